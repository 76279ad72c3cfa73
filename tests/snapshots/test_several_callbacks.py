"""Several packages from one run, and what else happens in a run's life."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb
from engines import run_ranks, train_on
from safetensors.torch import load_file, save_file
from training import classifier, save_base, train
from transformers import EarlyStoppingCallback
from wandb_files import history, offline_run

from dare_train import DareCallback, DeltaPackage, apply
from dare_train.errors import BaseMismatch
from dare_train.weights.live import live as shards


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("several") / "base")


def callbacks() -> list[DareCallback]:
    return [
        DareCallback(p=0.9, seed=1, name="sparse"),
        DareCallback(p=0.5, seed=2, name="dense", values="int8"),
        DareCallback(p=0.0, name="ends", when="end"),
        DareCallback(p=0.9, seed=4, name="often", when=1),
    ]


def results(callback: DareCallback) -> list[tuple[str, str]]:
    return [(snapshot.package.path.name, snapshot.package.manifest.result) for snapshot in callback.packages]


def test_several_callbacks_get_what_each_would_get_alone(base: Path, tmp_path: Path) -> None:
    together = callbacks()
    train(classifier(base), tmp_path / "together", *together)
    assert [[name for name, _ in results(one)] for one in together] == [
        ["step-2", "step-4", "final"], ["step-2", "step-4", "final"], ["final"],
        ["step-1", "step-2", "step-3", "step-4"],
    ]  # fmt: skip
    for number, callback in enumerate(callbacks()):
        train(classifier(base), tmp_path / f"alone-{number}", callback)
        assert results(callback) == results(together[number])


def test_one_pass_over_the_weights_serves_all_that_are_due(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    honest = shards.LiveWeights.read

    def read(self: shards.LiveWeights, name: str, start: int, count: int) -> Any:
        reads.append(name)
        return honest(self, name, start, count)

    def reads_of(*wanted: DareCallback) -> int:
        counting = []
        for one in wanted:
            begin = type(one).on_save

            def on_save(*arguments: Any, begin: Any = begin, one: DareCallback = one, **options: Any) -> None:
                before = len(reads)
                begin(one, *arguments, **options)
                counting.append(len(reads) - before)

            one.on_save = on_save  # type: ignore[method-assign]
        train(classifier(base), tmp_path / f"out-{len(wanted)}", *wanted, max_steps=2)
        return sum(counting)

    monkeypatch.setattr(shards.LiveWeights, "read", read)
    alone = reads_of(DareCallback(p=0.9, when="save"))
    assert (
        reads_of(DareCallback(p=0.9, when="save"), DareCallback(p=0.5, seed=2, when="save", name="other"))
        == alone
        > 20
    )


def test_a_second_run_with_the_same_model_and_callback(base: Path, tmp_path: Path) -> None:
    model, callback = classifier(base), DareCallback(p=0.5, when="end")
    train(model, tmp_path / "first", callback)
    train(model, tmp_path / "second", callback)
    assert [snapshot.package.path.parent.parent.name for snapshot in callback.packages] == ["first", "second"]


class Fails(DareCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("training broke")


def test_a_run_that_broke_does_not_haunt_the_next(base: Path, tmp_path: Path) -> None:
    model = classifier(base)
    with pytest.raises(RuntimeError, match="training broke"):
        train(model, tmp_path / "broken", Fails(p=0.5, name="old"))
    train(model, tmp_path / "next", callback := DareCallback(p=0.5))
    assert not (tmp_path / "broken/old/final").exists()
    assert [name for name, _ in results(callback)] == ["step-2", "step-4", "final"]


def life(rank: int, engine: str, base: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    callback = DareCallback(p=0.5, seed=3)
    extra = [EarlyStoppingCallback(early_stopping_patience=1)] if options.pop("early", False) else []
    trainer = train_on(engine, lambda: classifier(base), out, callback, *extra, **options)
    return {
        "results": results(callback),
        "best": trainer.state.best_model_checkpoint,
        "steps": trainer.state.global_step,
    }


BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "loss",
    "learning_rate": 0.5,
}
LIVES = {
    "best": BEST,
    "early": {**BEST, "early": True, "max_steps": 12},
    "model only": {"save_only_model": True},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("best", "ddp"),
        ("best", "zero3"),
        ("best", "fsdp2"),
        ("early", "zero2"),
        ("early", "fsdp2"),
        ("model only", "ddp"),
        ("model only", "zero3"),
        ("checkpointing", "zero2"),
        ("checkpointing", "fsdp2"),
        ("accumulation", "zero3"),
        ("accumulation", "ddp"),
    ],
)
def test_lives_of_runs_on_engines(base: Path, tmp_path: Path, kind: str, engine: str) -> None:
    first, second = run_ranks(life, 2, engine, base, tmp_path / "out", dict(LIVES[kind]))
    assert first == second
    by_name = dict(first["results"])
    for name in by_name:
        DeltaPackage.open(tmp_path / "out/dare" / name).verify(base)
    if first["best"] is not None:
        assert by_name["final"] == by_name["step-" + first["best"].rsplit("-", 1)[1]]
        assert len(set(by_name.values())) == len(by_name) - 1
    if kind == "early":
        assert first["steps"] < 12


Told = list[tuple[str, str]]


def plain_and_chained(rank: int, engine: str, base: Path, out: Path) -> tuple[Told, Told]:
    callbacks = [
        DareCallback(p=0.5, seed=3, name=name, incremental=name == "chain") for name in ("plain", "chain")
    ]
    train_on(engine, lambda: classifier(base), out, *callbacks)
    plain, chain = map(results, callbacks)
    return plain, chain


@pytest.fixture(scope="module")
def run_of(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Told, Told]]:
    """A training on two ranks of an engine to its end, once for all tests: its folder, what its packages on
    the base are, and what its chained ones are.
    """
    made: dict[str, tuple[Path, Told, Told]] = {}

    def run(engine: str) -> tuple[Path, Told, Told]:
        if engine not in made:
            out = tmp_path_factory.mktemp(engine) / "out"
            made[engine] = out, *run_ranks(plain_and_chained, 2, engine, base, out)[0]
        return made[engine]

    return run


def resumed(rank: int, engine: str, base: Path, out: Path) -> Told:
    callback = DareCallback(p=0.5, seed=3, name="chain", incremental=True)
    train_on(engine, lambda: classifier(base), out, callback, resume=out / "checkpoint-2")
    return results(callback)


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_chains_on_engines(base: Path, run_of: Callable[..., Any], tmp_path: Path, engine: str) -> None:
    """Each link's result is that of the package on the base; a resumed run goes on with the chain."""
    whole, plain, chain = run_of(engine)
    assert chain == plain
    out = tmp_path / "out"
    for name in ("checkpoint-2", "chain"):
        shutil.copytree(whole / name, out / name)
    links = [out / "chain" / name for name, _ in chain]
    assert [DeltaPackage.open(link).manifest.continues for link in links] == ["base", "package", "package"]
    apply(base, links, tmp_path / "result")
    assert run_ranks(resumed, 2, engine, base, out)[0] == plain[1:]
    assert apply(base, links, tmp_path / "again") == plain[-1][1]


