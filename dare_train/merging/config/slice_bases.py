"""What stands for the base in each slice of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...errors import ConfigError
from .recipe_parts import LayerRange
from .yaml_parts import Inputs

Bases = tuple[str | None, ...]


def bases_of(slices: object, of_all: str | None) -> Bases:
    """The model that each slice calls its base, which is that of all where it calls none so."""
    listed = slices if isinstance(slices, list) else []
    named = [each.get("base_model") if isinstance(each, dict) else None for each in listed]
    return tuple(str(name) if name else of_all for name in named)


def with_bases(inputs: Inputs, base: str | None) -> Inputs:
    """What stands for one base in each slice, where layers move: its own layers, or those that all models
    have there; without a base the first model's.
    """
    if not any(layers.moved for layers in inputs.layers):
        return inputs
    names = [each.model for each in inputs.models]
    return replace(inputs, layers=tuple(_with_base(each, names, base) for each in inputs.layers))


def _with_base(layers: LayerRange, names: Sequence[str], base: str | None) -> LayerRange:
    first = {name: layers.origin(n) for n, name in enumerate(names) if layers.models[n] is not None}
    origins = tuple(layers.origin(n) for n in range(len(names)))
    model = next(iter(first)) if base is None else base
    if model not in first and len({*first.values()}) > 1:
        raise ConfigError(
            layers.label,
            expected=f"{model} among the sources, since they have layers of other places",
            found=", ".join(first),
            remedy="list it there with its layer_range",
        )
    begin = first.get(model, next(iter(first.values())))
    return replace(layers, origins=origins, base=(model, begin))


def with_own_bases(inputs: Inputs, bases: Bases, *, merged_too: bool, first: bool) -> Inputs:
    """The base of each slice among its sources, as mergekit wants it.

    Args:
        merged_too: whether the base is one of those that are merged, as its weights are.
        first: whether it is the first of them.

    Raises:
        ConfigError: a slice has no base, or does not list it; or in one a model comes first that does not in
            another.
    """
    names = [each.model for each in inputs.models]
    for layers, base in zip(inputs.layers, bases, strict=True):
        sources = [name for name, settings in zip(names, layers.models, strict=True) if settings is not None]
        if base not in sources:
            raise ConfigError(
                f"base_model of {layers.label}",
                expected=f"one of its sources: {', '.join(sources)}",
                found="none" if base is None else base,
                remedy="list it there with its layer_range",
            )
    order = _bases_first(names, bases) if first else [*range(len(names))]
    arranged = inputs.arranged(order, "")
    ranges = []
    for layers, base in zip(arranged.layers, bases, strict=True):
        place = [model.model for model in arranged.models].index(str(base))
        taking = [settings is not None for settings in layers.models]
        if first and any(taking[:place]):
            raise ConfigError(
                f"base_model of {layers.label}",
                expected="a model that is the base wherever it meets these models",
                found=base,
                remedy="make each order of models a merge of its own, and stack their layers",
            )
        models = tuple(
            settings if merged_too or number != place else None
            for number, settings in enumerate(layers.models)
        )
        ranges.append(replace(layers, models=models, base=(str(base), layers.origin(place))))
    return Inputs(models=arranged.models, layers=tuple(ranges))


def _bases_first(names: Sequence[str], bases: Bases) -> list[int]:
    return sorted(range(len(names)), key=lambda place: names[place] not in bases)
