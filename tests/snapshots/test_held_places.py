"""A training whose package's place somebody else holds goes on, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import classifier, make_trainer, save_base
from transformers import TrainerCallback

from dare_train import DareCallback, DeltaPackage, extract
from dare_train.errors import OutputExists, SnapshotError
from dare_train.parallel.place_lock import locked


def trained(place: Path, **options: Any) -> tuple[DareCallback, Any]:
    callback = DareCallback(p=0.5, when=(2, "end"), **options)
    trainer = make_trainer(classifier(place / "base"), place / "out", callback, max_steps=4)
    trainer.train()
    return callback, trainer


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    return tmp_path


def test_the_training_goes_on_and_the_other_packages_are_there(place: Path) -> None:
    (place / "out/dare").mkdir(parents=True)
    with locked(place / "out/dare/step-2"):
        callback, trainer = trained(place)
    assert trainer.state.global_step == 4
    (failure,) = callback.failures
    assert "step-2" in str(failure)
    assert "found process" in str(failure)
    assert sorted(path.name for path in (place / "out/dare").iterdir()) == ["final", "step-4"]
    for path in (place / "out/dare").iterdir():
        DeltaPackage.open(path).check_integrity()


def test_the_weights_are_those_of_a_training_that_was_left_alone(place: Path) -> None:
    _, alone = trained(place)
    wanted = {name: tensor.clone() for name, tensor in alone.model.state_dict().items()}
    with locked(place / "out/dare/step-2"):
        _, disturbed = trained(place)
    for name, tensor in disturbed.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_it_ends_only_if_that_was_asked_for(place: Path) -> None:
    (place / "out/dare").mkdir(parents=True)
    with locked(place / "out/dare/step-2"), pytest.raises(SnapshotError, match="found process"):
        trained(place, on_error="raise")


def test_a_training_does_not_begin_where_somebody_else_is_at_work(place: Path) -> None:
    (place / "out").mkdir()
    with locked(place / "out/dare"), pytest.raises(OutputExists, match=r"dare: .*found process \d+ on"):
        trained(place)
    trained(place)
    assert [path.name for path in (place / "out").glob(".*")] == []


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise Interrupted


def test_nobody_takes_the_place_of_a_training_until_it_is_over(place: Path) -> None:
    """One that was interrupted is over when this process ends, or trains there again."""
    callback = DareCallback(p=0.5, when="end")
    model = classifier(place / "base")
    with pytest.raises(Interrupted):
        make_trainer(model, place / "out", callback, Interrupt(), save_strategy="no").train()
    with pytest.raises(OutputExists, match="nobody is writing to"):
        extract(place / "base", place / "base", place / "out/dare", overwrite=True)
    trained(place)
    extract(place / "base", place / "base", place / "out/dare", overwrite=True)
    assert [path.name for path in (place / "out").glob(".*")] == []
