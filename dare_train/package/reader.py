"""Packages: a delta on disk with its manifest, an ordinary Hub folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DareError, PackageError
from ..parallel.threads import once, ordered_map
from .codec import FETCH_AGAIN
from .fetching import fetched
from .manifest import MANIFEST, FileRecord, Manifest, sha256_of
from .manifest_reader import load
from .part import Part
from .segment_index import SegmentIndex
from .segments import Segment

if TYPE_CHECKING:
    from ..weights.protocol import Weights


class DeltaPackage:
    """An opened package. Opening reads the manifest; parts are opened when they are first asked for, and stay
    so.
    """

    def __init__(self, path: Path, manifest: Manifest, *, name: str) -> None:
        self.path = path
        self.manifest = manifest
        self.name = name
        self.records = {record.name: record for record in manifest.tensors}

    @classmethod
    def open(cls, where: str | os.PathLike[str] | DeltaPackage) -> DeltaPackage:
        """Open a package folder, or one on the Hub: `user/repo`, `user/repo@revision`, or, of several in a
        repository, `hf://user/repo/folder`; without a folder, the package `final` is meant.

        Raises:
            PackageError: there is no manifest, or it is damaged; a listed file is missing or of another size.
        """
        if isinstance(where, DeltaPackage):
            return where
        path = fetched(where)
        try:
            manifest = load(path / MANIFEST)
        except OSError as error:
            found = os.strerror(error.errno or 0)
            raise PackageError(str(path / MANIFEST), expected="a manifest", found=found) from error
        for record in (*manifest.parts, *manifest.files):
            _check_size(path / record.file, record)
        return cls(path, manifest, name=str(where))

    @property
    def paths(self) -> list[Path]:
        """The folder, and the listed files, which may lie in folders below it."""
        return [
            self.path,
            *(self.path / record.file for record in (*self.manifest.parts, *self.manifest.files)),
        ]

    @once
    def _parts(self) -> Mapping[str, Part]:
        """By file: each is opened once, and what is hashed is what is read."""
        return {record.file: _opened(self.path / record.file, record) for record in self.manifest.parts}

    @once
    def _segments(self) -> SegmentIndex:
        return SegmentIndex([*self._parts.values()], self.manifest, self.name)

    def segments(self, tensor: str, start: int, stop: int) -> Iterator[Segment]:
        """Segments of a tensor that meet [start, stop), in order."""
        for place in self._segments.meeting(tensor, start, stop):
            yield place.segment

    def frames(self, tensor: str, start: int, stop: int) -> Iterator[tuple[Segment, memoryview]]:
        """The same, each with its compressed frame."""
        for segment, part, offset in self._segments.meeting(tensor, start, stop):
            yield segment, part.frame(offset, segment.size)

    def compressed_bytes(self, tensor: str) -> int:
        return self._segments.size(tensor)

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
        parts = self._parts
        files = (*self.manifest.parts, *self.manifest.files)

        def digest_of(file: FileRecord) -> str:
            return parts[file.file].sha256() if file.file in parts else sha256_of(self.path / file.file)

        for file, digest in zip(files, ordered_map(digest_of, files), strict=True):
            check_digest(self.path / file.file, file, digest)
        self.check_segments()

    def check_segments(self) -> None:
        """Check the layout of the parts.

        Raises:
            PackageError: naming the first tensor whose segments are not what the manifest says.
        """
        for record in self.manifest.tensors:
            self._segments.check_coverage(record)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """The same as `dare_train.push([package], repo_id, **options)`."""
        from .. import push

        return push([self], repo_id, **options)

    def __repr__(self) -> str:
        gone = "" if self.path.is_dir() else ", removed since it was opened"
        count = len(self.manifest.tensors)
        return f"DeltaPackage({self.name!r}, {count} tensors, on {self.manifest.base_model!r}{gone})"


def read_back(folder: Path) -> None:
    """Open a package that was written just now as its receivers will: the manifest, sizes, and every
    segment's place. What the manifest says of the files' content was worked out from the files.

    Raises:
        PackageError: it would be refused.
    """
    DeltaPackage.open(folder).check_segments()


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


def _opened(path: Path, record: FileRecord) -> Part:
    """A part; where it is none, damage that explains it is what is raised."""
    try:
        return Part(path)
    except PackageError:
        check_digest(path, record, sha256_of(path))
        raise


def check_digest(path: Path, record: FileRecord, digest: str) -> None:
    """
    Raises:
        PackageError: a file's SHA-256 is not the one in the manifest.
    """
    if digest != record.sha256:
        expected = f"SHA-256 {record.sha256[:12]}…"
        raise PackageError(str(path), expected=expected, found=f"{digest[:12]}…", remedy=FETCH_AGAIN)


def _check_size(path: Path, record: FileRecord) -> None:
    expected = f"{record.bytes} bytes"
    if not path.is_file():
        raise PackageError(str(path), expected=expected, found="no such file", remedy=FETCH_AGAIN)
    size = path.stat().st_size
    if size != record.bytes:
        raise PackageError(str(path), expected=expected, found=f"{size}", remedy=FETCH_AGAIN)
