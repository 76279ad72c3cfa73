"""A guest on several ranks: what fails on one of them, or is missing there, ends or hangs none."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines import outcomes, run_ranks, train_on
from fine_tunes import QUANTISED, load, lora, save_decoder
from planted_faults import planted
from training import classifier, save_base
from transformers import TrainerCallback

from dare_train import DareCallback, DeltaPackage, extract

ON_EVERY_RANK = (
    "dare_train.snapshots.shared_pass.LiveWeights",
    "dare_train.snapshots.shared_pass.take_run",
    "dare_train.snapshots.snapshotter.write_parts",
    "dare_train.snapshots.snapshotter.save_tallies",
    "dare_train.snapshots.received_weights.LiveWeights",
    "dare_train.snapshots.snapshotter.DeltaPackage.open",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("ranks") / "base")


def only_on_the_first(rank: int, engine: str, base: Path, out: Path) -> None:
    import dare_train.snapshots.callback as callbacks

    callbacks._ROLL_PATIENCE = timedelta(seconds=5)
    given = [DareCallback()] if rank == 0 else []
    train_on(engine, partial(classifier, base), out, *given, max_steps=2)


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_callback_on_one_process_alone_is_named_at_once(base: Path, tmp_path: Path, engine: str) -> None:
    ends = outcomes(only_on_the_first, 2, engine, base, tmp_path / "out", timeout=60)
    assert ends[0].error == "ConfigError"
    assert ends[0].message == (
        "DareCallback: expected the same callback on all 2 processes, found none on rank 1; "
        "give it to every process's Trainer, not to the main one's alone"
    )


def only_the_second_time(rank: int, base: Path, out: Path) -> None:
    import dare_train.snapshots.callback as callbacks

    callbacks._ROLL_PATIENCE = timedelta(seconds=5)
    train_on("ddp", partial(classifier, base), out, DareCallback(), max_steps=1)
    given = [DareCallback()] if rank == 1 else []
    train_on("ddp", partial(classifier, base), out, *given, max_steps=1)


def test_a_callback_that_all_had_before_does_not_vouch_for_the_next(base: Path, tmp_path: Path) -> None:
    ends = outcomes(only_the_second_time, 2, base, tmp_path / "out", timeout=60)
    assert ends[1].error == "ConfigError"
    assert "found none on rank 0" in ends[1].message


class _Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(rank: int, base: Path, out: Path) -> None:
    train_on("ddp", partial(classifier, base), out, _Killed(), DareCallback(when=1), max_steps=4)


def test_the_others_of_a_killed_rank_do_not_wait_for_it(base: Path, tmp_path: Path) -> None:
    ends = outcomes(killed, 2, base, tmp_path / "out", timeout=60)
    assert [ends[0].error == "hung", ends[1].error] == [False, "killed"]


def folders_of_their_own(rank: int, base: Path, out: Path) -> None:
    train_on("ddp", partial(classifier, base), out / f"node-{rank}", DareCallback(), max_steps=2)


def test_nodes_that_do_not_share_the_output_folder_are_refused_before_they_train(
    base: Path, tmp_path: Path
) -> None:
    ends = outcomes(folders_of_their_own, 2, base, tmp_path, timeout=60)
    assert ends[1].error == "RankError"
    assert ends[1].message.endswith(
        "expected the folder that rank 0 made, found nothing there; put the output folder on a file system "
        "that all nodes share"
    )


def faulty(rank: int, engine: str, base: Path, out: Path, place: str) -> tuple[int, int]:
    """Steps trained and failures told, with a fault on the last rank alone."""
    callback = DareCallback(when=("save", "end", 1), evaluate=True)

    class Plant(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rank == 1 and state.global_step == 0:
                self.fault = planted(place, RuntimeError("planted"))
                self.fault.__enter__()

    options: dict[str, Any] = dict(max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = train_on(engine, partial(classifier, base), out, Plant(), callback, **options)
    return int(trainer.state.global_step), len(callback.failures)


@pytest.mark.parametrize("place", ON_EVERY_RANK)
def test_a_fault_on_one_rank_is_told_and_ends_none(base: Path, tmp_path: Path, place: str) -> None:
    engine = "zero3" if "take_run" in place else "ddp"
    ends = run_ranks(faulty, 2, engine, base, tmp_path / "out", place, timeout=60)
    assert [steps for steps, _ in ends] == [2, 2]
    assert any(failures for _, failures in ends)


def adapter_on_packed(rank: int, base: Path, out: Path) -> None:
    import peft

    def model() -> Any:
        packed = load(base, quantization_config=QUANTISED["nf4"](), device_map="cpu")
        prepared = peft.prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False)
        return lora(prepared)

    from fine_tunes import rows

    trainer = train_on("ddp", model, out, DareCallback(p=0.0), max_steps=2, train_rows=rows())
    if rank == 0:
        trainer.model.save_pretrained(out / "adapter")


def test_qlora_on_two_ranks_gives_the_package_of_the_saved_adapter(tmp_path: Path) -> None:
    import torch

    base = save_decoder(tmp_path / "base", dtype=torch.bfloat16)
    run_ranks(adapter_on_packed, 2, base, tmp_path / "out")
    expected = extract(base, tmp_path / "out/adapter", tmp_path / "extracted", p=0.0)
    assert DeltaPackage.open(tmp_path / "out/dare/final").manifest.result == expected.manifest.result
