"""How recipes judge chat models: losses, answers, choices, numbers, and code that is run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import save_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import chat_answers  # noqa: E402

ROWS = [
    {"system": "Say it.", "prompt": "hi you", "text": "yes"},
    {"prompt": "What is it, do you think?", "text": "it is a tin"},
    {"system": "Be kind.", "prompt": "no", "text": "thank you, and hi"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(False)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_only_the_answer_counts(tokenizer: Any) -> None:
    (row,) = chat_answers.encoded(tokenizer, ROWS[:1], 100)
    assert tokenizer.decode(row["input_ids"]) == (
        "<s>system\nSay it.</s>\n<s>user\nhi you</s>\n<s>assistant\nyes</s>\n"
    )
    counted = [label for label in row["labels"] if label != chat_answers.IGNORED]
    assert tokenizer.decode(counted) == "yes</s>\n"
    assert len(row["labels"]) == len(row["input_ids"])
    (short,) = chat_answers.encoded(tokenizer, ROWS[:1], 10)
    assert len(short["input_ids"]) == len(short["labels"]) == 10


@pytest.mark.filterwarnings("default")  # TRL's own
def test_what_counts_is_what_trl_trains_on(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": chat_answers.question(row), "completion": chat_answers.answer(row)} for row in ROWS[:1] * 4
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=100,
        completion_only_loss=True,
        activation_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        processing_class=tokenizer,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    (row,) = chat_answers.encoded(tokenizer, ROWS[:1], 100)
    assert batch["input_ids"][0].tolist() == row["input_ids"]
    assert batch["labels"][0].tolist() == row["labels"]


def alone(model: Any, row: dict[str, Any]) -> float:
    """The loss of one answer, token after token."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        told = model(input_ids=ids).logits[0].log_softmax(-1)
    places = [place for place, label in enumerate(row["labels"]) if label != chat_answers.IGNORED]
    return -sum(float(told[place - 1, row["input_ids"][place]]) for place in places)


def test_losses_of_answers(model: Any, tokenizer: Any) -> None:
    expected = [alone(model, row) for row in chat_answers.encoded(tokenizer, ROWS, 1000)]
    assert chat_answers.losses(model, tokenizer, ROWS, batch_size=2) == pytest.approx(expected, rel=1e-4)
    counted = sum(
        label != chat_answers.IGNORED
        for row in chat_answers.encoded(tokenizer, ROWS, 1000)
        for label in row["labels"]
    )
    measured = chat_answers.held_out(tokenizer, ROWS, 1000, batch_size=2)(model)
    assert measured["loss"] == pytest.approx(sum(expected) / counted, rel=1e-4)


def test_held_out_leaves_out_what_has_no_room_for_an_answer(tokenizer: Any) -> None:
    rows = chat_answers.encoded(tokenizer, ROWS, 1000)
    prompts = sorted(row["labels"].count(chat_answers.IGNORED) for row in rows)
    assert chat_answers.held_out(tokenizer, ROWS, prompts[-1] + 1).count == 3
    assert chat_answers.held_out(tokenizer, ROWS, prompts[-1]).count == 2


def test_answers_in_a_batch_are_those_alone(model: Any, tokenizer: Any) -> None:
    together = chat_answers.answers(model, tokenizer, ROWS, 12, batch_size=3)
    assert together == [chat_answers.answers(model, tokenizer, [row], 12)[0] for row in ROWS]
    assert all(0 < len(tokens) <= 12 for tokens in together)


def test_an_answer_ends_where_the_template_ends_it(model: Any, tokenizer: Any) -> None:
    rows = ROWS * 8
    with torch.no_grad():
        kept = model.lm_head.weight[tokenizer.eos_token_id].clone()
        model.lm_head.weight[tokenizer.eos_token_id] *= 30
        found = chat_answers.answers(model, tokenizer, rows, 12)
        model.lm_head.weight[tokenizer.eos_token_id] = kept
    assert min(map(len, found)) < 12
    assert not any(tokenizer.eos_token_id in tokens for tokens in found)


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("card arrival", "card arrival", True),
        (" Card  arrival.\n", "card arrival", True),
        ("card arrivals", "card arrival", False),
        ("It is card arrival", "card arrival", False),
        ("", "card arrival", False),
    ],
)
def test_same_words(given: str, expected: str, same: bool) -> None:
    assert chat_answers.same_words(given, expected) is same


def test_the_choice_of_the_least_loss_per_character(model: Any, tokenizer: Any) -> None:
    questions = [
        {"question": "What is hot?", "choices": ["the sun", "a lake in winter", "ice"], "answer": 0},
        {"question": "Two and two?", "choices": ["4", "four thousand and nine"], "answer": 0},
    ]
    expected = []
    for item in questions:
        rows = [{"prompt": item["question"], "text": text} for text in item["choices"]]
        losses = [alone(model, row) for row in chat_answers.encoded(tokenizer, rows, 1000)]
        each = [loss / len(text) for loss, text in zip(losses, item["choices"], strict=True)]
        expected.append(each.index(min(each)))
    assert chat_answers.choices(model, tokenizer, questions, batch_size=2) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### -3.50", "-3.5"),
        ("#### 18.00 dollars, not 20", "18"),
        ("She has 3 apples and then 10.", "10"),
        ("It is 7-2=5", "5"),
        ("####", None),
        ("I had 4 #### none", "4"),
        ("none", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert chat_answers.final_number(text) == number


@pytest.mark.parametrize(
    ("code", "passed"),
    [
        ("def double(n):\n    return 2 * n", True),
        ("def double(n):\n    return n * n", False),
        ("def double(n:", False),
        ("raise SystemExit(0)", False),
        ("while True:\n    pass", False),
        ("import time\ntime.sleep(60)", False),
        ("rows = [0] * (1 << 31)\ndef double(n):\n    return 2 * n", False),
        (
            "with open('left', 'w') as file:\n    file.write('x' * 100)\ndef double(n):\n    return 2 * n",
            False,
        ),
    ],
    ids=["right", "wrong", "no code", "leaves", "for ever", "sleeps", "memory", "writes"],
)
def test_code_is_run_with_limits(code: str, passed: bool) -> None:
    tests = ["assert double(3) == 6", "assert double(0) == 0"]
    assert chat_answers.passes(code, tests, allowed=True, seconds=1) is passed


def test_code_is_run_only_if_that_is_asked_for(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    assert chat_answers.passes(code, []) is None
    assert not (tmp_path / "ran").exists()
    assert chat_answers.passes(code, [], allowed=True) is True
    assert (tmp_path / "ran").exists(), "the file would have shown that it ran"