def logging(rank: int, engine: str, base: Path, out: Path) -> float:
    callback = DareCallback(p=0.5)
    train_on(
        engine,
        lambda: classifier(base),
        out,
        callback,
        report_to=["wandb"],
        logging_strategy="steps",
        logging_steps=1,
    )
    if rank == 0:
        wandb.teardown()
    return callback.packages[0].waited


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_only_the_main_process_logs(base: Path, tmp_path: Path, engine: str, quiet: Path) -> None:
    waited, same = run_ranks(logging, 2, engine, base, tmp_path / "out")
    rows = [row for row in history(offline_run(quiet)) if "dare/package_bytes" in row]
    assert [row["train/global_step"] for row in rows] == [2, 4, 4]
    assert rows[0]["dare/seconds_waited"] == waited == same
    assert rows[-1]["dare/package_bytes"] == DeltaPackage.open(tmp_path / "out/dare/final").size


def moved_base(rank: int, engine: str, base: Path, out: Path) -> str:
    callback = DareCallback(p=0.5, name="plain")
    try:
        train_on(engine, lambda: classifier(base), out, callback, resume=out / "checkpoint-2")
    except BaseMismatch as error:
        return str(error)
    return "trained"


@contextmanager
def moved(base: Path, elsewhere: Path) -> Iterator[Path]:
    """Within the block, nothing lies where the base was."""
    base.rename(elsewhere)
    try:
        yield elsewhere
    finally:
        elsewhere.rename(base)


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_resumed_run_whose_base_is_gone_stops_before_it_trains(
    base: Path, run_of: Callable[..., Any], tmp_path: Path, engine: str
) -> None:
    out = shutil.copytree(run_of(engine)[0], tmp_path / "out")
    with moved(base, tmp_path / "elsewhere") as elsewhere:
        other = shutil.copytree(elsewhere, tmp_path / "other")
        halved = {name: tensor / 2 for name, tensor in load_file(other / "model.safetensors").items()}
        save_file(halved, other / "model.safetensors", metadata={"format": "pt"})
        ends = run_ranks(moved_base, 2, engine, other, out)
    for said in ends:
        assert said.startswith(f"base of the resumed run: {base}: expected one with fingerprint ")
        assert said.endswith("found nothing there; put it back where it was, or pass base= to the callback")


def test_a_resumed_run_finds_its_base_by_content_where_the_model_was_loaded_from(
    base: Path, run_of: Callable[..., Any], tmp_path: Path
) -> None:
    out = shutil.copytree(run_of("ddp")[0], tmp_path / "out")
    with moved(base, tmp_path / "elsewhere") as elsewhere:
        assert run_ranks(moved_base, 2, "ddp", elsewhere, out) == ["trained", "trained"]
    assert DeltaPackage.open(out / "plain/final").manifest.base_model == str(elsewhere)
