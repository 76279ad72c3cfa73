"""What the updates of an adapter on disk are added to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...dtypes import DType, Words, cast
from ..live.layouts import Place
from ..protocol import TensorInfo, Weights
from .adapted_modules import Modules


class AdaptedBase:
    """Tensors of the base, or what the adapter has for them: modules that were trained in full. Implements
    `Weights`.
    """

    def __init__(self, modules: Modules, adapter: Weights, keys: Mapping[str, str], *, rounded: bool) -> None:
        self.label = modules.label
        self._base = modules.base
        self._adapter = adapter
        self._keys = keys
        self.in_modules = dict(modules.tensors)
        """What modules have, in the dtypes of the files."""
        placed = {source for place in modules.places.values() for source in place.sources}
        unplaced = {name: adapter.tensors[key].shape for name, key in keys.items() if name not in placed}
        beside = {name: Place.whole(name, shape) for name, shape in unplaced.items()}
        # A module that was trained in full may have other rows than the base's, such as a new head.
        resized = {
            name: Place.whole(source, adapter.tensors[keys[source]].shape)
            for name, place in modules.places.items()
            for source in place.sources & keys.keys()
            if place.is_whole(modules.shapes[source])
        }
        self.places = {**modules.places, **resized, **beside}
        self.tensors = dict(self._base.tensors)
        for name, place in self.places.items():
            trained = [keys[source] for source in sorted(place.sources) if source in keys]
            if trained:
                info = TensorInfo(adapter.tensors[trained[0]].dtype, place.shape)
                self.tensors[name] = self._info(name, info, rounded)
        for source, key in keys.items():
            self.in_modules[source] = TensorInfo(self._dtype_of(source), adapter.tensors[key].shape)

    def _info(self, name: str, info: TensorInfo, rounded: bool) -> TensorInfo:
        base_info = self._base.tensors.get(name)
        if base_info is not None and base_info.dtype.can_be_delta and info.dtype.can_be_delta:
            finer = info.dtype.mantissa_bits > base_info.dtype.mantissa_bits
            return info if finer and not rounded else TensorInfo(base_info.dtype, info.shape)
        return info

    def _dtype_of(self, source: str) -> DType:
        of = (name for name, place in self.places.items() if source in place.sources)
        return self.tensors[next(of)].dtype

    def read(self, name: str, start: int, count: int) -> Words:
        place = self.places.get(name)
        trained = place.sources & self._keys.keys() if place is not None else ()
        if place is None or not trained:
            return self._base.read(name, start, count)
        if len(place.blocks) == 1 and place.blocks[0].is_run and not place.blocks[0].offset:
            return self._trained(name, next(iter(trained)), start, count)
        dtype = self.tensors[name].dtype
        words = np.zeros(count, dtype.word)
        if place.sources - trained:
            words[:] = cast(self._base.read(name, start, count), self._base.tensors[name].dtype, dtype)
        for block in place.blocks:
            low, high = max(start, block.start), min(start + count, block.start + block.length)
            if low < high and block.source in trained:
                whole = self._trained(name, block.source, 0, self.in_modules[block.source].numel)
                words[low - start : high - start] = whole[block.places(low - block.start, high - block.start)]
        return words

    def _trained(self, name: str, source: str, start: int, count: int) -> Words:
        key = self._keys[source]
        words = self._adapter.read(key, start, count)
        return cast(words, self._adapter.tensors[key].dtype, self.tensors[name].dtype)
