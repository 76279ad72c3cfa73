"""Tasks for a chat model: a question, the answer, and how an answer is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import public_data
import standard_library
from inputs import Columns, labelled, short, spoken
from standard_library import Row, Split

INSTRUCTIONS: Mapping[str, str] = {
    "banking77": "Name the intent of the customer's question.",
    "packages": "Name the package of Python's standard library that this text is from.",
    "exceptions": "Name the exception that Python raises with this message.",
    "code_or_prose": "Say whether this is code or prose.",
    "verbs": "Name the verb that the name of this function begins with.",
}
"""Of tasks with labels: the system message. Other such tasks have `NAME_IT`."""
NAME_IT = "Name the label of this text."
LABELLED = (*public_data.LABELLED, *standard_library.LABELLED)
Judge = Literal["exact match", "final number", "tests passed", "loss alone"]
JUDGES: Mapping[str, Judge] = {
    "maths": "final number",
    "code": "tests passed",
    "instructions": "loss alone",
    **dict.fromkeys(standard_library.SPOKEN, "loss alone"),
}
"""What tells whether an answer is right, where it is not whether it is the expected one."""


@dataclass(frozen=True, kw_only=True)
class ChatTask:
    name: str
    rows: Mapping[Split, Sequence[Row]]
    """Each with `prompt` and `text`, `system` where there is an instruction, and `tests` of programs."""
    judge: Judge = "exact match"


def usual_task(data: Path | None) -> str:
    """banking77 with local copies of the data, else one that is on every machine."""
    return "banking77" if data else "exceptions"


def chat_task(task: str, data: Path | None = None, columns: Columns = ()) -> ChatTask:
    """A task by its name, or rows with the columns prompt and text: see `inputs`."""
    if task not in LABELLED:
        rows = spoken(task, data, columns)
        return ChatTask(
            name=short(task),
            rows={part: [_asked(row) for row in some] for part, some in rows.items()},
            judge=JUDGES.get(task, "exact match"),
        )
    instruction = INSTRUCTIONS.get(task, NAME_IT)
    return ChatTask(
        name=short(task),
        rows={
            part: [_named(row, instruction) for row in some]
            for part, some in labelled(task, data, columns).items()
        },
    )


def _named(row: Row, instruction: str) -> Row:
    return {"system": instruction, "prompt": row["text"], "text": words(row["label"])}


def _asked(row: Row) -> Row:
    """Without what stands for a chat template where there is none. A program is asked for with its first
    test, which says what its function is called.
    """
    prompt = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer: ")
    if "tests" not in row:
        return {"prompt": prompt, "text": row["text"]}
    return {**row, "prompt": f"{prompt}\n{row['tests'].splitlines()[0]}"}


def words(label: str) -> str:
    """card_arrival as card arrival."""
    return " ".join(label.rstrip("?").replace("_", " ").split())
