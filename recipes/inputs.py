"""Real inputs for the recipes: rows of text, split the same way every time. Any JSON, JSON-lines or CSV file will do as well."""

from __future__ import annotations

import json
import random
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dare_train.evaluation.texts import read_rows

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HELD_OUT = 0.2

Split = Literal["train", "validation", "test"]
Rows = list[dict[str, str]]
"""A label by name and a text; or a prompt and the text that follows."""

REVIEWS = {"rt-polarity.neg": "negative", "rt-polarity.pos": "positive"}
OPINIONS = {"plot.tok.gt9.5000": "objective", "quote.tok.gt9.5000": "subjective"}
"""Labels of two archives' files."""
LABELLED = ("rt_polarity", "subjectivity", "banking77", "clinc150")
SPOKEN = ("instructions", "maths", "code")


def labelled(name: str, data: Path = DATA, *, text: str = "text", label: str = "label") -> dict[Split, Rows]:
    """Texts with labels: one of `LABELLED`, or a file with columns of those names."""
    if Path(name).suffix:
        return split([{"text": str(row[text]), "label": str(row[label])} for row in read_rows(name)])
    folder = present(data / name)
    if name == "rt_polarity":
        return split(two_files(folder / "sentence_polarity.zip", REVIEWS))
    if name == "subjectivity":
        return split(two_files(folder / "subjectivity.zip", OPINIONS))
    if name == "banking77":
        return split([{"text": row["text"], "label": row["category"]} for row in read_rows(folder / "train.csv")])
    if name == "clinc150":
        return own_splits(folder / "clinc150.json")
    sys.exit(f"no task {name}: expected {', '.join(LABELLED)} or a .jsonl, .json or .csv file")


def spoken(name: str, data: Path = DATA, *, prompt: str = "prompt", text: str = "text") -> dict[Split, Rows]:
    """Prompts and what follows them: one of `SPOKEN`, or a file with columns of those names."""
    if Path(name).suffix:
        return split([{"prompt": str(row.get(prompt, "")), "text": str(row[text])} for row in read_rows(name)])
    if name == "instructions":
        rows = read_rows(present(data / "instruct_1100") / "instruction-data.json")
        return split([asked(" ".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in rows])
    if name == "maths":
        return split([asked(row["question"], row["answer"]) for row in read_rows(present(data / "gsm8k") / "train.jsonl")])
    if name == "code":
        return split([asked(row["text"], row["code"]) for row in read_rows(present(data / "mbpp") / "mbpp.train.jsonl")])
    sys.exit(f"no task {name}: expected {', '.join(SPOKEN)} or a .jsonl, .json or .csv file")


def asked(question: str, answer: str) -> dict[str, str]:
    return {"prompt": f"Question: {question}\nAnswer: ", "text": answer.replace("\r\n", "\n")}


def present(folder: Path) -> Path:
    if not folder.is_dir():
        sys.exit(f"no data: {folder} not found; pass --data, or a file of your own")
    return folder


def split(rows: Sequence[dict[str, str]]) -> dict[Split, Rows]:
    """Shuffled; a fifth is held out, half of it for validation."""
    shuffled = random.Random(0).sample(rows, len(rows))
    held_out = int(len(rows) * HELD_OUT)
    return {"test": shuffled[: held_out // 2], "validation": shuffled[held_out // 2 : held_out], "train": shuffled[held_out:]}


def two_files(archive: Path, members: Mapping[str, str]) -> Rows:
    """Sentences of two classes, a file each."""
    with zipfile.ZipFile(archive) as file:
        paths = {Path(path).name: path for path in file.namelist()}
        return [
            {"text": line.strip(), "label": label}
            for member, label in members.items()
            for line in file.read(paths[member]).decode().splitlines()
        ]


def own_splits(path: Path) -> dict[Split, Rows]:
    """clinc150's own."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
    rows = {split: [{"text": text, "label": label} for text, label in found[name]] for split, name in names.items()}
    return {split: random.Random(0).sample(some, len(some)) for split, some in rows.items()}


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
