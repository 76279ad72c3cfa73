"""Chat models judged as people judge them: the loss on held-out answers, and what they answer.

None of the figures is comparable with published scores: rows, prompts and shares are those of the recipes.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from os import killpg
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from choice_questions import Choice

from dare_train import Texts, batched

Row = dict[str, str]
"""`prompt`, and `text`, which is the answer; the system message in `system`, if there is one."""
Messages = list[dict[str, str]]
IGNORED = -100
"""The label of tokens that do not count."""
NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")


# As messages, and as tokens.


def question(row: Row) -> Messages:
    """What the model is told before it answers."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": row["prompt"]}]


def answer(row: Row) -> Messages:
    return [{"role": "assistant", "content": row["text"]}]


def encoded(tokenizer: Any, rows: Sequence[Row], max_length: int) -> list[dict[str, Any]]:
    """`input_ids` and `labels` of each conversation; only those of the answer count, its end included."""
    examples = []
    for row in rows:
        asked, whole = _asked(tokenizer, row), _ids(tokenizer, [*question(row), *answer(row)])
        labels = [IGNORED] * len(asked) + whole[len(asked) :]
        examples.append({"input_ids": whole[:max_length], "labels": labels[:max_length]})
    return examples


def _asked(tokenizer: Any, row: Row) -> list[int]:
    return _ids(tokenizer, question(row), add_generation_prompt=True)


def _ids(tokenizer: Any, messages: Messages, **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


# The loss.


def held_out(tokenizer: Any, rows: Sequence[Row], max_length: int, batch_size: int = 32) -> Texts:
    """Measures a model: the `loss` (nats) of a token of held-out answers, and the `accuracy` of the next."""
    examples = encoded(tokenizer, rows, max_length)
    kept = [example for example in examples if any(label != IGNORED for label in example["labels"])]
    return Texts(batched(kept, tokenizer, batch_size=batch_size))


@torch.no_grad()
def losses(model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int = 32) -> list[float]:
    """Of each row's answer, in nats, summed over its tokens."""
    found = []
    examples = encoded(tokenizer, rows, sys.maxsize)
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        ids, mask = _padded([example["input_ids"] for example in part], tokenizer.pad_token_id, left=False)
        labels, _ = _padded([example["labels"] for example in part], IGNORED, left=False)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2),
            labels[:, 1:].to(model.device),
            ignore_index=IGNORED,
            reduction="none",
        )
        found.extend(each.sum(1).tolist())
    return found


# What is answered.


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int, batch_size: int = 32
) -> list[list[int]]:
    """The most likely token each time, up to the one that ends an answer, which is left out."""
    found: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        prompts = [_asked(tokenizer, row) for row in rows[start : start + batch_size]]
        ids, mask = _padded(prompts, tokenizer.pad_token_id, left=True)
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        found.extend(
            _until_end(tokens, tokenizer.eos_token_id) for tokens in written[:, ids.shape[1] :].tolist()
        )
    return found


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _padded(rows: Sequence[list[int]], by: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [rows, longest], and which of them are no padding."""
    longest = max(map(len, rows))
    filled, mask = [], []
    for row in rows:
        missing = longest - len(row)
        filled.append([by] * missing + row if left else row + [by] * missing)
        mask.append([0] * missing + [1] * len(row) if left else [1] * len(row) + [0] * missing)
    return torch.tensor(filled), torch.tensor(mask)


# Right or wrong.


def same_words(given: str, expected: str) -> bool:
    """Whether an answer is the expected one, whatever is around it of blanks, capitals and full stops."""
    return _plain(given) == _plain(expected)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def choices(model: Any, tokenizer: Any, questions: Sequence[Choice], batch_size: int = 32) -> list[int]:
    """Which of its `choices` answers each `question`: the one of the least loss per character."""
    rows = [{"prompt": item["question"], "text": text} for item in questions for text in item["choices"]]
    told = iter(losses(model, tokenizer, rows, batch_size))
    return [_least(item["choices"], told) for item in questions]


def _least(texts: Sequence[str], told: Iterator[float]) -> int:
    per_character = [next(told) / max(1, len(text)) for text in texts]
    return per_character.index(min(per_character))


def final_number(text: str) -> str | None:
    """What follows `####`, as in answers of GSM8K, or else the last number; None without one."""
    after = NUMBER.findall(text.rpartition("####")[2]) if "####" in text else []
    numbers = after[:1] or NUMBER.findall(text)[-1:]
    return _shortest(numbers[0].replace(",", "")) if numbers else None


def _shortest(number: str) -> str:
    """3.50 as 3.5, and 3.0 as 3."""
    return number.rstrip("0").rstrip(".") if "." in number else number


# Code that a model wrote.

FENCED = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def program(text: str) -> str:
    """What stands between the first fences of Markdown, if there are some."""
    found = FENCED.search(text)
    return found[1] if found else text


LIMITS = """
import resource
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""
PASSED = 75
"""The exit status of a program that came to its end. One that leaves before its tests has another."""


def passes(
    code: str,
    tests: Sequence[str],
    *,
    allowed: bool = False,
    seconds: int = 5,
    memory: int = 1 << 30,
) -> bool | None:
    """Whether a program passes its tests (MBPP's are assertions). None, and nothing is run, unless `allowed`.

    It runs in a process of its own, in an empty folder, without this one's environment and packages, for so
    many seconds and bytes, and writes nothing into files. That keeps accidents away, not malice: it may read
    what this user may, and reach the network.
    """
    if not allowed:
        return None
    with TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        limits = LIMITS.format(seconds=seconds, memory=memory)
        program.write_text(
            "\n".join((limits, code, *tests, f"import os\nos._exit({PASSED})\n")), encoding="utf-8"
        )
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(program)],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=2 * seconds) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                killpg(process.pid, signal.SIGKILL)
            process.wait()
