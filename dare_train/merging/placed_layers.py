"""Base and models of a merge with their layers where the result has them."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..weights.protocol import Weights
from .config.task import MergeTask
from .models.naming import ModelLike, open_model, package_of
from .models.references import folder_of, open_reference, parts_of
from .models.relayered import Relayered, Run


@dataclass(frozen=True, kw_only=True)
class InPlaces:
    """What `in_places` gives."""

    base: Weights
    models: tuple[ModelLike, ...]
    numbers: tuple[int, ...] | None = None
    """By layer of the result, its number in the base's model; None where no layer moved."""


def in_places(task: MergeTask, base: Weights) -> InPlaces:
    """Base and models of a task as they are, or where its slices move layers, as the result needs them.

    Raises:
        ConfigError: a model has no such layers, or is a package.
    """
    recipe = task.recipe
    if not any(layers.moved for layers in recipe.layers):
        return InPlaces(base=base, models=task.models)
    models = opened(task, base, "where layers move")
    named = {model.model: weights for model, weights in zip(recipe.models, models, strict=True)}
    views = tuple(_view(task, number, weights) for number, weights in enumerate(models))
    runs = []
    for each in recipe.layers:
        name, origin = each.base or (recipe.base, each.first)
        weights = base if name == recipe.base else _as_base(task, name, named[name])
        runs.append(Run(first=each.first, count=each.last - each.first, weights=weights, origin=origin))
    outside = runs[0].weights, runs[-1].weights
    return InPlaces(
        base=Relayered(runs, *outside, folder=folder_of(base), label=base.label),
        models=views,
        numbers=tuple(run.origin + place for run in runs for place in range(run.count)),
    )


def _as_base(task: MergeTask, name: str, model: Weights) -> Weights:
    """A model that stands for the base: with an adapter, in the dtypes of what it is merged into."""
    if len(parts_of(name)) < 2:
        return model
    return open_reference(name, dequantize=task.recipe.dequantize, rounded=True)


def _view(task: MergeTask, number: int, model: Weights) -> Relayered:
    runs = [
        Run(first=each.first, count=each.last - each.first, weights=model, origin=each.origin(number))
        for each in task.recipe.layers
        if each.models[number] is not None
    ]
    return Relayered(runs, model, model, folder=folder_of(model), label=model.label)


def opened(task: MergeTask, base: Weights, where: str) -> list[Weights]:
    """The models of a task as weights.

    Raises:
        ConfigError: one is a package, which cannot be one `where` it is asked for.
    """
    models = []
    for model, given in zip(task.recipe.models, task.models, strict=True):
        if package_of(given) is not None:
            remedy = "dare-train apply makes one of base and package"
            raise ConfigError(model.model, expected=f"checkpoints, {where}", found="a package", remedy=remedy)
        models.append(open_model(given, base, dequantize=task.recipe.dequantize))  # type: ignore[arg-type]
    return models
