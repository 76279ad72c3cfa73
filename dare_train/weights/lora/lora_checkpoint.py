"""PEFT adapters on disk, seen as the model that they make of a base: merged as it is read, never held whole.

A LoRA adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. Its tensors are named
after modules: `base_model.model.{module}.lora_A.weight` and its like are factors of an update; any other was
trained in full, such as a new head, and takes the place of the base's.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...dtypes import Words, to_float
from ...errors import CheckpointError, TensorMismatch
from ..alignment import align
from ..files.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SINGLE, Checkpoint
from ..files.full_precision import check_full_precision
from ..live.viewed_updates import in_files
from ..low_rank import LowRank, Matrix, Stacked, Update, finest, merged_words, stacked_factors
from ..protocol import TensorInfo, Weights
from .adapted_base import AdaptedBase
from .adapted_modules import Modules, Parameter, by_class, plain
from .bases_of_adapters import (
    same_in,
    saved_alone,
    tell_adapter_beside,
    tell_other_base,
    tell_tied_head,
    with_own_heads,
)
from .lora_config import MERGE, AdapterConfig

logger = logging.getLogger("dare_train")

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>embedding_A|embedding_B|magnitude_vector|[AB])(?:\.weight|(?P<bias>\.bias))?"
)
_WRONG_BASE = "is this the base that the adapter was trained on?"
_SAVE_AGAIN = "fetch the adapter again, or save it again"


def merge_adapter(tuned: Weights, base: Weights, *, unrounded: bool = False) -> Weights:
    """`tuned` itself; or where it is a PEFT adapter, the model that it makes of `base`: see `AdapterWeights`.

    Raises:
        CheckpointError: the adapter is of a kind that cannot be merged here, or lies beside a whole model.
        TensorMismatch: it does not fit the base.
    """
    tell_adapter_beside(base)
    if not isinstance(tuned, Checkpoint):
        return tuned
    opened = {file.path.name for file in tuned.files.values()}
    described = (tuned.folder / ADAPTER_CONFIG).exists()
    if ADAPTER_WEIGHTS in opened or (described and not opened):
        check_full_precision(base, purpose="since the adapter is merged into it")
        return AdapterWeights(base, tuned, unrounded=unrounded)
    if described and not Path(tuned.label).is_file():
        expected = "a model or an adapter"
        remedy = f"give the file that is meant: {tuned.label}/{ADAPTER_WEIGHTS} or {tuned.label}/{SINGLE}"
        raise CheckpointError(tuned.label, expected=expected, found="both in one folder", remedy=remedy)
    return tuned


class AdapterWeights:
    """The model that a LoRA adapter makes of a base. Implements `Weights`, with the base's dtypes; or with
    `unrounded`, what is merged into 16-bit weights in float64, and what was trained in full as the adapter
    has it.

    Names are the adapter's: where it was trained on a task model and the base is the bare encoder, the
    base's are prefixed.
    """

    def __init__(self, base: Weights, adapter: Checkpoint, *, unrounded: bool = False) -> None:
        self.folder = adapter.folder
        self.label = adapter.label
        config = AdapterConfig.read(adapter.folder / ADAPTER_CONFIG)
        tell_other_base(adapter, base, config.base)
        factors, full = _sorted_keys(adapter)
        if not factors:
            expected = "factors lora_A and lora_B"
            raise CheckpointError(adapter.label, expected=expected, found=f"{len(full)} other tensors")
        of_files = base.tensors.keys()
        adapted = {f"{module}.weight" for module in factors}
        base = with_own_heads(base, adapted, saved_alone(full, adapter, config))
        tell_tied_head(adapter, base, adapted)
        modules = _modules(base, adapter, factors, full, config)
        self._adapter = adapter
        self._modules = modules
        copies = _without_copies(full, modules, adapter, config)
        self._plain = AdaptedBase(modules, adapter, copies, rounded=not unrounded)
        self._updates = dict(_updates(factors, modules, self._plain.in_modules, adapter, config))
        self._last: tuple[str, list[Update]] | None = None
        self._adapted = {
            name for name, place in self._plain.places.items() if place.sources & self._updates.keys()
        }
        copies_of_tied = base.tensors.keys() - of_files
        merging = (
            {name: self._plain.tensors[name] for name in self._adapted - copies_of_tied} if unrounded else {}
        )
        self.tensors = {**self._plain.tensors, **{name: finest(info) for name, info in merging.items()}}
        added = {name for name in full if config.adds(name)}
        self.whole = frozenset(name for name, place in self._plain.places.items() if place.sources <= added)
        """Tensors of `modules_to_save`, such as a new head: a package carries them as they are."""

    def read(self, name: str, start: int, count: int) -> Words:
        if name not in self._adapted:
            return self._plain.read(name, start, count)
        info, into = self._plain.tensors[name], self.tensors[name].dtype
        return merged_words(self._plain, self._loaded(name), info, name, start, count, into=into)

    def _loaded(self, name: str) -> list[Update]:
        """The updates of one tensor; the last ones are remembered, since tensors are read run by run."""
        last = self._last
        if last is None or last[0] != name:
            place = self._plain.places[name]
            sources = place.sources & self._updates.keys()
            found = {source: [self._updates[source].load(self._adapter)] for source in sources}
            shapes = {source: info.shape for source, info in self._plain.in_modules.items()}
            last = self._last = (name, in_files(found, {name: place}, shapes)[name])
        return last[1]


def _modules(
    base: Weights,
    adapter: Checkpoint,
    factors: Mapping[str, Mapping[str, str]],
    full: Mapping[str, str],
    config: AdapterConfig,
) -> Modules:
    """The modules that the adapter is about: by the names of the base's files, where these have them all."""
    weights = {f"{module}.weight" for module in factors}
    named = {*factors, *(name.rpartition(".")[0] for name in full)}
    found = None
    if not config.parameters and base.tensors:
        try:
            aligned, prefix = align(base, {*weights, *full}, model=adapter.label)
        except TensorMismatch:
            aligned, prefix = base, ""
        known = all(name in aligned.tensors or config.adds(name) for name in (*weights, *full))
        found = plain(aligned)
        elsewhere = _in_other_files(base, aligned, named, full, config, adapter.label)
        if elsewhere is not None:
            return elsewhere
        if known and not _lie_both_ways(factors, found, adapter):
            itself = by_class(base, named, config, adapter.label, own=True) if prefix else None
            return itself or found
    by_its_class = by_class(base, named, config, adapter.label)
    if by_its_class is not None:
        return by_its_class
    if found is None:
        where = f"{config.path}: target_parameters"
        expected = "a base whose config.json names a class of transformers that has them"
        raise CheckpointError(where, expected=expected, found=f"none such at {base.label}", remedy=MERGE)
    aligned, _ = align(base, {*weights, *full}, model=adapter.label)
    return plain(aligned)


