"""Which tensors of files are parts of one quantised weight: integers or 8-bit floats, and the scales without
which they mean nothing.

Libraries that quantise give these parts names of their own; a unit is what lies in one module, or belongs to
one of its stacked weights. What is not known, and has such integers all the same, counts as quantised, too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..derived_buffers import is_derived
from ..protocol import TensorInfo, Weights
from .config_file import config_beside

UNKNOWN = "a scheme that is not known here"

_PACKED_LEAVES = {
    "qweight": "weight",
    "weight_packed": "weight",
    "weight_quantized": "weight",
    "W_q": "weight",
    "_weight_qdata": "weight",
    "weight._data": "weight",
    "weight._packed": "weight",
    "weight.qdata": "weight",
}
"""What layers of GPTQ, AWQ, compressed-tensors, HQQ, torchao and quanto call the integers of theirs,
and the name that the weight had."""
_SCALE_WORDS = re.compile(
    r"scale|zero|absmax|quant|scb\b|codebook|centroid|lut|g_idx|_shape\b|min|max|blocks|packed|nested|state",
    re.IGNORECASE,
)
"""In names of what lies beside integers."""
_NOT_OF_A_UNIT = ("bias", "lora_A", "lora_B")
_METHODS = {
    "fp8": "fp8 with scales",
    "fbgemm_fp8": "fp8 with scales",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "mxfp4",
    "bitsandbytes": "bitsandbytes",
}
"""By `quant_method` of a configuration; others go by their own name."""
NO_SCALES = "fp8 without scales"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A weight, and the tensors that it is made of in files."""

    weight: str
    """Its name in full precision."""
    packed: str
    """The tensor with its integers or 8-bit floats."""
    parts: frozenset[str]
    """All of them, the packed one too."""
    scheme: str

    @cached_property
    def beside(self) -> frozenset[str]:
        """The parts but the packed one."""
        return self.parts - {self.packed}


class Quantised:
    """The units of some weights; none, and false, where nothing is quantised."""

    def __init__(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None) -> None:
        self._tensors = tensors
        said = (config or {}).get("quantization_config")
        self.said: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
        """What the configuration says of how they are quantised."""
        self.units = tuple(units_of(tensors, config or {}))

    @classmethod
    def of(cls, weights: Weights) -> Quantised:
        """Of weights, and the configuration beside them."""
        return cls(weights.tensors, config_beside(weights))

    def __bool__(self) -> bool:
        return bool(self.units)

    @cached_property
    def unit_of(self) -> Mapping[str, Unit]:
        """The unit that a tensor is a part of, by its name."""
        return {part: unit for unit in self.units for part in unit.parts}

    @property
    def schemes(self) -> frozenset[str]:
        """Those of the units, in words."""
        return frozenset(unit.scheme for unit in self.units)

    @property
    def layout(self) -> frozenset[tuple[frozenset[str], str]]:
        """Equal for weights that are quantised in the same places in the same way."""
        return frozenset((unit.parts, self._tensors[unit.packed].dtype.code) for unit in self.units)

    def __str__(self) -> str:
        first = self.units[0]
        others = sorted(name.removeprefix(first.packed.rpartition(".")[0] + ".") for name in first.beside)
        beside = f" with {', '.join(others[:3])}" if others else ""
        more = f", {len(self.units)} such" if len(self.units) > 1 else ""
        return f"{first.scheme} ({self._tensors[first.packed].dtype.code} {first.packed}{beside}{more})"


def units_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[Unit]:
    """Every quantised weight among tensors, by names and dtypes and by what a configuration says."""
    said = config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    by_module: defaultdict[str, list[str]] = defaultdict(list)
    for name in tensors:
        by_module[_module(name)].append(name)
    for module, names in by_module.items():
        taken: set[str] = set()
        for packed in sorted(names, key=lambda name: (not _certain(name, module), name)):
            if packed in taken:
                continue
            weight = _weight_of(packed, module, tensors, names, said=method is not None)
            if weight is None:
                continue
            parts = {packed, *_beside(weight, module, names)} - taken
            taken |= parts
            yield Unit(
                weight=weight,
                packed=packed,
                parts=frozenset(parts),
                scheme=_scheme(packed, parts, tensors, method),
            )


def _module(name: str) -> str:
    """Where a tensor lies: before `.weight.absmax` as before `.weight`."""
    before, inner, _ = name.partition(".weight.")
    return before if inner else name.rpartition(".")[0]


