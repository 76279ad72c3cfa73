"""Texts in a file as what a model is evaluated on: labelled ones for a classifier, any for a language
model.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import check_count
from ..errors import CheckpointError, ConfigError, brief, printable
from ..reading.plain_files import is_text, opened, reason
from ..reading.structures import checked

Row = Mapping[str, Any]
Batch = dict[str, torch.Tensor]

LONGEST_TEXT = (1 << 31) - 1
"""Tokens; what tokenizers can count."""
_IGNORED = -100
"""The label that transformers' losses leave out."""


class Texts:
    """Encoded texts in batches, and a metric of a model on them: an `Evaluate`, and batches for what asks for
    batches.

    Of a classifier, `accuracy` and `loss` (nats) per text. Of a language model, `accuracy` of the next token
    and `loss` (nats) per token, of those tokens that come after the prompt, if the rows have one.

    Args:
        batches: arguments of the model by name, labels included.
        classes: numbers of the classes that a classifier may choose from; all, by default.

    Attributes:
        batches: as given.
        count: how many texts.
    """

    def __init__(self, batches: Sequence[Batch], *, classes: Sequence[int] | None = None) -> None:
        self.batches = list(batches)
        self._classes = classes
        self.count = sum(len(batch["input_ids"]) for batch in self.batches)

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        right = total = 0
        loss = 0.0
        device = next(model.parameters()).device
        for batch in self.batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            logits, labels = _counted(model(**inputs).logits.float(), batch["labels"].to(device))
            if self._classes is not None:
                others = torch.ones(logits.shape[-1], dtype=torch.bool, device=device)
                others[self._classes] = False
                logits = logits.masked_fill(others, float("-inf"))
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            total += len(labels)
        return {"accuracy": right / total, "loss": loss / total}


def _counted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, one row for each decision that counts."""
    if logits.dim() == 3:
        logits = logits[:, :-1]
        labels = labels[:, 1:]
        places = labels != _IGNORED
        return logits[places], labels[places]
    return logits, labels


def load_texts(
    model: torch.nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    max_length: int = 128,
    batch_size: int = 64,
    limit: int | None = None,
    labels: bool = True,
) -> Texts:
    """The texts of a file, encoded for a model.

    Args:
        model: a classifier of texts, or a causal language model, of transformers.
        path: `.jsonl`, `.json` (a list), `.csv`, or `.txt` (a text in each line).
        columns: what the columns `text`, `label` and `prompt` are called in the file, where it is not that.
        max_length: tokens that count of a text.
        limit: the first so many rows only.
        labels: whether a classifier's texts need labels: without them the model can read, but not be
            measured.

    Raises:
        CheckpointError: the file cannot be read, or lacks a column.
        ConfigError: the model is neither, or does not know a label.
    """
    if limit is not None:
        check_count("examples", limit)
    rows = read_rows(path)[:limit]
    if not rows:
        raise CheckpointError(str(path), expected="at least one row", found="none")
    encoded = encode_rows(
        model, tokenizer, rows, columns=columns, max_length=max_length, labels=labels, label=str(path)
    )
    return Texts(batched(encoded, tokenizer, batch_size=batch_size))


def batched(rows: Sequence[dict[str, Any]], tokenizer: Any, *, batch_size: int = 64) -> list[Batch]:
    """Encoded rows in batches, those of similar length together, padded."""
    check_count("batch_size", batch_size)
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return [_padded(ordered[start : start + batch_size], pad) for start in range(0, len(ordered), batch_size)]


def encode_rows(
    model: torch.nn.Module, tokenizer: Any, rows: Sequence[Row], *, columns: Mapping[str, str] | None = None,
    max_length: int = 128,
    labels: bool = True, label: str = "rows",
) -> list[dict[str, Any]]:  # fmt: skip
    """`input_ids` and `labels` of each row, as lists, not padded; of a prompt the labels are -100.

    Args:
        model, columns, max_length, labels: see `load_texts`.
        label: what messages call the rows.

    Raises:
        As `load_texts`.
    """
    check_count("max_length", max_length, at_most=LONGEST_TEXT)
    names = {name: (columns or {}).get(name, name) for name in ("text", "label", "prompt")}
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    if not classifies and not hasattr(model, "generate"):
        expected = "a model for sequence classification, or a causal language model"
        raise ConfigError(
            "model", expected=expected, found=type(model).__name__, remedy="pass --eval MODULE:FUNCTION"
        )
    for role in ("text", "label") if classifies and labels else ("text",):
        _check_column(label, rows, role, names[role])
    if labels and not classifies:
        return _spoken(tokenizer, rows, names, max_length, label)
    encoded = _encoded(tokenizer, rows, names["text"], max_length, label)
    if not labels:
        return [{"input_ids": ids} for ids in encoded]
    known: Mapping[str, int] = model.config.label2id  # type: ignore[union-attr, assignment]
    numbers = [_number(known, row[names["label"]]) for row in rows]
    return [{"input_ids": ids, "labels": one} for ids, one in zip(encoded, numbers, strict=True)]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON, JSON-lines, CSV or plain-text file.

    Raises:
        CheckpointError: it is none of those, or cannot be read.
    """
    path = Path(path)
    try:
        with opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            if path.suffix == ".jsonl":
                return _rows([json.loads(line) for line in file if line.strip()], path)
            if path.suffix == ".json":
                return _rows(json.load(file), path)
            if path.suffix == ".txt":
                return [{"text": line.strip()} for line in file if line.strip()]
    except (csv.Error, ValueError, RecursionError) as error:
        expected = f"a readable {path.suffix} file"
        raise CheckpointError(str(path), expected=expected, found=reason(error)) from error
    raise CheckpointError(
        str(path), expected="a .jsonl, .json, .csv or .txt file", found=path.suffix or "no ending"
    )


