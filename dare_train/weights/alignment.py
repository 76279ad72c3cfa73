"""A base under the names of the result, and in its dtypes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from ..dtypes import Words, to_float
from ..errors import DtypeMismatch, NonFiniteDelta, TensorMismatch
from ..kernels import cpu
from .protocol import Cast, TensorInfo, Weights, under


def align(base: Weights, names: Collection[str], *, model: str) -> tuple[Weights, str]:
    """The base under the names of the result, and the prefix that makes one of the other.

    A prefix is what a task model puts before its encoder's names ("bert."); it counts when it matches more
    tensors than the names as they are. A base that has the prefix itself, where the result has not, gives a
    prefix that begins with "-".

    Raises:
        TensorMismatch: not one name in common.
    """
    best = ""
    best_count = len(base.tensors.keys() & set(names))
    tops = {f"{name.split('.')[0]}." for name in (*names, *base.tensors) if "." in name}
    for top in sorted(tops):
        added = sum(f"{top}{name}" in names for name in base.tensors)
        removed = sum(f"{top}{name}" in base.tensors for name in names)
        for prefix, count in ((top, added), (f"-{top}", removed)):
            if count > best_count:
                best = prefix
                best_count = count
    if not best_count:
        expected = f"tensors of {model}"
        remedy = "is this the base it was tuned from?"
        raise TensorMismatch(base.label, expected=expected, found="not one of them", remedy=remedy)
    return with_prefix(base, best), best


def with_prefix(base: Weights, prefix: str) -> Weights:
    """The base under the names that `align` found."""
    if not prefix:
        return base
    top = prefix.removeprefix("-")
    if top != prefix:
        names = {name.removeprefix(top): name for name in base.tensors if name.startswith(top)}
    else:
        names = {f"{prefix}{name}": name for name in base.tensors}
    return under(base, names)


def without_prefix(name: str, prefix: str) -> str:
    """The base's name of a tensor, given the result's and the prefix that `align` found."""
    return f"{prefix[1:]}{name}" if prefix.startswith("-") else name.removeprefix(prefix)


def cast_to(base: Weights, tuned: Mapping[str, TensorInfo]) -> Weights:
    """The base rounded to the dtypes of the tuned tensors of the same names."""
    dtypes = {
        name: info.dtype
        for name, info in tuned.items()
        if name in base.tensors and base.tensors[name].dtype != info.dtype
    }
    return _Rounded(base, dtypes) if dtypes else base


class _Rounded(Cast):
    """Weights rounded to other dtypes, into which they fit."""

    def read(self, name: str, start: int, count: int) -> Words:
        """
        Raises:
            NonFiniteDelta: a number is too large for the dtype, and would become an infinity.
        """
        words = super().read(name, start, count)
        dtype, source = self.tensors[name].dtype, self._weights.tensors[name].dtype
        if dtype == source or not cpu.has_nonfinite(words, dtype.exponent_mask):
            return words
        finite = np.isfinite(to_float(self._weights.read(name, start, count), source))
        lost = finite & ~np.isfinite(to_float(words, dtype))
        if lost.any():
            raise NonFiniteDelta(
                name,
                expected=f"numbers in {self.label} that fit {dtype.code}",
                found=f"a larger one at flat index {start + int(np.argmax(lost))}",
                remedy=f"give the fine-tuned weights in {source.code}, as the base's are",
            )
        return words


def dtype_mismatch(
    name: str, *, expected: TensorInfo, found: TensorInfo, where: str, remedy: str
) -> DtypeMismatch:
    found_code = f"{found.dtype.code} in {where}"
    return DtypeMismatch(name, expected=expected.dtype.code, found=found_code, remedy=remedy)
