"""Tasks of lm-evaluation-harness as what a model in memory is measured by.

EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness (`pip install "dare_train[eval]"`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain, islice
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import CheckpointError, ConfigError, brief
from .generators import borrowed_generators
from .harness_text import HarnessText, harness_version, is_file
from .linear_layers import evaluating
from .model_loading import load_model, load_tokenizer

_SEED = 1234
"""Of numpy's and torch's generators and of the choice of examples to show, as the harness's own; Python's
begins at 0 there."""
_RUNS_CODE = "HF_ALLOW_CODE_EVAL"
"""The environment variable by which people allow it, in the harness's metrics as here."""
_PLACES = {"metadata", "dataset_path", "dataset_name", "dataset_kwargs"}
"""Settings of a task that say where it and its data lie."""
_MAIN = ("acc_norm", "acc", "exact_match")
"""What a task is scored by, by one number: the first of these that it has, else its own first."""

Results = Mapping[str, Mapping[str, float]]
"""Metrics by name, by task."""


class HarnessTasks:
    """Tasks with their data, loaded once; called with a causal language model it gives their metrics: an
    `Evaluate`.

    Names are `task/metric`, or `task/metric/filter` where the task filters what the model says. A group gives
    what it puts together of its tasks, or else each of them. The generators of Python, numpy and torch begin
    alike each time, and afterwards are as they were. A task runs the Python that its file names, and what a
    model writes only where the environment has HF_ALLOW_CODE_EVAL=1.

    Args:
        text: `lm_eval:TASK,TASK`, names of the harness's tasks or YAML files, and perhaps `?limit=50`,
            `batch_size=8`, `apply_chat_template=true`, with `&` between them.
        tokenizer: of the models. It is copied.
        limit: only the first so many examples of each task, where the text has no limit.

    Attributes:
        setup: what figures depend on besides the model: the harness's version, and the SHA-256 of the tasks'
            settings and questions.

    Raises:
        ConfigError: the harness is not installed, or does not have a task; when called, the model is no
            language model, there is no tokenizer, or a task gives no finite number.
        CheckpointError: a task's file or its data cannot be read; when called, it cannot be measured.
    """

    def __init__(self, text: str, tokenizer: Any = None, *, limit: int | None = None) -> None:
        asked = HarnessText.of(text)
        if limit is not None and (asked.limit is not None or limit < 1):
            found = f"{limit}" if asked.limit is None else f"{asked.limit} and {limit}"
            raise ConfigError(text, expected="one limit, above 0", found=found)
        self._asked = asked if limit is None else replace(asked, limit=limit)
        self._tokenizer = tokenizer
        installed = harness_version()
        with borrowed_generators():
            self._tasks, self._shown = _loaded(self._asked)
            digest = _digest(text, self._tasks["tasks"], self._asked.limit)
        self.setup = {"lm_eval": installed, "tasks_sha256": digest}

    def __call__(self, model: Any) -> dict[str, float]:
        results, _ = self._measured(model, self._tokenizer)
        return {f"{task}/{name}": value for task in results for name, value in results[task].items()}

    def scores(self, model: Any, tokenizer: Any) -> list[Score]:
        """A number for each task or group: its `acc_norm`, else `acc`, else `exact_match`, else its first."""
        results, directions = self._measured(model, tokenizer)
        found = []
        for task, metrics in results.items():
            by_metric = {name.partition("/")[0]: name for name in reversed([*metrics])}
            name = next((by_metric[main] for main in _MAIN if main in by_metric), next(iter(metrics)))
            more = directions.get(task, {}).get(name.partition("/")[0])
            found.append(Score(name=f"{task}/{name}", value=metrics[name], more_is_better=more))
        return found

    def _measured(self, model: Any, tokenizer: Any) -> tuple[Results, Mapping[str, Mapping[str, bool]]]:
        """Metrics by task, and of which of them more is better."""
        _check_model(model)
        if tokenizer is None:
            raise ConfigError(
                self._asked.text,
                expected="the model's tokenizer",
                found="none",
                remedy="pass it: HarnessTasks(text, tokenizer)",
            )
        with borrowed_generators(model.device, python=0, others=_SEED), evaluating(model):
            try:
                found = self._evaluated(model, tokenizer)
            except Exception as error:  # whatever a task's templates and functions have against its data
                raise _unmeasured(self._asked.text, "tasks that can be measured", error) from error
        results = {task: _metrics(task, found["results"][task]) for task in self._shown}
        return results, found["higher_is_better"]

    def _evaluated(self, model: Any, tokenizer: Any) -> Any:
        """What `lm_eval.simple_evaluate` does of it, without its description of the machine, which takes
        seconds each time.
        """
        from lm_eval import evaluate

        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(_SEED)
        return evaluate(
            lm=_wrapped(model, deepcopy(tokenizer), self._asked.batch_size),
            task_dict=self._tasks,
            limit=self._asked.limit,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=self._asked.apply_chat_template,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=_code_may_run(),
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of a task."""

    name: str
    """Task and metric."""
    value: float
    more_is_better: bool | None
    """None where the task does not say."""

    def check(self, minimize: bool) -> None:
        """
        Raises:
            ConfigError: what is best is looked for at the wrong end.
        """
        if self.more_is_better is minimize:
            wanted, has = ("less", "more") if minimize else ("more", "less")
            remedy = "leave --minimize out" if minimize else "pass --minimize"
            expected = f"a metric of which {wanted} is better"
            raise ConfigError(self.name, expected=expected, found=f"one of which {has} is", remedy=remedy)


def folder_score(text: str, *, minimize: bool = False) -> Callable[[str], float]:
    """The mean score of the tasks, of the model in a folder.

    Raises:
        As `HarnessTasks`.
    """
    tasks = HarnessTasks(text)

    def score(folder: str) -> float:
        scores = tasks.scores(load_model(folder), load_tokenizer(folder))
        for one in scores:
            one.check(minimize)
        return fmean(one.value for one in scores)

    return score


def _check_model(model: Any) -> None:
    """
    Raises:
        ConfigError: it does not write texts.
    """
    kind = type(model).__name__
    if not hasattr(model, "generate") or kind.endswith("ForSequenceClassification"):
        raise ConfigError("model", expected="a language model, for lm_eval", found=kind)


def _wrapped(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """A model in memory as the harness has it. Its warnings that this is one are not for the user."""
    from lm_eval.models.huggingface import HFLM

    log = logging.getLogger(HFLM.__module__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        log.setLevel(level)


def _loaded(asked: HarnessText) -> tuple[dict[str, Any], list[str]]:
    """The tasks with their data as the harness keeps them, and the names of those whose metrics are shown:
    groups instead of their members, where they put something together.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(map(is_file, asked.tasks)))
    for spec in asked.tasks:
        if is_file(spec):
            _check_single(spec)
        else:
            _check_known(spec, manager.all_tasks)
            _check_code(spec, manager.task_index)
    every: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    shown: list[str] = []
    for spec in asked.tasks:
        try:
            found = manager.load([spec])
        except Exception as error:  # whatever a task's file and its data have against them
            raise _unmeasured(spec, "a task with its data", error) from error
        twice = [name for part in ("tasks", "groups") for name in found[part] if name in every[part]]
        if twice:
            raise ConfigError(asked.text, expected="each task once", found=f"{twice[0]} twice")
        for part, members in every.items():
            members.update(found[part])
        top = next(iter(found["groups"].values()), None)
        shown += [top.name] if top is not None and top.has_aggregation else [*found["tasks"]]
    for name, task in every["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not _code_may_run():
            raise _refused_code(name)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return every, shown


def _check_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1)
        expected = "a task of lm-evaluation-harness, or a YAML file"
        remedy = f"{near[0]}?" if near else "`lm_eval ls tasks` lists them"
        raise ConfigError(name, expected=expected, found="none of that name", remedy=remedy)


