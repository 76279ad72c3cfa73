"""Quantised checkpoints read in full precision, where that is a formula; in the bits of transformers.

    fp8                    w = q · s, a scale for each block, row or tensor; fp8 without scales: q
    int8, also torchao's   w = (q - z) · s; without zeros: q · s
    mxfp4                  w = q · 2^(e - 127), q of 16 values, a scale for 32 of them, and turned
    bitsandbytes 8-bit     w = q · s / 127, a scale for each row
    several in a word      `packed_weights`

each in float32 and rounded once, to the dtype of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DTYPES, DType, Words, code_named, from_float, to_float
from ...errors import CheckpointError
from ..protocol import TensorInfo, Weights
from .checkpoint import Checkpoint
from .config_file import config_beside
from .packed_weights import Formula, Matrices, packed_formula, unfitting
from .quantised import NO_SCALES, Quantised, Unit

Float = NDArray[np.float32]

_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BY_127 = np.float32(7.874015718698502e-3)
_SCALES = ("_scale_inv", "_scale")
_OF_INPUTS = ("input_", "activation_", "_weight_act_quant_")
KNOWN = "fp8, int8 with scales, mxfp4, bitsandbytes, GPTQ, AWQ for GEMM, compressed-tensors in words"
"""Schemes, as messages call them."""


def is_formula(quantised: Quantised, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether every unit can be read in full precision here."""
    return all(_formula_of(unit, tensors, quantised.said) is not None for unit in quantised.units)


class Dequantised(Checkpoint):
    """A quantised checkpoint whose weights are read in full precision, under the names they have there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            CheckpointError: its scheme is no formula that is known here.
        """
        quantised = Quantised.of(checkpoint)
        self.folder = checkpoint.folder
        self.label = checkpoint.label
        self.index = checkpoint.index
        self.single = checkpoint.single
        self._checkpoint = checkpoint
        self._units = {unit.weight: unit for unit in quantised.units}
        self._dtype = _dtype_of(checkpoint, quantised)
        self._said = quantised.said
        kept = checkpoint.files.keys() - quantised.unit_of.keys()
        self.files = {name: file for name, file in checkpoint.files.items() if name in kept}
        self.tensors = {name: info for name, info in checkpoint.tensors.items() if name in kept}
        self._matrices: dict[str, Matrices] = {}
        for unit in quantised.units:
            formula = _formula_of(unit, checkpoint.tensors, quantised.said)
            if formula is None:
                raise CheckpointError(
                    checkpoint.label,
                    expected=f"a scheme that is a formula: {KNOWN}",
                    found=str(quantised),
                    remedy="give the model as it was before it was quantised",
                )
            matrices = formula(unit, self)
            self._matrices[unit.weight] = matrices
            self.tensors[unit.weight] = TensorInfo(matrices.dtype, matrices.shape)
            self.files[unit.weight] = checkpoint.files[unit.packed]
        self._whole = lru_cache(maxsize=4)(self._dequantised)

    def read(self, name: str, start: int, count: int) -> Words:
        matrices = self._matrices.get(name)
        if matrices is None:
            return self._checkpoint.read(name, start, count)
        size = prod(matrices.shape[-2:])
        parts = []
        for number in range(start // size, -(-(start + count) // size) if size else 0):
            words = self._whole(name, number)
            first, stop = max(start - number * size, 0), min(start + count - number * size, size)
            parts.append(words[first:stop])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, matrices.dtype.word), *parts])

    def _dequantised(self, name: str, number: int) -> Words:
        """One matrix of those that lie one on the other in a weight."""
        matrices = self._matrices[name]
        with np.errstate(over="ignore", invalid="ignore"):
            words = from_float(matrices.read(number).reshape(-1), matrices.dtype)
        words.flags.writeable = False
        return words

    def part(self, name: str, start: int, count: int) -> Float:
        """Elements of a tensor of the files, in float32."""
        info = self._checkpoint.tensors[name]
        return in_single(self._checkpoint.read(name, start, count), info.dtype)

    def words(self, name: str, start: int, count: int) -> Words:
        """The same as they lie there."""
        return self._checkpoint.read(name, start, count)

    def info(self, name: str) -> TensorInfo:
        """Of a tensor of the files."""
        return self._checkpoint.tensors[name]

    @property
    def dtype(self) -> DType:
        """Of what is dequantised."""
        return self._dtype

    @property
    def said(self) -> Mapping[str, Any]:
        """What the configuration says of how it is quantised."""
        return self._said


