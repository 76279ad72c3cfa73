"""Figures of snapshots: in the Trainer's history, in all its trackers, and a line at the end."""

from __future__ import annotations

import importlib.util
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from training import classifier, make_trainer, save_base, train
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dare_train import DareCallback

Stored = Mapping[str, list[float]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def told(history: list[dict[str, Any]], key: str) -> list[float]:
    return [entry[key] for entry in history if key in entry]


def test_the_trainers_history_has_each_callbacks_figures(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = DareCallback(p=0.5), DareCallback(p=0.9, name="sparse", when="end")
    trainer = make_trainer(classifier(base), tmp_path / "out", one, other)
    trainer.train()
    history = trainer.state.log_history
    assert told(history, "dare/package_bytes") == [each.package.size for each in one.packages]
    assert told(history, "dare/seconds_waited") == one.waited
    assert told(history, "dare/step") == [2, 4, 4]
    assert told(history, "sparse/package_bytes") == [other.packages[0].package.size]
    assert told(history, "sparse/density")[0] == pytest.approx(0.1, abs=0.01)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DareCallback ")]
    assert len(lines) == 2
    size = one.packages[-1].package.size
    assert lines[0].startswith(f"DareCallback 'dare': {tmp_path / 'out/dare/final'}: {size:,} bytes, ")
    assert f"training waited {sum(one.waited):.3f} s for 3 packages" in lines[0]
    assert lines[1].endswith(" for 1 package")


class StopsAtFigures(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> Any:
        if "dare/step" in logs:
            control.should_training_stop = True
        return control


def test_the_trainer_logs_and_goes_on_as_without_it(base: Path, tmp_path: Path) -> None:
    """A package of the step before is reported just before the Trainer looks whether it has to log."""
    callbacks = (DareCallback(when=1), StopsAtFigures())
    logging: dict[str, Any] = dict(logging_strategy="steps", logging_steps=1)
    trainer = train(classifier(base), tmp_path / "out", *callbacks, **logging)
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert told(history, "dare/step") == [1, 2, 3, 4]


class Tracker(TrainerCallback):
    """Closes its run at the end of a training, as mlflow's does, and takes nothing after that."""

    heard: list[dict[str, float]]
    closed = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        type(self).heard = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        assert not self.closed, "told after it had closed its run"
        self.heard.append(logs)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        type(self).closed += 1


class Own(TrainerCallback):
    """A user's: is called where it was put, before the trackers close and after."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_log(self, *_: Any, **__: Any) -> None:
        self.seen.append("log")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seen.append("end")


def test_trackers_close_after_the_last_package(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "stand-in", Tracker)
    callback, own = DareCallback(when="end"), Own()
    trainer = make_trainer(classifier(base), tmp_path / "out", own, callback, report_to=["stand-in"])
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert Tracker.closed == 1
    assert [logs["dare/package_bytes"] for logs in Tracker.heard if "dare/package_bytes" in logs] == [
        callback.packages[0].package.size
    ]
    assert own.seen.count("end") == 1
    assert trainer.callback_handler.callbacks == before, "each in its place again"
    Tracker.closed = 0
    trainer.train()
    assert (Tracker.closed, own.seen.count("end")) == (1, 2)
    assert trainer.callback_handler.callbacks == before


# Real trackers.


def of_tensorboard(folder: Path) -> Stored:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.*")
    events = EventAccumulator(str(file)).Reload()
    return {
        key.removeprefix("train/"): [event.value for event in events.Scalars(key)]
        for key in events.Tags()["scalars"]
    }


def of_mlflow(folder: Path) -> Stored:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = [
        run for found in client.search_experiments() for run in client.search_runs([found.experiment_id])
    ]
    assert run.info.status == "FINISHED"
    return {
        key: [metric.value for metric in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }


def of_trackio(folder: Path) -> Stored:
    import json

    (file,) = folder.glob("*.db")
    stored: dict[str, list[float]] = {}
    with sqlite3.connect(file) as connection:
        for (metrics,) in connection.execute("select metrics from metrics order by id"):
            for key, value in json.loads(metrics).items():
                stored.setdefault(key.removeprefix("train/"), []).append(value)
    return stored


TRACKERS: Mapping[str, Callable[[Path], Stored]] = {
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
}


@pytest.mark.filterwarnings("default")  # their own
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(name) is None, reason=f"no {name}: run scripts/trackers"
            ),
        )
        for name in TRACKERS
    ],
)
def test_a_trackers_store_has_the_same_figures(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(store))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(store))
    callback = DareCallback(p=0.5)
    train(classifier(base), tmp_path / "out", callback, report_to=[name])
    found = TRACKERS[name](store)
    assert found["dare/package_bytes"] == [each.package.size for each in callback.packages]
    bits = [each.package.stats["bits_per_parameter"] for each in callback.packages]
    assert found["dare/bits_per_parameter"] == pytest.approx(bits)
    assert found["dare/seconds_waited"] == pytest.approx(callback.waited)
