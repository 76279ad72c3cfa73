"""A merge as it is asked for: a recipe, and the weights that it is about."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config import Patterns, Rounding
from ...errors import ConfigError
from ...weights.lora.opening import WeightsLike
from ..methods.registry import Method, method_of
from ..models.naming import ModelLike
from .checks import check_choice
from .recipe import Recipe
from .recipe_parts import Model

OF_RUNNING = ("package", "allow_nonfinite", "allow_unchanged", "overwrite", "device", "progress", "ranks")
"""Arguments of `merge` that are none of its task."""


@dataclass(frozen=True, kw_only=True)
class MergeTask:
    """A recipe and what it is about, which need not lie in folders."""

    recipe: Recipe
    base: WeightsLike
    models: tuple[ModelLike, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> MergeTask:
        """Of folders and Hub ids, which a recipe names."""
        return cls(recipe=recipe, base=recipe.base, models=tuple(model.model for model in recipe.models))


def rounding_of(dtype: str | None, out_dtype: str | None, rounding: Rounding | None) -> Rounding:
    """How a merge rounds, of what `merge` is told.

    Raises:
        ConfigError: `dtype` is not "base", or contradicts `out_dtype`.
    """
    if dtype is not None:
        check_choice("dtype", dtype, ("base",))
        if out_dtype is not None:
            raise ConfigError("out_dtype", expected='none with dtype="base"', found=repr(out_dtype))
    return rounding or ("nearest" if dtype is None else "stochastic")


def task_of(
    base: WeightsLike,
    models: Sequence[ModelLike],
    *,
    method: str = "task_arithmetic",
    weights: Sequence[float] | None = None,
    p: float | Sequence[float] | None = None,
    take: Mapping[str, int | str] | None = None,
    rename: Mapping[str, str] | None = None,
    fisher: Sequence[str | os.PathLike[str]] | None = None,
    gram: Sequence[str | os.PathLike[str]] | None = None,
    exclude: Patterns = (),
    parameters: Mapping[str, Any] | None = None,
    **rest: Any,
) -> MergeTask:
    """The task of a call of `merge`, whose arguments these are: options of the recipe, and parameters of the
    method by name.

    Raises:
        ConfigError: an argument is wrong.
    """
    options = {
        name: rest.pop(name)
        for name in ("seed", "rescale", "out_dtype", "rounding", "tokenizer", "cast_base", "dequantize")
        if name in rest
    }
    given = {
        "weight": weights,
        "p": p,
        **(parameters or {}),
        **{name.rstrip("_"): value for name, value in rest.items()},
    }
    if isinstance(models, (str, os.PathLike)) or not isinstance(models, Sequence):
        raise ConfigError("models", expected="a list of models", found=repr(models))
    labels = _labels(models)
    shared, by_model = _settings(given, method_of(method), len(models))
    recipe = Recipe(
        method=method,
        base=label_of(base),
        models=tuple(
            Model(model=label, parameters=settings) for label, settings in zip(labels, by_model, strict=True)
        ),
        parameters=shared,
        exclude=exclude,  # type: ignore[arg-type]
        take={pattern: _labelled(model, labels) for pattern, model in (take or {}).items()},
        rename=rename or {},
        fisher=tuple(os.fspath(path) for path in fisher or ()),
        gram=tuple(os.fspath(path) for path in gram or ()),
        **options,
    )
    return MergeTask(recipe=recipe, base=base, models=tuple(models))


def _settings(
    given: Mapping[str, Any], method: Method, count: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings for all models, and those of each."""
    each = {parameter.name for parameter in method.parameters if parameter.per_model}
    shared: dict[str, Any] = {}
    by_model: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in given.items():
        if name in each and isinstance(value, Sequence) and not isinstance(value, (str, tuple)):
            if len(value) != count:
                raise ConfigError(
                    "weights" if name == "weight" else name,
                    expected=f"one for each of {count} models",
                    found=str(len(value)),
                )
            for settings, model_value in zip(by_model, value, strict=True):
                settings[name] = model_value
        elif value is not None:
            shared[name] = value
    return shared, by_model


def _labels(models: Sequence[ModelLike]) -> list[str]:
    """What the recipe calls each: numbered where two would have the same name."""
    labels = [label_of(model) for model in models]
    return [
        label if labels.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(labels)
    ]


def label_of(what: object) -> str:
    """What recipes and messages call a model."""
    if isinstance(what, (str, os.PathLike)):
        return str(os.fspath(what))
    return str(getattr(what, "name", None) or getattr(what, "label", None) or "model in memory")


def _labelled(model: int | str, labels: Sequence[str]) -> str:
    known = isinstance(model, int) and not isinstance(model, bool)
    return labels[model] if known and 0 <= model < len(labels) else str(model)  # type: ignore[index, operator]
