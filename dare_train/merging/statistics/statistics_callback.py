"""Statistics of a model at the end of its training, from the data that it was trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...config import check_folder_name
from ...errors import ConfigError
from ...evaluation import wandb_run
from ...evaluation.linear_layers import Batch, examples_of, has_two_sequences, named_places
from ...parallel.ranks import Ranks
from ...weights.live.wrapped import unwrapped
from .fisher_and_gram import Labels, check_options, fisher_and_count, gram_and_count
from .statistics_file import StatisticsKind, save_statistics, statistics_path


class StatisticsCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the statistics of the trained model when training ends, beside the package that a `DareCallback`
    writes then.

        Trainer(..., callbacks=[DareCallback(p=0.9), StatisticsCallback()])

    The files are `{output_dir}/{name}/final.fisher.safetensors` and `final.gram.safetensors`.

    Args:
        kinds: which statistics; see `collect_fisher` and `collect_gram`.
        examples: how many examples of the Trainer's training data they are taken from, on all ranks together;
            rounded up to the same number on each.
        labels: see `collect_fisher`.
        name: of the folder; that of the `DareCallback`.

    Attributes:
        files: what this run wrote, by kind.
        seconds: for which collecting and writing took place.

    Raises:
        ConfigError: at construction, for values that are wrong; at train begin, for a model that statistics
            cannot be taken of.
    """

    def __init__(
        self,
        kinds: StatisticsKind | Sequence[StatisticsKind] = ("fisher", "gram"),
        examples: int = 256,
        *,
        labels: Labels = "data",
        name: str = "dare",
    ) -> None:
        self.kinds: tuple[StatisticsKind, ...] = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if (
            not self.kinds
            or len({*self.kinds}) < len(self.kinds)
            or not {*self.kinds} <= {*get_args(StatisticsKind)}
        ):
            raise ConfigError(
                "kinds", expected=f"some of {', '.join(get_args(StatisticsKind))}", found=repr(kinds)
            )
        check_options(examples or 0, labels)
        self.examples = examples
        self.labels = labels
        self.name = check_folder_name("name", name)
        self.files: dict[StatisticsKind, Path] = {}
        self.seconds = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        named_places(unwrapped(model), adapters="fisher" not in self.kinds)
        if "gram" in self.kinds and has_two_sequences(model):
            remedy = 'kinds="fisher"; or collect_gram on batches without padding'
            raise ConfigError(
                "kinds",
                expected="no gram for a model with encoder and decoder",
                found=repr(self.kinds),
                remedy=remedy,
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        begin = time.perf_counter()
        ranks = Ranks.joined()
        share = -(-self.examples // ranks.world)
        # A data loader's iterator draws from torch's generator, which is the user's.
        with torch.random.fork_rng(devices=[]):
            batches: list[Batch] = ranks.each(lambda: list(examples_of(model, train_dataloader, share)))
        count = [
            self._write(kind, model, batches, Path(args.output_dir) / self.name / "final", ranks)
            for kind in self.kinds
        ][-1]
        self.seconds = time.perf_counter() - begin
        run = wandb_run.active_run()
        if run is not None and ranks.first:
            figures = {"dare/statistics_examples": count, "dare/statistics_seconds": self.seconds}
            run.log({**figures, "train/global_step": state.global_step})

    def _write(
        self, kind: StatisticsKind, model: Any, batches: list[Batch], package: Path, ranks: Ranks
    ) -> int:
        """Collect and write statistics of one kind; how many examples counted."""
        tensors, count = (
            fisher_and_count(model, batches, None, self.labels, ranks)
            if kind == "fisher"
            else gram_and_count(model, batches, None, ranks)
        )
        self.files[kind] = path = statistics_path(package, kind)
        ranks.together(
            lambda: str(save_statistics(path, kind, tensors, examples=count)) if ranks.first else ""
        )
        return count
