"""Searching merge settings: every combination of a grid, or Optuna's choice of them, by a metric of the
user's.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, brief, printable
from ..parallel.place_lock import kept
from ..parallel.scratch_folder import scratch_beside
from ..parallel.staged_folder import check_free, storage_errors
from .config.recipe import RESCALES, Recipe
from .config.task import MergeTask
from .merge import run
from .merge_report import MergeReport
from .methods.parameters import Scalar
from .methods.registry import method_of
from .prepared_merge import DeviceLike

if TYPE_CHECKING:
    from rich.console import RenderableType

Metric = Callable[[str], float]
"""Called with the folder of a merged checkpoint; returns a number."""

MOST_MERGES = 10_000
"""Of a grid; all of its combinations are checked before the first."""
_OF_THE_RECIPE = ("method", "rescale", "seed")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting that is searched."""

    name: str
    """A parameter of the method, for all models or, as `weight.0`, for one; or method, rescale or seed."""
    values: tuple[Scalar, ...]
    """All of them, in order."""
    step: float | None = None
    """Of a range of numbers; None for a choice."""

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Read `name=low:high:step` or `name=value,value,...`.

        Raises:
            ConfigError: it is neither, or has more than `MOST_MERGES` values.
        """
        name, equals, values = text.partition("=")
        name = "weight" + name.removeprefix("weights") if name.split(".")[0] == "weights" else name
        if not equals or not name or not values:
            raise ConfigError("search", expected="NAME=LOW:HIGH:STEP or NAME=VALUE,VALUE", found=repr(text))
        if ":" in values:
            return cls(name=name, **_range(text, values))
        return cls(name=name, values=tuple(scalar(value) for value in values.split(",")))


def _range(text: str, values: str) -> dict[str, Any]:
    try:
        low, high, step = (float(value) for value in values.split(":"))
    except ValueError as error:
        raise ConfigError("search", expected="NAME=LOW:HIGH:STEP, three numbers", found=repr(text)) from error
    if not (math.isfinite(low) and math.isfinite(high) and step > 0 and low <= high):
        raise ConfigError("search", expected="LOW at most HIGH, and a STEP above 0", found=repr(text))
    steps = (high - low) / step + 1e-9
    if not steps < MOST_MERGES:
        found = f"{brief(text)}, which are {steps + 1:,.0f}" if math.isfinite(steps) else brief(text)
        raise ConfigError("search", expected=f"at most {MOST_MERGES:,} values", found=found)
    return {"values": tuple(_plain(low + place * step) for place in range(int(steps) + 1)), "step": step}


def _plain(number: float) -> float:
    """Without what adding up steps leaves behind the twelfth digit."""
    return float(f"{number:.12g}")


def scalar(text: str) -> Scalar:
    """A word as the number or truth value that it spells, or as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination, and what the metric said of it."""

    settings: Mapping[str, Scalar]
    score: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """A search's trials in the order they were made, and the merge of the best."""

    trials: tuple[Trial, ...]
    best: Trial
    report: MergeReport


def search(
    task: MergeTask,
    axes: Sequence[Axis],
    metric: Metric,
    out: str | Path,
    *,
    trials: int | None = None,
    minimize: bool = False,
    overwrite: bool = False,
    device: DeviceLike | None = None,
    told: Callable[[Trial], object] | None = None,
) -> Found:
    """Merge with each combination of settings, ask the metric, and write the best into `out`.

    Args:
        task: what is merged; its recipe is what the settings change.
        axes: what is searched.
        metric: called with the folder of each result, which is removed afterwards.
        trials: this many combinations, chosen by Optuna (TPE, seeded by the recipe's seed); None tries the
            whole grid.
        minimize: the smallest score is the best instead of the largest.
        device: as for `merge`.
        told: called with each trial when it is done.

    Raises:
        ConfigError: a setting is none of the method's, the grid has more than `MOST_MERGES` combinations, the
            metric gives no finite number, or Optuna is not installed; and as `merge`.
        OutputExists: `out` is taken, or somebody else is writing there; before the first trial.
    """
    out = Path(out)
    _check_axes(task.recipe, axes, trials)
    with ExitStack() as stack:
        with storage_errors(out):
            stack.enter_context(kept(out))
        check_free(out, overwrite)
        return _searched(
            task, axes, metric, out, trials=trials, minimize=minimize, overwrite=overwrite, device=device,
            told=told,
        )  # fmt: skip


def _searched(
    task: MergeTask,
    axes: Sequence[Axis],
    metric: Metric,
    out: Path,
    *,
    trials: int | None,
    minimize: bool,
    overwrite: bool,
    device: DeviceLike | None,
    told: Callable[[Trial], object] | None,
) -> Found:
    done: list[Trial] = []

    def score(settings: Mapping[str, Scalar]) -> float:
        with scratch_beside(out) as scratch:
            tried = scratch / "model"
            run(
                replace(task, recipe=_checked(task.recipe, settings)),
                tried,
                device=device,
                allow_unchanged=True,
            )
            trial = Trial(settings=dict(settings), score=_number(metric(str(tried))))
        done.append(trial)
        if told is not None:
            told(trial)
        return trial.score

    if trials is None:
        for settings in _grid(axes):
            score(settings)
    else:
        _ask_optuna(axes, score, trials, minimize=minimize, seed=task.recipe.seed)
    best = (min if minimize else max)(done, key=lambda trial: trial.score)
    chosen = replace(task, recipe=_checked(task.recipe, best.settings))
    report = run(
        chosen, out, overwrite=overwrite, device=device, notes=[_told(best, len(done))], allow_unchanged=True
    )
    return Found(trials=tuple(done), best=best, report=report)


