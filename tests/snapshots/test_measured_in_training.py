"""`DareCallback(evaluate=...)` with a function, or with tasks of lm-evaluation-harness: the model as its
receiver gets it is measured, and training does not notice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import RanksFailed, run_ranks, train_on
from harness_tasks import needs_harness, save_task, theirs
from peft import LoraConfig, get_peft_model
from tiny import refusal
from training import classifier, make_trainer, save_base, train, weights_print
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from worded_models import save_llama

from dare_train import DareCallback, HarnessTasks, apply
from dare_train.errors import CheckpointError, ConfigError, DareError
from dare_train.integrations.written_options import check, read

EACH_STEP: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def norm(model: Any) -> dict[str, float]:
    """A figure of the weights, which draws and says in which mode the model is."""
    torch.rand(3)
    total = sum(float(parameter.detach().double().square().sum()) for parameter in model.parameters())
    return {"norm": total, "training": float(model.training)}


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_function_measures_what_the_receiver_gets(base: Path, tmp_path: Path) -> None:
    callback = DareCallback(p=0.5, when=1, evaluate=norm)
    trainer = train(classifier(base), tmp_path / "out", callback, **EACH_STEP)
    plain = train(classifier(base), tmp_path / "plain", **EACH_STEP)
    assert weights_print(trainer.model) == weights_print(plain.model)
    assert logged(trainer, "eval_dare_training") == [0.0] * 4
    found = logged(trainer, "eval_dare_norm")
    apply(base, tmp_path / "out/dare/step-3", tmp_path / "received")
    assert found[2] == norm(type(trainer.model).from_pretrained(tmp_path / "received"))["norm"]
    assert found[3] != norm(trainer.model)["norm"]


def test_a_number_has_a_name_and_is_measured_once_a_step(base: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    callback = DareCallback(p=0.5, evaluate=lambda model: seen.append(1) or len(seen))
    trainer = make_trainer(classifier(base), tmp_path / "out", callback, **EACH_STEP)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    trainer.train()
    assert logged(trainer, "eval_dare_metric") == [1, 2, 3, 4]
    assert "eval_dare_metric" in (tmp_path / "out/dare/step-2/README.md").read_text()


def fails(model: Any) -> float:
    raise RuntimeError("no figure")


@pytest.mark.parametrize("function", [fails, lambda model: "good", lambda model: float("nan")])
def test_a_function_that_fails_ends_nothing(base: Path, tmp_path: Path, function: Any) -> None:
    callback = DareCallback(p=0.5, evaluate=function)
    trainer = train(classifier(base), tmp_path / "out", callback, **EACH_STEP)
    plain = train(classifier(base), tmp_path / "plain", **EACH_STEP)
    assert weights_print(trainer.model) == weights_print(plain.model)
    assert len(callback.failures) == 4
    assert (tmp_path / "out/dare/final").is_dir()


def on_ranks(rank: int, engine: str, base: Path, out: Path) -> list[float]:
    callback = DareCallback(p=0.5, evaluate=norm, when="end")
    return logged(train_on(engine, lambda: classifier(base), out, callback, **EACH_STEP), "eval_dare_norm")


def test_ranks_that_have_all_weights_measure_together(base: Path, tmp_path: Path) -> None:
    found = run_ranks(on_ranks, 2, "ddp", base, tmp_path / "out")
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_weights_in_shards_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="evaluate: expected True where weights are spread"):
        run_ranks(on_ranks, 2, "fsdp2", base, tmp_path / "out")


@pytest.mark.parametrize("evaluate", ["lm_eval", "yes", 3, None])
def test_what_nothing_can_be_measured_by(evaluate: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        DareCallback(evaluate=evaluate)
    refusal(caught.value, ConfigError, "evaluate: expected true or false, lm_eval:TASK,TASK, or a function")


def language_model_trainer(
    base: Path, out: Path, *callbacks: DareCallback, lora: bool = False, **options: Any
) -> Trainer:
    rows = [{"input_ids": [*range(4 + i, 16 + i)], "labels": [*range(4 + i, 16 + i)]} for i in range(24)]
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        use_cpu=True, seed=5, disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
        save_strategy="no", eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base)
    if lora:
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[*callbacks],
        **options,
    )


@needs_harness
@theirs
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_tasks_measure_what_the_receiver_gets(tmp_path: Path, lora: bool) -> None:
    base = save_llama(tmp_path / "base", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = f"lm_eval:{save_task(tmp_path / 'tasks')}?limit=12"
    options = read([f"evaluate={text}", "when=2", "p=0.5"])
    check(options)
    callback = DareCallback(**options, on_error="raise")
    trainer = language_model_trainer(base, tmp_path / "out", callback, lora=lora, processing_class=tokenizer)
    trainer.train()
    plain = language_model_trainer(base, tmp_path / "plain", lora=lora, processing_class=tokenizer)
    plain.train()
    assert weights_print(trainer.model) == weights_print(plain.model)
    for step, place in ((2, 0), (4, 1)):
        apply(base, tmp_path / f"out/dare/step-{step}", tmp_path / f"received-{step}")
        received = AutoModelForCausalLM.from_pretrained(tmp_path / f"received-{step}")
        for name, value in HarnessTasks(text, tokenizer)(received).items():
            assert logged(trainer, f"eval_dare_{name}")[place] == value


@needs_harness
@theirs
def test_tasks_that_cannot_be_asked_are_refused_before_training(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    path = save_task(tmp_path / "tasks")

    def begun(text: str, **options: Any) -> DareError:
        trainer = language_model_trainer(base, tmp_path / "out", DareCallback(evaluate=text), **options)
        with pytest.raises(DareError) as caught:
            trainer.train()
        assert trainer.state.global_step == 0
        return caught.value

    refusal(begun(f"lm_eval:{path}"), ConfigError, "a tokenizer", "Trainer(processing_class=tokenizer)")
    path.with_suffix(".jsonl").unlink()
    missing = begun(f"lm_eval:{path}", processing_class=tokenizer)
    refusal(missing, CheckpointError, "a task with its data")
