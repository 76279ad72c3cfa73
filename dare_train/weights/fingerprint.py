"""Fingerprints that do not depend on who holds which part of a tensor.

A tensor's fingerprint is a sum over its bytes in units of 32 bits, modulo 2⁶⁴ in two lanes, of units times
what their places say. It guards against a wrong base and against bit rot, not against forgery; docs/format.md
§3 defines it.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from ..dtypes import Words
from ..errors import PackageError
from ..kernels import cpu
from ..parallel.threads import ordered_map
from .protocol import SEGMENT, Weights, runs

if TYPE_CHECKING:
    from ..kernels.launch_tables import Rows

_LANE = (1 << 64) - 1


class Fingerprint(NamedTuple):
    """Two lanes, each in [0, 2**64)."""

    first: int = 0
    second: int = 0

    def plus(self, other: tuple[int, int]) -> Fingerprint:
        return Fingerprint((self.first + other[0]) & _LANE, (self.second + other[1]) & _LANE)

    @property
    def hex(self) -> str:
        """32 lower-case hexadecimal digits, the first lane before the second."""
        return f"{self.first:016x}{self.second:016x}"

    @classmethod
    def parse(cls, text: object, *, name: str = "fingerprint") -> Fingerprint:
        """The fingerprint that `hex` wrote.

        Raises:
            PackageError: not 32 lower-case hexadecimal digits.
        """
        if not isinstance(text, str) or len(text) != 32 or not set(text) <= set(string.digits + "abcdef"):
            raise PackageError(name, expected="32 hexadecimal digits", found=repr(text))
        return cls(int(text[:16], 16), int(text[16:], 16))

    @classmethod
    def of(cls, words: Words, start: int = 0) -> Fingerprint:
        """The share of the elements with flat indices `start` onwards; shares of a tensor's parts add up."""
        return cls(*cpu.fingerprint(words, start))


def total(shares: Iterable[tuple[int, int]]) -> Fingerprint:
    result = Fingerprint()
    for share in shares:
        result = result.plus(share)
    return result


def model_fingerprint(tensors: Iterable[tuple[str, str, tuple[int, ...], Fingerprint]]) -> str:
    """Names a whole set of weights: SHA-256 over one line per tensor (name, dtype code, shape, fingerprint),
    sorted by name.
    """
    lines = sorted(
        f"{name}\0{dtype}\0{','.join(map(str, shape))}\0{print_.hex}\n"
        for name, dtype, shape, print_ in tensors
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprints(
    weights: Weights,
    spans: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    *,
    threads: int | None = None,
) -> dict[str, Fingerprint]:
    """Fingerprints by tensor, of its elements [start, stop) in `spans`, or of all elements of all tensors.

    Read a segment at a time, on threads, however large the tensors are.
    """
    if spans is None:
        spans = {name: ((0, info.numel),) for name, info in weights.tensors.items()}
    work = [
        (name, begin + start, count)
        for name, tensor_spans in spans.items()
        for begin, end in tensor_spans
        for start, count in runs(end - begin, SEGMENT)
    ]

    def share_of(run: tuple[str, int, int]) -> Fingerprint:
        name, start, count = run
        return Fingerprint.of(weights.read(name, start, count), start)

    prints = dict.fromkeys(spans, Fingerprint())
    with closing(ordered_map(share_of, work, threads=threads)) as shares:
        for (name, _, _), share in zip(work, shares, strict=True):
            prints[name] = prints[name].plus(share)
    return prints


def weights_fingerprint(weights: Weights) -> str:
    """The fingerprint of all weights (docs/format.md §3.3)."""
    infos = weights.tensors
    prints = fingerprints(weights).items()
    return model_fingerprint(
        (name, infos[name].dtype.code, infos[name].shape, print_) for name, print_ in prints
    )


def prints_of(kernels: ModuleType, rows: Rows) -> list[Fingerprint]:
    """Each row's share of a fingerprint. Waits for the device."""
    return [
        Fingerprint(first % 2**64, second % 2**64)
        for first, second in kernels.fingerprint(rows).cpu().tolist()
    ]