def _rows(parsed: object, path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = checked(
        parsed, list[dict[str, Any]], where=str(path), expected="a list of rows"
    )
    return rows


def _check_column(label: str, rows: Sequence[Row], role: str, name: str) -> None:
    for number, row in enumerate(rows):
        if name not in row:
            remedy = f"name it with --column {role}=NAME"
            raise CheckpointError(
                f"{label}: row {number + 1}",
                expected=f"a column {name}",
                found=printable(", ".join(str(column) for column in row), 200),
                remedy=remedy,
            )


def _encoded(tokenizer: Any, rows: Sequence[Row], name: str, max_length: int, label: str) -> list[list[int]]:
    """Token ids of each text, of which every one has some."""
    texts = [_text(row, name, f"{label}: row {number}") for number, row in enumerate(rows, 1)]
    encoded: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    for number, (ids, text) in enumerate(zip(encoded, texts, strict=True), 1):
        if not ids:
            expected = f"a {name} with tokens in it"
            raise CheckpointError(f"{label}: row {number}", expected=expected, found=brief(text))
    return encoded


def _text(row: Row, name: str, label: str) -> str:
    """What stands in a column, or nothing, as text."""
    text = str(row.get(name, ""))
    if not is_text(text):
        raise CheckpointError(label, expected=f"text in {name}", found=brief(text))
    return text


def _number(known: Mapping[str, int], label: Any) -> int:
    """Of a label that the data has by name or by number."""
    if str(label) in known:
        return known[str(label)]
    number = str(label)
    if number.isascii() and number.isdigit() and len(number) < 10 and int(number) in known.values():
        return int(number)
    raise ConfigError(
        "label", expected=f"one that the model knows: {', '.join([*known][:5])}…", found=brief(label)
    )


def _spoken(
    tokenizer: Any, rows: Sequence[Row], names: Mapping[str, str], max_length: int, label: str
) -> list[dict[str, Any]]:
    """What comes before the text is a prompt, which does not count."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = []
    for number, row in enumerate(rows, 1):
        before, after = (_text(row, names[role], f"{label}: row {number}") for role in ("prompt", "text"))
        prompt = begin + tokenizer(before, add_special_tokens=False)["input_ids"]
        text = tokenizer(after, add_special_tokens=False)["input_ids"] + end
        labels = [_IGNORED] * len(prompt) + text
        encoded.append({"input_ids": (prompt + text)[:max_length], "labels": labels[:max_length]})
    kept = [row for row in encoded if any(label != _IGNORED for label in row["labels"][1:])]
    if not kept:
        raise ConfigError("max_length", expected="room for more than the prompts", found=str(max_length))
    return kept


def _padded(rows: Sequence[dict[str, Any]], pad: int) -> Batch:
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: Sequence[list[int]], by: int) -> torch.Tensor:
        return torch.tensor([value + [by] * (longest - len(value)) for value in values])

    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": filled(ids, pad),
        "attention_mask": filled([[1] * len(numbers) for numbers in ids], 0),
    }
    if "labels" in rows[0]:
        labels = [row["labels"] for row in rows]
        batch["labels"] = torch.tensor(labels) if isinstance(labels[0], int) else filled(labels, _IGNORED)
    return batch
