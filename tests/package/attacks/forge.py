"""Packages that lie. A good one is taken apart, one thing in it is changed, and it is sealed again:
everything but the lie is right.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load_file, save_file

from dare_train import apply
from dare_train.errors import DareError, PackageError

MANIFEST = "dare_config.json"
PART = "dare_delta.safetensors"
BLANK = "0" * 64


class Forgery:
    """A package in pieces: `manifest` as JSON, `rows` of the segment table, the compressed `frames`."""

    def __init__(self, good: Path, folder: Path) -> None:
        shutil.copytree(good, folder)
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        part = load_file(folder / PART)
        self.rows = [[int(number) for number in row] for row in part["segments"]]
        self.frames = list(_split(part["data"].tobytes(), [row[5] for row in self.rows]))

    def tensor(self, name: str) -> dict[str, Any]:
        return next(tensor for tensor in self.manifest["tensors"] if tensor["name"] == name)

    def index(self, name: str) -> int:
        return self.manifest["tensors"].index(self.tensor(name))

    def segment(self, name: str, number: int = 0) -> int:
        """Place in `rows` of a tensor's segment."""
        return [place for place, row in enumerate(self.rows) if row[0] == self.index(name)][number]

    def set_frame(self, name: str, frame: bytes) -> None:
        place = self.segment(name)
        self.frames[place], self.rows[place][5] = frame, len(frame)

    def content(self, name: str) -> bytes:
        return zstandard.ZstdDecompressor().decompress(self.frames[self.segment(name)])

    def write_part(self, tensors: dict[str, np.ndarray] | None = None, raw: bytes | None = None) -> None:
        """Put the part on disk, with whatever it now holds, and record its size and SHA-256 truthfully."""
        table = np.array(self.rows, np.int64).reshape(-1, 6)
        data = np.frombuffer(b"".join(self.frames), np.uint8)
        if raw is None:
            save_file({"segments": table, "data": data} if tensors is None else tensors, self.folder / PART)
        else:
            (self.folder / PART).write_bytes(raw)
        self.manifest["parts"] = [truth(self.folder / PART)]

    def write_manifest(self, *, derive: bool = True) -> None:
        """Put the manifest on disk under a digest that fits; with `derive`, under fingerprints that fit its
        tensors, too.
        """
        if derive:
            self.manifest["parent"]["fingerprint"] = parent_of(self.manifest)
            self.manifest["result"] = result_of(self.manifest)
        (self.folder / MANIFEST).write_bytes(sealed(self.manifest))

    def seal(self) -> Path:
        self.write_part()
        self.write_manifest()
        return self.folder


def _split(data: bytes, sizes: list[int]) -> list[bytes]:
    ends = np.cumsum(sizes).tolist()
    return [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def sealed(manifest: dict[str, Any]) -> bytes:
    blank = json.dumps({"digest": BLANK} | manifest | {"digest": BLANK}).encode()
    return blank.replace(BLANK.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def truth(path: Path, name: str | None = None) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "file": path.name if name is None else name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def parent_of(manifest: dict[str, Any]) -> str:
    """docs/format.md 3.3, written a second time."""
    held = [tensor for tensor in manifest["tensors"] if "base" in tensor]
    return _named(
        (t, [t["base_rows"], *t["shape"][1:]] if "base_rows" in t else t["shape"], t["base"]) for t in held
    )


def result_of(manifest: dict[str, Any]) -> str:
    return _named(
        (tensor, tensor["shape"], tensor.get("result", tensor.get("base"))) for tensor in manifest["tensors"]
    )


def _named(tensors: Any) -> str:
    lines = [
        f"{t['name']}\0{t['dtype']}\0{','.join(str(int(size)) for size in shape)}\0{print_}\n"
        for t, shape, print_ in tensors
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def compressed(content: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(content)


def refused(package: Path, base: Path, *texts: str, kind: type[DareError] = PackageError) -> DareError:
    """Apply the package: it must be refused in one helpful line, and nothing may be left where the result was
    to be.
    """
    place = package.parent / "results"
    place.mkdir()
    with pytest.raises(DareError) as caught:
        apply(base, package, place / "out")
    assert list(place.iterdir()) == []
    return checked(caught.value, *texts, kind=kind)


def checked(error: DareError, *texts: str, kind: type[DareError] = PackageError) -> DareError:
    message = str(error)
    assert type(error) is kind, message
    assert "\n" not in message, message
    assert len(message) < 1000, f"{len(message)} characters: {message[:200]}"
    assert error.expected is not None, message
    assert error.found is not None, message
    for text in texts:
        assert text in message, f"{text!r} is not in: {message}"
    return error
