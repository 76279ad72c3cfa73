"""`StatisticsCallback` in real Trainer runs: what it writes, of which weights, and that nobody else
notices.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import outcomes, run_ranks, train_on
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from statistics_of import assert_same
from training import classifier, examples, make_trainer, save_base, train
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration, TrainerCallback

from dare_train import DareCallback, DeltaPackage
from dare_train.errors import ConfigError
from dare_train.merging.statistics.fisher_and_gram import collect_fisher, collect_gram
from dare_train.merging.statistics.statistics_callback import StatisticsCallback
from dare_train.merging.statistics.statistics_file import StatisticsFile, statistics_path

ALL = 48
"""Rows of training data. Statistics of all of them do not depend on how they were shuffled and shared."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("statistics") / "base", layers=1)


def rows() -> list[dict[str, torch.Tensor]]:
    found = examples()
    return [{name: torch.tensor([row[name] for row in found]) for name in found[0]}]


def check_files(out: Path, model: Any, *, count: int = ALL) -> None:
    """The files say what the model's statistics over all rows are."""
    for kind, collect in (("fisher", collect_fisher), ("gram", collect_gram)):
        path = out / f"final.{kind}.safetensors"
        assert path == statistics_path(out / "final", kind)  # type: ignore[arg-type]
        assert StatisticsFile.open(path, kind).examples == count  # type: ignore[arg-type]
        assert_same(load_file(path), collect(model, rows()), 2e-5)


@pytest.mark.parametrize("first", [True, False])
def test_files_lie_beside_the_final_package(base: Path, tmp_path: Path, first: bool) -> None:
    ours, dare = StatisticsCallback(examples=ALL), DareCallback(p=0.0)
    trainer = train(classifier(base), tmp_path / "out", *((ours, dare) if first else (dare, ours)))
    check_files(tmp_path / "out/dare", trainer.model)
    expected = ["final", "final.fisher.safetensors", "final.gram.safetensors", "step-2", "step-4"]
    assert sorted(path.name for path in (tmp_path / "out/dare").iterdir()) == expected
    assert ours.files == {
        kind: tmp_path / f"out/dare/final.{kind}.safetensors" for kind in ("fisher", "gram")
    }
    assert ours.seconds > 0
    names = StatisticsFile.open(ours.files["fisher"], "fisher").tensors.keys()
    assert names == DeltaPackage.open(tmp_path / "out/dare/final").records.keys()
    assert trainer.model.training


def test_the_best_model_is_the_one_that_is_looked_at(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=True
    )
    out = tmp_path / "out"
    trainer = train(
        classifier(base),
        out,
        StatisticsCallback(examples=ALL, name="best"),
        metric_for_best_model="loss",
        **options,
    )
    assert (
        Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    )  # loss falls, and greater is said to be better
    check_files(out / "best", BertForSequenceClassification.from_pretrained(out / "checkpoint-2"))


def test_so_many_examples_of_so_many_kinds(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "out", StatisticsCallback("gram", 6))
    assert [path.name for path in (tmp_path / "out/dare").iterdir()] == ["final.gram.safetensors"]
    assert StatisticsFile.open(tmp_path / "out/dare/final.gram.safetensors", "gram").examples == 6


def test_random_numbers_stay_the_users(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "plain")
    expected = torch.get_rng_state()
    train(classifier(base), tmp_path / "out", StatisticsCallback())
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_active_wandb_run_hears_of_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(
        "dare_train.evaluation.wandb_run.active_run", lambda: SimpleNamespace(log=logged.append)
    )
    callback = StatisticsCallback(examples=5)
    train(classifier(base), tmp_path / "out", callback)
    assert logged == [
        {"dare/statistics_examples": 5, "dare/statistics_seconds": callback.seconds, "train/global_step": 4}
    ]


# Several processes.


