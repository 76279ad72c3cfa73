"""A guest in the training: whatever fails in the callback once training has begun, training goes on to its
end, with the weights that it would have had.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_faults import PLACES, planted
from training import classifier, make_trainer, save_base, train, weights_print
from transformers import TrainerCallback

from dare_train import DareCallback, DeltaPackage
from dare_train.errors import ConfigError, SnapshotError, StorageError

EVERYTHING: dict[str, Any] = dict(when=("save", "epoch", "end", 1), evaluate=True, keep=1, p=0.5)
SHORT: dict[str, Any] = dict(max_steps=2, eval_strategy="steps", eval_steps=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("guest") / "base", layers=1)


@pytest.fixture(scope="module")
def trained_alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fingerprint of the weights that training without a callback gives."""
    trainer = train(classifier(base), tmp_path_factory.mktemp("alone"), **SHORT)
    return weights_print(trainer.model)


class _FaultsAfterBegin(TrainerCallback):
    """Plants a fault when training has begun, before the callbacks that come after it see the first step."""

    def __init__(self, place: str) -> None:
        self.fault = planted(place, RuntimeError("planted"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.calls = self.fault.__enter__()


@pytest.mark.parametrize("place", PLACES)
def test_no_fault_ends_a_training_or_changes_what_it_trains(
    base: Path, tmp_path: Path, trained_alone: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback = DareCallback(**EVERYTHING)
    plant = _FaultsAfterBegin(place)
    trainer = make_trainer(classifier(base), tmp_path / "out", callback, plant, **SHORT)
    try:
        with caplog.at_level(logging.ERROR, "dare_train"):
            trainer.train()
    finally:
        plant.fault.__exit__(None, None, None)
    assert plant.calls, "the fault was never met: it proves nothing"
    assert trainer.state.global_step == 2
    assert weights_print(trainer.model) == trained_alone
    assert callback.failures
    counted = [entry["dare/failures"] for entry in trainer.state.log_history if "dare/failures" in entry]
    assert counted
    assert counted[-1] == len(callback.failures)
    assert "in this training" in caplog.records[-1].getMessage()
    trainer.save_model()
    assert (tmp_path / "out/model.safetensors").exists()


def test_training_goes_on_with_packages_once_the_fault_is_gone(base: Path, tmp_path: Path) -> None:
    class Once(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            weight = model.bert.pooler.dense.weight
            if state.global_step == 1:
                self.before = weight.detach().clone()
            elif state.global_step == 2:
                weight.data.copy_(self.before)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                self.before = model.bert.pooler.dense.weight.detach().clone()
                model.bert.pooler.dense.weight.data.fill_(float("nan"))

    callback = DareCallback(when=1, p=0.0)
    train(classifier(base), tmp_path / "out", Once(), callback)
    assert [snapshot.step for snapshot in callback.packages] == [1, 3, 4]
    assert len(callback.failures) == 1
    assert isinstance(callback.failures[0], SnapshotError)
    assert "bert.pooler.dense.weight" in str(callback.failures[0])


def test_with_raise_a_failure_ends_training_with_its_own_words(base: Path, tmp_path: Path) -> None:
    callback = DareCallback(on_error="raise")
    with (
        planted("dare_train.snapshots.snapshotter.write_manifest", OSError(28, "No space left on device")),
        pytest.raises(SnapshotError, match="No space left on device"),
    ):
        train(classifier(base), tmp_path / "out", callback)


def test_an_unknown_way_to_fail_is_refused() -> None:
    with pytest.raises(ConfigError, match='on_error: expected "warn" or "raise", found \'ignore\''):
        DareCallback(on_error="ignore")  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dare").write_text("a file in the folder's place")
    trainer = make_trainer(classifier(base), tmp_path / "out", DareCallback())
    with pytest.raises(StorageError, match=r"out/dare: found File exists; .*check the path and the disk"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_keyboard_interrupts_pass_and_the_next_training_starts_clean(base: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        stopped = False

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3 and not self.stopped:
                self.stopped = True
                raise KeyboardInterrupt

    callback = DareCallback(p=0.0)
    trainer = make_trainer(classifier(base), tmp_path / "out", callback, Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(base)
    assert sorted(path.name for path in (tmp_path / "out/dare").iterdir()) == ["final", "step-2", "step-4"]
    assert sorted(path.name for path in (tmp_path / "out").glob("dare-*")) == ["dare-earlier-1"]


def test_a_failed_evaluation_leaves_training_its_own_weights(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(classifier(base), tmp_path / "out", DareCallback(evaluate=True, p=0.5))
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with planted("dare_train.weights.live.live.LiveWeights.settle", OSError("planted")):
        trainer.evaluate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
