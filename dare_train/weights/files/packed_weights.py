"""Weights whose integers lie several in a word: how each scheme packs them, and what they stand for.

    bitsandbytes 4-bit     w = c[q] · a, of 16 values c, a for each block; a itself may be c'[q'] · a' + m
    GPTQ                   w = s · (q - z), with s and z for each group of inputs and output
    AWQ                    the same, in another order
    compressed-tensors     w = s · q, s for each output, or each group of its inputs

What these formulas do not say decides nothing here: another order or kind of scale is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DTYPES, DType, Words
from ...errors import CheckpointError, brief
from ...reading.structures import json_of
from ..protocol import TensorInfo
from .quantised import Unit

Float = NDArray[np.float32]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LARGEST_STATE = 1 << 16
_ROWS = 256
"""Of words that are unpacked at a time."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight outputs lies in a word."""


class Files(Protocol):
    """The files that weights are read from."""

    @property
    def dtype(self) -> DType:
        """The model's."""

    @property
    def said(self) -> Mapping[str, Any]:
        """What its configuration says of how it is quantised."""

    def info(self, name: str) -> TensorInfo: ...

    def part(self, name: str, start: int, count: int) -> Float:
        """Elements of a tensor of the files, in float32."""

    def words(self, name: str, start: int, count: int) -> Words:
        """The same as they lie there."""


class Matrices(NamedTuple):
    """A weight in full precision: its matrices, one on the other."""

    shape: tuple[int, ...]
    dtype: DType
    read: Callable[[int], Float]


Formula = Callable[[Unit, Any], Matrices]


def packed_formula(unit: Unit, tensors: Mapping[str, TensorInfo], said: Mapping[str, Any]) -> Formula | None:
    """That of a unit with packed integers; None where it has none that is known here."""
    known = _KNOWN.get(unit.scheme)
    return known(unit, tensors, said) if known is not None else None


# bitsandbytes, 4 bits


def _known_4_bits(unit: Unit, tensors: Mapping[str, TensorInfo], said: Mapping[str, Any]) -> Formula | None:
    parts = {f"{unit.weight}.absmax", f"{unit.weight}.quant_map"}
    states = {f"{unit.weight}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")} & unit.parts
    nested = {f"{unit.weight}.nested_{name}" for name in ("absmax", "quant_map")}
    rest = unit.parts - parts - states - {unit.packed}
    whole = unit.packed == unit.weight and len(states) == 1 and parts <= unit.parts
    return _of_4_bits if whole and rest in (set(), nested) else None


def _of_4_bits(unit: Unit, of: Files) -> Matrices:
    (name,) = (part for part in unit.parts if ".quant_state." in part)
    state = _state_of(name, of)
    shape, block = tuple(state["shape"]), state["blocksize"]
    count = prod(shape)
    packed, scales = of.info(unit.packed), of.info(f"{unit.weight}.absmax")
    values = of.info(f"{unit.weight}.quant_map")
    if (
        packed.nbytes != -(-count // 2)
        or scales.numel != -(-count // block)
        or (values.dtype.code, values.numel) != ("F32", 16)
    ):
        raise unfitting(unit.weight, packed, scales)
    scale = _nested(unit, of, state) if "nested_offset" in state else _plain_scale(unit, of)

    def read(_: int) -> Float:
        words = of.words(unit.packed, 0, packed.numel).view(np.uint8)
        codes = np.stack([words >> 4, words & 15], -1).reshape(-1)[:count]
        wide = np.repeat(scale(), block)[:count]
        return (of.part(f"{unit.weight}.quant_map", 0, 16)[codes] * wide).reshape(shape)

    return Matrices(shape, DTYPES[_DTYPES[state["dtype"]]], read)


def _state_of(name: str, of: Files) -> dict[str, Any]:
    info = of.info(name)
    expected = "shape, blocksize and dtype of a weight, as JSON"
    if info.dtype.code != "U8" or info.numel > _LARGEST_STATE:
        raise CheckpointError(name, expected=expected, found=str(info))
    text = of.words(name, 0, info.numel).tobytes()
    state: dict[str, Any] = json_of(text, where=name, expected=expected)
    shape = state.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and size > 0 for size in shape)
        and state.get("blocksize") in _BLOCKS
        and str(state.get("dtype")) in _DTYPES
    ):
        raise CheckpointError(name, expected=expected, found=brief(state))
    return state


