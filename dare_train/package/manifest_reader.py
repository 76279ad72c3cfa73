"""Manifests from strangers: what `docs/format.md` §2 asks of them is checked before anything is believed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, get_args

from ..config import Rescale, Rounding
from ..dtypes import DTYPES
from ..errors import PackageError
from ..reading.plain_files import content, is_text
from ..reading.structures import parsed_json, values_at_most
from ..weights.fingerprint import Fingerprint
from ..weights.protocol import LONGEST_NAME, MOST_DIMENSIONS, TensorInfo
from .codec import FETCH_AGAIN, Encoding
from .manifest import (
    BLANK,
    CARRIED,
    FORMAT_VERSION,
    MANIFEST,
    FileRecord,
    Kind,
    Manifest,
    TensorRecord,
    sealed,
)
from .masks import MaskKind

LARGEST_MANIFEST = 64 << 20
"""Bytes; about 200,000 tensors. Parsing takes some thirty times as much memory."""
MOST_VALUES = 6_000_000
"""Of its JSON; a tensor has some twenty-five."""

_ENCODINGS = tuple(name for name in get_args(Encoding) if name != "whole")
_HUGE = 1e300
_LONGEST_NAME = 255
_SUSPECT = "do not trust this package"


def load(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        PackageError: it is missing, damaged, of a later format, or says something impossible.
    """
    where = str(path)
    if not path.is_file():
        expected = f"a package with a {MANIFEST}"
        remedy = "it was never completed, or is something else"
        raise PackageError(str(path.parent), expected=expected, found="none", remedy=remedy)
    raw = content(path, at_most=LARGEST_MANIFEST, expected="a manifest", error=PackageError)
    values = values_at_most(raw)
    if values > MOST_VALUES:
        raise PackageError(where, expected=f"at most {MOST_VALUES:,} values", found=f"{values:,}")
    try:
        data = parsed_json(raw, keys_once=True)
    except (ValueError, RecursionError) as error:
        raise PackageError(where, expected="JSON", found=str(error), remedy=FETCH_AGAIN) from error
    if not isinstance(data, dict) or data.get("format") != "dare_train":
        expected = '"format": "dare_train"'
        remedy = "is this a dare_train package?"
        raise PackageError(where, expected=expected, found=_brief(data), remedy=remedy)
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        expected = f"format version {FORMAT_VERSION}"
        raise PackageError(where, expected=expected, found=_brief(version), remedy="update dare_train")
    _check_digest(where, raw, data.get("digest"))
    return _manifest(_Fields(data, where))


