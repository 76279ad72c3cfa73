"""Packages travel in the uploads of `TrainingArguments(push_to_hub=True)`, and nothing else of theirs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from huggingface_hub.utils import filter_repo_objects
from training import classifier, make_trainer, save_base

from dare_train import DareCallback, DeltaPackage


class Hub:
    """What a Trainer calls; remembers which files are uploaded, as the Hub's client chooses them."""

    def __init__(self) -> None:
        self.uploaded: set[str] = set()

    def __call__(self, *_: Any, **__: Any) -> Hub:
        return self

    def create_repo(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(repo_id="user/model")

    def upload_folder(self, *, folder_path: str, ignore_patterns: list[str], **_: Any) -> Any:
        root = Path(folder_path)
        files = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        self.uploaded.update(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        return SimpleNamespace(done=lambda: True, result=lambda *_: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", stand_in)
    return stand_in


PUSHED: dict[str, Any] = dict(push_to_hub=True, hub_token="hf_x", hub_strategy="every_save")


def moved_on(base: Path, by: float = 1.01) -> Any:
    """A model whose weights are nowhere on disk: its base has to be kept."""
    model = classifier(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(by)
    return model


def test_packages_travel_and_neither_bases_nor_what_is_being_written(hub: Hub, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    callback = DareCallback(p=0.5, keep=1)
    trainer = make_trainer(moved_on(base), tmp_path / "out", callback, **PUSHED)
    trainer.train()
    ours = {file for file in hub.uploaded if "dare" in file}
    assert {file.split("/")[1] for file in ours} <= {"step-2", "step-4"}
    assert not [file for file in ours if "/." in file or "base" in file.split("/")]
    trainer.push_to_hub()
    assert "dare/final/dare_delta.safetensors" in hub.uploaded
    assert not [file for file in hub.uploaded if "_dare" in file]
    kept = tmp_path / "out/_dare/base"
    DeltaPackage.open(tmp_path / "out/dare/final").verify(kept)
    assert {path.name for path in (tmp_path / "out/_dare").iterdir()} == {"base"}
    assert {path.name for path in (tmp_path / "out/dare").iterdir()} == {"step-4", "final"}


def test_a_run_that_is_pushed_resumes_on_its_base(hub: Hub, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    first = DareCallback(p=0.5)
    make_trainer(moved_on(base), tmp_path / "out", first, **PUSHED).train()
    again = DareCallback(p=0.5)
    trainer = make_trainer(classifier(base), tmp_path / "out", again, **PUSHED)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert again.package is not None
    assert first.package is not None
    assert again.package.manifest.result == first.package.manifest.result
    again.package.verify(tmp_path / "out/_dare/base")


def test_a_second_run_moves_the_first_ones_base_where_it_is_not_uploaded(hub: Hub, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    make_trainer(moved_on(base), tmp_path / "out", DareCallback(p=0.5), **PUSHED).train()
    hub.uploaded.clear()
    make_trainer(moved_on(base, by=1.02), tmp_path / "out", DareCallback(p=0.5), **PUSHED).train()
    assert (tmp_path / "out/_dare-earlier-1/base").is_dir()
    assert not [file for file in hub.uploaded if "earlier" in file or "base" in file.split("/")]
