"""One tensor of a merge: any run of the result, by whatever the method's function wants to be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType, FloatArray, Words, cast, from_float, to_float
from ..errors import ConfigError
from ..kernels import cpu, sums
from ..kernels.rounding import land
from ..kernels.ties_of_two import Cut, ties_of_two_bf16
from ..package.arithmetic import Term, combine, unrounded
from ..package.landing import drawn
from ..weights.protocol import TensorInfo, Weights
from .deltas import Member, ModelDelta, ModelStatistics, dense
from .methods import combinations
from .methods import elementwise as elements
from .methods.parameters import Scalar
from .methods.registry import Method
from .tensor_passes import pass_over
from .walk import Walk, quiet


class MergedTensor:
    """The part of a tensor that the base has, merged.

    Args:
        base: weights under the result's names.
        out: dtype of the result.
        members: the models that have the tensor, in order.
        settings: values of the parameters of which the merge has one.
        threads: for passes over the whole tensor, where the method needs them: they are made here and now.
        landing_key: of the draws by which elements land on the result's grid; without it they are rounded to
            the nearest.
    """

    def __init__(
        self,
        method: Method,
        base: Weights,
        name: str,
        out: DType,
        members: Sequence[Member],
        settings: Mapping[str, Scalar],
        *,
        rescale: str,
        threads: int,
        landing_key: int | None = None,
    ) -> None:
        self.info = base.tensors[name]
        self._method = method
        self._settings = settings
        self._out = out
        self._landing_key = landing_key
        self._members = members
        self._weights = np.array([member.settings.get("weight", 1.0) for member in members], np.float64)
        self._averaged = averages(method, self.info, members, name)
        self._is_matrix = method.reach == "matrix" and not self._averaged
        whole = self._is_matrix or method.reach == "tensor" or self._per == "column"
        self._walk = Walk(
            base, name, row=_row_length(self.info, method, self._per), whole=whole, threads=threads
        )
        self._deltas = [
            ModelDelta.of(member, self._walk, drops=method.drops, rescale=rescale) for member in members
        ]
        self._coefficients = self._of_the_tensor()
        self._at_once = (
            method.function is elements.ties
            and self.info.dtype == out
            and landing_key is None
            and len(members) == 2
            and all(delta.plain for delta in self._deltas)
        )
        self._pass = pass_over(method, self._walk, self._rows, settings)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(start, count) of the runs that `merged` gives."""
        return self._walk.runs

    def merged(self, start: int, count: int) -> Words:
        """Words of the result of one of the runs."""
        with quiet():
            return self._merged(start, self._walk.words(start, count))

    def _merged(self, start: int, words: Words) -> Words:
        if self._averaged:
            return self._combined(start, words, averaged_coefficients(self._weights, self._settings))
        if self._coefficients is not None:
            return self._combined(start, words, self._coefficients)
        if self._method.reach == "coefficients":
            return self._moved(start, words, self._by_rows(start, words))
        if self._is_matrix or self._method.reach == "tensor":
            return self._moved(start, words, self._of_whole(words))
        return self._of_elements(start, words)

    def task_norms(self, task: int) -> NDArray[np.float64]:
        """`emr_norms` of the tensor."""
        norms: Any = self._walk.total(
            lambda start, words: elements.emr_norms(self._rows(start, words), task=task)
        )
        return np.asarray(np.zeros(2) + norms)

    # Deltas as rows

    def _rows(self, start: int, words: Words) -> FloatArray:
        """Every model's delta after dropping, [n, words.size]."""
        return self._dense([delta.terms(start, words) for delta in self._deltas], words)

    def _dense(self, lists: Sequence[Sequence[Term]], words: Words) -> FloatArray:
        rows = np.zeros((len(lists), words.size), self.info.dtype.compute)
        for row, terms in zip(rows, lists, strict=True):
            dense(terms, words, self.info.dtype, row)
        return rows

    # Methods that combine vectors

    @property
    def _on_weights(self) -> bool:
        return (
            self._settings["of"] == "weights" if "of" in self._settings else self._method.space == "weights"
        )

    @property
    def _per(self) -> str:
        """What has coefficients of its own: the `tensor`, each `row` of its last dimension, or each `column`
        of its first.
        """
        if self._settings.get("filter_wise"):
            return "row"
        if self._settings.get("nuslerp_flatten", True):
            return "tensor"
        return "column" if self._settings["nuslerp_row_wise"] else "row"

    def _of_the_tensor(self) -> NDArray[np.float64] | None:
        """The coefficients, where the tensor as a whole has some."""
        # Where a method wants two, what one model has is that model's, as in mergekit.
        if len(self._members) < self._method.models[0]:
            return np.ones(len(self._members))
        if self._method.reach != "coefficients" or self._per != "tensor":
            return None
        return self._factors(
            self._walk.total(self._gram) if self._method.needs_gram and self.info.numel else None
        )

    def _factors(self, gram: NDArray[np.float64] | None) -> NDArray[np.float64]:
        if gram is None and self._method.needs_gram:
            return np.zeros(len(self._deltas))
        return own_coefficients(self._method, gram, self._weights, self._settings)

    def _vectors(self, start: int, words: Words) -> FloatArray:
        rows = self._rows(start, words)
        return rows + to_float(words, self.info.dtype) if self._on_weights else rows

    def _gram(self, start: int, words: Words) -> NDArray[np.float64]:
        """Dot products of the vectors over a run, [n, n]. Not by BLAS, whose sums depend on its threads."""
        return _dots(self._vectors(start, words), axis=-1)

    def _combined(self, start: int, words: Words, coefficients: NDArray[np.float64]) -> Words:
        """One coefficient for each model: the arithmetic law."""
        result = words = words if words.flags.owndata else words.copy()
        terms = [
            replace(term, factor=term.factor * float(factor))
            for delta, factor in zip(self._deltas, coefficients, strict=True)
            for term in delta.terms(start, words)
        ]
        rest = float(coefficients.sum()) - 1
        if self._on_weights and abs(rest) > 1e-12:
            terms.append(Term(positions=None, factor=rest, delta=to_float(words, self.info.dtype)))
        if self._landing_key is not None:
            return self._landed(start, words, unrounded(words, terms, self.info.dtype))
        if self._out != self.info.dtype:
            return from_float(unrounded(words, terms, self.info.dtype), self._out)
        if terms:
            combine(result, terms, self.info.dtype)
        return result

    def _by_rows(self, start: int, words: Words) -> FloatArray:
        """Coefficients for each row, or column, of its own."""
        by_columns = self._per == "column"
        shape = (self.info.shape or (1,)) if by_columns else (-1, self._walk.row)
        axis = 0 if by_columns else -1
        vectors = self._vectors(start, words).reshape(len(self._deltas), *shape)
        factors = self._factors(_dots(vectors, axis=axis))
        merged = np.zeros(vectors.shape[1:], vectors.dtype)
        for vector, factor in zip(vectors, np.moveaxis(factors, -1, 0), strict=True):
            merged += np.expand_dims(factor, axis).astype(vectors.dtype) * vector
        flat = merged.reshape(-1)
        return flat - to_float(words, self.info.dtype) if self._on_weights else flat

    # Methods that work element by element

    def _of_elements(self, start: int, words: Words) -> Words:
        if self._at_once:
            cuts = [cut for delta in self._deltas if (cut := delta.cut(start)) is not None]
            if len(cuts) == len(self._deltas):
                return self._ties_at_once(start, words, cuts)
        rows, at = self._filled(start, words)
        if at is None:
            return self._moved(start, words, self._called(rows, start, words, slice(None)))
        result = self._as_base(words)
        delta = self._called(rows[:, at], start, words, at)
        cpu.put(result, at, self._moved(start, cpu.take(words, at), delta, at))
        return result

    def _ties_at_once(self, start: int, words: Words, cuts: Sequence[Cut]) -> Words:
        """What the steps below give, to the bit."""
        return ties_of_two_bf16(
            words,
            [member.input.words(self._walk.name, start, words.size) for member in self._members],
            start,
            cuts,
            self._weights.astype(np.float32),
            normalize=bool(self._settings["normalize"]),
            scale=float(self._settings.get("lambda", 1.0)),
        )

    def _filled(self, start: int, words: Words) -> tuple[FloatArray, NDArray[np.int64] | None]:
        """Every model's delta after dropping, [n, words.size], and the elements that some model moves, where
        they are few.
        """
        rows = np.empty((len(self._deltas), words.size), self.info.dtype.compute)
        moved: list[NDArray[np.int64] | None] = []
        for row, delta in zip(rows, self._deltas, strict=True):
            if delta.plain:
                delta.fill(start, words, row)
                moved.append(None)
            else:
                terms = delta.terms(start, words)
                row[:] = 0
                dense(terms, words, self.info.dtype, row)
                moved += [term.positions for term in terms]
        return rows, _few(moved, words.size)

    def _called(
        self, deltas: FloatArray, start: int, words: Words, at: NDArray[np.int64] | slice
    ) -> FloatArray:
        given: dict[str, Any] = {name: self._settings[name] for name in self._method.arguments}
        if self._method.needs == "fisher":
            given["fisher"] = np.stack(
                [_of(member.fisher).read(self._walk.name, start, words.size)[at] for member in self._members]
            )
        elif self._method.needs == "undropped":
            given["undropped"] = self._dense([delta.raw(start, words) for delta in self._deltas], words)[
                :, at
            ]
        elif self._pass is not None:
            given |= self._pass.given(deltas, start, words, at)
        function = elements.COMPILED.get(self._method.function) if deltas.dtype == np.float32 else None
        return self._scaled(
            (function or self._method.function)(
                np.ascontiguousarray(deltas), self._weights.astype(deltas.dtype), **given
            )
        )

    # Methods that look at the whole

    def _of_whole(self, words: Words) -> FloatArray:
        deltas = self._rows(0, words).reshape(len(self._deltas), *self.info.shape)
        given: dict[str, Any] = {name: self._settings[name] for name in self._method.arguments}
        if self._is_matrix and self._method.needs == "gram":
            grams = [_of(member.gram) for member in self._members]
            name = self._walk.name
            given |= {
                "grams": np.stack([gram.whole(name) for gram in grams]),
                "transposed": grams[0].transposed(name),
            }
        delta = np.asarray(
            self._method.function(deltas, self._weights.astype(deltas.dtype), **given), deltas.dtype
        )
        if delta.shape != self.info.shape:
            where = f"method {self._method.name} on {self._walk.name}"
            raise ConfigError(
                where, expected=f"a delta of shape {list(self.info.shape)}", found=str(list(delta.shape))
            )
        return self._scaled(delta.reshape(-1))

    # Onto the base

    def _scaled(self, delta: FloatArray) -> FloatArray:
        factor = float(self._settings.get("lambda", 1.0))
        return delta if factor == 1 else delta * delta.dtype.type(factor)

    def _moved(
        self, start: int, words: Words, delta: FloatArray, at: NDArray[np.int64] | None = None
    ) -> Words:
        """Base plus merged delta, rounded once; the base's words where the delta is zero. `at` says which
        elements of the run these are, if they are not all.
        """
        dtype = self.info.dtype
        if self._landing_key is not None:
            return self._landed(start, words, to_float(words, dtype) + delta, at)
        if self._out == dtype and dtype.code == "BF16":
            return sums.moved_bf16(words, delta)
        with np.errstate(over="ignore", invalid="ignore"):
            result = from_float(to_float(words, dtype) + delta, self._out)
        return np.where(delta == 0, self._as_base(words), result)

    def _landed(
        self, start: int, words: Words, total: FloatArray, at: NDArray[np.int64] | None = None
    ) -> Words:
        """Where sums land on the result's grid; the base's words where nothing was added."""
        assert self._landing_key is not None, "only where elements land"
        draws = drawn(self._landing_key, start, np.arange(words.size) if at is None else at)
        landed = land(total.astype(np.float64), self._out, draws)
        return np.where(total == to_float(words, self.info.dtype), self._as_base(words), landed)

    def _as_base(self, words: Words) -> Words:
        return np.array(cast(words, self.info.dtype, self._out))


