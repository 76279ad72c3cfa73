"""`dare_config.json`: what a package says about itself. docs/format.md §2 specifies every field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .codec import Encoding
from .dtypes import DTYPES
from .errors import PackageError
from .fingerprint import Fingerprint, model_fingerprint
from .masks import Mask, MaskKind, key_of
from .weights import TensorInfo

MANIFEST = "dare_config.json"
FORMAT_VERSION = 1
LARGEST_MANIFEST = 256 << 20
_BLANK = "0" * 64
_REMEDY = "fetch the package again"

Kind = Literal["base", "delta", "whole"]
_KINDS = ("base", "delta", "whole")
_MASKS = ("all", "seeded", "stored")
_ENCODINGS = ("exact", "rounded", "int8", "int4", "sign")
_RESCALES = ("paper", "none", "carried")


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One tensor of the result."""

    name: str
    """Checkpoint name, as `save_pretrained` writes it."""
    info: TensorInfo
    """dtype and shape of the result."""
    kind: Kind
    """`base`: as in the base. `delta`: base plus delta. `whole`: carried as it is."""
    base_rows: int | None = None
    """Leading rows that the base has, where the base has fewer than the result: a resized embedding."""
    mask: MaskKind = "all"
    p: float = 0.0
    """Drop rate that was asked for."""
    threshold: int = 0
    """Drop rate that was used, times 2¹⁶."""
    values: Encoding = "exact"
    kept: int = 0
    """Elements that the mask keeps."""
    changed: int = 0
    """Kept elements whose delta is not zero."""
    base: Fingerprint | None = None
    """Of the base's tensor; None where the base has none."""
    result: Fingerprint = field(default_factory=Fingerprint)
    """Of the tensor after applying with weight 1."""
    delta: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Median, 99th percentile and maximum of |δ| over the kept elements, before rescaling."""

    @property
    def base_info(self) -> TensorInfo:
        """dtype and shape of the base's tensor."""
        shape = self.info.shape if self.base_rows is None else (self.base_rows, *self.info.shape[1:])
        return TensorInfo(self.info.dtype, shape)

    def mask_of(self, seed: int) -> Mask:
        return Mask(kind=self.mask, key=key_of(seed, self.name), threshold=self.threshold)


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    base_model: str
    """What the base was called when the package was made: a Hub id or a path. A hint, never trusted."""
    continues: Literal["base", "package"]
    """Whether `parent` is a base model's or another package's result."""
    prefix: str = ""
    """What the result's names have before the base's names."""
    base_only: tuple[str, ...] = ()
    """Tensors of the base that the result does not have."""
    seed: int
    rescale: Literal["paper", "none", "carried"]
    tensors: tuple[TensorRecord, ...]
    delta: Mapping[str, float] = field(default_factory=dict)
    """|δ| over all kept elements: p50, p90, p99, max."""
    parts: tuple[FileRecord, ...] = ()
    files: tuple[FileRecord, ...] = ()
    """Configuration and tokenizer files that differ from the base's."""
    written_by: str = ""

    @property
    def parent(self) -> str:
        """Fingerprint of the weights that the package is relative to: every base tensor with a counterpart in the result."""
        held = [record for record in self.tensors if record.base is not None]
        return model_fingerprint((r.name, r.base_info.dtype.code, r.base_info.shape, r.base or Fingerprint()) for r in held)

    @property
    def result(self) -> str:
        """Fingerprint of the weights after applying with weight 1."""
        return model_fingerprint((r.name, r.info.dtype.code, r.info.shape, r.result) for r in self.tensors)

    def factor(self, record: TensorRecord) -> float:
        """The rescale γ of one tensor: 2¹⁶ / (2¹⁶ - threshold) for seeded masks under `paper`, else 1."""
        return 65536 / (65536 - record.threshold) if self.rescale == "paper" and record.mask == "seeded" else 1.0


