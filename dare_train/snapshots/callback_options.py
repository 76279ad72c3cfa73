"""What a `DareCallback` is told, checked: when it takes snapshots, and which options go together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Union, get_args

from ..config import Source, check_count, check_folder_name
from ..errors import ConfigError, brief
from ..evaluation.harness_text import HarnessText, harness_version, is_harness

When = Union[str, int]
OnError = Literal["warn", "raise"]


_EVENTS = ("save", "epoch", "end")


def schedule(when: When | Sequence[When]) -> tuple[frozenset[str], int | None]:
    """Events and step interval."""
    given = list(when) if isinstance(when, Collection) and not isinstance(when, (str, bytes)) else [when]
    numbers = [item for item in given if isinstance(item, int) and not isinstance(item, bool)]
    events = [item for item in given if isinstance(item, str)]
    unknown = [item for item in given if item not in _EVENTS and item not in numbers]
    if unknown or not given or len(numbers) > 1 or any(number < 1 for number in numbers):
        raise ConfigError(
            "when",
            expected='"save", "epoch", "end", a number of steps, or several of these',
            found=brief(when),
        )
    return frozenset(events), numbers[0] if numbers else None


def check_options(
    *,
    keep: int | None,
    keep_best: bool,
    incremental: bool,
    evaluate: object,
    values: str,
    name: str,
    on_error: str,
    source: str,
) -> None:
    if on_error not in get_args(OnError):
        raise ConfigError("on_error", expected='"warn" or "raise"', found=repr(on_error))
    if source not in get_args(Source):
        raise ConfigError("source", expected='"weights" or "master"', found=repr(source))
    check_evaluate(evaluate)
    if keep_best and keep is None:
        remedy = "without keep, all packages stay"
        raise ConfigError("keep_best", expected="False without keep", found=repr(keep_best), remedy=remedy)
    if keep is not None:
        check_count("keep", keep)
    if incremental and keep is not None:
        raise ConfigError(
            "keep",
            expected="None with incremental=True",
            found=repr(keep),
            remedy="a chain needs all of its packages",
        )
    if incremental and values not in ("auto", "exact"):
        raise ConfigError(
            "values",
            expected="exact with incremental=True",
            found=repr(values),
            remedy="links of a chain are exact",
        )
    check_folder_name("name", name)


def check_evaluate(evaluate: object) -> None:
    """
    Raises:
        ConfigError: a model cannot be evaluated by that, or lm-evaluation-harness is not installed.
        CheckpointError: a task's file is not there.
    """
    if is_harness(evaluate):
        HarnessText.of(evaluate)
        harness_version()
    elif not isinstance(evaluate, bool) and not callable(evaluate):
        expected = "true or false, lm_eval:TASK,TASK, or a function of the model"
        raise ConfigError("evaluate", expected=expected, found=repr(evaluate))
