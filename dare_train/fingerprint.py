"""Fingerprints that do not depend on who holds which part of a tensor.

A tensor's fingerprint is a sum over its bytes in units of 32 bits, modulo 2⁶⁴ in two lanes, of units times what their places say.
It guards against a wrong base and against bit rot, not against forgery; docs/format.md §3 defines it.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable
from typing import NamedTuple

from .dtypes import Words
from .errors import PackageError
from .kernels import cpu

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
    """Names a whole set of weights: SHA-256 over one line per tensor (name, dtype code, shape, fingerprint), sorted by name."""
    lines = sorted(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0{print_.hex}\n" for name, dtype, shape, print_ in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