def _in_other_files(
    base: Weights,
    aligned: Weights,
    named: set[str],
    full: Mapping[str, str],
    config: AdapterConfig,
    label: str,
) -> Modules | None:
    """As the base's class has them, where tensors that were trained in full, such as joined experts, lie in
    its files under other names, so that they are not new.
    """
    absent = full.keys() - aligned.tensors.keys()
    if not any(config.adds(name) for name in absent):
        return None
    modules = by_class(base, named, config, label)
    return modules if modules is not None and absent & modules.tensors.keys() else None


def _lie_both_ways(factors: Mapping[str, Mapping[str, str]], modules: Modules, adapter: Checkpoint) -> bool:
    """Whether some weights certainly lie as [out, in] and others as [in, out], so that square ones may be
    either.
    """
    ways: set[bool] = set()
    for module, parts in factors.items():
        info = modules.tensors.get(f"{module}.weight")
        if info is not None and len(info.shape) == 2 and "A" in parts and "B" in parts:
            shape = (adapter.tensors[parts["B"]].shape[0], adapter.tensors[parts["A"]].shape[-1])
            if shape[0] != shape[1]:
                ways.add(shape != info.shape)
    return len(ways) == 2


def _sorted_keys(adapter: Checkpoint) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Keys of factors by module and part; keys of tensors trained in full by their names in a checkpoint."""
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    full = {}
    # A name without a wrapper's comes last, and counts.
    for key in sorted(adapter.tensors, key=len, reverse=True):
        name = key.removeprefix("base_model.model.")
        match = _FACTOR.fullmatch(name)
        if match:
            factors[match["module"]][match["part"] + (match["bias"] or "")] = key
        elif ".original_module." not in name:
            full[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = key
    return factors, full


def _without_copies(
    full: dict[str, str], base: Modules, adapter: Checkpoint, config: AdapterConfig
) -> dict[str, str]:
    """`full` without the output embedding where it is tied: PEFT writes a copy, checkpoints do not hold it.

    Raises:
        TensorMismatch: a tensor is neither in the base nor in a module that the adapter adds.
    """
    known = {name: key for name, key in full.items() if name in base.tensors or config.adds(name)}
    for name in sorted(full.keys() - known.keys()):
        if not any(same_in(adapter, full[name], key) for key in known.values()):
            expected = f"in {base.label}, or in a module under modules_to_save of {adapter.label}"
            remedy = f"{_WRONG_BASE} If so, {MERGE}"
            raise TensorMismatch(name, expected=expected, found="neither", remedy=remedy)
    return known


@dataclass(frozen=True, kw_only=True)
class _Update:
    """Where the factors of one tensor's update lie in the adapter's file."""

    experts: int = 0
    """How many weights lie one on the other in a parameter that is adapted itself; 0 for that of a module."""

    a: str | None
    """None for a bias: what was trained is added to it as it is."""
    b: str
    scaling: float
    transposed: bool = False
    magnitude: str | None = None

    def load(self, adapter: Checkpoint) -> LowRank | Stacked:
        if self.experts and self.a is not None:
            factors = _matrix(adapter, self.a), _matrix(adapter, self.b)
            return stacked_factors(*factors, self.experts, scaling=self.scaling, transposed=self.transposed)
        a = np.ones((1, 1)) if self.a is None else _matrix(adapter, self.a)
        b = _matrix(adapter, self.b)
        magnitude = None if self.magnitude is None else _matrix(adapter, self.magnitude).reshape(-1)
        return LowRank(a=a, b=b, scaling=self.scaling, transposed=self.transposed, magnitude=magnitude)


def _matrix(adapter: Checkpoint, key: str) -> Matrix:
    info = adapter.tensors[key]
    words = adapter.read(key, 0, info.numel)
    return to_float(words, info.dtype).astype(np.float64).reshape(info.shape[0], -1)


def _updates(
    factors: Mapping[str, Mapping[str, str]],
    modules: Modules,
    infos: Mapping[str, TensorInfo],
    adapter: Checkpoint,
    config: AdapterConfig,
) -> Iterator[tuple[str, _Update]]:
    """(tensor, update) of every module.

    Raises:
        TensorMismatch: a module is not in the base, or has other shapes.
        CheckpointError: a module is of a kind that cannot be merged here.
    """
    base = _Infos(modules.label, infos)
    found = []
    for name, parts in factors.items():
        parameter = modules.parameter(name, config.parameters) if config.parameters else None
        if parameter is None:
            found.append(_Module(name, parts, base, adapter, config))
        else:
            yield parameter.tensor, _of_parameter(parameter, parts, adapter, config)
    unmistakable = [module for module in found if len(module.ways) == 1 and not module.embedding]
    certain = {way for module in unmistakable for way in module.ways}
    for module in found:
        lies = None if module.embedding else modules.transposed(module.name)
        yield module.weight, module.weight_update(certain if lies is None else {lies}, lies)
        if "B.bias" in module.parts:
            yield module.bias, module.bias_update()


def _of_parameter(
    parameter: Parameter, parts: Mapping[str, str], adapter: Checkpoint, config: AdapterConfig
) -> _Update:
    rank = config.rank_of(parameter.tensor)
    shapes = {part: adapter.tensors[key].shape for part, key in parts.items()}
    rows, columns = parameter.shape[-2:]
    inner, outer = (rows, columns) if parameter.transposed else (columns, rows)
    expected = {"A": (rank * parameter.experts, inner), "B": (outer, rank * parameter.experts)}
    if shapes != expected:
        where = f"factors of {list(parameter.shape)}"
        raise TensorMismatch(parameter.tensor, expected=where, found=str(shapes), remedy=_WRONG_BASE)
    return _Update(
        a=parts["A"],
        b=parts["B"],
        scaling=config.scaling_of(parameter.tensor),
        transposed=parameter.transposed,
        experts=parameter.experts,
    )


class _Infos(NamedTuple):
    """What modules have, for messages and shapes."""

    label: str
    tensors: Mapping[str, TensorInfo]


class _Module:
    """One adapted module: its factors and the tensors of the base that they fit."""

    def __init__(
        self, name: str, parts: Mapping[str, str], base: _Infos, adapter: Checkpoint, config: AdapterConfig
    ) -> None:
        self.name = name
        self.parts = parts
        self._base = base
        self._label = adapter.label
        self._config = config
        self._infos = {part: adapter.tensors[key] for part, key in parts.items()}
        self.weight = f"{name}.weight"
        self.bias = f"{name}.bias"
        self.embedding = "embedding_A" in parts or "embedding_B" in parts
        self._a = "embedding_A" if self.embedding else "A"
        self._b = "embedding_B" if self.embedding else "B"
        self._check_parts()
        self.ways = self._ways()
        """Whether the weight may lie transposed: one answer, or both where it is square."""

    def weight_update(self, certain: set[bool], lies: bool | None) -> _Update:
        """`certain` says how the weights lie whose shapes leave no doubt, `lies` how this one does, if
        its class is known.
        """
        doubtful = len(self.ways) == 2
        stated = self._config.transposed if lies is None else lies
        transposed = stated if doubtful else next(iter(self.ways))
        if doubtful and certain - {transposed}:
            expected = (
                f"other modules to lie as fan_in_fan_out = {str(transposed).lower()} "
                "says, since this one is square"
            )
            raise CheckpointError(self.weight, expected=expected, found="some that do not", remedy=MERGE)
        if self._config.dora:
            shape = self._base_info(self.weight).shape
            outputs = shape[-1] if transposed else shape[0]
            fitting = (outputs,) if len(shape) == 2 else (1, outputs, *(1 for _ in shape[2:]))
            self._check_shape("magnitude_vector", fitting)
        magnitude = self.parts["magnitude_vector"] if self._config.dora else None
        scaling = self._config.scaling_of(self.name)
        return _Update(
            a=self.parts[self._a],
            b=self.parts[self._b],
            scaling=scaling,
            transposed=transposed,
            magnitude=magnitude,
        )

    def bias_update(self) -> _Update:
        self._check_shape("B.bias", self._base_info(self.bias).shape)
        return _Update(a=None, b=self.parts["B.bias"], scaling=self._config.scaling_of(self.name))

    def _base_info(self, name: str) -> TensorInfo:
        """Of the base's tensor.

        Raises:
            TensorMismatch: there is none.
            CheckpointError: it is quantized.
        """
        info = self._base.tensors.get(name)
        if info is None:
            expected = f"in {self._base.label}, since {self._label} adapts it"
            raise TensorMismatch(name, expected=expected, found="missing", remedy=_WRONG_BASE)
        if not info.dtype.can_be_delta:
            expected = "a floating-point weight of 16 bits or more"
            remedy = "give the base in full precision"
            raise CheckpointError(name, expected=expected, found=info.dtype.code, remedy=remedy)
        return info

    def _check_parts(self) -> None:
        """All factors are there, and no others."""
        needed = {self._a, self._b} | ({"magnitude_vector"} if self._config.dora else set())
        for part in sorted(needed - self.parts.keys()):
            name = f"{self.name}.lora_{part}"
            expected = f"in {self._label}"
            raise TensorMismatch(name, expected=expected, found="missing", remedy=_SAVE_AGAIN)
        for part in sorted(self.parts.keys() - needed - {"B.bias"}):
            expected = f"the factors that {self._config.path.name} speaks of"
            raise CheckpointError(self.parts[part], expected=expected, found=f"lora_{part} too", remedy=MERGE)
        for part, info in self._infos.items():
            if not info.dtype.can_be_delta:
                key = self.parts[part]
                expected = "floating-point numbers of 16 bits or more"
                raise CheckpointError(key, expected=expected, found=info.dtype.code, remedy=MERGE)
        self._check_shape(self._a, (self._config.rank_of(self.name), *self._infos[self._a].shape[1:]))

    def _ways(self) -> set[bool]:
        shape = self._base_info(self.weight).shape
        a = self._infos[self._a].shape
        b = self._infos[self._b].shape
        joined = 1 < len(a) == len(b) and prod(b[1:]) == a[0]
        straight = joined and not self.embedding and shape == (b[0], *a[1:])
        turned = joined and len(a) == 2 and shape == (a[1], b[0])
        if not straight and not turned:
            expected = f"factors of a weight {list(shape)}, as in {self._base.label}"
            found = f"{list(a)} and {list(b)}"
            raise TensorMismatch(self.weight, expected=expected, found=found, remedy=_WRONG_BASE)
        return {way for way, fits in ((False, straight), (True, turned)) if fits}

    def _check_shape(self, part: str, fitting: tuple[int, ...]) -> None:
        shape = self._infos[part].shape
        if shape != fitting:
            key = self.parts[part]
            expected = f"shape {list(fitting)}"
            raise TensorMismatch(key, expected=expected, found=f"{list(shape)}", remedy=_SAVE_AGAIN)