def _leaf(name: str, module: str) -> str:
    return name[len(module) + 1 :] if module else name


def _certain(name: str, module: str) -> bool:
    return _leaf(name, module) in _PACKED_LEAVES


def _weight_of(
    name: str, module: str, tensors: Mapping[str, TensorInfo], beside: list[str], *, said: bool
) -> str | None:
    """The weight that a tensor has the integers of; None where it has none."""
    info = tensors[name]
    buffer = info.dtype.code == "BOOL" or not info.shape or is_derived(name, info.shape)
    leaf = _leaf(name, module)
    if leaf == "weight" and any(other.startswith(_marks_of(name)) for other in beside):
        return name  # whatever its dtype is: bitsandbytes packs bits into that of a model, for FSDP
    if info.dtype.can_be_delta or buffer:
        return None
    within = f"{module}." if module else ""
    if leaf in _PACKED_LEAVES:
        return f"{within}{_PACKED_LEAVES[leaf]}"
    if leaf.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        return name.removesuffix("_blocks")
    is_matrix = len(info.shape) > 1 and not _is_index(leaf)
    if leaf == "weight":
        alone = info.dtype.is_float and not said and _beside(name, module, beside) == {name}
        return None if alone and not is_matrix else name
    has_scales = any(
        re.match(rf"{re.escape(name)}[._]", other) and _SCALE_WORDS.search(other[len(name) :])
        for other in beside
    )
    if has_scales:
        return name
    if is_matrix and info.dtype.itemsize < 8 and _is_layer(name, module, tensors, beside):
        return f"{within}weight"
    if said and not is_matrix and not info.dtype.is_float and f"{within}weight" not in tensors:
        return None if _is_index(leaf) else f"{within}weight"  # such as SpQR's, which lie in rows of numbers
    return name if is_matrix and (said or info.dtype.is_float) else None


def _marks_of(weight: str) -> tuple[str, str]:
    """How tensors are called that only a quantised weight has."""
    return f"{weight}.quant_state.", f"{weight}_scale_inv"


def _is_layer(name: str, module: str, tensors: Mapping[str, TensorInfo], beside: list[str]) -> bool:
    """Whether integers may be the weight of the layer that they lie in: floating-point tensors lie beside
    them, and none that is its weight.
    """
    floats = {_leaf(other, module) for other in beside if tensors[other].dtype.can_be_delta} - {
        *_NOT_OF_A_UNIT
    }
    return bool(floats) and "weight" not in floats and _leaf(name, module) not in _NOT_OF_A_UNIT


def _is_index(leaf: str) -> bool:
    """Whether integers are places, as those of positions are."""
    return leaf.endswith(("_ids", "_index", "_idx", "indices_buffer", "mask", "batches_tracked"))


def _beside(weight: str, module: str, names: list[str]) -> set[str]:
    """The other parts of a weight's unit."""
    within = f"{module}." if module else ""
    if weight == f"{within}weight":  # a quantised layer holds nothing else but a bias
        return {
            name
            for name in names
            if _leaf(name, module).partition(".")[0] not in _NOT_OF_A_UNIT
            and not _leaf(name, module).endswith("bias")
        }
    return {
        name for name in names if re.match(rf"{re.escape(weight)}[._]", name) and not name.endswith("bias")
    }


def _scheme(packed: str, parts: set[str], tensors: Mapping[str, TensorInfo], method: object) -> str:
    """In words."""
    leaves = {part.rpartition(".")[2] for part in parts}
    code = tensors[packed].dtype.code
    if any(part.endswith(".weight.absmax") for part in parts):
        return "bitsandbytes 4-bit"
    if "SCB" in leaves:
        return "bitsandbytes 8-bit"
    if packed.endswith("_blocks"):
        return "mxfp4"
    if "_weight_qdata" in leaves:
        return "torchao"
    if method is not None:
        return _METHODS.get(str(method), str(method))
    if "g_idx" in leaves:
        return "GPTQ"
    if "qweight" in leaves:
        return "GPTQ or AWQ"
    if "weight_packed" in leaves:
        return "compressed-tensors"
    if code.startswith("F8_E"):
        return "fp8 with scales" if any("scale" in leaf for leaf in leaves) else NO_SCALES
    return UNKNOWN
