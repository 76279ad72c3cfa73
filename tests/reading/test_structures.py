"""JSON from strangers: a structure, or one error that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare_train.errors import CheckpointError, PackageError
from dare_train.reading.structures import MOST_VALUES, json_in, json_of, values_at_most


class Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


def test_structures(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text('{"weight_map": {"a": "b"}, "other": [NaN, Infinity]}')
    assert json_in(path, Index) == Index(weight_map={"a": "b"})
    assert [*json_in(path)] == ["weight_map", "other"]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("[1", dict[str, Any], "x: expected a JSON object, found Expecting"),
        ("[1]", dict[str, Any], r"x: expected a JSON object, found \[1\]"),
        ("7", dict[str, int], "x: expected a JSON object, found int"),
        ("[" * 10**5, dict[str, Any], "x: expected a JSON object, found values nested too deep"),
        ("1" * 5000, dict[str, Any], "x: expected a JSON object, found Exceeds the limit"),
        ('{"weight_map": {"a": 1}}', Index, r"x: weight_map\[\.\.\.\]: expected str, found int"),
        ("{}", Index, "x: expected a JSON object, found .*missing required field"),
        ('{"weight_map": []}', Index, "x: weight_map: expected object, found array"),
        (r'{"weight_map": {}, "\ud800": 1}', Index, "x: expected a JSON object, found half a character"),
        ("[" + "[]," * MOST_VALUES, Index, "x: expected at most 4,000,000 values, found 8,000,002"),
    ],
    ids=range(10),
)
def test_what_is_no_such_structure_is_one_error(text: str, kind: Any, message: str) -> None:
    with pytest.raises(PackageError, match=message) as caught:
        json_of(text, kind, where="x", error=PackageError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("raw", [b"\xff", b"\xff\xfe{\x00}\x00\x00", b"", b"\xef\xbb\xbf{"])
def test_bytes_that_are_no_text(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(CheckpointError, match="x: expected a JSON object, found"):
        json_in(tmp_path / "x")


@pytest.mark.parametrize("text", [r'{"a": ["\ud83d"]}', r'{"\uDC00": 1}', r'{"a": "\ud83d \ude00"}'])
def test_half_a_character_is_refused_wherever_it_is(tmp_path: Path, text: str) -> None:
    """It cannot be written into a file, nor be part of a name."""
    (tmp_path / "x").write_text(text)
    with pytest.raises(CheckpointError, match="x: expected a JSON object, found half a character in a text"):
        json_in(tmp_path / "x")


def test_characters_in_two_escapes_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + rb'{"\ud83d\ude00": "\\ud800 \u00e9"}')
    assert json_in(tmp_path / "x") == {"😀": r"\ud800 é"}


@given(
    st.recursive(
        st.none() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_values_are_counted_before_they_are_made(value: Any) -> None:
    def count(value: Any) -> int:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + sum(map(count, inside))

    raw = msgspec.json.encode(value)
    assert count(value) <= values_at_most(raw) == values_at_most(raw.decode())
