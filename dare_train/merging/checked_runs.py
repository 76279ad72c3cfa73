"""What is looked at before a run of a merge is written: is it finite, and does it differ from the base?"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words
from ..errors import NonFiniteDelta, TensorMismatch
from ..kernels import cpu
from .merged_weights import Merged


class Allowed(NamedTuple):
    """What a result may be that is usually a mistake."""

    nonfinite: bool
    unchanged: bool


_FIRST = 1 << 12
"""Elements that are compared before all others: most tensors differ there."""


def check_finite(merged: Merged, name: str, start: int, words: Words) -> None:
    """
    Raises:
        NonFiniteDelta: what a merge has worked out holds NaN or infinity.
    """
    fate = merged.fates[name]
    dtype = fate.info.dtype
    as_it_was = fate.how == "copied" and merged.base.tensors[name].dtype == dtype
    if as_it_was or not dtype.can_be_delta or not cpu.has_nonfinite(words, dtype.exponent_mask):
        return
    bad = _nonfinite(merged, name, start, words)
    if not bad.any():
        return
    first = start + int(np.argmax(bad))
    models = ", ".join(merged.inputs[number].label for number in fate.models) or merged.base.label
    raise NonFiniteDelta(
        name,
        expected=f"finite {dtype.code} of {models}",
        found=f"NaN or infinity at flat index {first}",
        remedy="smaller weights or a wider out_dtype (--out-dtype) if sums were too large; exclude "
        "(--exclude) keeps the base's; allow_nonfinite=True (--allow-nonfinite) writes it",
    )


def _nonfinite(merged: Merged, name: str, start: int, words: Words) -> NDArray[np.bool_]:
    """Where words are NaN, or infinities that are not the base's: a mask of these is no sign of anything."""
    dtype = merged.fates[name].info.dtype
    mask = dtype.word.type(dtype.exponent_mask)
    bad: NDArray[np.bool_] = (words & mask) == mask
    base = merged.base.tensors.get(name)
    if base is not None and base.dtype == dtype and start < merged.base_numel(name):
        below = dtype.word.type((1 << dtype.mantissa_bits) - 1)
        infinite = bad & ((words & below) == 0)
        bad &= ~(infinite & (words == merged.base.read(name, start, words.size)))
    return bad


def differs(merged: Merged, name: str, start: int, words: Words) -> bool:
    """Whether a run of the result is not the base's."""
    fate = merged.fates[name]
    if fate.how == "copied":
        return False
    base = merged.base.tensors.get(name)
    if base is None or base.dtype != fate.info.dtype or start >= merged.base_numel(name):
        return True
    for first, stop in ((0, _FIRST), (_FIRST, words.size)):
        part = words[first:stop]
        if part.size and not np.array_equal(part, merged.base.read(name, start + first, part.size)):
            return True
    return False


def check_something_merged(merged: Merged) -> None:
    """Before any arithmetic.

    Raises:
        TensorMismatch: all, or nearly all, of the base would be copied, since no model has it.
    """
    of_base = [fate for fate in merged.fates.values() if fate.name in merged.base.tensors]
    alone = [fate for fate in of_base if fate.how == "copied" and not _is_held(merged, fate.name)]
    everything = sum(fate.info.numel for fate in of_base)
    copied = sum(fate.info.numel for fate in alone)
    if alone and copied > _NEARLY * everything:
        raise TensorMismatch(
            "merge",
            expected=f"models with the tensors of {merged.base.label}",
            found=f"{len(alone)} of its {len(of_base)} tensors in none of them, such as {alone[0].name}",
            remedy="are these models of this base? allow_unchanged=True (--allow-unchanged) merges the rest",
        )


_NEARLY = 0.9
"""Share of the base's elements."""


def _is_held(merged: Merged, name: str) -> bool:
    return any(name in model.tensors for model in merged.inputs)


def check_changed(merged: Merged, changed: Collection[str]) -> None:
    """After the last run.

    Args:
        changed: tensors that differ from the base's.

    Raises:
        TensorMismatch: none.
    """
    if not changed:
        models = ", ".join(model.label for model in merged.inputs)
        raise TensorMismatch(
            "merge",
            expected=f"a result that differs from {merged.base.label}",
            found=f"its equal: {models} changes nothing of it with these settings",
            remedy="is it the right model, of the right base? allow_unchanged=True (--allow-unchanged) "
            "writes it",
        )
