"""`dare_config.json`: what a package says about itself. docs/format.md §2 specifies every field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import Rescale, Rounding
from ..weights.fingerprint import Fingerprint, model_fingerprint
from ..weights.protocol import TensorInfo
from .codec import Encoding
from .masks import Mask, MaskKind, key_of

MANIFEST = "dare_config.json"
FORMAT_VERSION = 1
CARRIED = frozenset(
    {".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".codes", ".bpe", ".vocab", ".tokenizer"}
)
"""Endings of the files that a package may bring beside its parts: configuration and tokenizers, no code."""
BLANK = "0" * 64
LANDED = ("rounding", "rescale")
"""What the manifest says of elements that landed on the base's grid."""
Kind = Literal["base", "delta", "whole"]


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
    def counts_changes(self) -> bool:
        """Whether segments say how many of their kept elements changed. Elsewhere all count as changed."""
        return self.values in ("exact", "rounded")

    @property
    def changes(self) -> bool:
        """Whether the result's tensor is not the base's, or may be another."""
        return self.kind == "whole" or (self.kind == "delta" and self.result != self.base)

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
    landed: tuple[Rounding, Rescale] | None = None
    """How elements landed on the base's grid, and the rescale γ that they had before; None where they did
    not."""
    tensors: tuple[TensorRecord, ...]
    delta: Mapping[str, float] = field(default_factory=dict)
    """|δ| over all kept elements: p50, p90, p99, max."""
    parts: tuple[FileRecord, ...] = ()
    files: tuple[FileRecord, ...] = ()
    """Configuration and tokenizer files that differ from the base's."""
    digest: str = field(default="", compare=False)
    """Of the file that it was read from."""
    written_by: str = ""
    run: str = ""
    """The training that wrote it, by a name that no other has; empty where none did."""

    @property
    def parent(self) -> str:
        """Fingerprint of the weights that the package is relative to: the base's that the result has too."""
        held = [record for record in self.tensors if record.base is not None]
        return model_fingerprint(
            (record.name, record.base_info.dtype.code, record.base_info.shape, record.base or Fingerprint())
            for record in held
        )

    @property
    def result(self) -> str:
        """Fingerprint of the weights after applying with weight 1."""
        return model_fingerprint(
            (record.name, record.info.dtype.code, record.info.shape, record.result) for record in self.tensors
        )

    @property
    def rescaled(self) -> str:
        """The rescale in words: also the one that elements had before they landed."""
        if self.landed is None:
            return self.rescale
        rounding, rescale = self.landed
        return f"{rescale}, then landed on the base's grid ({rounding})"

    def factor(self, record: TensorRecord) -> float:
        """The rescale γ of one tensor: 2¹⁶ / (2¹⁶ - threshold) for seeded masks under `paper`, else 1."""
        if self.rescale == "paper" and record.mask == "seeded":
            return 65536 / (65536 - record.threshold)
        return 1.0


def dump(manifest: Manifest) -> bytes:
    """The manifest's bytes: JSON, one line per tensor, sealed with a digest of itself."""
    head = {
        "format": "dare_train",
        "format_version": FORMAT_VERSION,
        "written_by": manifest.written_by,
        **({"run": manifest.run} if manifest.run else {}),
        "base_model": manifest.base_model,
        "parent": {"continues": manifest.continues, "fingerprint": manifest.parent},
        "result": manifest.result,
        "prefix": manifest.prefix,
        "seed": manifest.seed,
        "rescale": manifest.rescale,
        **({"landed": dict(zip(LANDED, manifest.landed, strict=True))} if manifest.landed else {}),
        "delta": dict(manifest.delta),
        "base_only": list(manifest.base_only),
        "files": [vars(record) for record in manifest.files],
        "parts": [vars(record) for record in manifest.parts],
        "digest": BLANK,
    }
    fields = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    records = [json.dumps(_tensor_json(record), separators=(",", ":")) for record in manifest.tensors]
    tensors = ",\n".join(records)
    blank = ("{\n" + fields + ',\n"tensors": [\n' + tensors + "\n]\n}\n").encode()
    return blank.replace(sealed(BLANK), sealed(hashlib.sha256(blank).hexdigest()), 1)


def sealed(digest: str) -> bytes:
    """The bytes around a digest, by which it is found."""
    return f'"digest": "{digest}"'.encode()


def _tensor_json(record: TensorRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": record.name,
        "dtype": record.info.dtype.code,
        "shape": list(record.info.shape),
        "kind": record.kind,
    }
    if record.base_rows is not None:
        fields["base_rows"] = record.base_rows
    if record.kind == "delta":
        fields |= {"mask": record.mask, "p": record.p, "threshold": record.threshold, "values": record.values}
        fields |= {"kept": record.kept, "changed": record.changed}
        fields["delta"] = [float(f"{magnitude:.3g}") for magnitude in record.delta]
    if record.base is not None:
        fields["base"] = record.base.hex
    if record.result != record.base:
        fields["result"] = record.result.hex
    return fields


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return _digest_by_blocks(file)


def _digest_by_blocks(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def file_record(path: Path, folder: Path) -> FileRecord:
    name = path.relative_to(folder).as_posix()
    return FileRecord(file=name, bytes=path.stat().st_size, sha256=sha256_of(path))
