"""Packages that were changed, sealed again: every digest and fingerprint of sets is right, so that a reader
has to find what is wrong by itself.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from changes import Change
from format_reader import fingerprint_of_set

MANIFEST = "dare_config.json"
PART = "dare_delta.safetensors"
BLANK = "0" * 64


def change_part(folder: Path, changes: list[Change]) -> None:
    """Change the segment table and the frames of a package."""
    if not changes:
        return
    raw = (folder / PART).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    places = {name: header[name]["data_offsets"] for name in ("segments", "data")}
    content = raw[8 + size :]
    table = np.frombuffer(content[slice(*places["segments"])], np.int64).reshape(-1, 6).copy()
    data, ends = content[slice(*places["data"])], np.cumsum(table[:, 5])
    frames = [bytearray(data[end - count : end]) for end, count in zip(ends, table[:, 5], strict=True)]
    for kind, row, *details in changes:
        row %= len(frames)
        if kind == "row":
            column, number = details
            table[row, column % 6] = np.int64(number)
        elif kind == "frame":
            frames[row] = _flipped(frames[row], *details)
        else:
            with suppress(zstandard.ZstdError):  # an earlier change has damaged the frame
                content_of = bytearray(zstandard.ZstdDecompressor().decompress(bytes(frames[row])))
                frames[row] = bytearray(zstandard.compress(bytes(_flipped(content_of, *details))))
        if kind != "row":
            table[row, 5] = len(frames[row])
    _write_part(folder / PART, table, b"".join(map(bytes, frames)))


def _flipped(content: bytearray, place: int, bit: int) -> bytearray:
    if content:
        content[place % len(content)] ^= 1 << bit % 8
    return content


def _write_part(path: Path, table: np.ndarray, data: bytes) -> None:
    rows = table.astype("<i8").tobytes()
    header = {
        "segments": {"dtype": "I64", "shape": list(table.shape), "data_offsets": [0, len(rows)]},
        "data": {"dtype": "U8", "shape": [len(data)], "data_offsets": [len(rows), len(rows) + len(data)]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + rows + data)


def reseal(folder: Path) -> None:
    """Make sizes, digests and fingerprints of sets right, as far as the manifest still says what they are."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        return
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(manifest, dict):
        with suppress(OSError, LookupError, TypeError, AttributeError, ValueError):
            _derive(folder, manifest)
        manifest.pop("digest", None)
        blank = json.dumps({"digest": BLANK} | manifest).encode()
        path.write_bytes(blank.replace(BLANK.encode(), hashlib.sha256(blank).hexdigest().encode(), 1))


def _derive(folder: Path, manifest: dict[str, Any]) -> None:
    _record_files(folder, manifest)
    tensors = manifest["tensors"]
    held = [tensor for tensor in tensors if "base" in tensor]
    manifest["parent"]["fingerprint"] = fingerprint_of_set([_row(each, "base") for each in held])
    manifest["result"] = fingerprint_of_set([_row(each, "result") for each in tensors])


def _record_files(folder: Path, manifest: dict[str, Any]) -> None:
    for record in (*manifest["parts"], *manifest["files"]):
        path = folder / record["file"]
        if not path.is_file():
            raise FileNotFoundError(path)
        raw = path.read_bytes()
        record.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def _row(tensor: dict[str, Any], which: str) -> tuple[str, str, list[int], Any]:
    shape = tensor["shape"]
    if which == "base" and "base_rows" in tensor:
        shape = [tensor["base_rows"], *shape[1:]]
    print_ = tensor["base"] if which == "base" else tensor.get("result", tensor.get("base"))
    return tensor["name"], tensor["dtype"], shape, print_
