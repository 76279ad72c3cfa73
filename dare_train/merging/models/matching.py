"""What becomes of each tensor of a merge, settled by names, shapes and dtypes before any arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from ...config import Patterns, matches
from ...dtypes import DType, cast
from ...errors import ConfigError, DtypeMismatch, TensorMismatch
from ...weights.derived_buffers import is_derived
from ...weights.heads import embeddings_in, heads_in
from ...weights.protocol import SEGMENT, TensorInfo, Weights, runs
from .added_rows import AddedRows
from .inputs import Input

How = Literal["merged", "copied", "carried"]
GrownRows = Callable[[str, Sequence[int]], "AddedRows | None"]
"""Rows that a tensor has beyond the base's, of a name and the models in which it grew; None: the result has
the base's rows only."""


@dataclass(frozen=True, kw_only=True)
class Fate:
    """One tensor of the result."""

    name: str
    info: TensorInfo
    how: How
    """`merged`: by the method. `copied`: as in the base. `carried`: as in a model."""
    models: tuple[int, ...] = ()
    """Those that take part, or the one it is carried from."""
    note: str = ""
    added: AddedRows | None = None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the user said of tensors by name pattern."""

    exclude: Patterns = ()
    """Left as in the base, and left out where the base has none."""
    take: Mapping[str, int]
    """Carried from the model of that number."""

    def decide(self, name: str) -> bool:
        """Whether they say what becomes of a tensor."""
        return matches(name, self.exclude) or self.taken(name) is not None

    def taken(self, name: str) -> int | None:
        return next((model for pattern, model in self.take.items() if fnmatchcase(name, pattern)), None)


def fates(
    base: Weights,
    inputs: Sequence[Input],
    choices: Choices,
    grown: GrownRows,
    out: DType | None,
    takes_part: Callable[[str, int], bool],
) -> list[Fate]:
    """The fate of every tensor that the base or a model has, sorted by name.

    Args:
        takes_part: whether a model is one of those that are merged into a tensor.

    Raises:
        TensorMismatch: shapes do not fit, or models carry different content that cannot be merged.
        DtypeMismatch: a model has integers where the base has floating-point numbers.
        ConfigError: `take` names a model that has no such tensor; or `exclude` names it, too.
    """
    names = sorted(set(base.tensors).union(*(model.tensors for model in inputs)))
    found = (_fate(name, base, inputs, choices, grown, takes_part) for name in names)
    settled = [fate for fate in found if fate is not None]
    _check_heights(settled, base)
    return [_in_dtype(fate, out) for fate in settled]


def _check_heights(settled: Sequence[Fate], base: Weights) -> None:
    """Embeddings and heads that have as many rows in the base have as many in the result: others could not be
    loaded.
    """
    tallest: dict[int, Fate] = {}
    by_token = {*embeddings_in(base.tensors), *heads_in(base.tensors)}
    shared = [fate for fate in settled if fate.name in by_token and fate.info.shape]
    for fate in sorted(shared, key=lambda fate: -fate.info.shape[0]):
        first = tallest.setdefault(base.tensors[fate.name].shape[0], fate)
        if fate.info.shape[0] != first.info.shape[0]:
            raise TensorMismatch(
                fate.name,
                expected=f"{first.info.shape[0]} rows, as {first.name} has",
                found=f"{fate.info.shape[0]}{f' ({fate.note})' if fate.note else ''}",
                remedy="merge models that have added rows in both; or tokenizer='base' "
                "(--tokenizer base) leaves them out",
            )


def _in_dtype(fate: Fate, out: DType | None) -> Fate:
    if out is None or not fate.info.dtype.can_be_delta:
        return fate
    return Fate(**{**vars(fate), "info": TensorInfo(out, fate.info.shape)})


def _fate(
    name: str,
    base: Weights,
    inputs: Sequence[Input],
    choices: Choices,
    grown: GrownRows,
    takes_part: Callable[[str, int], bool],
) -> Fate | None:
    info = base.tensors.get(name)
    holders = [number for number, model in enumerate(inputs) if name in model.tensors]
    taken = choices.taken(name)
    if matches(name, choices.exclude) and taken is not None:
        expected = "exclude or take to name it"
        raise ConfigError(name, expected=expected, found="both", remedy="give one of them")
    if matches(name, choices.exclude):
        return Fate(name=name, info=info, how="copied", note="excluded") if info is not None else None
    if taken is not None:
        return _taken(name, taken, inputs)
    if is_derived(name, (info or inputs[holders[0]].tensors[name]).shape):
        return _derived(name, info, holders, inputs)
    if info is None:
        return _carried(name, holders, inputs)
    holders = [number for number in holders if takes_part(name, number)]
    whole = [number for number in holders if inputs[number].whole(name)]
    if whole:
        moved = [
            number for number in holders if number not in whole and not _as_base(name, inputs[number], base)
        ]
        return _carried(name, [*whole, *moved], inputs)
    if not any(inputs[number].moves(name) for number in holders):
        return Fate(name=name, info=info, how="copied", note="" if holders else "in no model")
    if not info.dtype.can_be_delta:
        return _not_float(name, info, holders, base, inputs)
    return _merged(name, info, holders, inputs, grown)


def _derived(name: str, info: TensorInfo | None, holders: list[int], inputs: Sequence[Input]) -> Fate:
    """A buffer that the model works out for itself: one is as good as another."""
    note = "worked out by the model itself"
    if info is not None:
        return Fate(name=name, info=info, how="copied", note=note)
    first = holders[0]
    return Fate(name=name, info=inputs[first].tensors[name], how="carried", models=(first,), note=note)


def _taken(name: str, number: int, inputs: Sequence[Input]) -> Fate:
    if name not in inputs[number].tensors:
        raise ConfigError(
            f"take for {name}",
            expected="a model that has it",
            found=f"none of that name in {inputs[number].label}",
        )
    return Fate(name=name, info=inputs[number].tensors[name], how="carried", models=(number,), note="taken")


def _merged(
    name: str, info: TensorInfo, holders: list[int], inputs: Sequence[Input], grown: GrownRows
) -> Fate:
    for number in holders:
        _check_float(name, inputs[number])
    larger = [number for number in holders if inputs[number].tensors[name].shape != info.shape]
    for number in larger:
        _check_grown(name, info, inputs[number])
    absent = [model.label for number, model in enumerate(inputs) if number not in holders]
    note = f"not in {', '.join(absent)}" if absent else ""
    added = grown(name, larger)
    if larger and added is None:
        note = "; ".join(filter(None, [note, "added rows left out"]))
    if added is not None and added.rows.size:
        info = TensorInfo(info.dtype, (max(info.shape[0], int(added.rows[-1]) + 1), *info.shape[1:]))
    return Fate(name=name, info=info, how="merged", models=tuple(holders), note=note, added=added)


def _check_float(name: str, model: Input) -> None:
    dtype = model.tensors[name].dtype
    if not dtype.can_be_delta:
        remedy = (
            f"give the model in full precision; exclude={name!r} (--exclude) leaves the "
            f"base's, take={{{name!r}: model}} takes it"
        )
        raise DtypeMismatch(
            name,
            expected="floating-point numbers of 16 bits or more",
            found=f"{dtype.code} in {model.label}",
            remedy=remedy,
        )


def _check_grown(name: str, info: TensorInfo, model: Input) -> None:
    shape = model.tensors[name].shape
    if not info.shape or shape[1:] != info.shape[1:] or shape[0] < info.shape[0]:
        raise TensorMismatch(
            name,
            expected=f"shape {list(info.shape)}, as in the base",
            found=f"{list(shape)} in {model.label}",
            remedy=f"is it a model of this base? exclude={name!r} (--exclude) leaves the "
            f"base's, take={{{name!r}: model}} takes a model's",
        )


def _not_float(
    name: str, info: TensorInfo, holders: list[int], base: Weights, inputs: Sequence[Input]
) -> Fate:
    changed = [number for number in holders if not _as_base(name, inputs[number], base)]
    if not changed:
        return Fate(name=name, info=info, how="copied", note="not floating point, equal in all")
    return _carried(name, changed, inputs)


def _as_base(name: str, model: Input, base: Weights) -> bool:
    """Whether a model's tensor is the base's to the bit."""
    info = base.tensors[name]
    return not model.moves(name) or (
        model.tensors[name] == info and equal(name, info.numel, base.read, model.words)
    )


def _carried(name: str, holders: list[int], inputs: Sequence[Input]) -> Fate:
    first, *others = holders
    info = inputs[first].tensors[name]
    for number in others:
        if inputs[number].tensors[name] != info or not equal(
            name, info.numel, inputs[first].words, inputs[number].words
        ):
            raise TensorMismatch(
                name,
                expected=f"the same content as in {inputs[first].label}, since it is no delta of the base",
                found=f"other content in {inputs[number].label}",
                remedy=f"take={{{name!r}: model}} (--take) takes one model's, exclude={name!r} "
                "(--exclude) leaves it out",
            )
    note = f"the same in {len(holders)} models" if others else ""
    return Fate(name=name, info=info, how="carried", models=(first,), note=note)


Read = Callable[[str, int, int], "np.ndarray"]


def equal(name: str, numel: int, left: Read, right: Read) -> bool:
    """Whether two models have the same words in the first `numel` elements."""
    return all(
        np.array_equal(left(name, start, count), right(name, start, count))
        for start, count in runs(numel, SEGMENT)
    )


def carried_words(model: Input, name: str, start: int, count: int, out: DType) -> np.ndarray:
    """A run of what a model carries, in the result's dtype."""
    dtype = model.tensors[name].dtype
    words = model.words(name, start, count)
    return cast(words, dtype, out) if dtype != out and dtype.is_float else words