def in_single(words: Words, dtype: DType) -> Float:
    """Words as float32: also 8-bit floats, powers of two (E8M0) and integers."""
    if dtype.code in ("F8_E4M3", "F8_E5M2"):
        return _table(dtype.code)[words]
    if dtype.code == "F8_E8M0":
        return _powers(words)
    if dtype.is_float:
        return to_float(words, dtype).astype(np.float32)
    signed = f"i{dtype.itemsize}" if dtype.code.startswith("I") else f"u{dtype.itemsize}"
    return words.view(signed).astype(np.float32)


def _powers(exponents: NDArray[Any]) -> Float:
    """2^(e - 127); the largest e stands for NaN (OCP MX: E8M0)."""
    values = np.ldexp(np.float32(1), np.minimum(exponents, 254).astype(np.int32) - 127)
    found: Float = np.where(exponents == 255, np.float32(np.nan), values).astype(np.float32)
    return found


@lru_cache(maxsize=2)
def _table(code: str) -> Float:
    """The numbers that 8-bit floats stand for (OCP OFP8: E4M3 has no infinities)."""
    bits = np.arange(256, dtype=np.uint16)
    if code == "F8_E5M2":
        return (bits << np.uint16(8)).view(np.float16).astype(np.float32)
    exponent = (bits >> 3 & 15).astype(np.int32)
    mantissa = (bits & 7).astype(np.float32)
    fraction = np.where(exponent == 0, mantissa / 8, 1 + mantissa / 8).astype(np.float32)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - 7).astype(np.float32)
    values[(bits & 127) == 127] = np.nan
    signed: Float = np.where(bits >> 7 == 1, -values, values).astype(np.float32)
    return signed


def _formula_of(unit: Unit, tensors: Mapping[str, TensorInfo], said: Mapping[str, Any]) -> Formula | None:
    packed = tensors[unit.packed]
    if unit.scheme == "compressed-tensors" and said.get("transform_config"):
        return None
    if (formula := packed_formula(unit, tensors, said)) is not None:
        return formula
    if unit.scheme == "mxfp4" and packed.dtype.code == "U8" and len(packed.shape) >= 3:
        return _mxfp4
    if unit.scheme == "bitsandbytes 8-bit" and packed.dtype.code == "I8" and len(packed.shape) == 2:
        return _int8_by_rows
    if unit.scheme == NO_SCALES and unit.parts == {unit.packed}:
        return _plain
    scale, zero = _beside(unit)
    if scale is None or len(packed.shape) < 2:
        return None
    is_fp8 = packed.dtype.code in ("F8_E4M3", "F8_E5M2") and zero is None
    is_int8 = packed.dtype.code == "I8" and not scale.endswith("_scale_inv")
    if zero is not None:
        zeros = tensors[zero]
        fits = zeros.dtype.code == "I8" and zeros.shape == tensors[scale].shape
        is_int8 = is_int8 and fits and unit.scheme in ("compressed-tensors", "torchao")
    return _scaled if is_fp8 or is_int8 else None


def _beside(unit: Unit) -> tuple[str | None, str | None]:
    """The scales of a weight, and its zeros; None where something else is beside it that would count."""
    stem = unit.weight if unit.packed == unit.weight else unit.packed.removesuffix("_qdata")
    scales = {f"{stem}{ending}" for ending in _SCALES} & unit.parts
    zeros = {f"{stem}_zero_point"} & unit.parts
    ignored = {part for part in unit.parts if part.rpartition(".")[2].startswith(_OF_INPUTS)}
    if len(scales) != 1 or unit.parts - ignored != {unit.packed, *scales, *zeros}:
        return None, None
    return scales.pop(), next(iter(zeros), None)


