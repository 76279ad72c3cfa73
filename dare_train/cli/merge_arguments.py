"""From the words of a command line to a merge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..merging.config import mergekit
from ..merging.config.stack import Stack, read_stack
from ..merging.config.task import MergeTask, task_of
from ..merging.methods.parameters import Scalar
from ..merging.search import Axis, scalar
from .terminal import pairs

_CONFIGURATIONS = (".yml", ".yaml")


def task_and_notes(
    sources: Sequence[str],
    method: str | None,
    settings: Iterable[str],
    *,
    strict: bool = False,
    **options: Any,
) -> tuple[MergeTask | Stack, list[str]]:
    """The merge of a configuration file, or of a base and models with options, or the layers that a file
    stacks; and what the user should know of it.

    Args:
        sources: one file that ends in .yml or .yaml; or the base, then the models.
        settings: `NAME=VALUE`, or `NAME=VALUE,VALUE,...` with a value for each model.
        strict: refuse what a configuration says and no merge here uses.
        options: arguments of `merge`; those that are empty count as not given.

    Raises:
        ConfigError: they contradict one another, or are wrong in themselves.
    """
    given = {name: value for name, value in options.items() if value not in (None, (), [], {}, False)}
    if len(sources) == 1 and sources[0].endswith(_CONFIGURATIONS):
        also = sorted([*given, *(["method"] if method else []), *settings])
        if also:
            raise ConfigError(
                sources[0], expected="all options in the configuration itself", found=", ".join(also)
            )
        stacked = read_stack(Path(sources[0]), strict=strict)
        if stacked is not None:
            return stacked, [*stacked.notes]
        recipe, notes = mergekit.read(Path(sources[0]), strict=strict)
        return MergeTask.of(recipe), notes
    if len(sources) < 2:
        raise ConfigError(
            "merge",
            expected="BASE and at least one MODEL, or one CONFIG.yml",
            found=" ".join(sources) or "nothing",
        )
    base, *models = sources
    return task_of(
        base, models, method=method or "task_arithmetic", parameters=dict(map(_setting, settings)), **given
    ), []


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
