"""The header of a safetensors file, held to what the format says: the rest of the file is tensors, one behind
another, each as long as its shape and dtype say.

The safetensors library checks the same, but through a map, and a file that is cut short under a map ends the
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ...dtypes import dtype_of
from ...errors import CheckpointError, brief
from ...reading.plain_files import FETCH_AGAIN, is_text
from ...reading.structures import json_of, values_at_most
from ..protocol import LONGEST_NAME, MOST_DIMENSIONS, TensorInfo
from .read_file import ReadFile

METADATA = "__metadata__"
"""What no tensor is called: safetensors keeps other things under this name."""
LARGEST_HEADER = 100_000_000
"""Bytes; what the safetensors library reads."""
MOST_VALUES = 2_000_000
"""Of its JSON: some 200,000 tensors."""
_EXPECTED = "a safetensors file"
_BEYOND = 1 << 64
"""What numbers are less than."""
_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git has left with its server."""


@dataclass(frozen=True, kw_only=True)
class Header:
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    """Of each tensor's first byte, from the beginning of the file."""


def header_of(file: ReadFile) -> Header:
    """The header of an open file.

    Raises:
        CheckpointError: it is no safetensors file, or its header goes beyond a limit.
    """
    raw = _text_of(file)
    values = values_at_most(raw)
    if values > MOST_VALUES:
        raise _no(file.path, f"a header of {values:,} values", f"a header of at most {MOST_VALUES:,} values")
    try:
        text = raw.decode()
    except UnicodeDecodeError as problem:
        raise _no(file.path, "a header that is no UTF-8") from problem
    fields: dict[str, Any] = json_of(text, where=str(file.path), expected=_EXPECTED, keys_once=True)
    metadata = _metadata(file.path, fields.pop(METADATA, None))
    placed = {name: _placed(file.path, name, entry) for name, entry in fields.items()}
    begin = 8 + len(raw)
    _check_places(file, begin, placed)
    return Header(
        metadata=metadata,
        tensors={name: info for name, (info, _) in placed.items()},
        offsets={name: begin + first for name, (_, (first, _)) in placed.items()},
    )


def _text_of(file: ReadFile) -> bytes:
    """The header's JSON."""
    start = bytes(file.read(0, min(file.size, len(_POINTER))))
    if start == _POINTER:
        remedy = "fetch the file itself: git lfs pull"
        raise CheckpointError(str(file.path), expected=_EXPECTED, found="a Git LFS pointer", remedy=remedy)
    size = int.from_bytes(start[:8], "little")
    if file.size < 8 or size > file.size - 8:
        raise _no(file.path, f"{file.size:,} bytes, without a whole header")
    if size > LARGEST_HEADER:
        raise _no(file.path, f"a header of {size:,} bytes", f"a header of at most {LARGEST_HEADER:,} bytes")
    return bytes(file.read(8, size))


def _metadata(path: Path, found: object) -> dict[str, str]:
    match found:
        case None:
            return {}
        case dict() if all(isinstance(text, str) and is_text(text) for text in chain(*found.items())):
            return found
    raise _no(path, f"{brief(found)} for {METADATA}", "texts by name")


def _placed(path: Path, name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    """A tensor, with its first byte and the one behind its last, from the header's end."""
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [first, end]} if all(
            type(number) is int and 0 <= number < _BEYOND for number in (*shape, first, end)
        ):
            info = _info(path, name, code, tuple(shape))
            if end - first != info.nbytes:
                raise _no(path, f"{end - first:,} bytes of {brief(name)}, {code} of shape {brief([*shape])}")
            return info, (first, end)
    raise _no(path, f"{brief(entry)} for {brief(name)}", "a tensor's dtype, shape and data_offsets")


def _info(path: Path, name: str, code: str, shape: tuple[int, ...]) -> TensorInfo:
    if not is_text(name):
        raise _no(path, f"half a character in {brief(name)}")
    if len(name) > LONGEST_NAME:
        expected = f"names of at most {LONGEST_NAME:,} characters"
        raise CheckpointError(f"{path}: {brief(name)}", expected=expected, found=f"one of {len(name):,}")
    if len(shape) > MOST_DIMENSIONS:
        expected = f"at most {MOST_DIMENSIONS} dimensions"
        raise CheckpointError(f"{path}: {name}", expected=expected, found=f"{len(shape):,}")
    return TensorInfo(dtype_of(code, tensor=f"{path.name}: {name}"), shape)


def _check_places(file: ReadFile, begin: int, placed: dict[str, tuple[TensorInfo, tuple[int, int]]]) -> None:
    """The tensors are all that there is, without holes, and none lies on another."""
    behind = 0
    for name, (_, (first, end)) in sorted(placed.items(), key=lambda item: item[1][1]):
        if first != behind:
            raise _no(file.path, f"{brief(name)} at {first:,} where {behind:,} is the next byte")
        behind = end
    if begin + behind != file.size:
        expected = f"{_EXPECTED} of {begin + behind:,} bytes, as its header says"
        raise _no(file.path, f"{file.size:,}", expected)


def _no(path: Path, found: str, expected: str = _EXPECTED) -> CheckpointError:
    return CheckpointError(str(path), expected=expected, found=found, remedy=FETCH_AGAIN)
