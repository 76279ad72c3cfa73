"""Headers of safetensors files: ours says what the library that everybody uses says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from dare_train.dtypes import DTYPES
from dare_train.errors import CheckpointError
from dare_train.weights.files.headers import header_of
from dare_train.weights.files.read_file import ReadFile

GOOD = save(
    {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.zeros((0, 2), np.int8),
        "c": np.ones((), np.uint8),
    },
    metadata={"format": "np"},
)
SIZE = int.from_bytes(GOOD[:8], "little")
HEADER: dict[str, Any] = json.loads(GOOD[8 : 8 + SIZE])
DATA = GOOD[8 + SIZE :]

_VALUES = st.sampled_from(
    [0, 1, 2, 3, 24, 25, -1, 1.0, 0.5, True, None, "F32", "U8", "", [], [0], [2, 3], [0, 24], [24, 25],
     [24, 24], [25, 24], [1 << 64, 1], [1 << 63] * 3, [2, [3]], 1 << 64, {}, {"x": "y"}, {"x": 1},
     {"x": None}]
)  # fmt: skip
_NAMES = st.sampled_from(["a", "b", "c", "d", "", "__metadata__", "é"])
_FIELDS = st.sampled_from(["dtype", "shape", "data_offsets", "more"])


def file_of(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def ours(raw: bytes, folder: Path) -> dict[str, Any] | None:
    """Tensors by name; None where the file is refused."""
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    try:
        header = header_of(ReadFile(path))
    except CheckpointError:
        return None
    return {
        name: (info.dtype.code, [*info.shape], raw[header.offsets[name] :][: info.nbytes])
        for name, info in header.tensors.items()
    }


def theirs(raw: bytes) -> dict[str, Any] | None:
    try:
        tensors = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None
    return {name: (found["dtype"], [*found["shape"]], bytes(found["data"])) for name, found in tensors}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


def test_a_good_one(folder: Path) -> None:
    found = ours(GOOD, folder)
    assert found == theirs(GOOD)
    assert found is not None
    assert found["a"] == ("F32", [2, 3], np.arange(6, dtype="<f4").tobytes())


@given(changes=st.lists(st.tuples(_NAMES, _FIELDS | st.none(), _VALUES), min_size=1, max_size=3))
def test_changed_fields(folder: Path, changes: list[tuple[str, str | None, Any]]) -> None:
    header = json.loads(json.dumps(HEADER))
    for name, field, value in changes:
        entry = header.get(name)
        if field and isinstance(entry, dict):
            entry[field] = value
        else:
            header[name] = value
    raw = file_of(header)
    assert ours(raw, folder) == theirs(raw)


@given(place=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7), more=st.integers(-len(GOOD), 9))
def test_changed_bits_and_lengths(folder: Path, place: int, bit: int, more: int) -> None:
    raw = bytearray(GOOD)
    raw[place] ^= 1 << bit
    for changed in (bytes(raw), GOOD[:more] if more < 0 else GOOD + bytes(more)):
        assert ours(changed, folder) == theirs(changed)


@given(
    places=st.lists(st.tuples(_NAMES, st.integers(0, 25), st.integers(0, 25)), max_size=4),
)
def test_tensors_laid_anywhere(folder: Path, places: list[tuple[str, int, int]]) -> None:
    header = {
        name: {"dtype": "U8", "shape": [max(end - first, 0)], "data_offsets": [first, end]}
        for name, first, end in places
        if name != "__metadata__"
    }
    raw = file_of(header)
    assert ours(raw, folder) == theirs(raw)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{}", b"[]", b"null", b" {}", b"{} ", b"{}\0", b"\xef\xbb\xbf{}", b"{", b"{}{}", b'{"a":NaN}',
        b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"a":"\\ud800"}}', b'{"__metadata__":null}',
        b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"b"}}',
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[00],"data_offsets":[0,0]}}', b"[" * 5000, b'{"a":' * 5000,
    ],
)  # fmt: skip
def test_texts(folder: Path, text: bytes) -> None:
    raw = file_of(text, b"")
    assert ours(raw, folder) == theirs(raw)


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_dtypes(folder: Path, code: str) -> None:
    count = DTYPES[code].itemsize
    raw = file_of({"a": {"dtype": code, "shape": [3], "data_offsets": [0, 3 * count]}}, bytes(3 * count))
    found = ours(raw, folder)
    assert found == theirs(raw)
    assert found == {"a": (code, [3], bytes(3 * count))}


def test_a_name_twice_is_refused(folder: Path) -> None:
    """The library takes the last; nobody knows which is meant."""
    entry = '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    path = folder / "twice.safetensors"
    path.write_bytes(file_of(f"{{{entry},{entry}}}".encode(), b""))
    with pytest.raises(CheckpointError, match="expected a safetensors file, found 'a' given twice"):
        header_of(ReadFile(path))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (GOOD[:-1], f"safetensors file of {SIZE + 33} bytes, as its header says, found {SIZE + 32}"),
        (GOOD[:20], "expected a safetensors file, found 20 bytes, without a whole header"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "expected a safetensors file, found a Git LFS pointer; fetch the file itself: git lfs pull",
        ),
        (
            file_of({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}, bytes(12)),
            "found 12 bytes of 'a', F32 of shape [2, 2]",
        ),
        (
            file_of({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, bytes(3)),
            "found 'a' at 1 where 0 is the next byte",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(folder: Path, raw: bytes, message: str) -> None:
    path = folder / "wrong.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        header_of(ReadFile(path))
    assert str(caught.value).removesuffix("; fetch it again").endswith(message)
