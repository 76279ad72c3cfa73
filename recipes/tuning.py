"""Fine-tuning as the study recipes need it: an ordinary Trainer, and what it began with and ended with in
folders.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dare_train import encode_rows, load_model

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Training:
    steps: int
    learning_rate: float = 5e-5
    batch_size: int = 32
    max_length: int = 64
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A fine-tuned model and what it began with."""

    folder: Path

    @property
    def base(self) -> str:
        """In bfloat16."""
        return str(self.folder / "base")

    @property
    def tuned(self) -> str:
        """In float32, as it was trained, with its tokenizer."""
        return str(self.folder / "tuned")

    @property
    def shipped(self) -> str:
        """The same in bfloat16."""
        return str(self.folder / "tuned-bf16")


def classifier(base: str, rows: Rows, out: Path, training: Training, *callbacks: TrainerCallback) -> Pair:
    """Fine-tune an encoder to tell labels from each other, unless `out` has it already."""
    names = sorted({row["label"] for row in rows})
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    return _tuned(AutoModelForSequenceClassification, base, rows, out, training, callbacks, **labels)


def decoder(base: str, rows: Rows, out: Path, training: Training) -> Pair:
    """Fine-tune a causal language model to continue prompts, unless `out` has it already."""
    return _tuned(AutoModelForCausalLM, base, rows, out, training, ())


def adapter(
    pair: Pair, rows: Rows, out: Path, training: Training, *callbacks: TrainerCallback, rank: int
) -> Path:
    """Train a LoRA adapter of all linear layers for the same task, from the same base, unless `out` has it
    already.
    """
    from peft import LoraConfig, get_peft_model

    if not trained(out, training, rank=rank):
        set_seed(training.seed)
        model = untrained(pair)
        kind = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"
        config = LoraConfig(
            task_type=kind, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear"
        )
        examples = encode_rows(
            model, AutoTokenizer.from_pretrained(pair.tuned), rows, max_length=training.max_length
        )
        adapted = get_peft_model(model, config)
        tune(adapted, AutoTokenizer.from_pretrained(pair.tuned), examples, out, training, callbacks)
        adapted.save_pretrained(str(out))
        note(out, training, rank=rank)
    return out


def untrained(pair: Pair) -> Any:
    """The base as a model for the task, in float32, with a new head if it needs one."""
    tuned: Any = load_model(pair.tuned)
    classifies = type(tuned).__name__.endswith("ForSequenceClassification")
    labels = {"id2label": tuned.config.id2label, "label2id": tuned.config.label2id} if classifies else {}
    return type(tuned).from_pretrained(pair.base, dtype=torch.float32, **labels)


def _tuned(
    kind: Any,
    base: str,
    rows: Rows,
    out: Path,
    training: Training,
    callbacks: Sequence[TrainerCallback],
    **labels: Any,
) -> Pair:
    pair = Pair(folder=out)
    if trained(out, training, base=base):
        return pair
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_seed(training.seed)
    model = kind.from_pretrained(base, dtype=torch.bfloat16, **labels)
    (model.base_model if labels else model).save_pretrained(pair.base)
    model.to(torch.float32)
    tune(
        model,
        tokenizer,
        encode_rows(model, tokenizer, rows, max_length=training.max_length),
        out,
        training,
        callbacks,
    )
    model.save_pretrained(pair.tuned)
    tokenizer.save_pretrained(pair.tuned)
    model.to(torch.bfloat16).save_pretrained(pair.shipped)
    note(out, training, base=base)
    return pair


NOTE = "training.json"


def trained(folder: Path, training: Training, **more: Any) -> bool:
    """Whether a folder has the outcome of this training. What was trained otherwise is neither used nor
    overwritten.
    """
    if not (folder / NOTE).exists():
        return False
    found, asked = json.loads((folder / NOTE).read_text(encoding="utf-8")), {**vars(training), **more}
    for name in asked:
        if found.get(name) != asked[name]:
            sys.exit(
                f"{folder} was trained with {name} {found.get(name)}, not {asked[name]}: choose another --out"
            )
    return True


def note(folder: Path, training: Training, **more: Any) -> None:
    """That this training ended here."""
    (folder / NOTE).write_text(json.dumps({**vars(training), **more}, indent=1) + "\n", encoding="utf-8")


def tune(
    model: torch.nn.Module,
    tokenizer: Any,
    examples: list[dict[str, Any]],
    out: Path,
    training: Training,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    trainer_for(model, tokenizer, examples, out, training, callbacks).train()


def trainer_for(
    model: torch.nn.Module,
    tokenizer: Any,
    examples: list[dict[str, Any]],
    out: Path,
    training: Training,
    callbacks: Sequence[TrainerCallback],
    *,
    save_steps: int | None = None,
) -> Trainer:
    """An ordinary one, of encoded examples."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for_labels = (
        DataCollatorForSeq2Seq(tokenizer)
        if isinstance(examples[0]["labels"], list)
        else DataCollatorWithPadding(tokenizer)
    )
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        train_sampling_strategy="group_by_length",
        logging_steps=100,
        save_strategy="no" if save_steps is None else "steps",
        save_steps=save_steps or 0,
        save_total_limit=1,
        report_to=[],
        seed=training.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return Trainer(
        model=model, args=arguments, train_dataset=examples, data_collator=for_labels, callbacks=[*callbacks]
    )