def trained(rank: int, engine: str, base: Path, out: Path, count: int) -> list[str]:
    callback = StatisticsCallback(examples=count)
    trainer = train_on(engine, lambda: classifier(base), out, callback)
    if rank == 0:
        trainer.model.save_pretrained(out / "trained")
    return [path.name for path in callback.files.values()]


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_ranks_share_the_examples(base: Path, tmp_path: Path, engine: str) -> None:
    names = run_ranks(
        trained, 2, engine, base, tmp_path / "out", ALL - 1
    )  # rounded up to the same number on each
    assert names == [["final.fisher.safetensors", "final.gram.safetensors"]] * 2
    check_files(
        tmp_path / "out/dare", BertForSequenceClassification.from_pretrained(tmp_path / "out/trained")
    )


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_shards_are_refused_when_training_begins(base: Path, tmp_path: Path, engine: str) -> None:
    ends = outcomes(trained, 2, engine, base, tmp_path / "out", ALL)
    assert [end.error for end in ends] == ["ConfigError"] * 2
    assert all(
        "model: expected weights that are whole in this process, found shards (FSDP, ZeRO-3)" in end.message
        for end in ends
    )
    assert not (tmp_path / "out/dare").exists()


# What is refused.


class Ended(TrainerCallback):
    """Fails the test when training goes as far as its first step."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        raise AssertionError("training began")


def adapted(base: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            classifier(base), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
        )


def test_adapters_have_input_products_only(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"model: expected no adapters: .*; merge_and_unload\(\) first, .*; gram needs no merging",
    ):
        train(adapted(base), tmp_path / "refused", StatisticsCallback(), Ended())
    trainer = train(adapted(base), tmp_path / "out", StatisticsCallback("gram", ALL))
    found = load_file(tmp_path / "out/dare/final.gram.safetensors")
    assert_same(found, collect_gram(trainer.model.merge_and_unload(), rows()), 2e-5)


def test_encoder_and_decoder_have_fisher_only(tmp_path: Path) -> None:
    sizes = dict(
        vocab_size=60, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(
        ConfigError, match=r'kinds: expected no gram for a model with encoder and decoder, .*; kinds="fisher"'
    ):
        train(model, tmp_path / "out", StatisticsCallback(), Ended())


def test_a_full_disk_is_one_clear_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dare_train.merging.statistics.statistics_file._write", full)
    with pytest.raises(OSError, match=r"final\.fisher\.safetensors: found No space left on device"):
        train(classifier(base), tmp_path / "out", StatisticsCallback())
    assert list((tmp_path / "out/dare").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ()}, "kinds: expected some of fisher, gram"),
        ({"kinds": ("fisher", "fisher")}, "kinds: expected some of fisher, gram"),
        ({"kinds": "hessian"}, "kinds: expected some of fisher, gram"),
        ({"examples": 0}, "examples: expected a positive number"),
        ({"examples": None}, "examples: expected a positive number"),
        ({"examples": 2.5}, "examples: expected a positive number"),
        ({"labels": "both"}, 'labels: expected "data" or "model"'),
        ({"name": "a/b"}, "name: expected the name of a folder"),
    ],
)
def test_wrong_values_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StatisticsCallback(**options)


def test_a_models_own_labels_reach_the_file(base: Path, tmp_path: Path) -> None:
    trainer = train(classifier(base), tmp_path / "out", StatisticsCallback("fisher", ALL, labels="model"))
    found = load_file(tmp_path / "out/dare/final.fisher.safetensors")
    assert_same(found, collect_fisher(trainer.model, rows(), labels="model"), 2e-5)
    assert (
        make_trainer(trainer.model, tmp_path / "again").evaluate()["eval_loss"] > 0
    )  # nothing is left in its way


def test_errors_of_data_name_the_batch(base: Path, tmp_path: Path) -> None:
    class Diverged(TrainerCallback):
        def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            with torch.no_grad():
                model.classifier.bias[0] = torch.nan

    with pytest.raises(ConfigError, match=r"batches: expected finite log-likelihoods, found \[nan\]"):
        train(classifier(base), tmp_path / "out", Diverged(), StatisticsCallback())
