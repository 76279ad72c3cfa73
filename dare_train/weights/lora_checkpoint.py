"""PEFT adapters on disk, seen as the model that they make of a base: merged as it is read, never held whole.

A LoRA adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. Its tensors are named
after modules: `base_model.model.{module}.lora_A.weight` and its like are factors of an update; any other was
trained in full, such as a new head, and takes the place of the base's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ..dtypes import Words, cast, to_float
from ..errors import CheckpointError, TensorMismatch
from .alignment import align
from .checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SINGLE, Checkpoint
from .lora_config import MERGE, AdapterConfig
from .low_rank import LowRank, Matrix, finest, merged_words
from .protocol import SEGMENT, TensorInfo, Weights, runs

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
    if not isinstance(tuned, Checkpoint):
        return tuned
    opened = {file.path.name for file in tuned.files.values()}
    described = (tuned.folder / ADAPTER_CONFIG).exists()
    if ADAPTER_WEIGHTS in opened or (described and not opened):
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
        factors, full = _sorted_keys(adapter)
        if not factors:
            expected = "factors lora_A and lora_B"
            raise CheckpointError(adapter.label, expected=expected, found=f"{len(full)} other tensors")
        aligned, _ = align(base, {*(f"{module}.weight" for module in factors), *full}, model=adapter.label)
        self._adapter = adapter
        copies = _without_copies(full, aligned, adapter, config)
        self._plain = _Plain(aligned, adapter, copies, rounded=not unrounded)
        self._updates = dict(_updates(factors, self._plain, adapter, config))
        self._last: tuple[str, LowRank] | None = None
        merging = {name: self._plain.tensors[name] for name in self._updates} if unrounded else {}
        self.tensors = {**self._plain.tensors, **{name: finest(info) for name, info in merging.items()}}
        self.whole = frozenset(name for name in full if config.adds(name))
        """Tensors of `modules_to_save`, such as a new head: a package carries them as they are."""

    def read(self, name: str, start: int, count: int) -> Words:
        if name not in self._updates:
            return self._plain.read(name, start, count)
        info, into = self._plain.tensors[name], self.tensors[name].dtype
        return merged_words(self._plain, [self._low_rank(name)], info, name, start, count, into=into)

    def _low_rank(self, name: str) -> LowRank:
        """The update of one tensor; the last one is remembered, since tensors are read run by run."""
        last = self._last
        if last is None or last[0] != name:
            last = self._last = (name, self._updates[name].load(self._adapter))
        return last[1]


class _Plain:
    """What the adapter's updates are added to: tensors of the base, or what the adapter has for them."""

    def __init__(self, base: Weights, adapter: Weights, keys: Mapping[str, str], *, rounded: bool) -> None:
        self.label = base.label
        self._base = base
        self._adapter = adapter
        self._keys = keys
        self.tensors = dict(base.tensors)
        for name, key in keys.items():
            info = adapter.tensors[key]
            base_info = base.tensors.get(name)
            if base_info is not None and base_info.dtype.can_be_delta and info.dtype.can_be_delta:
                finer = info.dtype.mantissa_bits > base_info.dtype.mantissa_bits
                info = info if finer and not rounded else TensorInfo(base_info.dtype, info.shape)
            self.tensors[name] = info

    def read(self, name: str, start: int, count: int) -> Words:
        if name not in self._keys:
            return self._base.read(name, start, count)
        key = self._keys[name]
        words = self._adapter.read(key, start, count)
        return cast(words, self._adapter.tensors[key].dtype, self.tensors[name].dtype)


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
    full: dict[str, str], base: Weights, adapter: Checkpoint, config: AdapterConfig
) -> dict[str, str]:
    """`full` without the output embedding where it is tied: PEFT writes a copy, checkpoints do not hold it.

    Raises:
        TensorMismatch: a tensor is neither in the base nor in a module that the adapter adds.
    """
    known = {name: key for name, key in full.items() if name in base.tensors or config.adds(name)}
    for name in sorted(full.keys() - known.keys()):
        if not any(_same(adapter, full[name], key) for key in known.values()):
            expected = f"in {base.label}, or in a module under modules_to_save of {adapter.label}"
            remedy = f"{_WRONG_BASE} If so, {MERGE}"
            raise TensorMismatch(name, expected=expected, found="neither", remedy=remedy)
    return known


def _same(adapter: Checkpoint, first: str, second: str) -> bool:
    info = adapter.tensors[first]
    return info == adapter.tensors[second] and all(
        np.array_equal(adapter.read(first, start, count), adapter.read(second, start, count))
        for start, count in runs(info.numel, SEGMENT)
    )


@dataclass(frozen=True, kw_only=True)
class _Update:
    """Where the factors of one tensor's update lie in the adapter's file."""

    a: str | None
    """None for a bias: what was trained is added to it as it is."""
    b: str
    scaling: float
    transposed: bool = False
    magnitude: str | None = None

    def load(self, adapter: Checkpoint) -> LowRank:
        a = np.ones((1, 1)) if self.a is None else _matrix(adapter, self.a)
        b = _matrix(adapter, self.b)
        magnitude = None if self.magnitude is None else _matrix(adapter, self.magnitude).reshape(-1)
        return LowRank(a=a, b=b, scaling=self.scaling, transposed=self.transposed, magnitude=magnitude)


def _matrix(adapter: Checkpoint, key: str) -> Matrix:
    info = adapter.tensors[key]
    words = adapter.read(key, 0, info.numel)
    return to_float(words, info.dtype).astype(np.float64).reshape(info.shape[0], -1)


def _updates(
    factors: Mapping[str, Mapping[str, str]], base: Weights, adapter: Checkpoint, config: AdapterConfig
) -> Iterator[tuple[str, _Update]]:
    """(tensor, update) of every module.

    Raises:
        TensorMismatch: a module is not in the base, or has other shapes.
        CheckpointError: a module is of a kind that cannot be merged here.
    """
    modules = [_Module(name, parts, base, adapter, config) for name, parts in factors.items()]
    unmistakable = [module for module in modules if len(module.ways) == 1 and not module.embedding]
    certain = {way for module in unmistakable for way in module.ways}
    for module in modules:
        yield module.weight, module.weight_update(certain)
        if "B.bias" in module.parts:
            yield module.bias, module.bias_update()


class _Module:
    """One adapted module: its factors and the tensors of the base that they fit."""

    def __init__(
        self, name: str, parts: Mapping[str, str], base: Weights, adapter: Checkpoint, config: AdapterConfig
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

    def weight_update(self, certain: set[bool]) -> _Update:
        """`certain` says how the weights lie whose shapes leave no doubt."""
        doubtful = len(self.ways) == 2
        transposed = self._config.transposed if doubtful else next(iter(self.ways))
        if doubtful and certain - {transposed}:
            expected = (
                f"other modules to lie as fan_in_fan_out = {str(transposed).lower()} "
                "says, since this one is square"
            )
            raise CheckpointError(self.weight, expected=expected, found="some that do not", remedy=MERGE)
        if self._config.dora and (transposed or len(self._base_info(self.weight).shape) != 2):
            kind = "an Embedding" if self.embedding else "a Conv1D" if transposed else "a convolution"
            raise CheckpointError(self.weight, expected="DoRA on Linear modules", found=kind, remedy=MERGE)
        if self._config.dora:
            self._check_shape("magnitude_vector", self._base_info(self.weight).shape[:1])
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