def dump(manifest: Manifest) -> bytes:
    """The manifest's bytes: JSON, one line per tensor, sealed with a digest of itself."""
    head = {
        "format": "dare_train",
        "format_version": FORMAT_VERSION,
        "written_by": manifest.written_by,
        "base_model": manifest.base_model,
        "parent": {"continues": manifest.continues, "fingerprint": manifest.parent},
        "result": manifest.result,
        "prefix": manifest.prefix,
        "seed": manifest.seed,
        "rescale": manifest.rescale,
        "delta": dict(manifest.delta),
        "base_only": list(manifest.base_only),
        "files": [vars(record) for record in manifest.files],
        "parts": [vars(record) for record in manifest.parts],
        "digest": _BLANK,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    tensors = ",\n".join(json.dumps(_tensor_json(record), separators=(",", ":")) for record in manifest.tensors)
    blank = ("{\n" + ",\n".join(lines) + ',\n"tensors": [\n' + tensors + "\n]\n}\n").encode()
    return blank.replace(_sealed(_BLANK), _sealed(hashlib.sha256(blank).hexdigest()), 1)


def _sealed(digest: str) -> bytes:
    return f'"digest": "{digest}"'.encode()


def _tensor_json(record: TensorRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": record.name, "dtype": record.info.dtype.code, "shape": list(record.info.shape), "kind": record.kind}
    if record.base_rows is not None:
        fields["base_rows"] = record.base_rows
    if record.kind == "delta":
        fields |= {"mask": record.mask, "p": record.p, "threshold": record.threshold, "values": record.values}
        fields |= {"kept": record.kept, "changed": record.changed, "delta": [float(f"{x:.3g}") for x in record.delta]}
    if record.base is not None:
        fields["base"] = record.base.hex
    if record.result != record.base:
        fields["result"] = record.result.hex
    return fields


def load(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        PackageError: it is missing, damaged, of a later format, or says something impossible.
    """
    if not path.exists():
        raise PackageError(
            str(path.parent), expected=f"a package with a {MANIFEST}", found="none", remedy="it was never completed, or is something else"
        )
    if path.stat().st_size > LARGEST_MANIFEST:
        raise PackageError(str(path), expected=f"at most {LARGEST_MANIFEST:,} bytes", found=f"{path.stat().st_size:,}")
    raw = path.read_bytes()
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise PackageError(str(path), expected="JSON", found=str(error), remedy=_REMEDY) from error
    if not isinstance(data, dict) or data.get("format") != "dare_train":
        raise PackageError(str(path), expected='"format": "dare_train"', found=repr(data)[:60], remedy="is this a dare_train package?")
    if data.get("format_version") != FORMAT_VERSION:
        raise PackageError(
            str(path), expected=f"format version {FORMAT_VERSION}", found=repr(data.get("format_version")), remedy="update dare_train"
        )
    _check_digest(path, raw, data.get("digest"))
    return _manifest(data, str(path))


def _check_digest(path: Path, raw: bytes, digest: object) -> None:
    if not isinstance(digest, str) or len(digest) != 64:
        raise PackageError(str(path), expected="a digest of 64 digits", found=repr(digest), remedy=_REMEDY)
    found = hashlib.sha256(raw.replace(_sealed(digest), _sealed(_BLANK), 1)).hexdigest()
    if found != digest:
        raise PackageError(
            str(path), expected=f"digest {digest[:12]}…", found=f"{found[:12]}…", remedy=f"it was changed or damaged; {_REMEDY}"
        )


def _manifest(data: Mapping[str, Any], where: str) -> Manifest:
    get = _Reader(data, where)
    parent = _Reader(get("parent", dict), f"{where}: parent")
    manifest = Manifest(
        base_model=get("base_model", str),
        continues=parent.choice("continues", ("base", "package")),
        prefix=get("prefix", str),
        base_only=tuple(get.list_of("base_only", str)),
        seed=get.count("seed", below=1 << 64),
        rescale=get.choice("rescale", _RESCALES),
        tensors=tuple(_tensor(item, where) for item in get.list_of("tensors", dict)),
        delta=get("delta", dict),
        parts=tuple(_file(item, where) for item in get.list_of("parts", dict)),
        files=tuple(_file(item, where) for item in get.list_of("files", dict)),
        written_by=get("written_by", str),
    )
    names = [record.name for record in manifest.tensors]
    if len(set(names)) != len(names):
        raise PackageError(where, expected="each tensor once", found="a name that appears twice", remedy=_REMEDY)
    for said, derived in ((parent("fingerprint", str), manifest.parent), (get("result", str), manifest.result)):
        if said != derived:
            raise PackageError(where, expected=f"fingerprint {derived[:12]}…, as its tensors say", found=f"{said[:12]}…", remedy=_REMEDY)
    return manifest


def _tensor(data: Mapping[str, Any], where: str) -> TensorRecord:
    name = _Reader(data, where)("name", str)
    get = _Reader(data, f"{where}: {name}")
    shape = tuple(get.list_of("shape", int))
    dtype = get.choice("dtype", tuple(DTYPES))
    kind: Kind = get.choice("kind", _KINDS)
    info = TensorInfo(DTYPES[dtype], shape)
    if any(size < 0 or isinstance(size, bool) for size in shape) or info.nbytes >= 1 << 62:
        raise PackageError(get.where, expected="a shape", found=repr(list(shape)), remedy=_REMEDY)
    base_rows = get.count("base_rows", below=shape[0] if shape else 0) if "base_rows" in data else None
    base = Fingerprint.parse(data["base"], name=get.where) if "base" in data else None
    result = Fingerprint.parse(data["result"], name=get.where) if "result" in data else base
    if result is None or (base is None and kind != "whole"):
        raise PackageError(get.where, expected="fingerprints of base and result", found="none", remedy=_REMEDY)
    common = dict(name=name, info=info, kind=kind, base_rows=base_rows, base=base, result=result)
    if kind != "delta":
        return TensorRecord(**common)
    if not info.dtype.can_be_delta:
        raise PackageError(get.where, expected="a floating-point dtype", found=dtype, remedy=_REMEDY)
    kept = get.count("kept", below=info.numel + 1)
    return TensorRecord(
        **common,
        mask=get.choice("mask", _MASKS),
        p=float(get("p", (int, float))),
        threshold=get.count("threshold", below=65536),
        values=get.choice("values", _ENCODINGS),
        kept=kept,
        changed=get.count("changed", below=kept + 1),
        delta=tuple(float(x) for x in get.list_of("delta", (int, float)))[:3],
    )


def _file(data: Mapping[str, Any], where: str) -> FileRecord:
    get = _Reader(data, where)
    name = get("file", str)
    plain = PurePosixPath(name)
    if not name or plain.is_absolute() or ".." in plain.parts or "\\" in name or "\0" in name or name != plain.as_posix():
        raise PackageError(where, expected="names of files inside the package", found=repr(name), remedy="do not trust this package")
    return FileRecord(file=name, bytes=get.count("bytes", below=1 << 62), sha256=get("sha256", str))


class _Reader:
    """Takes fields out of parsed JSON and insists on their types."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def __call__(self, key: str, kind: type | tuple[type, ...]) -> Any:
        return self._check(key, self.data.get(key), lambda value: isinstance(value, kind) and not isinstance(value, bool), "another type")

    def choice(self, key: str, choices: tuple[str, ...]) -> Any:
        return self._check(
            key, self.data.get(key), lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"
        )

    def count(self, key: str, *, below: int) -> int:
        value: int = self(key, int)
        return int(self._check(key, value, lambda number: 0 <= number < below, f"a number in [0, {below})"))

    def list_of(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        items = self(key, list)
        self._check(key, items, lambda values: all(isinstance(value, kind) for value in values), "a list of another type")
        return list(items)

    def _check(self, key: str, value: Any, good: Callable[[Any], bool], expected: str) -> Any:
        if not good(value):
            raise PackageError(self.where, expected=f"{key!r} to be {expected}", found=repr(value)[:80], remedy=_REMEDY)
        return value
