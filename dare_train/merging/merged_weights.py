"""The merged model as weights that are worked out when they are read, whether into a checkpoint or into a
package.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words, cast
from ..errors import CheckpointError, ConfigError
from ..package.masks import key_of
from ..weights.protocol import SEGMENT, TensorInfo, Weights, only, runs
from .config.recipe import Recipe
from .config.setting_resolver import SettingResolver
from .deltas import Member
from .methods.parameters import Scalar
from .methods.registry import Method
from .models.inputs import Input
from .models.matching import Fate, carried_words
from .statistics.statistics_file import Floats, StatisticsFile
from .tensor_on_cpu import MergedTensor, averages

if TYPE_CHECKING:
    from .devices import Devices
    from .tensor_on_device import DeviceTensor

_PREPARED = 16
"""Tensors whose thresholds and coefficients are remembered: as many as threads may be at work on at a time,
and more."""


@dataclass(kw_only=True)
class Statistics:
    """A model's statistics by the result's names."""

    file: StatisticsFile
    names: Mapping[str, str]

    @classmethod
    def of(cls, file: StatisticsFile, model: Input) -> Statistics:
        """Those of a model, which has them under its own names."""
        return cls(file=file, names={name: own for name, own in model.names.items() if own in file.tensors})

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: self.file.tensors[name_in_file] for name, name_in_file in self.names.items()}

    def read(self, name: str, start: int, count: int) -> Floats:
        return self.file.read(self.names[name], start, count)

    def whole(self, name: str) -> Floats:
        return self.file.whole(self.names[name])

    def transposed(self, name: str) -> bool:
        return self.file.transposed(self.names[name])

    def fits(self, name: str, info: TensorInfo) -> bool:
        """Whether these can be the statistics of a tensor that the base has like this."""
        shape = self.tensors[name].shape
        if self.file.kind == "fisher":
            return shape == info.shape or (
                len(shape) == len(info.shape) > 0 and shape[1:] == info.shape[1:] and shape[0] > info.shape[0]
            )
        return len(info.shape) == 2 and shape[0] == info.shape[0 if self.transposed(name) else 1]


class Merged:
    """Implements `Weights`: every tensor of the result, any run of it, from any thread.

    Attributes:
        label: what messages call it.
        tensors: dtype and shape by name.
        untied: whether it has apart what the base's configuration may say is one, such as a head.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        base: Weights,
        inputs: Sequence[Input],
        fates: Sequence[Fate],
        *,
        values: SettingResolver,
        fisher: Sequence[Statistics] = (),
        gram: Sequence[Statistics] = (),
        threads: int = 1,
        devices: Devices | None = None,
        untied: bool = False,
    ) -> None:
        self.untied = untied
        self.folder: Path | None = None
        self.label = f"{method.name} of {', '.join(model.label for model in inputs)}"
        self.recipe = recipe
        self.method = method
        self.base = base
        self.inputs = inputs
        self.fates = {fate.name: fate for fate in fates}
        self.tensors = {fate.name: fate.info for fate in fates}
        self.fisher = fisher
        self.gram = gram
        self._values = values
        self._threads = threads
        self._devices = devices
        self._lock = threading.Lock()
        self._busy: dict[object, threading.Lock] = {}
        self._factors: dict[int, float] = {}
        self._factors_turn = threading.Lock()
        self._prepared: OrderedDict[str, MergedTensor | DeviceTensor] = OrderedDict()
        self._last: OrderedDict[tuple[str, int], Words] = OrderedDict()
        for statistics in (fisher, gram):
            self._check_statistics(statistics)

    def _check_statistics(self, given: Sequence[Statistics]) -> None:
        """Before any arithmetic: they are about these models, and have shapes that fit.

        Raises:
            CheckpointError: they are not.
        """
        for statistics, model in zip(given, self.inputs, strict=False):
            if not statistics.names:
                raise CheckpointError(
                    str(statistics.file.path),
                    expected=f"statistics of tensors that {model.label} has",
                    found=", ".join([*statistics.file.tensors][:3]) or "no tensor",
                    remedy="are they another model's?",
                )
        for fate in self.fates.values():
            if fate.how == "merged" and given:
                for number in fate.models:
                    self._check_shape(fate.name, given[number])

    def _check_shape(self, name: str, statistics: Statistics) -> None:
        info = self.base.tensors[name]
        if name in statistics.names and not statistics.fits(name, info):
            raise CheckpointError(
                f"{statistics.file.path}: {name}",
                expected=f"statistics for shape {list(info.shape)}",
                found=str(list(statistics.tensors[name].shape)),
            )

    def averaged(self, name: str) -> bool:
        """Whether a tensor is averaged, since statistics of it are missing or it is no matrix."""
        members = [self._member(name, number) for number in self.fates[name].models]
        return averages(self.method, self.base.tensors[name], members, name)

    def has_gram(self, name: str) -> bool:
        """Whether every model has a Gram matrix of a tensor."""
        return all(name in self.gram[number].tensors for number in self.fates[name].models)

    def beside(self, folder: Path) -> Merged:
        """The same, with configuration and tokenizer in a folder."""
        view = copy(self)
        view.folder = folder
        return view

    def merged_only(self) -> Weights:
        """Those tensors that were merged: neither carried along by a model nor left as they are in the
        base.
        """
        return only(self, [fate.name for fate in self.fates.values() if fate.how == "merged"])

    def base_numel(self, name: str) -> int:
        """Leading elements of a tensor that the base has."""
        return (
            min(self.base.tensors[name].numel, self.tensors[name].numel) if name in self.base.tensors else 0
        )

    def runs(self, name: str) -> list[tuple[int, int]]:
        """(start, count) of the runs that are worked out at once: those of the base's part, then those of
        added rows.
        """
        numel = self.tensors[name].numel
        split = self.base_numel(name)
        inner = self._tensor(name).runs if self.fates[name].how == "merged" else list(runs(split, SEGMENT))
        return [*inner, *((split + start, count) for start, count in runs(numel - split, SEGMENT))]

    def read(self, name: str, start: int, count: int) -> Words:
        """Words of the elements with flat indices [start, start + count), put together from runs."""
        parts = []
        for first, length in self.runs(name):
            begin = max(first, start)
            end = min(first + length, start + count)
            if begin < end:
                parts.append(self._remembered(name, first, length)[begin - first : end - first])
        return (
            parts[0]
            if len(parts) == 1
            else np.concatenate([np.empty(0, self.tensors[name].dtype.word), *parts])
        )

    def _remembered(self, name: str, start: int, count: int) -> Words:
        """A run that several readers may want a part of: the first works it out, while others wait."""
        key = (name, start)
        with self._lock:
            remembered = self._last.get(key)
            turn = self._busy.setdefault(key, threading.Lock())
        if remembered is not None:
            return remembered
        with turn:
            with self._lock:
                if key in self._last:
                    return self._last[key]
            words = self.run(name, start, count)
            with self._lock:
                self._last[key] = words
                while (
                    len(self._last) > 1
                    and sum(run.size for run in self._last.values()) > 4 * self._threads * SEGMENT
                ):
                    self._last.popitem(last=False)
        return words

    def run(self, name: str, start: int, count: int) -> Words:
        """One of the `runs`."""
        fate = self.fates[name]
        info = self.tensors[name]
        if fate.how == "carried":
            return carried_words(self.inputs[fate.models[0]], name, start, count, info.dtype)
        if fate.how == "copied":
            return cast(self.base.read(name, start, count), self.base.tensors[name].dtype, info.dtype)
        inside = start < self.base_numel(name)
        words = self._tensor(name).merged(start, count) if inside else np.zeros(count, info.dtype.word)
        if fate.added is not None and fate.added.rows.size:
            fate.added.fill(words, name, start, info, self.base, self.inputs, self._weights(name))
        return words

    def _weights(self, name: str) -> list[float]:
        known = [parameter for parameter in self.method.parameters if parameter.name == "weight"]
        return [
            float(self._values.value(known[0], name, number)) if known else 1.0
            for number in range(len(self.inputs))
        ]

    def _tensor(self, name: str) -> MergedTensor | DeviceTensor:
        """A tensor with its thresholds and coefficients, worked out by whoever needs it first."""
        with self._lock:
            prepared = self._prepared.get(name)
            if prepared is not None:
                return prepared
            turn = self._busy.setdefault(name, threading.Lock())
        with turn:
            with self._lock:
                if name in self._prepared:
                    return self._prepared[name]
            prepared = self._prepare(name)
            with self._lock:
                self._prepared[name] = prepared
                while len(self._prepared) > _PREPARED:
                    self._prepared.popitem(last=False)
        return prepared

    def _prepare(self, name: str) -> MergedTensor | DeviceTensor:
        shared = self._shared(name)
        if self.method.needs == "task":
            shared |= self._of_task(name, int(shared["task"]))
        members = [self._member(name, number) for number in self.fates[name].models]
        info = self.base.tensors[name]
        out = self.tensors[name].dtype
        rescale = self.method.rescale or self.recipe.rescale
        lands = self.recipe.rounding == "stochastic" and out.can_be_delta
        device = self._devices.of(name) if self._devices is not None and not lands else None
        if device is not None:
            from .tensor_on_device import DeviceTensor, works

            if works(self.method, info, out, name, members, rescale):
                return DeviceTensor(
                    self.method, self.base, name, out, members, shared, rescale=rescale, device=device
                )
        return MergedTensor(
            self.method, self.base, name, out, members, shared, rescale=rescale, threads=self._threads,
            landing_key=key_of(self.recipe.seed, name) if lands else None,
        )  # fmt: skip

    def _shared(self, name: str) -> dict[str, Scalar]:
        """Values of the parameters of which the merge has one."""
        return {
            parameter.name: self._values.value(parameter, name, None)
            for parameter in self.method.parameters
            if not parameter.per_model
        }

    def _of_task(self, name: str, task: int) -> dict[str, Scalar]:
        """A task's place among the models that have a tensor, and its factor over all tensors."""
        if task == 0:
            return {"task": 0, "factor": 1.0}
        if task > len(self.inputs):
            raise ConfigError("task", expected=f"0 to {len(self.inputs)}, a model's number", found=str(task))
        models = [*self.fates[name].models]
        if task - 1 not in models:
            return {"task": -1, "factor": 0.0}
        return {"task": models.index(task - 1) + 1, "factor": self._factor_of(task)}

    def _factor_of(self, task: int) -> float:
        """Worked out by whoever needs it first, in a pass over all that is merged."""
        with self._factors_turn:
            if task not in self._factors:
                own, masked = sum(self._task_norms(task), np.zeros(2))
                self._factors[task] = float(own / masked) if masked != 0 else 0.0
            return self._factors[task]

    def _task_norms(self, task: int) -> Iterator[NDArray[np.float64]]:
        rescale = self.method.rescale or self.recipe.rescale
        for name, fate in self.fates.items():
            if fate.how == "merged" and task - 1 in fate.models:
                members = [self._member(name, number) for number in fate.models]
                tensor = MergedTensor(
                    self.method, self.base, name, self.tensors[name].dtype, members, self._shared(name),
                    rescale=rescale, threads=self._threads,
                )  # fmt: skip
                yield tensor.task_norms([*fate.models].index(task - 1) + 1)

    def _member(self, name: str, number: int) -> Member:
        settings = {
            parameter.name: self._values.value(parameter, name, number)
            for parameter in self.method.parameters
            if parameter.per_model
        }
        return Member(
            input=self.inputs[number],
            seed=(self.recipe.seed + number) % (1 << 64),
            settings=settings,
            fisher=self.fisher[number] if self.fisher else None,
            gram=self.gram[number] if self.gram else None,
        )
