"""Kept values as compressed bytes and back: one zstd frame per segment, whose content's size is known.

docs/format.md §4 specifies the content of a frame; the functions here follow its order.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from ..dtypes import DTYPES, DType, FloatArray, Words, from_float, to_float
from ..errors import PackageError
from ..kernels import cpu
from .masks import DITHER_DOMAIN

FETCH_AGAIN = "fetch the package again"
"""What to do about a package that is damaged."""

Encoding = Literal["exact", "rounded", "int8", "int4", "sign", "whole"]


# Measured on real bf16 deltas: levels 3 to 12 are slower and 1 to 2 % larger. Their matches cost more than
# they save.
_LEVEL = 1
_SMALLEST_BLOCK = 4096  # symbols; a Huffman table of its own costs about 100 bytes
_BF16 = DTYPES["BF16"]
_LEVELS = {"int8": 127, "int4": 7, "sign": 1}

Positions = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a frame holds before compression, with the places where the statistics of its bytes change."""

    data: bytes | memoryview
    cuts: Sequence[int] = field(default_factory=list)


def group_length(threshold: int) -> int:
    """Flat elements that share one scale in `int8`, `int4` and `sign`: a power of two.

    On average about 128 of them are kept.
    """
    kept_per_element = (65536 - threshold) / 65536
    return 1 << max(7, round(7 - log2(kept_per_element)))


