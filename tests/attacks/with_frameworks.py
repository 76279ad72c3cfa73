"""What is read with torch and transformers: texts, tokenizers, records of sweeps, models that become
adapters, GGUF files.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf_models import write_gguf
from worded_models import save_llama

from dare_train import dequantize, extract, extract_lora, sweep
from dare_train.evaluation.model_loading import load_model, load_tokenizer
from dare_train.evaluation.texts import load_texts
from dare_train.reports.writing import study_of
from dare_train.weights.files.checkpoint import Checkpoint

_SIZES: dict[str, Any] = dict(
    vocab_size=44, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=16, num_labels=3,
)  # fmt: skip


def make(folder: Path) -> None:
    """Write good files beside those of `good_files`."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    save_llama(folder / "words")
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**_SIZES))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    base.save_pretrained(folder / "bert")
    tuned.save_pretrained(folder / "classifier")
    extract(folder / "bert", folder / "classifier", folder / "bert-package", p=0.5)
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "tiny.gguf")
    (folder / "swept").mkdir()
    _sweep(folder / "swept", folder)
    _texts(folder / "texts")


def _texts(folder: Path) -> None:
    folder.mkdir()
    rows = [{"text": f"w{number} w{number + 1}", "label": number % 3, "prompt": "w1"} for number in range(6)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.json").write_text(json.dumps(rows))
    lines = [",".join(map(str, row.values())) for row in rows]
    (folder / "texts.csv").write_text("\n".join(["text,label,prompt", *lines]) + "\n")
    (folder / "texts.txt").write_text("".join(f"{row['text']}\n" for row in rows))


@cache
def _model(folder: Path) -> Any:
    return load_model(str(folder), "float32")


@cache
def _tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


def classified(folder: Path, good: Path) -> None:
    """Measure a classifier on the files that differ from the good ones."""
    for path in _changed(folder, good):
        _measured(good / "classifier", path, good)


def spoken(folder: Path, good: Path) -> None:
    """Measure a language model on them."""
    for path in _changed(folder, good):
        _measured(good / "words", path, good)


def _changed(folder: Path, good: Path) -> list[Path]:
    kept = {path.name: path.read_bytes() for path in (good / "texts").iterdir()}
    return [
        path
        for path in (folder / name for name in sorted(kept))
        if not (path.is_file() and path.read_bytes() == kept[path.name])
    ]


def _measured(model: Path, path: Path, good: Path) -> None:
    load_texts(_model(model), _tokenizer(good / "words"), path, max_length=16)(_model(model))


def read_tokenizer(folder: Path, _: Path) -> None:
    load_tokenizer(str(folder))("w1 w2")


def _sweep(out: Path, good: Path) -> Any:
    model = _model(good / "classifier")
    return sweep(model, good / "bert", lambda _: {"loss": 1.0}, out=out, p=[0.5], seeds=1, variants=["dare"])


def swept(folder: Path, good: Path) -> None:
    """Go on with a sweep, and report what it found."""
    study = study_of(_sweep(folder, good), "a sweep")
    study.json()
    study.markdown()


def lora_of_model(folder: Path, good: Path) -> None:
    extract_lora(good / "bert", folder, folder.parent / "adapter-out", rank=2)


def lora_of_package(package: Path, good: Path) -> None:
    extract_lora(good / "bert", package, package.parent / "adapter-out", rank=2)


def dequantized(folder: Path, _: Path) -> None:
    dequantize(folder / "tiny.gguf", folder.parent / "out")
    Checkpoint.open(folder.parent / "out")
