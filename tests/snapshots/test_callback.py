"""`DareCallback` on one process: what it writes, when, and that training does not notice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from training import classifier, make_trainer, save_base, train, weights_print
from transformers import BertForSequenceClassification, set_seed

from dare_train import DareCallback, DeltaPackage, applied, apply, extract
from dare_train.errors import ConfigError, SnapshotError

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def packages(out: Path, name: str = "dare") -> list[str]:
    return sorted(path.name for path in (out / name).iterdir())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packages_are_those_that_extract_makes_of_the_checkpoints(
    base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    callback = DareCallback(p=0.9, seed=3)
    train(classifier(base, dtype=dtype), tmp_path / "out", callback)
    assert packages(tmp_path / "out") == ["final", "step-2", "step-4"]
    for step in (2, 4):
        ours = DeltaPackage.open(tmp_path / f"out/dare/step-{step}")
        checkpoint = tmp_path / f"out/checkpoint-{step}"
        theirs = extract(base, checkpoint, tmp_path / f"extracted-{step}", p=0.9, seed=3, cast_base=True)
        assert (ours.manifest.parent, ours.manifest.result) == (
            theirs.manifest.parent,
            theirs.manifest.result,
        )
        assert {r.name for r in ours.manifest.tensors if r.kind == "whole"} == {
            "classifier.weight",
            "classifier.bias",
        }
    assert [snapshot.step for snapshot in callback.packages] == [2, 4, 4]
    assert len(callback.waited) == 3


@pytest.mark.parametrize("evaluate", [False, True])
def test_training_does_not_notice(base: Path, tmp_path: Path, evaluate: bool) -> None:
    options: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1)
    plain = train(classifier(base), tmp_path / "plain", **options)
    watched = train(
        classifier(base), tmp_path / "watched", DareCallback(evaluate=evaluate, when=1), **options
    )
    assert weights_print(watched.model) == weights_print(plain.model)


def test_the_applied_package_loads_as_a_model(base: Path, tmp_path: Path) -> None:
    trainer = train(classifier(base), tmp_path / "out", DareCallback(p=0.0))
    apply(base, tmp_path / "out/dare/final", tmp_path / "received")
    received = BertForSequenceClassification.from_pretrained(tmp_path / "received")
    assert received.config.num_labels == trainer.model.config.num_labels
    assert weights_print(received) == weights_print(trainer.model)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("end", ["final"]),
        ("save", ["step-2", "step-4"]),
        ("epoch", ["step-12", "step-24"]),
        (3, ["step-12", "step-15", "step-18", "step-21", "step-24", "step-3", "step-6", "step-9"]),
        (["epoch", 10, "end"], ["final", "step-10", "step-12", "step-20", "step-24"]),
    ],
)
def test_when(base: Path, tmp_path: Path, when: Any, expected: list[str]) -> None:
    length = (
        {"max_steps": 4}
        if when in ("end", "save")
        else {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "no"}
    )
    train(classifier(base), tmp_path / "out", DareCallback(when=when), **length)
    assert packages(tmp_path / "out") == expected


def test_keep_leaves_the_latest(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "out", DareCallback(when=1, keep=2))
    assert packages(tmp_path / "out") == ["step-3", "step-4"]


def test_several_callbacks_write_side_by_side(base: Path, tmp_path: Path) -> None:
    train(
        classifier(base),
        tmp_path / "out",
        DareCallback(p=0.5, name="half"),
        DareCallback(p=0.99, seed=1, name="sparse"),
    )
    density = {
        name: DeltaPackage.open(tmp_path / "out" / name / "final").stats["density"]
        for name in ("half", "sparse")
    }
    assert density["half"] == pytest.approx(0.5, abs=0.02)
    assert density["sparse"] == pytest.approx(0.01, abs=0.005)


def test_gradient_accumulation_counts_optimizer_steps(base: Path, tmp_path: Path) -> None:
    train(
        classifier(base),
        tmp_path / "out",
        DareCallback(when=1),
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    assert packages(tmp_path / "out") == ["step-1", "step-2", "step-3", "step-4"]


def test_patterns_choose_rates_and_tensors(base: Path, tmp_path: Path) -> None:
    rates = {"*.attention.*": 0.5, "*": 0.75}
    train(classifier(base), tmp_path / "out", DareCallback(p=rates, exclude=["*embeddings*"]))
    records = DeltaPackage.open(tmp_path / "out/dare/final").records
    assert records["bert.encoder.layer.0.attention.self.query.weight"].p == 0.5
    assert records["bert.encoder.layer.0.output.dense.weight"].p == 0.75
    assert records["bert.embeddings.word_embeddings.weight"].kind == "base"


def test_load_best_model_at_end_gives_the_best_checkpoint(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=True
    )
    trainer = train(
        classifier(base), tmp_path / "out", DareCallback(p=0.0), metric_for_best_model="loss", **options
    )
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith("checkpoint-2")  # loss falls, and greater is said to be better
    final = DeltaPackage.open(tmp_path / "out/dare/final").manifest.result
    assert final == DeltaPackage.open(tmp_path / "out/dare/step-2").manifest.result
    assert final == weights_print(trainer.model)


def test_resized_embeddings_travel_as_rows(base: Path, tmp_path: Path) -> None:
    model = classifier(base)
    model.resize_token_embeddings(64)
    trainer = train(model, tmp_path / "out", DareCallback(p=0.5))
    record = DeltaPackage.open(tmp_path / "out/dare/final").records["bert.embeddings.word_embeddings.weight"]
    assert (record.kind, record.base_rows, record.info.shape) == ("delta", 60, (64, 32))
    apply(base, tmp_path / "out/dare/final", tmp_path / "received")
    received = BertForSequenceClassification.from_pretrained(tmp_path / "received")
    assert torch.equal(
        received.get_input_embeddings().weight[60:], trainer.model.get_input_embeddings().weight[60:]
    )


def test_a_model_from_nowhere_keeps_its_base_in_the_output_folder(tmp_path: Path) -> None:
    from training import LABELS, tiny_config

    set_seed(1)
    config = tiny_config()
    config.num_labels = LABELS
    model = BertForSequenceClassification(config)
    begin = weights_print(model)
    trainer = train(model, tmp_path / "out", DareCallback(p=0.0))
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.parent == begin
    assert apply(tmp_path / "out/dare/base", package, tmp_path / "received") == weights_print(trainer.model)


def test_an_explicit_base_counts_even_where_training_began_elsewhere(base: Path, tmp_path: Path) -> None:
    first = train(classifier(base), tmp_path / "first")
    first.model.save_pretrained(tmp_path / "intermediate")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "intermediate")
    trainer = train(model, tmp_path / "out", DareCallback(p=0.0, base=base))
    assert apply(base, tmp_path / "out/dare/final", tmp_path / "received") == weights_print(trainer.model)


def test_evaluate_logs_the_receivers_metrics(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(eval_strategy="steps", eval_steps=2)
    trainer = train(classifier(base), tmp_path / "out", DareCallback(p=0.5, when=2, evaluate=True), **options)
    logged = [entry["eval_dare_loss"] for entry in trainer.state.log_history if "eval_dare_loss" in entry]
    assert len(logged) == 2
    model = classifier(base)
    with applied(model, tmp_path / "out/dare/step-4"):
        metrics = make_trainer(model, tmp_path / "again").evaluate()
    assert metrics["eval_loss"] == logged[-1]
    assert metrics["eval_loss"] != next(
        entry["eval_loss"] for entry in reversed(trainer.state.log_history) if "eval_loss" in entry
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chain_gives_the_bits_of_packages_on_the_base(
    base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    def run(out: str, **options: Any) -> list[Path]:
        model = classifier(base, dtype=dtype)
        model.resize_token_embeddings(64)
        train(model, tmp_path / out, DareCallback(p=0.75, when=1, **options))
        return [tmp_path / out / f"dare/step-{step}" for step in (1, 2, 3, 4)]

    single, chain = run("single"), run("chain", incremental=True)
    for length in (1, 2, 3, 4):
        result = apply(base, chain[:length], tmp_path / f"received-{length}", cast_base=True)
        assert result == DeltaPackage.open(single[length - 1]).manifest.result
    assert [DeltaPackage.open(path).manifest.continues for path in chain] == [
        "base",
        "package",
        "package",
        "package",
    ]


def test_a_failed_write_is_one_clear_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dare_train.package.writer.PackageWriter.add", full)
    with pytest.raises(
        SnapshotError,
        match=r"snapshot: .*step-2: found No space left on device .* written before it are intact",
    ):
        train(classifier(base), tmp_path / "out", DareCallback(on_error="raise"))
    assert list((tmp_path / "out/dare").glob("step-*")) == []
    BertForSequenceClassification.from_pretrained(tmp_path / "out/checkpoint-2")


def test_a_diverged_tensor_is_named(base: Path, tmp_path: Path) -> None:
    model = classifier(base)
    trainer = make_trainer(model, tmp_path / "out", DareCallback(p=0.0, on_error="raise"), _Poison())
    with pytest.raises(SnapshotError, match=r"bert\.pooler\.dense\.weight: .*NaN"):
        trainer.train()


def test_a_callback_added_later_works_too(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(classifier(base), tmp_path / "out")
    trainer.add_callback(DareCallback(when="end"))
    trainer.train()
    assert packages(tmp_path / "out") == ["final"]


def test_leftovers_of_a_killed_run_are_removed(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out/dare/.step-2.partial").mkdir(parents=True)
    (tmp_path / "out/dare/.companions-abc").mkdir()
    train(classifier(base), tmp_path / "out", DareCallback())
    assert packages(tmp_path / "out") == ["final", "step-2", "step-4"]


def test_unknown_engines_are_refused_when_training_begins(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(classifier(base), tmp_path / "out")
    monkeypatch.setattr(
        "dare_train.snapshots.trainer_run.AcceleratorState",
        lambda: SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM),
    )
    with pytest.raises(
        ConfigError, match=r"DareCallback: expected plain modules, DDP, .* ZeRO-1, -2, -3, found MEGATRON_LM"
    ):
        DareCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "sometimes"}, "when: expected"),
        ({"when": []}, "when: expected"),
        ({"when": 0}, "when: expected"),
        ({"when": None}, "when: expected"),
        ({"when": 1.5}, "when: expected"),
        ({"when": True}, "when: expected"),
        ({"keep": 0}, "keep: expected at least 1, found 0"),
        ({"keep": 2, "incremental": True}, "a chain needs all of its packages"),
        ({"incremental": True, "values": "int4"}, "links of a chain are exact"),
        ({"name": "a/b"}, "name: expected the name of a folder"),
        ({"name": ".."}, "name: expected the name of a folder"),
        ({"name": "\ud800"}, "name: expected the name of a folder"),
        ({"keep": True}, "keep: expected at least 1, found True"),
        ({"p": 1.0}, r"p: expected a number in \[0, 1\)"),
    ],
)
def test_conflicts_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DareCallback(**options)


class _Poison(DareCallback.__mro__[1]):  # type: ignore[misc]
    """Makes one weight NaN after the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                model.bert.pooler.dense.weight[0, 0] = torch.nan


def test_autocast_training_keeps_float32_weights(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "out", DareCallback(p=0.5), bf16=True)
    ours = DeltaPackage.open(tmp_path / "out/dare/step-4")
    assert {record.info.dtype.code for record in ours.manifest.tensors} == {"F32"}
    assert (
        ours.manifest.result
        == extract(base, tmp_path / "out/checkpoint-4", tmp_path / "extracted", p=0.5).manifest.result
    )
