"""Weights that lie in memory quantised: packed into fewer bits, in a layout of their library's.

Known: bitsandbytes (4 and 8 bit, whatever dtype stores the bits), torchao's tensors, block-wise fp8, mxfp4,
GPTQ, AWQ and what else keeps integers or scales where a weight would be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from .sharding import clean, is_dtensor

_LIBRARIES = ("bitsandbytes", "torchao")
_BITS = re.compile(r"4bit|8bit|FP4|NF4")
"""In names of modules: once FSDP has cut their weights, these no longer say what they are."""
_BESIDE_PACKED = {
    "qweight",
    "qzeros",
    "scales",
    "weight_scale",
    "weight_scale_inv",
    "weight_packed",
    "gate_up_proj_blocks",
    "gate_up_proj_scales",
    "gate_up_proj_scale_inv",
}
"""Names that quantised layers give to what they hold: the last part of a parameter's or a buffer's name."""


def packed_modules(module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """(name, how it is quantised) of the modules whose own weights are packed."""
    for name, part in module.named_modules():
        how = packing(part)
        if how is not None:
            yield clean(name), how


def is_packed_name(name: str) -> bool:
    """Whether only quantised layers have a tensor that is called so."""
    return name.rpartition(".")[2] in _BESIDE_PACKED


def packing(part: torch.nn.Module) -> str | None:
    """How a module's own weights are quantised, in words; None where they are not."""
    kind = type(part)
    if kind.__module__.startswith("bitsandbytes") and _BITS.search(kind.__name__):
        return f"a {kind.__name__} of bitsandbytes"
    own = {**part._parameters, **part._buffers}
    for name, tensor in own.items():
        if tensor is not None and (name in _BESIDE_PACKED or _is_packed(name, tensor)):
            return f"a {kind.__name__} with {_kind(tensor).__name__} {name}"
    return None


def _is_packed(name: str, tensor: torch.Tensor) -> bool:
    if _kind(tensor).__module__.startswith(_LIBRARIES):
        return True
    whole_numbers = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    return whole_numbers and name == "weight"


def _kind(tensor: torch.Tensor) -> type:
    """The class of a tensor, or of what a DTensor holds here."""
    local: Any = tensor
    if is_dtensor(tensor):
        local = local._local_tensor
    data = getattr(local, "data", local)
    return type(local) if type(local).__module__.startswith(_LIBRARIES) else type(data)