def _check_code(name: str, index: Mapping[str, Any]) -> None:
    """Before a task is loaded: what runs a model's code may fetch code of its own to do so."""
    for member in index[name].tags if index[name].cfg is None else (name,):
        if (index[member].cfg or {}).get("unsafe_code") and not _code_may_run():
            raise _refused_code(member)


def _check_single(path: str) -> None:
    if re.search(r"^group:", Path(path).read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        remedy = "name its tasks' files, with commas between them"
        raise ConfigError(path, expected="a YAML file of a task", found="one of a group", remedy=remedy)


def _code_may_run() -> bool:
    return os.environ.get(_RUNS_CODE) == "1"


def _refused_code(name: str) -> ConfigError:
    return ConfigError(
        name,
        expected="a task that runs nothing of what the model writes",
        found="one that does",
        remedy=f"set {_RUNS_CODE}=1 if you want that",
    )


def _unmeasured(name: str, expected: str, error: Exception) -> Exception:
    if _RUNS_CODE in str(error):
        return _refused_code(name)
    return CheckpointError(name, expected=expected, found=f"{type(error).__name__}: {str(error)[:300]}")


def _digest(text: str, tasks: Mapping[str, Any], limit: int | None) -> str:
    """SHA-256 of what is asked, wherever it lies."""
    digest = hashlib.sha256()
    try:
        for name, task in sorted(tasks.items()):
            settings = {key: value for key, value in task.dump_config().items() if key not in _PLACES}
            shown = task.fewshot_docs() if settings.get("num_fewshot") else []
            for part in chain([[name, settings]], shown, islice(task.eval_docs, limit)):
                digest.update(json.dumps(part, sort_keys=True, default=_kind).encode())
    except Exception as error:  # its function that prepares data is its own
        raise _unmeasured(text, "tasks with questions", error) from error
    return digest.hexdigest()


def _kind(value: object) -> str:
    """Instead of what JSON cannot hold, such as a picture."""
    return type(value).__name__


def _metrics(task: str, results: Mapping[str, Any]) -> dict[str, float]:
    """What the harness found of a task, without standard errors.

    Raises:
        ConfigError: nothing, or no number.
    """
    found = dict(_named(results))
    wrong = {name: value for name, value in found.items() if not _is_finite(value)}
    if wrong or not found:
        shown = brief(wrong) if wrong else "none"
        raise ConfigError(f"lm_eval:{task}", expected="metrics that are finite numbers", found=shown)
    return {name: float(value) for name, value in found.items()}


def _named(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in results.items():
        metric, comma, kept = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric if kept == "none" else f"{metric}/{kept}", value


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
