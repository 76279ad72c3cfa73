"""`lm_eval:TASK,TASK?limit=50`: tasks of lm-evaluation-harness, as they are written down. Read without the
harness, and without torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import CheckpointError, ConfigError, brief

PREFIX = "lm_eval:"
_OLDEST = "0.4.13"
"""The first version whose tasks can be loaded as objects."""
_INSTALL = 'pip install "dare_train[eval]"'
_FILES = (".yaml", ".yml")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class HarnessText:
    """Which tasks, and how they are asked."""

    text: str
    """As it was written."""
    tasks: tuple[str, ...]
    """Names of the harness's tasks, groups and tags, or YAML files."""
    limit: int | None = None
    """The first so many examples of each task; all of them by default."""
    batch_size: int = 16
    """How many requests the model gets at once."""
    apply_chat_template: bool = False
    """Whether questions are put as messages to a chat model."""

    @classmethod
    def of(cls, text: str) -> HarnessText:
        """
        Raises:
            ConfigError: it cannot be read.
            CheckpointError: a YAML file is not there.
        """
        words, question, options = text.removeprefix(PREFIX).partition("?")
        tasks = tuple(word.strip() for word in words.split(","))
        if not all(tasks):
            raise ConfigError(text, expected=f"{PREFIX}TASK,TASK, names or YAML files", found="no name")
        for task in tasks:
            if is_file(task) and not Path(task).is_file():
                raise CheckpointError(task, expected="a YAML file of a task", found="no such file")
        pairs = options.split("&") if question else []
        return cls(text=text, tasks=tasks, **dict(_option(text, pair) for pair in pairs))


def is_harness(evaluate: object) -> TypeGuard[str]:
    """Whether an evaluation is given as tasks of the harness."""
    return isinstance(evaluate, str) and evaluate.startswith(PREFIX)


def is_file(task: str) -> bool:
    """Whether a task is given as a YAML file."""
    return task.endswith(_FILES)


def harness_version() -> str:
    """
    Raises:
        ConfigError: the harness is not installed, or too old.
    """
    expected = f"lm-evaluation-harness {_OLDEST} or later"
    try:
        found = version("lm_eval")
    except PackageNotFoundError as error:
        raise ConfigError("lm_eval", expected=expected, found="not installed", remedy=_INSTALL) from error
    if _numbers(found) < _numbers(_OLDEST):
        raise ConfigError("lm_eval", expected=expected, found=found, remedy=_INSTALL)
    return found


def _numbers(found: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", found)[:3]]


def _option(text: str, pair: str) -> tuple[str, Any]:
    name, _, value = pair.partition("=")
    whole = value.isascii() and value.isdigit() and len(value) < 10
    if name in ("limit", "batch_size") and whole and int(value):
        return name, int(value)
    if name == "apply_chat_template" and value in _TRUTH:
        return name, _TRUTH[value]
    expected = "limit=N or batch_size=N above 0, or apply_chat_template=true, with & between them"
    raise ConfigError(text, expected=expected, found=brief(pair))
