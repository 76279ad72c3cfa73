"""A base and a model that have the same weights cut otherwise: experts by number, or all in one tensor.

transformers says which layout its modules have and which its files; where it does, a model is read in the
layout of its base. Nothing else is known to be the same.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...errors import ConfigError, TensorMismatch
from ..alignment import align
from ..files.config_file import config_beside
from ..files.quantised import Quantised
from ..live.layouts import Block, Place
from ..protocol import TensorInfo, Weights
from ..renaming import apart_in_layers
from ..skeletons import skeleton
from .relaid import Relaid

if TYPE_CHECKING:
    from ..live.checkpoint_names import Places, Shapes

logger = logging.getLogger("dare_train")


def in_layout_of(base: Weights, model: Weights) -> Weights:
    """A model with its tensors cut as those of the base, where transformers defines how; else as it is."""
    try:
        aligned, _ = align(base, model.tensors.keys(), model=model.label)
    except TensorMismatch:
        return model
    missing, new = apart_in_layers(aligned.tensors, model.tensors)
    if not missing or not new or Quantised.of(model) or Quantised.of(base):
        return model
    known = _places(base, model)
    if known is None:
        return model
    places, shapes = known
    cut = _cut(model, places, shapes, missing, new)
    joined = _joined(model, places, shapes, missing, new)
    if not cut and not joined:
        return model
    logger.warning(
        "%s: %d tensors cut, joined or named as %s has them, by transformers' own conversion",
        model.label, len(cut) + len(joined), base.label,
    )  # fmt: skip
    return _relaid(model, shapes, cut, joined)


def _places(base: Weights, model: Weights) -> tuple[Places, Shapes] | None:
    """Where files have what lies in a module of the model's class, and the shapes there; None where
    transformers says nothing of it.
    """
    modules = (skeleton(config_beside(weights)) for weights in (model, base))
    module = next((module for module in modules if module is not None), None)
    if module is None:
        return None
    from ..live.checkpoint_names import file_places

    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    try:
        return file_places(module, shapes), shapes
    except ConfigError:  # a conversion that is no view: those who ask then refuse the names as they are
        return None


def _cut(
    model: Weights,
    places: Places,
    shapes: Shapes,
    missing: Mapping[str, TensorInfo],
    new: Mapping[str, TensorInfo],
) -> dict[str, Place]:
    """Tensors as files have them, of those that the model has as modules do."""
    parts: defaultdict[str, list[str]] = defaultdict(list)
    for name, place in places.items():
        for source in place.sources:
            parts[source].append(name)
    fits = {
        source: source in new
        and model.tensors[source].shape == tuple(shapes[source])
        and all(name in missing and missing[name].shape == places[name].shape for name in names)
        for source, names in parts.items()
    }
    found = {name: places[name] for name in missing if name in places}
    return {
        name: place
        for name, place in found.items()
        if all(fits[source] for source in place.sources)
        and len({model.tensors[source].dtype for source in place.sources}) == 1
    }


def _joined(
    model: Weights,
    places: Places,
    shapes: Shapes,
    missing: Mapping[str, TensorInfo],
    new: Mapping[str, TensorInfo],
) -> dict[str, list[tuple[str, Block]]]:
    """Tensors as modules have them, of those that the model has as files do."""
    parts: defaultdict[str, list[tuple[str, Block]]] = defaultdict(list)
    for name, place in places.items():
        for block in place.blocks:
            parts[block.source].append((name, block))
    found = {}
    for source in missing:
        names = {name for name, _ in parts.get(source, ())}
        if not names or missing[source].shape != tuple(shapes[source]) or not names <= new.keys():
            continue
        fits = all(new[name].shape == places[name].shape for name in names)
        whole = sum(block.length for _, block in parts[source]) == missing[source].numel
        if fits and whole and len({new[name].dtype for name in names}) == 1:
            found[source] = parts[source]
    return found


def _relaid(
    model: Weights, shapes: Shapes, cut: Mapping[str, Place], joined: Mapping[str, list[tuple[str, Block]]]
) -> Relaid:
    used = {source for place in cut.values() for source in place.sources}
    used |= {name for blocks in joined.values() for name, _ in blocks}
    tensors = {name: info for name, info in model.tensors.items() if name not in used}
    for name, place in cut.items():
        tensors[name] = TensorInfo(model.tensors[next(iter(place.sources))].dtype, place.shape)
    for name, blocks in joined.items():
        tensors[name] = TensorInfo(model.tensors[blocks[0][0]].dtype, tuple(shapes[name]))
    return Relaid(model, tensors, cut=cut, joined=joined)
