"""Packages: a delta on disk with its manifest, an ordinary Hub folder."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, DareError, PackageError
from ..parallel.threads import once, ordered_map
from ..weights.checkpoint import SafetensorsFile, locate
from .codec import FETCH_AGAIN
from .manifest import CARRIED, MANIFEST, FileRecord, Manifest, TensorRecord, sha256_of
from .manifest_reader import load
from .segment_table import check_table
from .segments import COLUMNS, Segment

if TYPE_CHECKING:
    from ..weights.protocol import Weights


_PATTERNS = ["*.safetensors", "README.md", *(f"*{suffix}" for suffix in sorted(CARRIED))]
"""Of the files of a package, in a repository of the Hub."""
"""What is fetched of a repository on the Hub."""


class DeltaPackage:
    """An opened package. Opening reads the manifest; frames are mapped when they are first asked for."""

    def __init__(self, path: Path, manifest: Manifest, *, name: str) -> None:
        self.path = path
        self.manifest = manifest
        self.name = name
        self.records = {record.name: record for record in manifest.tensors}

    @classmethod
    def open(cls, where: str | os.PathLike[str] | DeltaPackage) -> DeltaPackage:
        """Open a package folder or a Hub id.

        Raises:
            PackageError: there is no manifest, or it is damaged; a listed file is missing or of another size.
        """
        if isinstance(where, DeltaPackage):
            return where
        try:
            path = locate(where, patterns=_PATTERNS)
        except CheckpointError as error:
            expected = "a package folder or a Hub id"
            remedy = error.remedy
            raise PackageError(error.name, expected=expected, found=error.found, remedy=remedy) from error
        manifest = load(path / MANIFEST)
        for record in (*manifest.parts, *manifest.files):
            _check_size(path / record.file, record)
        return cls(path, manifest, name=str(where))

    @once
    def _frames(self) -> Mapping[str, list[tuple[Segment, memoryview]]]:
        by_tensor: dict[str, list[tuple[Segment, memoryview]]] = defaultdict(list)
        for part in self.manifest.parts:
            for segment, frame in _read_part(self.path / part.file, self.manifest):
                by_tensor[self.manifest.tensors[segment.tensor].name].append((segment, frame))
        for name, frames in by_tensor.items():
            frames.sort(key=lambda item: item[0].start)
            _check_apart([segment for segment, _ in frames], f"{self.name}: {name}")
        return dict(by_tensor)

    def frames(self, tensor: str, start: int, stop: int) -> Iterator[tuple[Segment, memoryview]]:
        """Segments of a tensor that meet [start, stop), each with its compressed frame, in order."""
        for segment, frame in self._frames.get(tensor, ()):
            if segment.start < stop and start < segment.stop:
                yield segment, frame

    def compressed_bytes(self, tensor: str) -> int:
        return sum(segment.size for segment, _ in self._frames.get(tensor, ()))

    @property
    def size(self) -> int:
        """Bytes of all the package's files on disk, the manifest and the card included.

        Raises:
            PackageError: it was removed since it was opened.
        """
        if not self.path.is_dir():
            raise PackageError(
                self.name, expected="a package", found="none: it was removed since it was opened"
            )
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    @property
    def stats(self) -> dict[str, Any]:
        """Sizes and counts by name, such as `bits_per_parameter`; under `delta`, percentiles of |δ|.

        `density` is measured: kept / elements, over the tensors stored as deltas.
        """
        tensors = self.manifest.tensors
        parameters = sum(record.info.numel for record in tensors)
        deltas = [record for record in tensors if record.kind == "delta"]
        covered = sum(record.base_info.numel for record in deltas)
        kept = sum(record.kept for record in deltas)
        return {
            "tensors": len(tensors),
            "parameters": parameters,
            "kept": kept,
            "changed": sum(record.changed for record in deltas),
            "density": kept / covered if covered else 0.0,
            "bytes": self.size,
            "model_bytes": sum(record.info.nbytes for record in tensors),
            "bits_per_parameter": 8 * self.size / parameters if parameters else 0.0,
            "compression_ratio": sum(record.info.nbytes for record in tensors) / self.size,
            "delta": dict(self.manifest.delta),
        }

    def verify(self, base: str | os.PathLike[str] | Weights | None = None) -> None:
        """The same as `dare_train.verify(package, base)`."""
        from .. import verify

        verify(self, base)

    def check_integrity(self) -> None:
        """Check the SHA-256 of every part and file, and the layout of the parts.

        Raises:
            PackageError: naming the first file that differs.
        """
        files = (*self.manifest.parts, *self.manifest.files)
        digests = ordered_map(lambda file: sha256_of(self.path / file.file), files)
        for file, digest in zip(files, digests, strict=True):
            if digest != file.sha256:
                where = str(self.path / file.file)
                expected = f"SHA-256 {file.sha256[:12]}…"
                raise PackageError(where, expected=expected, found=f"{digest[:12]}…", remedy=FETCH_AGAIN)
        for record in self.manifest.tensors:
            segments = [segment for segment, _ in self._frames.get(record.name, ())]
            _check_coverage(record, segments, f"{self.name}: {record.name}")

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the package as a model repository, without what else may lie in its folder; `options` go to
        `huggingface_hub.HfApi.upload_folder`. Returns its commit.
        """
        from huggingface_hub import HfApi

        self.check_integrity()
        api = HfApi(token=options.pop("token", None))
        api.create_repo(repo_id, exist_ok=True, private=options.pop("private", None))
        listed = [record.file for record in (*self.manifest.parts, *self.manifest.files)]
        own = [MANIFEST, "README.md", *map(glob.escape, listed)]
        options = {"allow_patterns": own, **options}
        return api.upload_folder(repo_id=repo_id, folder_path=self.path, **options)

    def __repr__(self) -> str:
        gone = "" if self.path.is_dir() else ", removed since it was opened"
        count = len(self.manifest.tensors)
        return f"DeltaPackage({self.name!r}, {count} tensors, on {self.manifest.base_model!r}{gone})"


