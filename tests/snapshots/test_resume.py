"""Resumed runs: the base stays the true base. A wrong one passes every test of a fresh run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training import LABELS, classifier, save_base, tiny_config, train, weights_print
from transformers import BertForSequenceClassification, set_seed

from dare_train import DareCallback, DeltaPackage, apply
from dare_train.errors import BaseMismatch


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def result(path: Path) -> tuple[str, str]:
    manifest = DeltaPackage.open(path).manifest
    return manifest.parent, manifest.result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "from_the_start", [True, False], ids=["callback from the start", "callback added on resuming"]
)
def test_a_resumed_run_writes_what_an_uninterrupted_one_does(
    base: Path, tmp_path: Path, dtype: torch.dtype, from_the_start: bool
) -> None:
    train(classifier(base, dtype=dtype), tmp_path / "whole", DareCallback(), max_steps=6)
    callbacks = [DareCallback()] if from_the_start else []
    train(classifier(base, dtype=dtype), tmp_path / "parts", *callbacks, max_steps=6, save_total_limit=3)
    shutil.rmtree(tmp_path / "parts/checkpoint-6")
    shutil.rmtree(tmp_path / "parts/dare", ignore_errors=True)
    resumed = classifier(base, dtype=dtype)
    train(resumed, tmp_path / "parts", DareCallback(), resume=tmp_path / "parts/checkpoint-4", max_steps=6)
    assert weights_print(resumed) == weights_print(
        BertForSequenceClassification.from_pretrained(tmp_path / "whole/checkpoint-6", dtype=dtype)
    )
    assert result(tmp_path / "parts/dare/step-6") == result(tmp_path / "whole/dare/step-6")


def test_a_model_loaded_from_the_checkpoint_still_has_its_true_base(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "out", DareCallback(), max_steps=2)
    checkpoint = tmp_path / "out/checkpoint-2"
    train(
        BertForSequenceClassification.from_pretrained(checkpoint),
        tmp_path / "out",
        DareCallback(),
        resume=checkpoint,
        max_steps=4,
    )
    first, later = (DeltaPackage.open(tmp_path / f"out/dare/step-{step}").manifest for step in (2, 4))
    assert later.parent == first.parent
    assert later.base_model == str(base)


def test_resized_embeddings_survive_a_resume(base: Path, tmp_path: Path) -> None:
    def resized() -> Any:
        model = classifier(base)
        model.resize_token_embeddings(64)
        return model

    train(resized(), tmp_path / "whole", DareCallback(), max_steps=4)
    train(resized(), tmp_path / "out", DareCallback(), max_steps=2)
    train(resized(), tmp_path / "out", DareCallback(), resume=tmp_path / "out/checkpoint-2", max_steps=4)
    assert (
        DeltaPackage.open(tmp_path / "out/dare/final")
        .records["bert.embeddings.word_embeddings.weight"]
        .base_rows
        == 60
    )
    assert result(tmp_path / "out/dare/final")[0] == result(tmp_path / "whole/dare/final")[0]


def test_a_spooled_base_survives_a_resume(tmp_path: Path) -> None:
    def scratch(seed: int) -> BertForSequenceClassification:
        set_seed(seed)
        config = tiny_config()
        config.num_labels = LABELS
        return BertForSequenceClassification(config)

    begin = weights_print(scratch(1))
    train(scratch(1), tmp_path / "out", DareCallback(p=0.0), max_steps=2)
    trainer = train(
        scratch(2), tmp_path / "out", DareCallback(p=0.0), resume=tmp_path / "out/checkpoint-2", max_steps=4
    )
    assert result(tmp_path / "out/dare/final") == (begin, weights_print(trainer.model))
    assert apply(
        tmp_path / "out/dare/base", tmp_path / "out/dare/final", tmp_path / "received"
    ) == weights_print(trainer.model)


def test_a_chain_goes_on_after_a_resume(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "out", DareCallback(incremental=True, when=1), max_steps=4)
    resume = tmp_path / "out/checkpoint-2"
    train(
        classifier(base), tmp_path / "out", DareCallback(incremental=True, when=1), resume=resume, max_steps=5
    )
    train(classifier(base), tmp_path / "single", DareCallback(when=1), max_steps=4)
    chain = [tmp_path / f"out/dare/step-{step}" for step in (1, 2, 3, 4, 5)]
    assert apply(base, chain[:4], tmp_path / "four") == DeltaPackage.open(chain[3]).manifest.result
    assert apply(base, chain, tmp_path / "five") == DeltaPackage.open(chain[4]).manifest.result


def test_a_base_that_is_gone_is_an_error_at_train_begin(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "out", DareCallback(), max_steps=2)
    model = classifier(base)
    base.rename(tmp_path / "moved")
    with pytest.raises(BaseMismatch, match=r"resumed run: .*base: .*, found nothing there; .*pass base="):
        train(model, tmp_path / "out", DareCallback(), resume=tmp_path / "out/checkpoint-2", max_steps=4)
    assert not (tmp_path / "out/dare/step-4").exists()
    callback = DareCallback(base=tmp_path / "moved")
    train(model, tmp_path / "out", callback, resume=tmp_path / "out/checkpoint-2", max_steps=4)
    assert callback.package is not None


def test_a_base_that_changed_is_an_error_at_train_begin(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "out", DareCallback(), max_steps=2)
    model = classifier(base)
    shutil.rmtree(base)
    other = classifier(save_base(tmp_path / "elsewhere")).bert
    with torch.no_grad():
        other.pooler.dense.weight.mul_(2)
    other.save_pretrained(base)
    with pytest.raises(
        BaseMismatch, match=r"expected one with fingerprint .*, as at the start of the run, found one with"
    ):
        train(model, tmp_path / "out", DareCallback(), resume=tmp_path / "out/checkpoint-2", max_steps=4)


def test_a_resumed_run_without_any_trace_of_its_base_is_refused(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "out", max_steps=2)
    checkpoint = tmp_path / "out/checkpoint-2"
    model = BertForSequenceClassification.from_pretrained(checkpoint)
    with pytest.raises(BaseMismatch, match="base: expected a base on record"):
        train(model, tmp_path / "out", DareCallback(), resume=checkpoint, max_steps=4)