def _told(best: Trial, count: int) -> str:
    return (
        f"the best of {count} merges: "
        f"{', '.join(f'{name}={value}' for name, value in best.settings.items())}; score {best.score:g}"
    )


def _check_axes(recipe: Recipe, axes: Sequence[Axis], trials: int | None) -> None:
    """Every combination can be merged, as far as there are not too many to look at them all."""
    names = [axis.name for axis in axes]
    if len({*names}) < len(names):
        raise ConfigError("search", expected="each setting once", found=brief(names))
    if trials is not None and trials < 1:
        raise ConfigError("trials", expected="1 or more", found=str(trials))
    merges = math.prod(len(axis.values) for axis in axes)
    if merges <= MOST_MERGES:
        combinations = _grid(axes)
    elif trials is None:
        remedy = "larger steps, or --trials N, which lets Optuna choose N of them"
        raise ConfigError(
            "search", expected=f"at most {MOST_MERGES:,} merges", found=f"{merges:,}", remedy=remedy
        )
    else:
        first = {axis.name: axis.values[0] for axis in axes}
        combinations = ({**first, axis.name: value} for axis in axes for value in axis.values)
    for settings in combinations:
        _checked(recipe, settings)


def _grid(axes: Sequence[Axis]) -> Iterator[dict[str, Scalar]]:
    for values in product(*(axis.values for axis in axes)):
        yield {axis.name: value for axis, value in zip(axes, values, strict=True)}


def _checked(recipe: Recipe, settings: Mapping[str, Scalar]) -> Recipe:
    """The recipe with settings in place of its own, which its method must know."""
    for name, value in settings.items():
        recipe = _with(recipe, name, value)
    recipe.check_parameters(method_of(recipe.method).parameters)
    return recipe


def _with(recipe: Recipe, name: str, value: Scalar) -> Recipe:
    if name == "rescale" and value not in RESCALES:
        raise ConfigError("rescale", expected=f"one of {', '.join(RESCALES)}", found=repr(value))
    if name in _OF_THE_RECIPE:
        return replace(recipe, **{name: value})  # type: ignore[arg-type]
    parameter, dot, number = name.partition(".")
    numbered = number.isascii() and number.isdigit() and len(number) < 10
    places = [int(number)] if dot and numbered else range(len(recipe.models))
    if dot and (not numbered or int(number) >= len(recipe.models)):
        raise ConfigError(
            f"search {name}",
            expected=f"a model's number from 0 to {len(recipe.models) - 1}",
            found=repr(number),
        )
    known = method_of(recipe.method).parameters
    if parameter not in {setting.name for setting in known if setting.per_model}:
        return replace(recipe, parameters={**recipe.parameters, parameter: value})
    models = [
        replace(model, parameters={**model.parameters, parameter: value}) if place in places else model
        for place, model in enumerate(recipe.models)
    ]
    return replace(recipe, models=tuple(models))


def _number(given: object) -> float:
    try:
        value = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError("eval", expected="a function that returns a finite number", found=repr(given))
    return value


def _ask_optuna(
    axes: Sequence[Axis],
    score: Callable[[Mapping[str, Scalar]], float],
    trials: int,
    *,
    minimize: bool,
    seed: int,
) -> None:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "trials", expected="Optuna", found="not installed", remedy='pip install "dare_train[search]"'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed % (1 << 32))
    study = optuna.create_study(direction="minimize" if minimize else "maximize", sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        return score({axis.name: _asked(trial, axis) for axis in axes})

    study.optimize(objective, n_trials=trials)


def _asked(trial: Any, axis: Axis) -> Scalar:
    if axis.step is None:
        return trial.suggest_categorical(axis.name, list(axis.values))  # type: ignore[no-any-return]
    low = float(axis.values[0])
    high = float(axis.values[-1])
    return _plain(float(trial.suggest_float(axis.name, low, high, step=axis.step)))


def metric_of(name: str) -> Callable[..., Any]:
    """The function that `module:function` names. Modules are also looked for in the current folder, after all
    other places: what lies there never takes the place of what is installed.

    Raises:
        ConfigError: there is none.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ConfigError("eval", expected="MODULE:FUNCTION", found=repr(name))
    if not {"", str(Path.cwd())} & {*sys.path}:
        sys.path.append(str(Path.cwd()))
    try:
        metric: Any = importlib.import_module(module)
        for part in function.split("."):
            metric = getattr(metric, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "eval", expected="a function that can be imported", found=f"{name}: {error}"
        ) from error
    if not callable(metric):
        raise ConfigError("eval", expected="a function", found=f"{name}, a {type(metric).__name__}")
    return metric  # type: ignore[no-any-return]


def results(outcome: Found) -> RenderableType:
    """A table of the trials for a terminal, the best first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{len(outcome.trials)} merges",
        caption=Text(f"{printable(outcome.report.out)} is the first; its recipe is in dare_merge.yml"),
    )
    for name in (*outcome.best.settings, "score"):
        table.add_column(Text(printable(name, 200)), justify="right")
    for trial in sorted(outcome.trials, key=lambda trial: abs(trial.score - outcome.best.score)):
        settings = (Text(printable(f"{value}", 200)) for value in trial.settings.values())
        table.add_row(*settings, f"{trial.score:.6g}")
    return table
