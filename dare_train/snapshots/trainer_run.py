"""What a Trainer says of the training that it is about to begin, or goes on with."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerState, TrainingArguments

from ..errors import ConfigError
from ..parallel.ranks import Ranks
from ..parallel.staged_folder import check_visible, storage_errors
from ..weights.live.sharding import SUPPORTED
from .base_model import Origin
from .companions import save_companions
from .pushing import Destination

STATE = "dare_train"
"""Under which the Trainer's state has what callbacks remember."""
_TIMES = ("_runtime", "_per_second")
_ENGINES = {
    "NO",
    "DEEPSPEED",
    "FSDP",
    *(f"MULTI_{kind}" for kind in ("CPU", "GPU", "NPU", "MLU", "SDAA", "MUSA", "XPU", "HPU")),
}
"""accelerate's names of what is known. Each process is one rank; the weights of `MULTI_*` are whole on
each."""


def check_engine() -> None:
    """Refuse an engine whose layout of weights is not known: its package would be wrong.

    Raises:
        ConfigError: naming what was found and what is supported.
    """
    found = str(AcceleratorState().distributed_type.value)
    if found not in _ENGINES:
        raise ConfigError(
            "DareCallback",
            expected=SUPPORTED,
            found=found,
            remedy="extract from the saved checkpoint instead",
        )


def on_record(state: TrainerState, name: str) -> Mapping[str, Any] | None:
    """What an earlier part of a resumed run remembered of its base."""
    record: Mapping[str, Any] | None = state.stateful_callbacks.get(STATE, {}).get("attributes", {}).get(name)
    return record


def name_of_run(record: Mapping[str, Any] | None, ranks: Ranks) -> str:
    """The resumed run's, or one that no other has."""
    mine = uuid.uuid4().hex if record is None else str(record.get("run", ""))
    return str(ranks.gather(mine)[0])


def output_folder(args: TrainingArguments, state: TrainerState, trainer: Trainer | None) -> Path:
    """Where the Trainer puts checkpoints: in a hyperparameter search, each trial has a folder of its own."""
    if state.is_hyper_param_search and trainer is not None:
        return Path(trainer._get_output_dir(trainer._trial))
    return Path(args.output_dir)


def private_folder(path: Path, args: TrainingArguments) -> Path:
    """Where a callback has what is not for others: in the folder of its packages, `path`; where the Trainer
    uploads its output folder, in one beside it whose name it leaves out.
    """
    return path.with_name(f"_{path.name}") if getattr(args, "push_to_hub", False) else path


def destination_of(args: TrainingArguments, repo: str) -> Destination:
    """Where packages are pushed, with what the Trainer is told of the Hub."""
    return Destination(
        repo=repo,
        revision=getattr(args, "hub_revision", None),
        private=args.hub_private_repo,
        token=args.hub_token,
    )


def shared_companions(ranks: Ranks, model: Any, processing_class: Any, path: Path, origin: Origin) -> Path:
    """The folder of files that go along with packages: made by the first rank, seen by all.

    Raises:
        StorageError: it cannot be made.
        RankError: a rank does not see it.
    """

    def make() -> str:
        if not ranks.first:
            return ""
        with storage_errors(path):
            return save_companions(model, processing_class, path, origin.checkpoint.folder)

    place = path / Path(ranks.together(make)[0]).name
    ranks.together(lambda: check_visible(place))
    return place


def module_of(model: Any) -> Any:
    """The module of what is in training: setfit's model is none itself, and has one."""
    return model if isinstance(model, torch.nn.Module) else getattr(model, "model_body", model)


def moment(event: str, state: TrainerState) -> int | str:
    """The step at which a snapshot is taken, or "end"."""
    return "end" if event == "end" else int(state.global_step)


def last_measured(state: TrainerState) -> dict[str, float]:
    """The metrics of this step's evaluations, by name, without what they took."""
    entries = [entry for entry in state.log_history if entry.get("step") == state.global_step]
    return {
        name: float(value)
        for entry in entries
        for name, value in entry.items()
        if name.startswith("eval_") and isinstance(value, Real) and not name.endswith(_TIMES)
    }


def calling_trainer() -> Trainer | None:
    """The Trainer that sent the current event, if one did. Callbacks are not given it; it stands further up
    the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None