@contextmanager
def checking(packages: Iterable[DeltaPackage]) -> Iterator[Callable[[], None]]:
    """`check_integrity` of packages beside what the block does, which gets a function that waits for it:
    nothing that the block leaves behind may come of bytes that were not checked. Where the block fails,
    damage that explains it is what is raised.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="dare-train") as pool:
        check = pool.submit(_check_all, packages)
        try:
            yield check.result
        except DareError:
            check.result()
            raise
        check.result()


def _check_all(packages: Iterable[DeltaPackage]) -> None:
    for package in packages:
        package.check_integrity()


def _check_size(path: Path, record: FileRecord) -> None:
    expected = f"{record.bytes} bytes"
    if not path.is_file():
        raise PackageError(str(path), expected=expected, found="no such file", remedy=FETCH_AGAIN)
    size = path.stat().st_size
    if size != record.bytes:
        raise PackageError(str(path), expected=expected, found=f"{size}", remedy=FETCH_AGAIN)


def _read_part(path: Path, manifest: Manifest) -> Iterator[tuple[Segment, memoryview]]:
    file = _open_part(path)
    table = file.read("segments", 0, file.tensors["segments"].numel).view(np.int64).reshape(-1, COLUMNS)
    data = file.bytes_of("data")
    check_table(table, manifest, len(data), str(path))
    offset = 0
    for row in table.tolist():
        segment = Segment.of(row)
        yield segment, data[offset : offset + segment.size]
        offset += segment.size
    if offset != len(data):
        expected = f"{offset} bytes of frames, as its table says"
        raise PackageError(str(path), expected=expected, found=f"{len(data)}", remedy=FETCH_AGAIN)


def _open_part(path: Path) -> SafetensorsFile:
    _check_header(path)
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        expected = error.expected
        raise PackageError(error.name, expected=expected, found=error.found, remedy=FETCH_AGAIN) from error
    shapes = {name: (info.dtype.code, len(info.shape)) for name, info in file.tensors.items()}
    if shapes != {"segments": ("I64", 2), "data": ("U8", 1)} or file.tensors["segments"].shape[1] != COLUMNS:
        layout = "segments I64 [n, 6] and data U8 [bytes]"
        raise PackageError(str(path), expected=layout, found=_listed(shapes), remedy=FETCH_AGAIN)
    return file


def _listed(shapes: Mapping[str, object]) -> str:
    return f"{list(shapes.items())[:3]}{' …' if len(shapes) > 3 else ''}"


def _check_header(path: Path) -> None:
    """Two tensors need some 200 bytes; parsing a header of megabytes would take hundreds of them."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > 1 << 16:
        expected = "a safetensors file with a header of at most 65,536 bytes"
        raise PackageError(str(path), expected=expected, found=f"{size:,}", remedy=FETCH_AGAIN)


def _check_apart(segments: Sequence[Segment], where: str) -> None:
    for before, after in zip(segments, segments[1:], strict=False):
        if before.stop > after.start:
            expected = "segments that do not overlap"
            raise PackageError(where, expected=expected, found=f"two at {after.start}", remedy=FETCH_AGAIN)


def _check_coverage(record: TensorRecord, segments: list[Segment], where: str) -> None:
    numel = record.info.numel
    base_numel = record.base_info.numel if record.kind == "delta" else 0
    inside = [segment for segment in segments if segment.start < base_numel]
    whole = sum(segment.length for segment in segments) - sum(segment.length for segment in inside)
    if record.kind != "base" and whole != numel - base_numel:
        expected = f"{numel - base_numel} elements carried whole"
        raise PackageError(where, expected=expected, found=f"{whole}", remedy=FETCH_AGAIN)
    if record.kind == "delta":
        kept = sum(segment.kept for segment in inside)
        covered = sum(segment.length for segment in inside)
        if not kept <= record.kept <= kept + base_numel - covered:
            expected = f"{record.kept} kept elements"
            raise PackageError(where, expected=expected, found=f"{kept}", remedy=FETCH_AGAIN)
        changed = sum(segment.changed for segment in inside)
        too_few = record.changed > changed
        if too_few or (record.counts_changes and record.changed < changed):
            expected = f"{record.changed} changed elements"
            raise PackageError(where, expected=expected, found=f"{changed}", remedy=FETCH_AGAIN)