def _plain_scale(unit: Unit, of: Files) -> Callable[[], Float]:
    name = f"{unit.weight}.absmax"
    info = of.info(name)
    if not info.dtype.is_float:
        raise CheckpointError(name, expected="floating-point numbers", found=str(info))
    return lambda: of.part(name, 0, info.numel)


def _nested(unit: Unit, of: Files, state: Mapping[str, Any]) -> Callable[[], Float]:
    """Scales that are quantised themselves, in blocks, about their mean."""
    names = [f"{unit.weight}.{name}" for name in ("absmax", "nested_absmax", "nested_quant_map")]
    if not {*names} <= unit.parts:
        raise CheckpointError(unit.weight, expected="nested scales", found="none of them")
    packed, scales, values = (of.info(name) for name in names)
    block, mean = state.get("nested_blocksize"), state["nested_offset"]
    if (
        block not in _BLOCKS
        or type(mean) is not float
        or packed.dtype.code != "U8"
        or scales.numel != -(-packed.numel // block)
        or (values.dtype.code, values.numel) != ("F32", 256)
    ):
        raise unfitting(names[0], packed, scales)

    def read() -> Float:
        codes = of.words(names[0], 0, packed.numel).view(np.uint8)
        wide = np.repeat(of.part(names[1], 0, scales.numel), block)[: packed.numel]
        return of.part(names[2], 0, 256)[codes] * wide + np.float32(mean)

    return read


# GPTQ and AWQ


def _known_gptq(unit: Unit, tensors: Mapping[str, TensorInfo], said: Mapping[str, Any]) -> Formula | None:
    leaves = {part.rpartition(".")[2] for part in unit.parts}
    known = said.get("bits") in (2, 4, 8) and said.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
    fits = leaves in ({"qweight", "qzeros", "scales", "g_idx"}, {"qweight", "qzeros", "scales"})
    return _gptq if known and fits and _are_words(unit, tensors) else None


def _known_awq(unit: Unit, tensors: Mapping[str, TensorInfo], said: Mapping[str, Any]) -> Formula | None:
    leaves = {part.rpartition(".")[2] for part in unit.parts}
    version = str(said.get("version", said.get("checkpoint_format", "gemm"))).lower()
    known = said.get("bits", said.get("w_bit")) == 4 and version == "gemm"
    return _awq if known and leaves == {"qweight", "qzeros", "scales"} and _are_words(unit, tensors) else None


def _are_words(unit: Unit, tensors: Mapping[str, TensorInfo]) -> bool:
    module, leaf_of_packed = unit.packed.removesuffix("qweight"), unit.packed.rpartition(".")[2]
    if leaf_of_packed != "qweight":  # it has no integers, and another of the parts has
        return False
    infos = [tensors[f"{module}{leaf}"] for leaf in ("qweight", "qzeros", "scales")]
    *words, scales = infos
    matrices = all(len(info.shape) == 2 for info in infos)
    return matrices and scales.dtype.can_be_delta and all(info.dtype.code == "I32" for info in words)


def _gptq(unit: Unit, of: Files) -> Matrices:
    """Integers lie in words along the inputs, zeros along the outputs; those of the first format are one too
    small.
    """
    module, bits = unit.packed.removesuffix("qweight"), int(of.said["bits"])
    in_word = 32 // bits
    packed, scales = of.info(unit.packed), of.info(f"{module}scales")
    rows, outputs = packed.shape
    inputs, groups = rows * in_word, scales.shape[0]
    before = int(of.said.get("checkpoint_format", "gptq") == "gptq")
    if scales.shape[1] != outputs or of.info(f"{module}qzeros").shape != (groups, -(-outputs // in_word)):
        raise unfitting(unit.weight, packed, scales)
    group_of = _groups(unit, of, module, inputs, groups)

    def zeros_of_groups() -> NDArray[np.int32]:
        return unpacked(_words_of(of, f"{module}qzeros"), bits)[:, :outputs].astype(np.int32)

    if before and (zeros_of_groups() == (1 << bits) - 1).any():
        found = f"{(1 << bits) - 1}, to which 1 is added"
        raise CheckpointError(f"{module}qzeros", expected="zeros that GPTQ's readers agree on", found=found)

    def read(_: int) -> Float:
        words, zeros = _words_of(of, unit.packed), zeros_of_groups()
        scale = of.part(f"{module}scales", 0, groups * outputs).reshape(groups, outputs)
        full = np.empty((inputs, outputs), np.float32)
        for row in range(0, rows, _ROWS):
            values = unpacked(words[row : row + _ROWS].T, bits).T.astype(np.int32)
            part = slice(row * in_word, row * in_word + len(values))
            full[part] = (values - zeros[group_of[part]] - before) * scale[group_of[part]]
        return full.T

    return Matrices((outputs, inputs), of.dtype, read)


def _groups(unit: Unit, of: Files, module: str, inputs: int, groups: int) -> NDArray[np.int64]:
    """The group of each input."""
    name = f"{module}g_idx"
    if name not in unit.parts:
        if not groups or inputs % groups:
            raise CheckpointError(unit.weight, expected=f"groups of {inputs} inputs", found=str(groups))
        return np.arange(inputs) // (inputs // groups)
    info = of.info(name)
    if info.dtype.code != "I32" or info.shape != (inputs,):
        raise CheckpointError(name, expected=f"the group of each of {inputs} inputs", found=str(info))
    found = of.words(name, 0, inputs).view("<i4").astype(np.int64)
    if ((found < 0) | (found >= groups)).any():
        raise CheckpointError(
            name, expected=f"groups 0 to {groups - 1}", found=f"{found.min()} to {found.max()}"
        )
    return found


def _awq(unit: Unit, of: Files) -> Matrices:
    """Integers and zeros lie in words along the outputs, in an order of their own."""
    module = unit.packed.removesuffix("qweight")
    packed, scales = of.info(unit.packed), of.info(f"{module}scales")
    inputs, groups = packed.shape[0], scales.shape[0]
    outputs = packed.shape[1] * 8
    fits = scales.shape[1] == outputs and of.info(f"{module}qzeros").shape == (groups, packed.shape[1])
    if not fits or not groups or inputs % groups:
        raise unfitting(unit.weight, packed, scales)
    group_of = np.arange(inputs) // (inputs // groups)

    def read(_: int) -> Float:
        words = _words_of(of, unit.packed)
        zeros = _in_order(_words_of(of, f"{module}qzeros"))
        scale = of.part(f"{module}scales", 0, groups * outputs).reshape(groups, outputs)
        full = np.empty((inputs, outputs), np.float32)
        for row in range(0, inputs, _ROWS):
            part = group_of[row : row + _ROWS]
            full[row : row + _ROWS] = (_in_order(words[row : row + _ROWS]) - zeros[part]) * scale[part]
        return full.T

    return Matrices((outputs, inputs), of.dtype, read)


def _in_order(words: NDArray[np.uint32]) -> NDArray[np.int32]:
    """AWQ's integers of each row."""
    found = unpacked(words, 4).reshape(len(words), -1, 8)[..., _AWQ_ORDER]
    return found.reshape(len(words), -1).astype(np.int32)


# compressed-tensors


def _known_rows(unit: Unit, tensors: Mapping[str, TensorInfo], said: Mapping[str, Any]) -> Formula | None:
    module = unit.packed.removesuffix("weight_packed")
    names = {f"{module}weight_{leaf}" for leaf in ("packed", "scale", "shape")}
    packed = tensors[unit.packed]
    fits = unit.parts == names and packed.dtype.code == "I32" and len(packed.shape) == 2
    return _rows if fits and _bits_of(said) else None


def _bits_of(said: Mapping[str, Any]) -> int | None:
    """Of integers about 0, where all layers have as many; None where a configuration says otherwise."""
    groups = said.get("config_groups")
    if said.get("format") != "pack-quantized" or not isinstance(groups, Mapping):
        return None
    known = {_bits_in(group) for group in groups.values()}
    return known.pop() if len(known) == 1 else None


def _bits_in(group: Any) -> int | None:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or group.get("format") not in (None, "pack-quantized"):
        return None
    plain = weights.get("type", "int") == "int" and weights.get("symmetric", True) is True
    by = weights.get("strategy") in ("group", "channel", "tensor")
    bits = weights.get("num_bits")
    return int(bits) if plain and by and bits in (4, 8) else None


def _rows(unit: Unit, of: Files) -> Matrices:
    """Integers lie in words along the inputs, from the smallest one on."""
    module, bits = unit.packed.removesuffix("weight_packed"), _bits_of(of.said)
    assert bits is not None, "only where it is known"
    packed, scales, said = (of.info(f"{module}weight_{leaf}") for leaf in ("packed", "scale", "shape"))
    if said.dtype.code not in ("I32", "I64") or said.numel != 2:
        raise CheckpointError(f"{module}weight_shape", expected="two integers", found=str(said))
    signed = f"<i{said.dtype.itemsize}"
    outputs, inputs = (int(size) for size in of.words(f"{module}weight_shape", 0, 2).view(signed))
    groups = scales.shape[1] if len(scales.shape) == 2 else 0
    whole = scales.numel == 1
    if packed.shape != (outputs, -(-inputs * bits // 32)) or not (
        whole or (scales.shape[0] == outputs and groups and inputs % groups == 0)
    ):
        raise unfitting(unit.weight, packed, scales)

    def read(_: int) -> Float:
        words = _words_of(of, unit.packed)
        scale = of.part(f"{module}weight_scale", 0, scales.numel).reshape(-1, 1 if whole else groups)
        full = np.empty((outputs, inputs), np.float32)
        for row in range(0, outputs, _ROWS):
            values = unpacked(words[row : row + _ROWS], bits)[:, :inputs].astype(np.int32) - (1 << bits - 1)
            own = scale if whole else np.repeat(scale[row : row + _ROWS], inputs // groups, 1)
            full[row : row + _ROWS] = values * own
        return full

    return Matrices((outputs, inputs), of.dtype, read)


_KNOWN: dict[str, Callable[[Unit, Mapping[str, TensorInfo], Mapping[str, Any]], Formula | None]] = {
    "bitsandbytes 4-bit": _known_4_bits,
    "GPTQ": _known_gptq,
    "AWQ": _known_awq,
    "compressed-tensors": _known_rows,
}


def unpacked(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """The integers in each row of words [rows, n], the lowest bits first: [rows, n · 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    found: NDArray[np.uint32] = (words[..., None] >> shifts & np.uint32((1 << bits) - 1)).reshape(
        len(words), -1
    )
    return found


def _words_of(of: Files, name: str) -> NDArray[np.uint32]:
    """A matrix of words."""
    info = of.info(name)
    return of.words(name, 0, info.numel).view("<u4").reshape(info.shape)


def unfitting(name: str, packed: TensorInfo, scales: TensorInfo) -> CheckpointError:
    return CheckpointError(name, expected=f"scales that fit {packed}", found=str(scales))
