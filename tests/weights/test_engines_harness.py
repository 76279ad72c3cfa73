"""The harness under the tests of real engines: every engine trains, saves and resumes, and a rank that fails
is told.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import ENGINES, PRELOADED, EngineAtWork, RanksFailed, outcomes, run_ranks, train_on
from training import classifier, make_trainer, save_base
from transformers import PreTrainedModel

RUNS = [(engine, 3 if engine in ("zero3", "fsdp2") else 2) for engine in ENGINES if engine != "single"]
"""Shards of three ranks are uneven; on two, these engines train in bf16 below."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


def without_dropout(base: Path) -> PreTrainedModel:
    """A model whose training does not depend on how rows and random numbers are spread over the ranks."""
    model = classifier(base)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def losses(
    _rank: int, engine: str, base: Path, out: Path, resume: Path | None, options: dict[str, Any]
) -> list[float]:
    """The loss of each step, over all ranks."""
    maker = partial(without_dropout, base)
    trainer = train_on(
        engine, maker, out, resume=resume, logging_strategy="steps", logging_steps=1, **options
    )
    assert trainer.state.global_step == 4
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(engine: str, world: int, base: Path, out: Path, **options: Any) -> list[float]:
    """The losses of a run, after checking that new processes resume it from its second step to the same
    end.
    """
    fresh = run_ranks(losses, world, engine, base, out, None, options)
    assert {path.name for path in out.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    resumed = run_ranks(losses, world, engine, base, out, out / "checkpoint-2", options)
    comparable = (
        3 if engine == "fsdp1" else 4
    )  # accelerate does not load AdamW's state again under FSDP1: another fourth step
    for of_rank in fresh + resumed:
        assert of_rank[:comparable] == pytest.approx(fresh[0][:comparable], rel=1e-6)
    return fresh[0]


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run in one process with no engine."""
    result = trained("single", 1, base, tmp_path_factory.mktemp("single"))
    assert len(set(result)) == 4
    return result


@pytest.mark.parametrize(("engine", "world"), RUNS, ids=str)
def test_every_engine_trains_and_resumes_as_one_process_does(
    engine: str, world: int, base: Path, alone: list[float], tmp_path: Path
) -> None:
    assert trained(engine, world, base, tmp_path) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_engines_train_in_bf16(engine: str, base: Path, alone: list[float], tmp_path: Path) -> None:
    [result, _] = run_ranks(losses, 2, engine, base, tmp_path, None, {"bf16": True})
    assert result == pytest.approx(alone, rel=2e-2)
    assert result != pytest.approx(alone, rel=1e-6)


def another_engine(_rank: int, base: Path, out: Path) -> None:
    EngineAtWork("fsdp2", make_trainer(classifier(base), out, ddp_backend="gloo"))


def test_an_engine_that_is_not_at_work_is_noticed(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"fsdp2 was asked for, DistributedType.MULTI_CPU trains"):
        run_ranks(another_engine, 2, base, tmp_path)


def preloaded(_rank: int) -> set[str]:
    return set(PRELOADED) & sys.modules.keys()


def test_ranks_begin_with_what_is_slow_to_import() -> None:
    [found] = run_ranks(preloaded, 1)
    assert found == set(PRELOADED)


def surroundings(rank: int, word: str) -> tuple[Any, ...]:
    dist.init_process_group("gloo")
    return (
        rank,
        word,
        dist.get_rank(),
        dist.get_world_size(),
        torch.get_num_threads(),
        os.environ.get("DARE_TEST_WORD"),
    )


def test_results_come_by_rank_from_processes_with_the_environment_of_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DARE_TEST_WORD", "new")
    assert run_ranks(surroundings, 3, "hello") == [(rank, "hello", rank, 3, 1, "new") for rank in range(3)]


def fails(rank: int, how: str) -> str:
    """Rank 1 fails; the others wait for it."""
    dist.init_process_group("gloo")
    if rank == 1 and how == "raise":
        raise ValueError("a reason")
    if rank == 1 and how == "exit":
        sys.exit("goodbye")
    if rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "hang":
        time.sleep(600)
    if how != "hang":
        dist.barrier()
    return "done"


@pytest.mark.parametrize(
    ("how", "error", "message", "trace"),
    [
        ("raise", "ValueError", "a reason", "in fails"),
        ("exit", "SystemExit", "goodbye", "in fails"),
        ("die", "killed", "exit code -9", ""),
        ("hang", "hung", "still running after 4 s", "in fails"),
    ],
)
def test_how_a_rank_failed_is_told(how: str, error: str, message: str, trace: str) -> None:
    began = time.monotonic()
    first, second = outcomes(fails, 2, how, timeout=4 if how == "hang" else 60)
    assert time.monotonic() - began < 15
    assert (second.error, second.message) == (error, message)
    assert trace in second.traceback
    if how == "hang":
        assert first.result == "done"
    else:
        assert first.error == "RuntimeError"  # gloo's: the connection is gone


def test_an_error_tells_of_every_rank() -> None:
    with pytest.raises(
        RanksFailed,
        match=r"(?s)rank 0 RuntimeError: .*in fails.*rank 1 ValueError: a reason.*in "
        r"fails.*rank 2 RuntimeError",
    ):
        run_ranks(fails, 3, "raise")


def unpicklable(_rank: int) -> Any:
    return lambda: None


def test_a_result_that_cannot_travel_is_told() -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 .*unpicklable"):
        run_ranks(unpicklable, 1)