def averaged_coefficients(
    weights: NDArray[np.float64], settings: Mapping[str, Scalar]
) -> NDArray[np.float64]:
    """Where a method cannot do what it does otherwise."""
    return combinations.average(None, weights, normalize=True) * float(settings["lambda"])


def own_coefficients(
    method: Method,
    gram: NDArray[np.float64] | None,
    weights: NDArray[np.float64],
    settings: Mapping[str, Scalar],
) -> NDArray[np.float64]:
    """Those of a method that combines vectors."""
    given = {name: settings[name] for name in method.arguments}
    with quiet():
        coefficients: NDArray[np.float64] = method.function(gram, weights, **given)
    return coefficients * float(settings.get("lambda", 1.0))


def _row_length(info: TensorInfo, method: Method, per: str) -> int:
    """Elements that belong together: a row where rows are ranked or have coefficients of their own, else
    one.
    """
    if method.drops == "magprune":
        return max(prod(info.shape[1:]) if len(info.shape) > 1 else info.numel, 1)
    by_rows = per == "row" or method.needs == "importance"
    return max(info.shape[-1], 1) if by_rows and info.shape else 1


def _few(moved: Sequence[NDArray[np.int64] | None], count: int) -> NDArray[np.int64] | None:
    """The union of positions among `count`, where they are few: the others need no arithmetic."""
    known = [positions for positions in moved if positions is not None]
    if len(known) < len(moved) or sum(positions.size for positions in known) > count // 2:
        return None
    touched = np.zeros(count, np.bool_)
    for positions in known:
        touched[positions] = True
    return np.flatnonzero(touched)


def _dots(vectors: FloatArray, *, axis: int) -> NDArray[np.float64]:
    """Gram matrices over one axis of each vector: [n, ...] becomes [..., n, n]."""
    wide = vectors.astype(np.float64)
    return np.stack(
        [np.stack([(left * right).sum(axis=axis) for right in wide], axis=-1) for left in wide], axis=-2
    )


def averages(method: Method, info: TensorInfo, members: Sequence[Member], name: str) -> bool:
    """Whether a tensor is averaged: a model lacks statistics of it, or it is no matrix, and the method is one
    of matrices.
    """
    no_matrix = method.reach == "matrix" and len(info.shape) != 2
    return no_matrix or lacks(method, members, name) is not None


def lacks(method: Method, members: Sequence[Member], name: str) -> str | None:
    """The label of a model without the statistics that the method needs of a tensor; then the tensor is
    averaged.
    """
    if method.needs not in ("fisher", "gram"):
        return None
    for member in members:
        statistics = member.fisher if method.needs == "fisher" else member.gram
        if statistics is None or name not in statistics.tensors:
            return member.input.label
    return None


def _of(statistics: ModelStatistics | None) -> ModelStatistics:
    assert statistics is not None
    return statistics
