"""Evaluating, in the Trainer, the model that a receiver of the package would get."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..errors import ConfigError
from ..evaluation.generators import borrowed_generators
from ..evaluation.linear_layers import evaluating
from ..evaluation.lm_harness import HarnessTasks
from ..evaluation.measurements import Evaluate, numbers
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


def metric_of(evaluate: bool | str | Evaluate, model: Live, processing_class: Any) -> Evaluate | None:
    """What a model is measured by; None where it is evaluated on the Trainer's data.

    Raises:
        ConfigError: weights are spread over processes, or there is no tokenizer.
        As `HarnessTasks`.
    """
    if isinstance(evaluate, bool):
        return None
    if not LiveWeights(model).whole:
        raise ConfigError(
            "evaluate",
            expected="True where weights are spread over processes (FSDP, ZeRO-3)",
            found=evaluate if isinstance(evaluate, str) else "a function",
            remedy="measure packages afterwards: dare-train apply, then dare-train sweep --eval",
        )
    if not isinstance(evaluate, str):
        return evaluate
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None:
        remedy = "hand it over: Trainer(processing_class=tokenizer)"
        raise ConfigError("evaluate", expected="a tokenizer for lm_eval", found="none", remedy=remedy)
    return HarnessTasks(evaluate, tokenizer)


def measure_received(
    trainer: Trainer, model: Any, snapshotter: Snapshotter, folder: Path, *, name: str, metric: Evaluate
) -> None:
    """Measure the model with the weights that a package taken now would give, on every rank, and log what the
    first one found as `eval_{name}_…`. Other arguments are those of `evaluate_received`.
    """

    def measured() -> dict[str, float]:
        with evaluating(model), torch.no_grad():
            return numbers(metric(model))

    device = next(model.parameters()).device
    with borrowed_generators(device), received_weights(model, snapshotter, folder):
        found = snapshotter.ranks.together(measured)[0]
    trainer.log({f"eval_{name}_{key}": value for key, value in found.items()})


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
