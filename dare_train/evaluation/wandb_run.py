"""wandb, where it is installed: the run of this process, and runs of their own for a search and for a
study.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ConfigError


def active_run() -> Any:
    """The wandb run of this process, or None; wandb is not imported for it."""
    wandb = sys.modules.get("wandb")
    return getattr(wandb, "run", None) if wandb is not None else None


@contextmanager
def searching(project: str | None) -> Iterator[Callable[[Any], None] | None]:
    """A wandb run that is told of a search's trials one by one; None without a project.

    Raises:
        ConfigError: wandb is not installed.
    """
    if project is None:
        yield None
        return
    wandb = imported_wandb()
    with wandb.init(project=project, job_type="merge-search") as run:
        trials: list[Any] = []

        def tell(trial: Any) -> None:
            trials.append(trial)
            run.log(
                {
                    **{f"search/{name}": value for name, value in trial.settings.items()},
                    "search/score": trial.score,
                }
            )

        yield tell
        if trials:
            rows = [[*trial.settings.values(), trial.score] for trial in trials]
            run.log({"search/trials": wandb.Table(columns=[*trials[0].settings, "score"], data=rows)})


@contextmanager
def studying(project: str | None) -> Iterator[None]:
    """A wandb run of its own for a study, which `log_study` finds; none without a project.

    Raises:
        ConfigError: wandb is not installed.
    """
    if project is None:
        yield
        return
    with imported_wandb().init(project=project, job_type="study"):
        yield


def imported_wandb() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "wandb", expected="wandb", found="not installed", remedy='pip install "dare_train[wandb]"'
        ) from error
    return wandb
