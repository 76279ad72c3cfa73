"""Changes to files: of bytes, of the structure in JSON, of a part's table and frames. Each is a tuple of
plain values, so that an input can be written down, made again and made smaller.

    ("bit", file, place, bit)               one bit of a file flipped
    ("cut", file, place)                    the file ends there
    ("put", file, place, text, times)       bytes put in
    ("u64", file, place, number)            eight bytes in place of others
    ("kind", file, kind)                    something else in its place: a pipe, a folder, a link, nothing
    ("set", file, place, value)             a value of the file's JSON replaced
    ("drop", file, place)                   ... taken out
    ("name", file, place, text)             ... its key replaced
    ("again", file, place, times)           ... repeated in its list
    ("swap", file, place, other)            ... exchanged for another
    ("at", file, keys, value)               what is at a path of keys replaced by a value
    ("row", row, column, number)            a number of the segment table
    ("frame", row, place, bit)              a bit of a frame
    ("recompress", row, place, bit)         a bit of a frame's content

A place is any number: of those that there are, it is taken modulo. JSON is that of a manifest, an index, a
configuration, or of a safetensors file's header. A link leads to a file beside the folder, `OUTSIDE`, and
nothing is written through it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Change = tuple[Any, ...]
Parent = tuple[Any, Any]

OUTSIDE = "outside"
"""What a link leads to."""
HALF = "\ud800"


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


VALUES: dict[str, Any] = {
    "none": None, "yes": True, "zero": 0, "minus": -1, "one": 1, "2^31": 1 << 31, "2^53": 1 << 53,
    "2^61": 1 << 61, "2^63": 1 << 63, "2^64": 1 << 64, "10^400": 10**400, "half": 0.5, "1e308": 1e308,
    "nan": float("nan"), "infinity": float("inf"), "empty": "", "square": "²", "digits": "1" * 5000,
    "half char": HALF,
    "[/x]": "[/x]",
    "escape": "\x1b[2J\x07", "turned": "a\u202eb", "line": "a\nb", "nul": "a\0b", "parts": "a." * 3000,
    "up": "../x", "root": "/proc/version", "home": "~nosuchuser/x", "long": "x" * 300, "dollars": "$x_{$",
    "list": [], "object": {}, "deep": deep(200), "wide": [1 << 61] * 70, "pairs": {"a": {"b": ["c"]}},
    "print": "0" * 32, "digest": "f" * 64, "F64": "F64", "BF16": "BF16", "delta": "delta", "whole": "whole",
    "base": "base", "stored": "stored", "seeded": "seeded", "all": "all", "exact": "exact", "int4": "int4",
    "sign": "sign", "rounded": "rounded", "pattern": r"((\w+\.?)+)+\!", "set": "[", "bracket": "(",
}  # fmt: skip
"""By names, of which inputs are made: values that something may stumble over."""


def apply_changes(folder: Path, changes: list[Change]) -> None:
    """Change the files in a folder; what cannot be done to them, since others have come before, is left."""
    for kind, file, *details in changes:
        path = folder / str(file)
        if kind == "kind":
            _replace(path, details[0], folder.absolute().parent / OUTSIDE)
        elif path.is_symlink():
            continue
        elif kind in _ON_BYTES and path.is_file():
            path.write_bytes(_ON_BYTES[kind](path.read_bytes(), *details))
        elif kind in _ON_JSON and path.is_file():
            _change_json(path, _ON_JSON[kind], details)
        elif kind == "at":
            _set_at(path, *details)


def _bit(raw: bytes, place: int, bit: int) -> bytes:
    place %= max(len(raw), 1)
    return raw[:place] + bytes([raw[place] ^ 1 << bit % 8]) + raw[place + 1 :] if raw else raw


def _cut(raw: bytes, place: int) -> bytes:
    return raw[: place % (len(raw) + 1)]


def _put(raw: bytes, place: int, text: str, times: int) -> bytes:
    place %= len(raw) + 1
    return raw[:place] + text.encode("utf-8", "surrogatepass") * times + raw[place:]


def _u64(raw: bytes, place: int, number: int) -> bytes:
    place = 8 * (place % (len(raw) // 8 + 1))
    return raw[:place] + (number % (1 << 64)).to_bytes(8, "little") + raw[place + 8 :]


_ON_BYTES: dict[str, Any] = {"bit": _bit, "cut": _cut, "put": _put, "u64": _u64}


def _replace(path: Path, kind: str, outside: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "round":
        path.symlink_to(path.name)
    elif kind == "empty":
        path.touch()


def _places(value: Any, parent: Parent | None = None) -> Iterator[Parent]:
    """Every value in a structure, as the container and the key or index that it has there."""
    if parent is not None:
        yield parent
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:200]:
        yield from _places(inner, (value, key))


def _set(place: Parent, value: str, _: list[Parent]) -> None:
    place[0][place[1]] = VALUES[value]


def _drop(place: Parent, *_: Any) -> None:
    del place[0][place[1]]


def _name(place: Parent, text: str, _: list[Parent]) -> None:
    container, key = place
    if isinstance(container, dict):
        items = [(str(VALUES[text]) if name == key else name, value) for name, value in container.items()]
        container.clear()
        container.update(items)


def _again(place: Parent, times: int, _: list[Parent]) -> None:
    container, key = place
    if isinstance(container, list):
        container[key:key] = [container[key]] * (times % 1000)
    else:
        container.update({f"{key}{number}": container[key] for number in range(times % 1000)})


def _swap(place: Parent, other: int, places: list[Parent]) -> None:
    there = places[other % len(places)]
    place[0][place[1]] = json.loads(json.dumps(there[0][there[1]]))


def _set_at(path: Path, keys: list[Any], value: Any) -> None:
    _write_json(path, lambda whole: _at(whole[""], keys, value))


def _at(structure: Any, keys: list[Any], value: Any) -> None:
    for key in keys[:-1]:
        structure = structure[key]
    structure[keys[-1]] = value


_ON_JSON: dict[str, Any] = {"set": _set, "drop": _drop, "name": _name, "again": _again, "swap": _swap}


def _change_json(path: Path, change: Any, details: list[Any]) -> None:
    def changed(whole: dict[str, Any]) -> None:
        places = list(_places(whole))[1:] or list(_places(whole))
        place, *others = details
        change(places[place % len(places)], *(others or [None]), places)

    _write_json(path, changed)


def _write_json(path: Path, change: Any) -> None:
    """Change the structure in a file, which is the value of "" in what `change` is given."""
    raw = path.read_bytes()
    of_tensors = path.suffix == ".safetensors"
    size = int.from_bytes(raw[:8], "little") if of_tensors else len(raw)
    text = raw[8 : 8 + size] if of_tensors else raw
    try:
        structure = json.loads(text)
    except (ValueError, RecursionError):
        return
    whole = {"": structure}
    change(whole)
    written = json.dumps(whole.get("")).encode()
    if of_tensors:
        written += b" " * (-len(written) % 8)
        written = len(written).to_bytes(8, "little") + written + raw[8 + size :]
    path.write_bytes(written)
