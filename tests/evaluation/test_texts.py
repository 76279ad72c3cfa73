"""Texts in files: read, encoded, and measured as a loop of a few lines measures them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import refusal
from tokenizers import Tokenizer, models, pre_tokenizers
from training import tiny_config
from transformers import (
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from dare_train.errors import CheckpointError, ConfigError, DareError
from dare_train.evaluation.texts import load_texts, read_rows

WORDS = ["<s>", "</s>", "one", "two", "three", "four", "five", "six"]
ROWS = [
    {"text": "one two three", "label": "odd"},
    {"text": "four", "label": "even"},
    {"text": "six five four three two one", "label": "even"},
    {"text": "three three", "label": "odd"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<s>")


@pytest.fixture
def classifier() -> BertForSequenceClassification:
    config = tiny_config()
    config.id2label, config.label2id = {0: "even", 1: "odd"}, {"even": 0, "odd": 1}
    set_seed(3)
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def decoder() -> LlamaForCausalLM:
    set_seed(3)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)).eval()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(row["text"] for row in rows))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt"])
def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path, ending: str) -> None:
    expected = [{"text": row["text"]} for row in ROWS] if ending == ".txt" else ROWS
    assert read_rows(write(tmp_path / f"rows{ending}", ROWS)) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_classifier_is_measured_text_by_text(
    tmp_path: Path,
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
) -> None:
    texts = load_texts(
        classifier, tokenizer, write(tmp_path / "rows.jsonl", ROWS), batch_size=batch_size, max_length=4
    )
    right, loss = [], []
    with torch.no_grad():
        for row in ROWS:
            ids = [WORDS.index(word) for word in row["text"].split()][:4]
            logits = classifier(input_ids=torch.tensor([ids])).logits[0]
            label = {"even": 0, "odd": 1}[row["label"]]
            right.append(int(logits.argmax()) == label)
            loss.append(-float(logits.log_softmax(-1)[label]))
    assert texts.count == 4
    assert texts(classifier) == pytest.approx({"accuracy": sum(right) / 4, "loss": sum(loss) / 4}, rel=1e-5)


@pytest.mark.parametrize("prompt", ["", "two one"])
def test_a_language_model_is_measured_token_by_token_after_the_prompt(
    tmp_path: Path, decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    rows = [{"prompt": prompt, "text": row["text"]} for row in ROWS]
    texts = load_texts(decoder, tokenizer, write(tmp_path / "rows.jsonl", rows), batch_size=3)
    right, loss = [], []
    with torch.no_grad():
        for row in rows:
            ids = [WORDS.index(word) for word in f"<s> {row['prompt']} {row['text']} </s>".split()]
            logits = decoder(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            for place in range(1 + len(prompt.split()), len(ids)):
                right.append(int(logits[place - 1].argmax()) == ids[place])
                loss.append(-float(logits[place - 1, ids[place]]))
    assert texts(decoder) == pytest.approx(
        {"accuracy": sum(right) / len(right), "loss": sum(loss) / len(loss)}, rel=1e-5
    )


def test_columns_limits_and_labels_by_number(
    tmp_path: Path, classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = load_texts(classifier, tokenizer, write(tmp_path / "rows.jsonl", ROWS[:2]))
    rows = [{"review": row["text"], "stars": str(int(row["label"] == "odd"))} for row in ROWS]
    file = write(tmp_path / "other.csv", rows)
    other = load_texts(classifier, tokenizer, file, columns={"text": "review", "label": "stars"}, limit=2)
    assert other.count == 2
    assert other(classifier) == plain(classifier)


@pytest.mark.parametrize(
    ("name", "text", "kind", "messages"),
    [
        (
            "rows.parquet",
            "",
            CheckpointError,
            ("expected a .jsonl, .json, .csv or .txt file, found .parquet",),
        ),
        ("rows.jsonl", "{", CheckpointError, ("expected a readable .jsonl file",)),
        ("rows.jsonl", "", CheckpointError, ("expected at least one row, found none",)),
        (
            "rows.jsonl",
            '{"text": "one"}',
            CheckpointError,
            ("row 1: expected a column label, found text", "--column label=NAME"),
        ),
        (
            "rows.jsonl",
            '{"text": "one", "label": "prime"}',
            ConfigError,
            ("expected one that the model knows: even, odd", "found 'prime'"),
        ),
        (
            "rows.csv",
            "label,words\n1,2,3\n",
            CheckpointError,
            ("expected a column text", "label, words, None"),
        ),
        (
            "rows.jsonl",
            '{"text": "\\ud800", "label": "odd"}',
            CheckpointError,
            ("row 1: expected text in text, found '\\ud800'",),
        ),
        (
            "rows.jsonl",
            '{"text": "", "label": "odd"}',
            CheckpointError,
            ("row 1: expected a text with tokens in it, found ''",),
        ),
        ("absent.jsonl", None, CheckpointError, ("absent.jsonl",)),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast,
    name: str, text: str | None, kind: type[DareError], messages: tuple[str, ...],
) -> None:  # fmt: skip
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DareError) as caught:
        load_texts(classifier, tokenizer, tmp_path / name)
    refusal(caught.value, kind, *messages)


def test_models_that_are_neither_and_prompts_without_room_are_refused(
    tmp_path: Path, decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "one two three", "text": "four"}])
    with pytest.raises(ConfigError) as caught:
        load_texts(BertModel(tiny_config()), tokenizer, file)
    refusal(
        caught.value,
        ConfigError,
        "a model for sequence classification, or a causal language model, found BertModel",
        "--eval",
    )
    with pytest.raises(ConfigError) as caught:
        load_texts(decoder, tokenizer, file, max_length=4)
    refusal(caught.value, ConfigError, "max_length: expected room for more than the prompts, found 4")
