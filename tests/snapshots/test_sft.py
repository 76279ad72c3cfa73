"""TRL's SFTTrainer, with and without LoRA, on one process and on engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engines import EngineAtWork, engine_arguments, run_ranks
from fine_tunes import QUANTISED
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer
from worded_models import save_llama

from dare_train import DareCallback, DeltaPackage, apply, extract


def sft(
    model: str | LlamaForCausalLM, out: Path, callback: DareCallback, *, lora: bool, engine: str = "single"
) -> SFTTrainer:
    rows = Dataset.from_list(
        [{"text": " ".join(f"w{(7 * i + j) % 40}" for j in range(12))} for i in range(24)]
    )
    options: dict[str, Any] = dict(
        output_dir=str(out), max_steps=4, save_steps=2, learning_rate=0.05, report_to=[], use_cpu=True,
        seed=5, disable_tqdm=True,
        dataloader_pin_memory=False, logging_strategy="no", max_length=16, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    arguments = engine_arguments(engine) if engine != "single" else {"per_device_train_batch_size": 4}
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]) if lora else None
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**options, **arguments}),
        train_dataset=rows,
        callbacks=[callback],
        peft_config=adapter,
    )
    if engine != "single":
        trainer.add_callback(EngineAtWork(engine, trainer))
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("default")  # TRL's and PEFT's own
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sft_from_a_model_given_by_its_folder(tmp_path: Path, lora: bool) -> None:
    """SFTTrainer then loads float32 weights, also from a bfloat16 file: the package is relative to the base
    so rounded.
    """
    base, callback = save_llama(tmp_path / "base"), DareCallback(p=0.5)
    sft(str(base), tmp_path / "out", callback, lora=lora)
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(base)
    assert {record.kind for record in package.manifest.tensors} <= {"delta", "base"}
    result = apply(base, package, tmp_path / "result", cast_base=True)
    assert result == package.manifest.result
    received = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    assert received(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def on_ranks(rank: int, engine: str, base: Path, out: Path, lora: bool) -> str:
    callback = DareCallback(p=0.5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sft(model, out, callback, lora=lora, engine=engine)
    assert callback.package is not None
    return callback.package.manifest.result


@pytest.mark.parametrize(
    ("engine", "lora"),
    [("ddp", True), ("zero2", False), ("zero3", False), ("zero3", True)],
    ids=["ddp-lora", "zero2-full", "zero3-full", "zero3-lora"],
)
def test_sft_on_engines(tmp_path: Path, engine: str, lora: bool) -> None:
    base = save_llama(
        tmp_path / "base", torch.float32, tied=False
    )  # which name of tied ones ZeRO's checkpoints keep is chance
    first, second = run_ranks(on_ranks, 2, engine, base, tmp_path / "out", lora)
    assert first == second
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    package.verify(base)
    theirs = extract(base, tmp_path / "out/checkpoint-4", tmp_path / "again", p=0.5)
    assert theirs.manifest.result == first


@pytest.mark.filterwarnings("default")  # TRL's, PEFT's and bitsandbytes' own
@pytest.mark.parametrize("kind", ["nf4", "nf4 in bf16", "int8"])
def test_qlora_through_sft_gives_the_package_of_the_saved_adapter(tmp_path: Path, kind: str) -> None:
    base = save_llama(tmp_path / "base", tied=False)
    packed = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=QUANTISED[kind](), device_map="cpu"
    )
    trainer = sft(packed, tmp_path / "out", DareCallback(p=0.0), lora=True)
    trainer.save_model(str(tmp_path / "adapter"))
    expected = extract(base, tmp_path / "adapter", tmp_path / "extracted", p=0.0)
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.result == expected.manifest.result
    assert package.manifest.base_model == str(base)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["dpo", "reward", "kto"])
def test_trainers_of_preferences_give_what_the_live_model_computes(tmp_path: Path, kind: str) -> None:
    import trl

    base = save_llama(tmp_path / "base", torch.float32, tied=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    classes: dict[str, tuple[Any, Any]] = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }
    if kind == "kto":
        if not hasattr(trl, "KTOTrainer"):
            from trl.experimental.kto import KTOConfig, KTOTrainer

            classes["kto"] = KTOTrainer, KTOConfig
        else:
            classes["kto"] = trl.KTOTrainer, trl.KTOConfig
    trainer_class, config_class = classes[kind]
    load = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    model = load.from_pretrained(base, **({"num_labels": 1} if kind == "reward" else {}))
    rows: list[dict[str, Any]] = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i}", "rejected": f" w{i + 3}"} for i in range(12)
    ]
    if kind == "kto":
        rows = [
            {"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0}
            for i, r in enumerate(rows)
        ]
    arguments = config_class(
        output_dir=str(tmp_path / "out"), max_steps=2, save_strategy="no", learning_rate=0.05, report_to=[],
        use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, bf16=False, max_length=16,
        dataloader_pin_memory=False, gradient_checkpointing=False, logging_strategy="no",
    )  # fmt: skip
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[DareCallback(p=0.0)],
    )
    trainer.train()
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(base)
    apply(base, package, tmp_path / "result")
    received = load.from_pretrained(tmp_path / "result")
    ids = torch.arange(4, 12)[None]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, received(input_ids=ids).logits)
