"""A Trainer run small enough for a test: a two-layer encoder on disk, a few steps, any callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dare_train.weights.fingerprint import Fingerprint, model_fingerprint
from dare_train.weights.live.live import LiveWeights

LABELS = 3


def tiny_config(layers: int = 2) -> BertConfig:
    return BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )


def save_base(folder: Path, *, dtype: torch.dtype = torch.float32, layers: int = 2) -> Path:
    """An encoder without a head, as `from_pretrained` finds it on the Hub."""
    set_seed(7)
    BertModel(tiny_config(layers)).to(dtype).save_pretrained(folder)
    return folder


def classifier(base: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The encoder with a random head, as a user loads it; the same head every time."""
    set_seed(11)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=LABELS, dtype=dtype)


def examples(count: int = 48, *, vocabulary: int = 60) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocabulary, (count, 8), generator=generator)
    return [
        {"input_ids": row.tolist(), "attention_mask": [1] * 8, "labels": int(row[0]) % LABELS} for row in ids
    ]


def make_trainer(model: torch.nn.Module, out: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    options: dict[str, Any] = dict(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-3,
        report_to=[], use_cpu=True,
        seed=5, disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    rows = examples()
    return Trainer(
        model=model,
        args=TrainingArguments(**{**options, **arguments}),
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=list(callbacks),
        compute_metrics=lambda result: {
            "accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())
        },
    )


def train(
    model: torch.nn.Module,
    out: Path,
    *callbacks: TrainerCallback,
    resume: Path | None = None,
    **arguments: Any,
) -> Trainer:
    trainer = make_trainer(model, out, *callbacks, **arguments)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def weights_print(model: torch.nn.Module) -> str:
    """The fingerprint of a live model's weights, as manifests record it."""
    live = LiveWeights(model)
    return model_fingerprint(
        (name, info.dtype.code, info.shape, Fingerprint.of(live.read(name, 0, info.numel)))
        for name, info in live.tensors.items()
    )
