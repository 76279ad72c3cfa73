"""From the words of a command line to a merge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..merging.config import mergekit
from ..merging.config.stack import Stack, read_stack
from ..merging.config.stages import stages_of
from ..merging.config.task import MergeTask, task_of
from ..merging.methods.parameters import Scalar
from ..merging.search import Axis, scalar
from .terminal import pairs

_CONFIGURATIONS = (".yml", ".yaml")


@dataclass(frozen=True, kw_only=True)
class Merging:
    """One merge that a command line comes to."""

    task: MergeTask
    out: Path
    notes: Sequence[str] = ()
    """What the user should know of it."""


@dataclass(frozen=True, kw_only=True)
class Stacking:
    """Layers that a command line has stacked."""

    task: Stack
    """It has its own notes."""
    out: Path


def asked(
    sources: Sequence[str],
    method: str | None,
    settings: Iterable[str],
    *,
    out: Path,
    intermediate_dir: Path | None = None,
    strict: bool = False,
    **options: Any,
) -> list[Merging | Stacking]:
    """The merges of a configuration file, in the order in which they are done, or of a base and models with
    options.

    Args:
        sources: one file that ends in .yml or .yaml; or the base, then the models.
        settings: `NAME=VALUE`, or `NAME=VALUE,VALUE,...` with a value for each model.
        out: where the result belongs.
        intermediate_dir: where those of a file belong that others use; beside `out` by default.
        strict: refuse what a configuration says and no merge here uses.
        options: arguments of `merge`; those that are empty count as not given.

    Raises:
        ConfigError: they contradict one another, or are wrong in themselves.
    """
    given = {name: value for name, value in options.items() if value not in (None, (), [], {}, False)}
    if len(sources) == 1 and sources[0].endswith(_CONFIGURATIONS):
        seed = given.pop("seed", 0)
        also = sorted([*given, *(["method"] if method else []), *settings])
        if also:
            raise ConfigError(
                sources[0], expected="all options in the configuration itself", found=", ".join(also)
            )
        folder = intermediate_dir or out.with_name(f"{out.name}-parts")
        stages = stages_of(Path(sources[0]), out, folder)
        if not stages:
            _check_alone(intermediate_dir)
            return [_of_document(Path(sources[0]), out, seed, strict)]
        return [_of_document(dict(stage.document), stage.out, seed, strict) for stage in stages]
    _check_alone(intermediate_dir)
    if len(sources) < 2:
        raise ConfigError(
            "merge",
            expected="BASE and at least one MODEL, or one CONFIG.yml",
            found=" ".join(sources) or "nothing",
        )
    base, *models = sources
    task = task_of(
        base, models, method=method or "task_arithmetic", parameters=dict(map(_setting, settings)), **given
    )
    return [Merging(task=task, out=out)]


def _of_document(given: Path | dict[str, Any], out: Path, seed: int, strict: bool) -> Merging | Stacking:
    """What one configuration asks for; `seed` counts where it says none."""
    stacked = read_stack(given, strict=strict)
    if stacked is not None:
        return Stacking(task=stacked, out=out)
    recipe, notes = mergekit.read(given, strict=strict, seed=seed)
    return Merging(task=MergeTask.of(recipe), out=out, notes=notes)


def _check_alone(intermediate_dir: Path | None) -> None:
    if intermediate_dir is not None:
        raise ConfigError(
            "--intermediate-dir",
            expected="a file of several merges",
            found="one merge",
            remedy="leave it out",
        )


def _setting(text: str) -> tuple[str, Scalar | list[Scalar]]:
    ((name, value),) = pairs("set", [text]).items()
    values = [scalar(word) for word in value.split(",")]
    return name, values[0] if len(values) == 1 else values


def axes(sources: Sequence[str], first: str) -> tuple[list[str], list[Axis]]:
    """Tell models from what is searched: `--search A=1,2 B=3,4` puts all but the first among the models."""
    settings = [word for word in sources if "=" in word and not Path(word).exists()]
    return [word for word in sources if word not in settings], [
        Axis.parse(text) for text in (first, *settings)
    ]
