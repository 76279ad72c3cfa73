"""The header of a safetensors file, whose content the safetensors library checks: what it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...dtypes import dtype_of
from ...errors import CheckpointError, brief
from ...reading.plain_files import FETCH_AGAIN, reason
from ...reading.structures import json_of, values_at_most
from ..protocol import LONGEST_NAME, MOST_DIMENSIONS, TensorInfo
from .read_file import ReadFile

METADATA = "__metadata__"
"""What no tensor is called: safetensors keeps other things under this name."""
LARGEST_HEADER = 100_000_000
"""Bytes; what the safetensors library reads."""
MOST_VALUES = 2_000_000
"""Of its JSON: some 200,000 tensors."""


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
    path = file.path
    raw = _text_of(file)
    values = values_at_most(raw)
    if values > MOST_VALUES:
        expected = f"a header of at most {MOST_VALUES:,} values"
        raise CheckpointError(str(path), expected=expected, found=f"{values:,}", remedy=FETCH_AGAIN)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as problem:
        expected = "a safetensors file"
        found = reason(problem)
        raise CheckpointError(str(path), expected=expected, found=found, remedy=FETCH_AGAIN) from problem
    file.check_same()
    fields: dict[str, Any] = json_of(raw, where=str(path), expected="a safetensors file")
    metadata = fields.pop(METADATA, None) or {}
    tensors = {name: _info(path, name, entry) for name, entry in fields.items()}
    offsets = {name: 8 + len(raw) + entry["data_offsets"][0] for name, entry in fields.items()}
    return Header(metadata=metadata, tensors=tensors, offsets=offsets)


def _text_of(file: ReadFile) -> bytes:
    """The header's JSON; nothing where there is none, of which the safetensors library says why."""
    if file.size < 8:
        return b""
    size = int.from_bytes(file.read(0, 8), "little")
    return bytes(file.read(8, size)) if size <= min(file.size - 8, LARGEST_HEADER) else b""


def _info(path: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    shape = tuple(entry["shape"])
    if len(name) > LONGEST_NAME:
        expected = f"names of at most {LONGEST_NAME:,} characters"
        raise CheckpointError(f"{path}: {brief(name)}", expected=expected, found=f"one of {len(name):,}")
    if len(shape) > MOST_DIMENSIONS:
        expected = f"at most {MOST_DIMENSIONS} dimensions"
        raise CheckpointError(f"{path}: {name}", expected=expected, found=f"{len(shape):,}")
    return TensorInfo(dtype_of(entry["dtype"], tensor=f"{path.name}: {name}"), shape)