def _twice(names: Iterable[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _check_digest(where: str, raw: bytes, digest: object) -> None:
    if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise PackageError(where, expected="a digest of 64 digits", found=_brief(digest), remedy=FETCH_AGAIN)
    computed = hashlib.sha256(raw.replace(sealed(digest), sealed(BLANK), 1)).hexdigest()
    if computed != digest:
        expected = f"digest {digest[:12]}…"
        remedy = f"it was changed or damaged; {FETCH_AGAIN}"
        raise PackageError(where, expected=expected, found=f"{computed[:12]}…", remedy=remedy)


def _manifest(get: _Fields) -> Manifest:
    parent = get.fields("parent")
    manifest = Manifest(
        base_model=get("base_model", str),
        continues=parent.choice("continues", ("base", "package")),
        prefix=get("prefix", str),
        base_only=tuple(get.list_of("base_only", str)),
        seed=get.count("seed", below=1 << 64),
        rescale=get.choice("rescale", ("paper", "none", "carried")),
        landed=_landed(get.fields("landed")) if "landed" in get.data else None,
        tensors=tuple(_tensor(item, get.where) for item in get.list_of("tensors", dict)),
        delta={name: get.fields("delta").number(name) for name in ("p50", "p90", "p99", "max")},
        parts=tuple(_file(_Fields(item, get.where)) for item in get.list_of("parts", dict)),
        files=tuple(_companion(_Fields(item, get.where)) for item in get.list_of("files", dict)),
        written_by=get("written_by", str),
        digest=get("digest", str),
        run=get("run", str) if "run" in get.data else "",
    )
    carried = manifest.rescale == "carried"
    get.insist(manifest.landed is None or carried, "rescale carried where elements landed", manifest.rescale)
    for what, names in (
        ("tensor", [record.name for record in manifest.tensors]),
        ("file", [record.file for record in (*manifest.parts, *manifest.files)]),
    ):
        again = _twice(names)
        get.insist(again is None, f"each {what} once", f"{again} twice")
    for said, derived in (
        (parent("fingerprint", str), manifest.parent),
        (get("result", str), manifest.result),
    ):
        get.insist(said == derived, f"fingerprint {derived[:12]}…, as its tensors say", f"{said[:12]}…")
    return manifest


def _landed(get: _Fields) -> tuple[Rounding, Rescale]:
    return get.choice("rounding", get_args(Rounding)), get.choice("rescale", get_args(Rescale))


def _tensor(data: Mapping[str, Any], where: str) -> TensorRecord:
    name = _Fields(data, where)("name", str)
    names_one = 0 < len(name) <= LONGEST_NAME and name != "__metadata__" and is_text(name)
    _Fields(data, where).insist(names_one, "the name of a tensor", ascii(name)[:80])
    get = _Fields(data, f"{where}: {name}")
    info = _info(get)
    kind: Kind = get.choice("kind", get_args(Kind))
    base = Fingerprint.parse(data["base"], name=get.where) if "base" in data else None
    result = Fingerprint.parse(data["result"], name=get.where) if "result" in data else base
    if result is None or (base is None and kind != "whole"):
        expected = "fingerprints of base and result"
        raise PackageError(get.where, expected=expected, found="none", remedy=FETCH_AGAIN)
    get.insist(kind != "base" or result == base, "the base's own fingerprint as result", "another")
    get.insist(kind == "delta" or "base_rows" not in data, "base_rows in deltas only", f"kind {kind}")
    record = TensorRecord(name=name, info=info, kind=kind, base=base, result=result)
    return _as_delta(record, get) if kind == "delta" else record


def _info(get: _Fields) -> TensorInfo:
    shape = tuple(get.list_of("shape", int))
    few = len(shape) <= MOST_DIMENSIONS
    get.insist(few, f"a shape of at most {MOST_DIMENSIONS} dimensions", f"{len(shape):,}")
    dtype = DTYPES[get.choice("dtype", tuple(DTYPES))]
    nbytes = dtype.itemsize
    for size in shape:  # in this order, and also where one is 0: as the safetensors library counts
        plain = not isinstance(size, bool) and 0 <= size < 1 << 62
        nbytes *= size if plain else 0
        get.insist(plain and nbytes < 1 << 62, "a shape", _brief(list(shape)))
    return TensorInfo(dtype, shape)


def _as_delta(record: TensorRecord, get: _Fields) -> TensorRecord:
    """The record, with the fields that only a delta has."""
    info = record.info
    get.insist(info.dtype.can_be_delta, "a floating-point dtype of 16 bits or more", info.dtype.code)
    base_rows = None
    if "base_rows" in get.data:
        base_rows = get.count("base_rows", below=info.shape[0] if info.shape else 0)
    kept = get.count("kept", below=info.numel + 1)
    return replace(
        record,
        base_rows=base_rows,
        mask=get.choice("mask", get_args(MaskKind)),
        p=get.number("p", below=1.0),
        threshold=get.count("threshold", below=65536),
        values=get.choice("values", _ENCODINGS),
        kept=kept,
        changed=get.count("changed", below=kept + 1),
        delta=get.three_numbers("delta"),
    )


def _companion(get: _Fields) -> FileRecord:
    """A file that is copied into a result already verified: it must not be weights, code, or hidden."""
    record = _file(get)
    path = PurePosixPath(record.file)
    harmless = path.suffix in CARRIED and ".index." not in path.name and path.name != MANIFEST
    if not harmless or any(part.startswith(".") for part in path.parts):
        expected = f"configuration and tokenizer files ({', '.join(sorted(CARRIED))})"
        raise PackageError(get.where, expected=expected, found=repr(record.file), remedy=_SUSPECT)
    return record


def _file(get: _Fields) -> FileRecord:
    name = get("file", str)
    path = PurePosixPath(name)
    inside = bool(name) and not path.is_absolute() and ".." not in path.parts and name == path.as_posix()
    plain = not any(char in name for char in "\\\0") and is_text(name) and len(name) <= 1000
    if not inside or not plain or any(len(part.encode()) > _LONGEST_NAME for part in path.parts):
        expected = "names of files inside the package"
        raise PackageError(get.where, expected=expected, found=ascii(name)[:80], remedy=_SUSPECT)
    return FileRecord(file=name, bytes=get.count("bytes", below=1 << 62), sha256=get("sha256", str))


def _brief(value: object) -> str:
    """Plain values as they are; of containers only kind and size, since they can be as deep as the file."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    return ascii(value)[:80]


class _Fields:
    """Takes fields out of parsed JSON and insists on their types."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def __call__(self, key: str, kind: type | tuple[type, ...]) -> Any:
        value = self.data.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            self._refuse(key, value, "of another type")
        return value

    def insist(self, good: bool, expected: str, found: str) -> None:
        if not good:
            raise PackageError(self.where, expected=expected, found=found, remedy=FETCH_AGAIN)

    def fields(self, key: str) -> _Fields:
        return _Fields(self(key, dict), f"{self.where}: {key}")

    def choice(self, key: str, choices: tuple[str, ...]) -> Any:
        value = self.data.get(key)
        if not isinstance(value, str) or value not in choices:
            self._refuse(key, value, f"one of {', '.join(choices)}")
        return value

    def count(self, key: str, *, below: int) -> int:
        number: int = self(key, int)
        if not 0 <= number < below:
            self._refuse(key, number, f"a number in [0, {below})")
        return number

    def number(self, key: str, *, below: float = _HUGE) -> float:
        return self._number(key, self(key, (int, float)), below)

    def three_numbers(self, key: str) -> tuple[float, float, float]:
        items = self.list_of(key, (int, float))
        if len(items) != 3:
            self._refuse(key, items, "3 numbers")
        first, second, third = (self._number(key, item, _HUGE) for item in items)
        return first, second, third

    def list_of(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        items: list[Any] = self(key, list)
        if not all(isinstance(item, kind) for item in items):
            self._refuse(key, items, "a list of another type")
        return items

    def _number(self, key: str, value: float, below: float) -> float:
        if isinstance(value, bool):
            self._refuse(key, value, "of another type")
        if not 0 <= value < below:
            self._refuse(key, value, f"a number in [0, {below:g})")
        return float(value)

    def _refuse(self, key: str, value: object, expected: str) -> NoReturn:
        found = _brief(value)
        raise PackageError(self.where, expected=f"{key!r} to be {expected}", found=found, remedy=FETCH_AGAIN)
