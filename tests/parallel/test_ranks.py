"""What ranks tell each other, and how the failure of one becomes the error of all."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="ranks are torch's, as torchrun starts them")

import torch
import torch.distributed as dist
from engines import outcomes, run_ranks, train_on
from training import classifier, save_base

from dare_train import DareCallback, DareConfig, DeltaPackage
from dare_train.errors import RankError, SnapshotError
from dare_train.parallel.ranks import Ranks
from dare_train.snapshots import snapshotter as snapshot
from dare_train.snapshots.base_model import from_live
from dare_train.snapshots.snapshotter import Snapshotter
from dare_train.weights.live.live import LiveWeights


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def joined() -> Ranks:
    dist.init_process_group("gloo")
    return Ranks.joined()


def talk(rank: int) -> tuple[list[Any], list[str], str]:
    ranks = joined()
    gathered = ranks.gather({"rank": rank, "text": "ä" * rank})
    together = ranks.together(lambda: f"did {rank}")
    try:
        ranks.together(lambda: 1 // (rank - 1))
    except (RankError, ZeroDivisionError) as error:
        return gathered, together, f"{type(error).__name__}: {error}"
    return gathered, together, "nothing"


def test_ranks_hear_of_each_other_and_of_failures() -> None:
    told, _, _ = found = run_ranks(talk, 3)
    assert all(rank[:2] == told[:2] for rank in found)
    assert told[0] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ä"}, {"rank": 2, "text": "ää"}]
    assert told[1] == ["did 0", "did 1", "did 2"]
    failed = "rank 1 failed: ZeroDivisionError: integer division or modulo by zero"
    assert [rank[2].split(": ", 1) for rank in found] == [
        ["RankError", failed],
        ["ZeroDivisionError", "integer division or modulo by zero"],
        ["RankError", failed],
    ]


def gone(rank: int) -> str:
    ranks = joined()
    ranks.gather(0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(
        RankError, match=r"rank 0: expected answers of 2 ranks, found .*; see the logs of the other ranks"
    ):
        ranks.gather(1)
    assert time.monotonic() - began < 10
    return "told"


def test_a_rank_that_is_killed_is_missed() -> None:
    first, second = outcomes(gone, 2)
    assert (first.result, first.error) == ("told", None)
    assert second.error == "killed"


def full_disk(rank: int, engine: str, base: Path, out: Path) -> list[str]:
    """Rank 1 cannot write its part of the second package."""
    honest, taken = snapshot.write_parts, []

    def write_parts(*args: Any, **options: Any) -> Any:
        taken.append(1)
        if rank == 1 and len(taken) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(*args, **options)

    snapshot.write_parts = write_parts  # in this process only
    callback = DareCallback(p=0.5, on_error="raise")
    try:
        train_on(engine, lambda: classifier(base), out, callback)
    except SnapshotError as error:
        return [str(error), *(taken.package.path.name for taken in callback.packages)]
    return ["no error"]


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_rank_that_cannot_write_stops_all_with_its_error(base: Path, tmp_path: Path, engine: str) -> None:
    began = time.monotonic()
    first, second = run_ranks(full_disk, 2, engine, base, tmp_path / "out")
    assert time.monotonic() - began < 60
    assert first[0].startswith("snapshot: rank 1 failed: ")
    assert "No space left on device" in first[0]
    assert "No space left on device" in second[0]
    assert first[1:] == second[1:] == ["step-2"]
    DeltaPackage.open(tmp_path / "out/dare/step-2").verify(base)
    assert [path.name for path in (tmp_path / "out/dare").iterdir() if path.name.startswith(".step")] == []
    assert (tmp_path / "out/checkpoint-4/model.safetensors").exists()


def traffic(rank: int, folder: Path, scale: int) -> int:
    """Bytes that this rank tells the others for one snapshot of a model."""
    ranks = joined()
    model = torch.nn.ModuleDict({f"layer{i}": torch.nn.Linear(8 * scale, 64) for i in range(40)})
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1.0)
    live = LiveWeights(model, ranks=ranks)
    snapshotter = Snapshotter(from_live(live, folder / "base", {}), DareConfig(p=0.5, values="int8"), live)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    before = snapshotter._line.bytes_sent + ranks.bytes_sent
    snapshotter.take(model, folder / "package", step=1)
    snapshotter.wait()
    sent = snapshotter._line.bytes_sent + ranks.bytes_sent - before
    snapshotter.close()
    return sent


def test_snapshots_send_counts_only(tmp_path: Path) -> None:
    """Whatever the size of the weights: 0.2 MB and 20 MB of them."""
    small = run_ranks(traffic, 2, tmp_path / "small", 2)
    large = run_ranks(traffic, 2, tmp_path / "large", 250)
    assert DeltaPackage.open(tmp_path / "large/package").stats["parameters"] == 40 * (2000 * 64 + 64)
    assert all(0 < bytes_sent < 4000 for bytes_sent in small + large)


def evaluated(
    rank: int, engine: str, base: Path, out: Path, evaluate: bool
) -> tuple[list[dict[str, float]], str]:
    callback = DareCallback(p=0.5, evaluate=evaluate, values="int8")
    trainer = train_on(
        engine,
        lambda: classifier(base),
        out,
        callback,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
    )
    assert callback.package is not None
    logged = [
        {k: v for k, v in entry.items() if k.endswith("loss") and k.startswith("eval")}
        for entry in trainer.state.log_history
    ]
    return logged, callback.package.manifest.result


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_evaluating_as_the_receiver_leaves_training_alone(base: Path, tmp_path: Path, engine: str) -> None:
    with_it, _ = run_ranks(evaluated, 2, engine, base, tmp_path / "with", True)
    without, _ = run_ranks(evaluated, 2, engine, base, tmp_path / "without", False)
    assert with_it[1] == without[1]
    dense = [entry["eval_loss"] for entry in with_it[0] if "eval_loss" in entry]
    received = [entry["eval_dare_loss"] for entry in with_it[0] if "eval_dare_loss" in entry]
    assert dense == [entry["eval_loss"] for entry in without[0] if "eval_loss" in entry]
    assert len(dense) == len(received) == 2
    assert dense != received


def masters(rank: int, engine: str, base: Path, out: Path) -> str:
    callback = DareCallback(p=0.0, source="master", values="exact")
    train_on(
        engine, lambda: classifier(base, dtype=torch.bfloat16), out, callback, bf16=True, save_strategy="no"
    )
    assert callback.package is not None
    return callback.package.manifest.result


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_snapshots_of_masters(base: Path, tmp_path: Path, engine: str) -> None:
    """fp32 values that, rounded to bfloat16, are the weights that training ends with."""
    first, second = run_ranks(masters, 2, engine, base, tmp_path / "masters")
    assert first == second
    package = DeltaPackage.open(tmp_path / "masters/dare/final")
    assert {record.info.dtype.code for record in package.manifest.tensors} == {"F32"}
    assert (
        sum(record.changed for record in package.manifest.tensors) > 0.9 * package.stats["parameters"] * 0.5
    )


def without_masters(rank: int, base: Path, out: Path) -> None:
    train_on("ddp", lambda: classifier(base, dtype=torch.bfloat16), out, DareCallback(source="master"))


def test_masters_of_an_engine_that_keeps_none(base: Path, tmp_path: Path) -> None:
    for outcome in outcomes(without_masters, 2, base, tmp_path / "out"):
        assert outcome.error == "ConfigError"
        assert (
            "source: expected an engine that keeps fp32 masters of 16-bit weights, found none of"
            in outcome.message
        )
