"""Questions with several answers to choose from: what a chat model should not lose by learning something
else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import standard_library
from inputs import missing

from dare_train import read_rows


class Choice(TypedDict):
    question: str
    choices: Sequence[str]
    answer: int
    """Which of them is right."""


@dataclass(frozen=True, kw_only=True)
class HubChoices:
    """Where such questions are on the Hub: with the columns `choices`, which has `text` and `label`, and
    `answerKey`.
    """

    id: str
    config: str
    question: str


ON_HUB: Mapping[str, HubChoices] = {
    "arc_easy": HubChoices(id="allenai/ai2_arc", config="ARC-Easy", question="question"),
    "openbookqa": HubChoices(id="allenai/openbookqa", config="main", question="question_stem"),
}
"""Not tried: no hub could be reached where this was written. Public code gives the ids."""
STANDARD = standard_library.LABELLED
"""Tasks of the standard library's text: every label is a choice."""


def choice_questions(name: str, data: Path | None, most: int) -> list[Choice]:
    """The first so many of the test split: of a data set by its name, or of a .jsonl or .json file with
    `question`, `choices` and `answer`, an index.
    """
    if name in STANDARD:
        return _of_labels(name, most)
    if name in ON_HUB:
        local = data / name / "test.jsonl" if data else None
        if local and local.is_file():
            return _of_file(local, most)
        return _of_hub(name, ON_HUB[name], most)
    if Path(name).is_file():
        return _of_file(Path(name), most)
    known = ", ".join((*ON_HUB, *STANDARD))
    missing(name, f"neither a file of questions, nor one of {known}")


def _of_labels(name: str, most: int) -> list[Choice]:
    rows = standard_library.labelled(name)["test"][:most]
    labels = sorted({row["label"] for row in standard_library.labelled(name)["train"]})
    return [Choice(question=row["text"], choices=labels, answer=labels.index(row["label"])) for row in rows]


def _of_file(file: Path, most: int) -> list[Choice]:
    return [_checked(str(file), row) for row in read_rows(file)[:most]]


def _checked(file: str, row: Mapping[str, Any]) -> Choice:
    match row:
        case {"question": str(question), "choices": [*choices], "answer": int(answer)}:
            if answer in range(len(choices)) and all(isinstance(text, str) for text in choices):
                return Choice(question=question, choices=choices, answer=answer)
    expected = "question, choices (a list of texts) and answer (an index)"
    sys.exit(f"{file}: a row has {expected}; found {row!r:.200}")


def _of_hub(name: str, entry: HubChoices, most: int) -> list[Choice]:
    try:
        from datasets import load_dataset

        rows = [*islice(load_dataset(entry.id, entry.config, split="test"), most)]
    except ImportError:
        missing(name, 'the Hub needs the library datasets (pip install -e ".[data]")')
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        missing(name, f"the Hub did not give {entry.id} ({type(error).__name__}: {reason})")
    return [
        Choice(
            question=row[entry.question],
            choices=row["choices"]["text"],
            answer=row["choices"]["label"].index(row["answerKey"]),
        )
        for row in rows
    ]
