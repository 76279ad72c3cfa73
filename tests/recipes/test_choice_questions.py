"""Questions with choices, wherever they come from; and what studies keep of what they measured."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import chat_answers  # noqa: E402
import chat_tasks  # noqa: E402
from choice_questions import choice_questions  # noqa: E402
from record import Record  # noqa: E402

WATER = {"question": "What is wet?", "choices": ["sand", "water"], "answer": 1}


def lines(path: Path, *rows: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_of_files_and_local_copies(tmp_path: Path) -> None:
    assert choice_questions(lines(tmp_path / "mine.jsonl", WATER, WATER), None, 1) == [WATER]
    lines(tmp_path / "arc_easy" / "test.jsonl", WATER)
    assert choice_questions("arc_easy", tmp_path, 10) == [WATER]


@pytest.mark.parametrize(
    ("name", "id", "config", "column"),
    [
        ("arc_easy", "allenai/ai2_arc", "ARC-Easy", "question"),
        ("openbookqa", "allenai/openbookqa", "main", "question_stem"),
    ],
)
def test_of_the_hub(
    name: str, id: str, config: str, column: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = {
        column: "What is wet?",
        "choices": {"text": ["sand", "water"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    asked = []

    def load_dataset(*given: str, split: str) -> Any:
        asked.append((*given, split))
        return [row] * 5

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert choice_questions(name, tmp_path, 3) == [WATER] * 3
    assert asked == [(id, config, "test")]


def test_of_the_standard_library() -> None:
    questions = choice_questions("exceptions", None, 40)
    assert len(questions) == 40
    assert all(len(item["choices"]) == 7 for item in questions)
    assert len({item["answer"] for item in questions}) > 3


@pytest.mark.parametrize(
    "row",
    [
        {**WATER, "answer": 2},
        {**WATER, "choices": ["sand", 2]},
        {**WATER, "choices": "sand"},
        {"question": "What is wet?"},
    ],
)
def test_rows_of_another_form_are_refused(row: Any, tmp_path: Path) -> None:
    file = lines(tmp_path / "mine.jsonl", WATER, row)
    with pytest.raises(SystemExit) as caught:
        choice_questions(file, None, 5)
    assert str(caught.value).startswith(f"{file}: a row has question, choices (a list of texts) and answer")


def test_what_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SystemExit, match="no data set nosuch: neither a file of questions, nor one of arc_easy"
    ):
        choice_questions("nosuch", None, 5)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match=r"no data set arc_easy: the Hub needs the library datasets"):
        choice_questions("arc_easy", None, 5)


# Programs.


def test_programs_are_asked_for_with_their_first_test(tmp_path: Path) -> None:
    row = {
        "text": "Double it.",
        "code": "def f(n):\r\n  return 2 * n",
        "test_list": ["assert f(1) == 2", "assert f(0) == 0"],
    }
    lines(tmp_path / "mbpp" / "mbpp.train.jsonl", *[row] * 10)
    task = chat_tasks.chat_task("code", tmp_path)
    assert task.judge == "tests passed"
    assert task.rows["test"] == [
        {
            "prompt": "Double it.\nassert f(1) == 2",
            "text": "def f(n):\n  return 2 * n",
            "tests": "assert f(1) == 2\nassert f(0) == 0",
        }
    ]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\nThat is it.\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1", "x = 1"),
        ("```py\nx = 1\n```", "x = 1\n"),
    ],
)
def test_a_program_is_what_stands_between_fences(text: str, code: str) -> None:
    assert chat_answers.program(text) == code


# The record.


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    record = Record(tmp_path, {"steps": 2})
    assert record.once("loss", lambda: [0.5]) == [0.5]
    assert Record(tmp_path, {"steps": 2}).once("loss", lambda: [0.7]) == [0.5]

    def fails() -> None:
        raise KeyError("killed")

    with pytest.raises(KeyError, match="killed"):
        record.once("other", fails)
    assert record.once("other", lambda: 1) == 1


def test_the_record_of_another_setup_is_refused(tmp_path: Path) -> None:
    Record(tmp_path, {"steps": 2, "seed": 0})
    with pytest.raises(SystemExit) as caught:
        Record(tmp_path, {"steps": 3, "seed": 0})
    assert str(caught.value) == f"{tmp_path} was measured with steps 2, not 3: choose another --out"