def _scaled(unit: Unit, of: Dequantised) -> Matrices:
    packed = of.info(unit.packed)
    scale, zero = _beside(unit)
    assert scale is not None, "only where it is known"
    info = of.info(scale)
    rows, columns = packed.shape[-2:]
    stacked = len(packed.shape) > 2
    count = prod(packed.shape[:-2])
    own_scales = info.shape[-2:] if len(info.shape) > 1 else (info.numel, 1)
    grid = own_scales if info.numel > 1 else (1, 1)
    in_each = prod(grid)
    shared = stacked and info.numel == in_each
    blocks = _block_size(of.said)

    def read(number: int) -> Float:
        high, wide = _steps((rows, columns), grid, blocks, unit.weight)

        def spread(name: str) -> Float:
            own = of.part(name, 0 if shared else number * in_each, in_each).reshape(grid)
            if name == scale and info.dtype.code == "U8":
                own = _powers(own)
            return np.repeat(np.repeat(own, high, 0)[:rows], wide, 1)[:, :columns]

        values = of.part(unit.packed, number * rows * columns, rows * columns).reshape(rows, columns)
        return (values if zero is None else values - spread(zero)) * spread(scale)

    if count * in_each != info.numel and not shared:
        raise unfitting(unit.weight, packed, info)
    _steps((rows, columns), grid, blocks, unit.weight)
    return Matrices(packed.shape, of.dtype, read)


def _plain(unit: Unit, of: Dequantised) -> Matrices:
    packed = of.info(unit.packed)
    size = prod(packed.shape[-2:])
    return Matrices(packed.shape, of.dtype, lambda number: of.part(unit.packed, number * size, size))


def _steps(
    shape: tuple[int, int], grid: tuple[int, ...], blocks: tuple[int, int] | None, name: str
) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    steps = []
    for axis in (0, 1):
        step = (blocks or (0, 0))[axis]
        if not step or -(-shape[axis] // step) != grid[axis]:
            step = shape[axis] // grid[axis] if grid[axis] and shape[axis] % grid[axis] == 0 else 0
        if not step:
            expected = f"scales for blocks of {list(shape)}"
            raise CheckpointError(name, expected=expected, found=f"a grid of {list(grid)}")
        steps.append(step)
    return steps[0], steps[1]


def _mxfp4(unit: Unit, of: Dequantised) -> Matrices:
    blocks = of.info(unit.packed)
    scales = of.info(f"{unit.weight}_scales")
    *stack, rows, groups, width = blocks.shape
    if scales.shape != blocks.shape[:-1]:
        raise unfitting(unit.weight, blocks, scales)
    columns = groups * width * 2

    def read(number: int) -> Float:
        words = of.words(unit.packed, number * rows * groups * width, rows * groups * width)
        exponents = of.words(f"{unit.weight}_scales", number * rows * groups, rows * groups).astype(np.int32)
        both = np.stack([words & 15, words >> 4], -1).reshape(rows * groups, width * 2)
        return np.ldexp(_FP4[both], exponents[:, None] - 127).reshape(rows, columns).T

    return Matrices((*stack, columns, rows), DTYPES["BF16"], read)


def _int8_by_rows(unit: Unit, of: Dequantised) -> Matrices:
    packed = of.info(unit.packed)
    rows, columns = packed.shape
    scale = next(part for part in unit.parts if part.endswith("SCB"))
    if of.info(scale).numel != rows:
        raise unfitting(unit.weight, packed, of.info(scale))

    def read(number: int) -> Float:
        values = of.part(unit.packed, 0, rows * columns).reshape(rows, columns)
        return values * of.part(scale, 0, rows)[:, None] * _BY_127

    return Matrices(packed.shape, of.dtype, read)


def _dtype_of(checkpoint: Weights, quantised: Quantised) -> DType:
    """The model's: as its configuration says, or as most of what is not quantised."""
    config = config_beside(checkpoint)
    for fields in (config, *(part for name, part in config.items() if name.endswith("_config"))):
        said = fields.get("dtype", fields.get("torch_dtype")) if isinstance(fields, Mapping) else None
        code = code_named(said)
        if code is not None:
            return DTYPES[code]
    plain = [
        info.dtype.code
        for name, info in checkpoint.tensors.items()
        if info.dtype.can_be_delta and name not in quantised.unit_of
    ]
    return DTYPES[Counter(plain).most_common(1)[0][0] if plain else "BF16"]


def _block_size(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the configuration says so."""
    size = said.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2:
        return None
    return (size[0], size[1]) if all(type(each) is int and each > 0 for each in size) else None
