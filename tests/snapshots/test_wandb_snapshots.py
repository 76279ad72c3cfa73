"""What wandb gets, read back from an offline run. Nothing is mocked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import wandb
from training import classifier, save_base, train
from wandb_files import history, offline_run

from dare_train import DareCallback, DeltaPackage


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def test_the_trainers_run_gets_figures_histograms_metrics_and_artifacts(
    base: Path, tmp_path: Path, quiet: Path
) -> None:
    options: dict[str, Any] = dict(report_to=["wandb"], eval_strategy="steps", eval_steps=2)
    callback = DareCallback(p=0.5, seed=4, evaluate=True)
    train(classifier(base), tmp_path / "out", callback, **options)
    found = offline_run(quiet)
    logged = [row for row in history(found) if "dare/package_bytes" in row]
    assert [row["train/global_step"] for row in logged] == [2, 4, 4]
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    last = logged[-1]
    assert last["dare/bits_per_parameter"] == pytest.approx(package.stats["bits_per_parameter"])
    assert last["dare/package_bytes"] == package.size
    assert last["dare/density"] == pytest.approx(0.5, abs=0.02)
    assert last["dare/seconds_waited"] == callback.waited[-1]
    assert {"dare/compression_ratio", "dare/delta_p50", "dare/delta_p99", "dare/delta_max"} <= last.keys()
    assert last["dare/delta_histogram/_type"] == "histogram"
    assert last["dare/layers/bert.pooler.dense.weight/_type"] == "histogram"
    assert [row for row in history(found) if "eval/dare_loss" in row or "eval_dare_loss" in row]
    artifacts = [
        record.request.log_artifact.artifact
        for record in found
        if record.HasField("request") and record.request.HasField("log_artifact")
    ]
    artifacts += [record.artifact for record in found if record.HasField("artifact")]
    packages = [artifact for artifact in artifacts if artifact.type == "dare-package"]
    assert len(packages) == 3
    metadata = json.loads(packages[-1].metadata)
    assert metadata["result_fingerprint"] == package.manifest.result
    assert metadata["parent_fingerprint"] == package.manifest.parent
    assert (metadata["base_model"], metadata["p"], metadata["seed"], metadata["continues"]) == (
        str(base),
        [0.5],
        4,
        "base",
    )


def test_an_active_run_is_used_though_the_trainer_does_not_report(
    base: Path, tmp_path: Path, quiet: Path
) -> None:
    run = wandb.init(project="mine")
    train(classifier(base), tmp_path / "out", DareCallback(when="end", artifact=False))
    assert wandb.run is run
    run.finish()
    found = offline_run(quiet)
    assert [row["train/global_step"] for row in history(found) if "dare/package_bytes" in row] == [4]
    assert not [record for record in found if record.HasField("artifact")]


def test_without_a_run_nothing_is_logged(base: Path, tmp_path: Path, quiet: Path) -> None:
    train(classifier(base), tmp_path / "out", DareCallback(when="end"))
    assert list(quiet.rglob("*.wandb")) == []


def test_an_offline_runs_artifacts_outlive_packages_that_keep_removes(
    base: Path, tmp_path: Path, quiet: Path
) -> None:
    train(classifier(base), tmp_path / "out", DareCallback(keep=1), report_to=["wandb"])
    assert not (tmp_path / "out/dare/step-2").exists()
    wandb.finish()
    logged = b"".join(record.SerializeToString() for record in offline_run(quiet))
    places = {Path(place.decode()) for place in re.findall(rb"/[\w./-]+dare_delta\.safetensors", logged)}
    assert {place.parent.name for place in places} == {"step-2", "step-4", "final"}
    assert all(place.exists() for place in places)
