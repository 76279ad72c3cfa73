"""One folder, one run: which base, which packages, which evaluation belong to a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tunes import ADAPTERS, load, make_trainer, rows, save_decoder
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from dare_train import DareCallback, DareConfig, DeltaPackage, Snapshotter, apply
from dare_train.errors import ConfigError, PackageError
from dare_train.weights.fingerprint import weights_fingerprint
from dare_train.weights.live.live import LiveWeights

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("runs") / "base")


def run(base: Path, out: Path, callback: DareCallback, *others: TrainerCallback, **options: Any) -> Trainer:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **options}
    resume = saving.pop("resume", None)
    trainer = make_trainer(load(base), out, callback, *others, **saving)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def results_in(base: Path, package: Path, out: Path) -> str:
    return apply(base, package, out, overwrite=True)


class Once(TrainerCallback):
    """Fails once, before a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error
        self.done = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and not self.done:
            self.done = True
            raise self.error


def test_want_of_memory_in_mid_training_does_not_change_the_base(base: Path, tmp_path: Path) -> None:
    """`auto_find_batch_size` begins again, with weights that were trained."""
    callback = DareCallback(p=0.0)
    trainer = run(
        base,
        tmp_path / "out",
        callback,
        Once(3, RuntimeError("CUDA out of memory.")),
        auto_find_batch_size=True,
    )
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(base)
    live = weights_fingerprint(LiveWeights(trainer.model))
    assert results_in(base, package.path, tmp_path / "received") == live


def test_a_second_training_of_a_model_goes_on_from_its_base(base: Path, tmp_path: Path) -> None:
    trainer = run(base, tmp_path / "out", DareCallback(p=0.0))
    trainer.train()
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    live = weights_fingerprint(LiveWeights(trainer.model))
    assert results_in(base, package.path, tmp_path / "received") == live
    assert names(tmp_path / "out/dare") == ["final", "step-2", "step-4"]
    assert names(tmp_path / "out/dare-earlier-1") == ["final", "step-2", "step-4"]


