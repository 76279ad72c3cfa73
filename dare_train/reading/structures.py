"""JSON from strangers as a structure of a given type, or one error that names the file and the field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar, cast

from ..errors import CheckpointError, DareError, brief, printable
from .plain_files import FETCH_AGAIN, content, reason

LARGEST = 64 << 20
"""Bytes of a JSON file; four times the largest index and twice the largest tokenizer there are."""
MOST_VALUES = 4_000_000
"""Of a JSON text: the largest tokenizers have half as many. Each takes at most some 250 bytes of memory."""
_MAY_BE_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_HALF_A_CHARACTER = "half a character in a text"

_Structure = TypeVar("_Structure")


def json_in(
    path: Path,
    kind: type[_Structure] | Any = dict[str, Any],
    *,
    expected: str = "a JSON object",
    error: type[DareError] = CheckpointError,
    remedy: str = FETCH_AGAIN,
    at_most: int = LARGEST,
) -> Any:
    """What a JSON file holds, of the type `kind`, such as `dict[str, str]` or a `msgspec.Struct`.

    Raises:
        error: it cannot be read, is no JSON, too large, or of another type; named are the path and the field.
    """
    raw = content(path, at_most=at_most, expected=expected, error=error, remedy=remedy)
    return json_of(raw, kind, where=str(path), expected=expected, error=error, remedy=remedy)


def json_of(
    raw: bytes | str,
    kind: type[_Structure] | Any = dict[str, Any],
    *,
    where: str,
    expected: str = "a JSON object",
    error: type[DareError] = CheckpointError,
    remedy: str = FETCH_AGAIN,
    keys_once: bool = False,
) -> Any:
    """`json_in` of a text that was read; errors call it `where`.

    Args:
        keys_once: an object that has a key twice is refused; else the last counts.
    """
    values = values_at_most(raw)
    if values > MOST_VALUES:
        raise error(where, expected=f"at most {MOST_VALUES:,} values", found=f"{values:,}", remedy=remedy)
    try:
        parsed = parsed_json(raw, keys_once=keys_once)
    except (ValueError, RecursionError) as problem:
        raise error(where, expected=expected, found=_flaw(problem), remedy=remedy) from problem
    return checked(parsed, kind, where=where, expected=expected, error=error, remedy=remedy)


def parsed_json(raw: bytes | str, *, keys_once: bool = False) -> Any:
    """The value of a JSON text, in which every text can be written as UTF-8.

    Raises:
        ValueError, RecursionError: it is none, has half a character somewhere, or is nested too deep; with
            `keys_once`, an object has a key twice.
    """
    text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    value = json.loads(text, object_pairs_hook=_with_keys_once if keys_once else None)
    if "\\u" in text and _MAY_BE_HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as problem:
            raise ValueError(_HALF_A_CHARACTER) from problem
    return value


def _with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"{key!a} given twice")
        fields[key] = value
    return fields


def checked(
    value: object,
    kind: type[_Structure] | Any,
    *,
    where: str,
    expected: str = "a JSON object",
    error: type[DareError] = CheckpointError,
    remedy: str = FETCH_AGAIN,
) -> Any:
    """A value that was parsed, as `kind`.

    Raises:
        error: it is something else; named are `where` and the field.
    """
    if kind == dict[str, Any]:
        if isinstance(value, dict):
            return value
        raise error(where, expected=expected, found=brief(value), remedy=remedy)
    import msgspec

    try:
        return msgspec.convert(value, kind)
    except UnicodeEncodeError as problem:
        raise error(where, expected=expected, found=_HALF_A_CHARACTER, remedy=remedy) from problem
    except msgspec.ValidationError as problem:
        field, needed, found = _told(str(problem))
        name = f"{where}: {field}" if field else where
        raise error(name, expected=needed if field else expected, found=found, remedy=remedy) from problem


def values_at_most(raw: bytes | str) -> int:
    """A bound of how many values a JSON text has, without parsing it."""
    marks: tuple[Any, ...] = (b",", b"[", b"{") if isinstance(raw, bytes) else (",", "[", "{")
    return 1 + sum(int(cast("Any", raw).count(mark)) for mark in marks)


def _flaw(problem: Exception) -> str:
    return "values nested too deep" if isinstance(problem, RecursionError) else reason(problem)


def _told(message: str) -> tuple[str, str, str]:
    """The field, what was expected and what was found, of msgspec's sentence."""
    sentence, _, path = message.partition(" - at ")
    field = printable(path.replace("`", "").replace("$.", "").replace("$", ""), 100)
    match = re.fullmatch(r"Expected (.*), got (.*)", sentence)
    if match is None:
        return field, "what this kind of file holds", printable(sentence.replace("`", ""), 200)
    needed, found = (text.replace("`", "") for text in match.groups())
    return field, needed, found
