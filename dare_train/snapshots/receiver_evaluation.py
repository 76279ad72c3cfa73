"""Evaluating, in the Trainer, the model that a receiver of the package would get."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..errors import ConfigError
from ..weights.live.live import LiveWeights
from ..weights.live.named_tensors import Live
from .received_weights import received_weights
from .snapshotter import Snapshotter


def check_evaluation(live: LiveWeights, trainer: Trainer | None) -> None:
    """
    Raises:
        ConfigError: there is no Trainer to evaluate with, or the weights are quantised.
    """
    if trainer is None:
        remedy = "hand it over: callback.attach(trainer)"
        raise ConfigError("evaluate", expected="a Trainer", found="events of another caller", remedy=remedy)
    if live.packed:
        remedy = "apply the package to the full-precision base and evaluate that"
        raise ConfigError(
            "evaluate", expected="weights in full precision", found="quantised ones", remedy=remedy
        )


def evaluate_received(
    trainer: Trainer,
    model: Live,
    snapshotter: Snapshotter,
    folder: Path,
    *,
    name: str,
    loader: Any,
    metrics: Mapping[str, Any],
) -> None:
    """Evaluate once more what the Trainer has just evaluated, with the weights that a package taken now would
    give; log the metrics under the same names, with `name` in them.

    Args:
        trainer: whose evaluation it was.
        model: in training; it has its own weights again afterwards.
        snapshotter: takes the packages.
        folder: for a file of weights that have to make room.
        name: of the callback.
        loader: of the examples that were evaluated.
        metrics: what came of that.
    """
    prefix = _with_name(_prefix_of(metrics), name)
    # A data loader's iterator draws from torch's generator, which is training's.
    with torch.random.fork_rng(), received_weights(model, snapshotter, folder):
        output = trainer.evaluation_loop(loader, description=f"Evaluation ({name})", metric_key_prefix=prefix)
    trainer.log(output.metrics)


def _prefix_of(metrics: Mapping[str, Any]) -> str:
    """What a Trainer put before the names of metrics: `eval`; or of one of several data sets, `eval_a`."""
    timed = (key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime"))
    return next(timed, "eval")


def _with_name(prefix: str, name: str) -> str:
    """`eval` becomes `eval_dare`, and `eval_a` becomes `eval_dare_a`."""
    if prefix.startswith("eval_"):
        return f"eval_{name}_{prefix.removeprefix('eval_')}"
    return f"{prefix}_{name}"