class _Zstd(threading.local):
    """Contexts that a thread uses again: making one takes longer than a small frame does."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def compress(content: Content) -> bytes:
    """One zstd frame with its content size. Blocks end at the cuts: each group has its own Huffman table."""
    stream = _zstd.compressor.compressobj(size=len(content.data))
    view = memoryview(content.data)
    frame = []
    done = 0
    for cut in content.cuts:
        if cut - done >= _SMALLEST_BLOCK:
            frame.append(stream.compress(view[done:cut]))
            frame.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
            done = cut
    return b"".join([*frame, stream.compress(view[done:]), stream.flush()])


def decompress(frame: memoryview, size: int, *, name: str) -> bytes:
    """The content of a frame that must hold `size` bytes: no memory is taken before its header says so.

    Raises:
        PackageError: the frame is damaged or declares another size.
    """
    try:
        declared = zstandard.frame_content_size(frame)
        if declared != size:
            expected = f"a frame of {size} bytes"
            raise PackageError(name, expected=expected, found=f"one of {declared}", remedy=FETCH_AGAIN)
        content = _zstd.decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        expected = "an intact zstd frame"
        raise PackageError(name, expected=expected, found=str(error), remedy=FETCH_AGAIN) from error
    if len(content) != size:
        raise PackageError(name, expected=f"{size} bytes", found=f"{len(content)}", remedy=FETCH_AGAIN)
    return content


def content_size(encoding: Encoding, dtype: DType, kept: int, changed: int, groups: int) -> int:
    """Bytes that a frame of this encoding holds before compression, a stored mask's bitmap not counted."""
    if encoding == "exact":
        return -(-kept // 8) + changed * dtype.itemsize
    if encoding == "rounded":
        return -(-kept // 8) + changed * _BF16.itemsize
    if encoding == "whole":
        return kept * dtype.itemsize
    return 2 * groups + {"int8": kept, "int4": -(-kept // 2), "sign": -(-kept // 8)}[encoding]


# Symbols: a bitmap of those that are not zero, then the others less one, in byte planes.


def pack_symbols(symbols: Words, starts: NDArray[np.int64]) -> Content:
    """Bytes of `symbols`, which come in groups that begin at `starts`, ascending."""
    bitmap, values, before = cpu.collapse(symbols, starts)
    planes = to_planes(values)
    cuts = _cuts(bitmap.size, values.size, values.itemsize, starts, before)
    return Content(data=bitmap.tobytes() + planes.tobytes(), cuts=cuts)


def packed_symbols(
    data: memoryview,
    kept: int,
    word: np.dtype[np.unsignedinteger],
    starts: NDArray[np.int64],
    before: NDArray[np.int64],
) -> Content:
    """The same of `kept` symbols packed already; `before` each of `starts` come so many that are not zero."""
    bitmap = -(-kept // 8)
    values = (len(data) - bitmap) // word.itemsize
    return Content(data=data, cuts=_cuts(bitmap, values, word.itemsize, starts, before))


def _cuts(
    bitmap: int, values: int, width: int, starts: NDArray[np.int64], before: NDArray[np.int64]
) -> list[int]:
    """Where groups begin in the bitmap and in each plane, and where these end."""
    cuts = [*(starts // 8), bitmap]
    for plane in range(width):
        cuts += [*(bitmap + plane * values + before), bitmap + (plane + 1) * values]
    return [int(cut) for cut in cuts]


def unpack_symbols(
    data: memoryview, kept: int, changed: int, word: np.dtype[np.unsignedinteger], *, name: str
) -> Words:
    """All `kept` symbols.

    Raises:
        PackageError: the bitmap does not hold `changed` ones.
    """
    size = -(-kept // 8)
    bitmap = np.frombuffer(data[:size], np.uint8)
    values = from_planes(data[size:], changed, word)
    symbols, counted = cpu.expand(bitmap, values, kept)
    if counted != changed:
        expected = f"{changed} changed elements"
        raise PackageError(name, expected=expected, found=f"{counted}", remedy=FETCH_AGAIN)
    return symbols


def to_planes(words: Words) -> NDArray[np.uint8]:
    """Words as byte planes, least significant first; shape (itemsize, n)."""
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, words.itemsize).T)


def from_planes(data: memoryview, count: int, word: np.dtype[np.unsignedinteger]) -> Words:
    words: Words = np.empty(count, word)
    cpu.join(np.frombuffer(data, np.uint8, count * word.itemsize), words)
    return words


# exact: ordered-bits distances grouped by the base's exponent.


def encode_exact(base: Words, tuned: Words, dtype: DType) -> Content:
    symbols, starts = cpu.distances_by_exponent(base, tuned, dtype.exponent_bits)
    return pack_symbols(symbols, np.unique(starts)[1:-1])


def packed_exact(
    data: memoryview, kept: int, starts: NDArray[np.int64], before: NDArray[np.int64], dtype: DType
) -> Content:
    """The same where a device grouped and packed the symbols; `starts` and `before` are of each exponent."""
    inner, places = np.unique(np.append(starts, kept), return_index=True)
    return packed_symbols(data, kept, dtype.word, inner[1:-1], before[places[1:-1]])


def decode_exact(data: memoryview, base: Words, changed: int, dtype: DType, *, name: str) -> Words:
    """The tuned words of the kept elements, shape of `base`."""
    symbols = unpack_symbols(data, base.size, changed, dtype.word, name=name)
    return cpu.from_distances(base, symbols, dtype.exponent_bits)


# rounded: bfloat16 deltas with the sign bit at the low end, so that the high plane holds exponents only.


def round_delta(delta: FloatArray) -> FloatArray:
    """Deltas as the `rounded` encoding keeps them."""
    return to_float(from_float(_single(delta), _BF16), _BF16).astype(delta.dtype)


def _single(delta: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        return delta.astype(np.float32)


def rounded_symbols(delta: FloatArray) -> Words:
    bits = from_float(_single(delta), _BF16)
    return (bits << np.uint16(1)) | (bits >> np.uint16(15))


def encode_rounded(delta: FloatArray) -> Content:
    return pack_symbols(rounded_symbols(delta), np.empty(0, np.int64))


def decode_rounded(data: memoryview, kept: int, changed: int, *, name: str) -> NDArray[np.float32]:
    symbols = unpack_symbols(data, kept, changed, _BF16.word, name=name)
    return np.asarray(to_float((symbols >> np.uint16(1)) | (symbols << np.uint16(15)), _BF16), np.float32)


# int8, int4, sign: one bfloat16 scale per group of flat indices, codes by unbiased stochastic rounding.


def groups_of(positions: Positions, start: int, length: int, group: int) -> tuple[NDArray[np.int64], int]:
    """Of each kept element its group's number within the segment, and how many groups the segment touches."""
    first = start // group
    numbers = (start + positions) // group - first
    groups = -(-(start + length) // group) - first
    return numbers, groups


def quantize(
    delta: FloatArray,
    group: NDArray[np.int64],
    groups: int,
    positions: Positions,
    start: int,
    key: int,
    encoding: Encoding,
    least: NDArray[np.float32] | None = None,
) -> tuple[Words, NDArray[np.int64]]:
    """bf16 scale of each group (its largest |δ|, rounded up) and the integer code of each element.

    code = floor(x + u) with x = δ·levels/scale and u uniform on [0, 1), so that E[code] = x. `sign` knows
    only -1 and 1: the same rounding on the grid of odd numbers. `least` is the largest |δ| that a group has
    elsewhere.
    """
    magnitude = np.abs(delta).astype(np.float32)
    largest = np.zeros(groups, np.float32) if least is None else least.copy()
    np.maximum.at(largest, group, magnitude)
    scales = _round_up_to_bf16(largest)
    step = to_float(scales, _BF16).astype(np.float64)[group] / _LEVELS[encoding]
    x = np.divide(delta.astype(np.float64), step, out=np.zeros(delta.size), where=step > 0)
    noise = (_draws_at(positions, start, key) + 0.5) / 65536
    if encoding == "sign":
        return scales, 2 * np.floor((x + 1) / 2 + noise).astype(np.int64).clip(0, 1) - 1
    return scales, np.floor(x + noise).astype(np.int64).clip(-_LEVELS[encoding], _LEVELS[encoding])


def dequantize(
    scales: Words, codes: NDArray[np.int64], group: NDArray[np.int64], encoding: Encoding
) -> NDArray[np.float32]:
    """float32(code) · float32(scale / levels): two float32 operations, the division first."""
    step = np.asarray(to_float(scales, _BF16), np.float32) / np.float32(_LEVELS[encoding])
    return codes.astype(np.float32) * step[group]


def encode_codes(scales: Words, codes: NDArray[np.int64], encoding: Encoding) -> Content:
    if encoding == "int8":
        body = codes.astype(np.int8).tobytes()
    elif encoding == "int4":
        nibbles = np.append((codes + 8).astype(np.uint8), np.zeros(codes.size % 2, np.uint8))
        body = (nibbles[0::2] | (nibbles[1::2] << np.uint8(4))).tobytes()
    else:
        body = np.packbits(codes > 0, bitorder="little").tobytes()
    return Content(data=scales.tobytes() + body, cuts=[2 * scales.size])


def decode_codes(
    data: memoryview, kept: int, groups: int, encoding: Encoding, *, name: str
) -> tuple[Words, NDArray[np.int64]]:
    """Scales, shape (groups,), and codes, shape (kept,).

    Raises:
        PackageError: a scale is not finite.
    """
    scales = np.frombuffer(data, np.uint16, groups)
    if not np.isfinite(to_float(scales, _BF16)).all():
        raise PackageError(name, expected="finite scales", found="NaN or infinity", remedy=FETCH_AGAIN)
    body = np.frombuffer(data[2 * groups :], np.uint8)
    if encoding == "int8":
        return scales, body.view(np.int8).astype(np.int64)
    if encoding == "int4":
        nibbles = np.stack([body & np.uint8(15), body >> np.uint8(4)], axis=1).reshape(-1)[:kept]
        return scales, nibbles.astype(np.int64) - 8
    return scales, 2 * np.unpackbits(body, bitorder="little", count=kept).astype(np.int64) - 1


def _draws_at(positions: Positions, start: int, key: int) -> NDArray[np.float64]:
    if not positions.size:
        return np.empty(0)
    return cpu.draws(key, start, int(positions[-1]) + 1, DITHER_DOMAIN)[positions].astype(np.float64)


def _round_up_to_bf16(values: NDArray[np.float32]) -> Words:
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