def test_a_base_that_was_copied_serves_the_second_training_too(tmp_path: Path) -> None:
    model = load(save_decoder(tmp_path / "base"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    trainer = make_trainer(model, tmp_path / "out", DareCallback(p=0.0))
    trainer.train()
    begun = (tmp_path / "out/dare/base/model.safetensors").read_bytes()
    trainer.train()
    assert (tmp_path / "out/dare/base/model.safetensors").read_bytes() == begun
    live = weights_fingerprint(LiveWeights(trainer.model))
    assert results_in(tmp_path / "out/dare/base", tmp_path / "out/dare/final", tmp_path / "received") == live


def test_another_runs_copied_base_goes_with_its_packages(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base")
    for factor in (1.25, 1.5):
        model = load(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        make_trainer(model, tmp_path / "out", DareCallback(p=0.0)).train()
    earlier = tmp_path / "out/dare-earlier-1"
    assert names(earlier) == ["base", "final"]
    for folder in (tmp_path / "out/dare", earlier):
        results_in(folder / "base", folder / "final", tmp_path / "received")


def test_packages_of_another_run_are_moved_aside_and_one_line_says_so(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(base, tmp_path / "out", DareCallback(seed=0), max_steps=8)
    run(base, tmp_path / "out", DareCallback(seed=3))
    folder = tmp_path / "out/dare"
    assert {DeltaPackage.open(path).manifest.seed for path in folder.iterdir()} == {3}
    assert names(folder) == ["final", "step-2", "step-4"]
    earlier = tmp_path / "out/dare-earlier-1"
    assert names(earlier) == ["final", "step-2", "step-4", "step-6", "step-8"]
    assert [r.getMessage() for r in caplog.records if r.name == "dare_train"] == [
        f"{folder}: moved to {earlier}, since it is not of this run so far: "
        "step-2, step-4, step-6, step-8, final"
    ]


def test_keep_counts_this_runs_packages(base: Path, tmp_path: Path) -> None:
    for _ in range(2):
        run(base, tmp_path / "out", DareCallback(keep=1), max_steps=6)
    assert names(tmp_path / "out/dare") == ["final", "step-6"]


def test_a_loop_of_ones_own_keeps_as_many_as_it_says(base: Path, tmp_path: Path) -> None:
    model = load(base)
    snapshotter = Snapshotter.begin(model, tmp_path, DareConfig())
    for step in (1, 2, 10):
        snapshotter.take(model, tmp_path / f"step-{step}", step=step, keep=(2, tmp_path))
    snapshotter.close()
    assert names(tmp_path) == ["step-10", "step-2"]


def test_the_best_checkpoints_package_stays(base: Path, tmp_path: Path) -> None:
    class Worse(TrainerCallback):
        """The metric is best at step 2."""

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            metrics["eval_score"] = float(-state.global_step)

    trainer = make_trainer(
        load(base), tmp_path / "out", Worse(), DareCallback(keep=1, keep_best=True),
        max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="score", greater_is_better=True, eval_dataset=rows(4),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert names(tmp_path / "out/dare") == ["final", "step-2", "step-6"]
    with pytest.raises(ConfigError, match="keep_best: expected False without keep"):
        DareCallback(keep_best=True)


def test_a_search_has_packages_beside_the_checkpoints_of_each_trial(base: Path, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, save_strategy="no", report_to=[], use_cpu=True,
        eval_strategy="steps", eval_steps=2, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model_init=lambda: load(base), args=arguments, train_dataset=rows(), eval_dataset=rows(4),
        callbacks=[DareCallback(p=0.0)],
    )  # fmt: skip
    trainer.hyperparameter_search(
        direction="minimize",
        backend="optuna",
        n_trials=2,
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
    )
    finals = (tmp_path / "out").rglob("final/dare_config.json")
    assert sorted(path.parents[2].name for path in finals) == ["run-0", "run-1"]


def test_a_package_that_a_kill_prevented_is_made_up(base: Path, tmp_path: Path) -> None:
    whole = run(base, tmp_path / "whole", DareCallback(p=0.5))
    run(base, tmp_path / "out", DareCallback(p=0.5), max_steps=2)
    expected = DeltaPackage.open(tmp_path / "out/dare/step-2").manifest.result
    for path in sorted((tmp_path / "out/dare/step-2").iterdir()):
        path.unlink()
    (tmp_path / "out/dare/step-2").rmdir()
    run(base, tmp_path / "out", DareCallback(p=0.5), resume=str(tmp_path / "out/checkpoint-2"))
    assert DeltaPackage.open(tmp_path / "out/dare/step-2").manifest.result == expected
    assert whole.state.global_step == 4


def test_what_a_run_wrote_after_its_checkpoint_does_not_stay_among_its_packages(
    base: Path, tmp_path: Path
) -> None:
    run(base, tmp_path / "out", DareCallback(keep=2, when=1), max_steps=4)
    resumed = DareCallback(keep=2, when=1)
    run(base, tmp_path / "out", resumed, resume=str(tmp_path / "out/checkpoint-2"), max_steps=3)
    assert [snapshot.step for snapshot in resumed.packages] == [3]
    assert names(tmp_path / "out/dare") == ["step-3"]
    assert names(tmp_path / "out/dare-earlier-1") == ["step-3", "step-4"]


def test_two_runs_are_not_chained(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "out", DareCallback(incremental=True, p=0.5, seed=1), max_steps=2)
    run(base, tmp_path / "out", DareCallback(incremental=True, p=0.5))
    chain = [tmp_path / f"out/dare/{name}" for name in ("step-2", "step-4", "final")]
    assert DeltaPackage.open(chain[0]).manifest.continues == "base"
    results_in(base, chain, tmp_path / "received")  # type: ignore[arg-type]


def test_a_base_that_moved_is_found_by_content(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "scratch")
    run(base, tmp_path / "out", DareCallback(p=0.0), max_steps=2)
    moved = base.rename(tmp_path / "elsewhere")
    run(moved, tmp_path / "out", DareCallback(p=0.0), resume=str(tmp_path / "out/checkpoint-2"))
    assert DeltaPackage.open(tmp_path / "out/dare/final").manifest.base_model == str(moved)


def test_an_output_folder_that_moved_has_its_copied_base_with_it(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base")
    doubled = {name: 2 * tensor for name, tensor in load_file(base / "model.safetensors").items()}
    model = load(base)
    model.load_state_dict(doubled, strict=False)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(model, tmp_path / "out", DareCallback(p=0.0), **options).train()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    trainer = make_trainer(load(base), moved, DareCallback(p=0.0), max_steps=4, **options)
    trainer.train(resume_from_checkpoint=str(moved / "checkpoint-2"))
    package = DeltaPackage.open(moved / "dare/final")
    assert package.manifest.base_model == str(moved / "dare/base")
    save_file(doubled, base / "model.safetensors", metadata={"format": "pt"})
    results_in(moved / "dare/base", package.path, tmp_path / "received")


def losses(trainer: Trainer, prefix: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in trainer.state.log_history:
        for name, value in line.items():
            if name.startswith(prefix) and name.endswith("_loss"):
                found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("adapter", ["none", "lora", "dora", "pissa", "head too", "native"])
def test_what_was_evaluated_is_evaluated_as_received(base: Path, tmp_path: Path, adapter: str) -> None:
    trainer = make_trainer(
        ADAPTERS[adapter](load(base)),
        tmp_path / "out",
        DareCallback(p=0.0, evaluate=True),
        eval_dataset={"a": rows(4), "b": rows(8)[4:]},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(rows(12)[8:], metric_key_prefix="test")
    received = losses(trainer, "eval_dare")
    live = losses(trainer, "eval_")
    assert received.keys() == {"eval_dare_a_loss", "eval_dare_b_loss"}
    for name, values in received.items():
        assert values == pytest.approx(live[name.replace("_dare", "")], abs=1e-4)
    assert losses(trainer, "test_dare")["test_dare_loss"] == pytest.approx(
        losses(trainer, "test_")["test_loss"], abs=1e-4
    )


def test_adapters_in_evaluation_are_dropped_and_back_again(base: Path, tmp_path: Path) -> None:
    model = ADAPTERS["lora"](load(base))
    trainer = make_trainer(model, tmp_path / "out", DareCallback(p=0.9, evaluate=True))
    trainer.eval_dataset = rows(4)
    trainer.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.evaluate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    received = losses(trainer, "eval_dare")["eval_dare_loss"]
    assert received != losses(trainer, "eval_")["eval_loss"]


def test_a_removed_packages_repr_says_so(base: Path, tmp_path: Path) -> None:
    callback = DareCallback(keep=1)
    run(base, tmp_path / "out", callback)
    first, last = callback.packages[0].package, callback.packages[-1].package
    assert repr(first).endswith("removed since it was opened)")
    assert "removed since" not in repr(last)
    assert "removed since" in repr(callback.packages)
    with pytest.raises(
        PackageError, match="expected a package, found none: it was removed since it was opened"
    ):
        print(first.stats)
