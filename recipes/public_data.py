"""The public data sets of `--full`: their ids and columns on the Hub, and how local copies of them are read.

No id here has been tried: no hub could be reached where this was written. Public code gives them.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from standard_library import Row, Split, Splits, asked

from dare_train import read_rows

HELD_OUT = 0.2


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """Where a data set is on the Hub, and which of its columns are read."""

    id: str
    config: str | None = None
    splits: Mapping[Split, str] = field(default_factory=lambda: {"train": "train"})
    """Its names of those that it has. What it lacks is held out of its training rows."""
    text: str = "text"
    label: str | None = None
    """A column of names, or of numbers that the data set has names for."""
    prompt: tuple[str, ...] = ()
    """Columns that make the question."""
    tests: str | None = None
    """A column of lists of assertions that the answer, a program, should pass."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What labels are called here, where it is another name."""
    kept: Collection[str] | None = None
    """Labels whose rows are read, where they are not all."""
    rows: int | None = None
    """Only the first so many are fetched."""


DOMAINS: Mapping[str, Sequence[str]] = {
    "banking": (
        "freeze_account", "routing", "pin_change", "bill_due", "pay_bill", "account_blocked",
        "interest_rate", "min_payment", "bill_balance", "transfer", "order_checks", "balance",
        "spending_history", "transactions", "report_fraud",
    ),
    "credit_cards": (
        "replacement_card_duration", "expiration_date", "damaged_card", "improve_credit_score",
        "report_lost_card", "card_declined", "credit_limit_change", "apr", "redeem_rewards", "credit_limit",
        "rewards_balance", "application_status", "credit_score", "new_card", "international_fees",
    ),
    "kitchen_and_dining": (
        "food_last", "confirm_reservation", "how_busy", "ingredients_list", "calories", "nutrition_info",
        "recipe", "restaurant_reviews", "restaurant_reservation", "meal_suggestion",
        "restaurant_suggestion", "cancel_reservation", "ingredient_substitution", "cook_time",
        "accept_reservations",
    ),
    "home": (
        "what_song", "play_music", "todo_list_update", "reminder", "reminder_update", "calendar_update",
        "order_status", "update_playlist", "shopping_list", "calendar", "next_song", "order", "todo_list",
        "shopping_list_update", "smart_home",
    ),
    "auto_and_commute": (
        "current_location", "oil_change_when", "oil_change_how", "uber", "traffic", "tire_pressure",
        "schedule_maintenance", "gas", "mpg", "distance", "directions", "last_maintenance", "gas_type",
        "tire_change", "jump_start",
    ),
    "utility": (
        "weather", "alarm", "date", "find_phone", "share_location", "timer", "make_call", "calculator",
        "definition", "measurement_conversion", "flip_coin", "spelling", "time", "roll_dice", "text",
    ),
    "small_talk": (
        "who_made_you", "meaning_of_life", "who_do_you_work_for", "do_you_have_pets",
        "what_are_your_hobbies", "fun_fact", "what_is_your_name", "where_are_you_from", "goodbye",
        "thank_you", "greeting", "tell_joke", "are_you_a_bot", "how_old_are_you", "what_can_i_ask_you",
    ),
}  # fmt: skip
"""Seven domains of clinc150 (CC BY 3.0) with their intents. Rows of others are left out."""

THREE: Mapping[Split, str] = {"train": "train", "validation": "validation", "test": "test"}
TWO: Mapping[Split, str] = {"train": "train", "test": "test"}

ON_HUB: Mapping[str, HubSet] = {
    # Texts with labels.
    "rt_polarity": HubSet(
        id="cornell-movie-review-data/rotten_tomatoes",
        splits=THREE,
        label="label",
        labels={"neg": "negative", "pos": "positive"},
    ),
    "subjectivity": HubSet(id="SetFit/subj", splits=TWO, label="label_text"),
    "banking77": HubSet(id="mteb/banking77", splits=TWO, label="label_text"),
    "clinc150": HubSet(
        id="clinc/clinc_oos",
        config="plus",
        splits=THREE,
        label="intent",
        kept={*chain(*DOMAINS.values())},
    ),
    # Prompts and answers.
    "instructions": HubSet(id="tatsu-lab/alpaca", prompt=("instruction", "input"), text="output", rows=5_000),
    "maths": HubSet(id="openai/gsm8k", config="main", prompt=("question",), text="answer"),
    "code": HubSet(
        id="google-research-datasets/mbpp",
        config="full",
        splits={"train": "train+validation+prompt"},
        prompt=("text",),
        text="code",
        tests="test_list",
    ),
    # Plain texts.
    "novels": HubSet(id="emozilla/pg19-test", splits={"train": "test"}, rows=12),
    "shakespeare": HubSet(id="Trelis/tiny-shakespeare", text="Text"),
    "stories": HubSet(id="roneneldan/TinyStories", splits={"train": "validation"}, rows=5_000),
    "encyclopedia": HubSet(id="wikimedia/wikipedia", config="20231101.simple", rows=2_000),
    "articles": HubSet(id="Salesforce/wikitext", config="wikitext-2-raw-v1", splits={"train": "validation"}),
    "python_code": HubSet(id="codeparrot/codeparrot-clean-valid", text="content", rows=2_000),
}

STORIES = "Xenova/llama2.c-stories15M"
"""The next larger one of its family, for stories260K: no copy of that is known that transformers reads."""

LABELLED = ("rt_polarity", "subjectivity", "banking77", "clinc150")
SPOKEN = ("instructions", "maths", "code")
PLAIN = ("novels", "shakespeare", "stories", "encyclopedia", "articles", "python_code")
STYLES = ("shakespeare", "stories", "encyclopedia", "articles", "novels")
"""Of English."""


# From the Hub.


def from_hub(entry: HubSet) -> Splits:
    """Its rows.

    Raises:
        ImportError: `datasets` is not installed.
        OSError, ValueError: the Hub cannot be reached, or has no such data set, or that has no such column.
    """
    found = {part: _fetched(entry, split) for part, split in entry.splits.items()}
    return completed(found)


def texts_from_hub(entry: HubSet) -> list[str]:
    """Its plain texts, whole."""
    rows = chain.from_iterable(_fetched(entry, split) for split in entry.splits.values())
    return [row["text"] for row in rows if row["text"].strip()]


def _fetched(entry: HubSet, split: str) -> list[Row]:
    from datasets import load_dataset

    data = load_dataset(entry.id, entry.config, split=split, streaming=entry.rows is not None)
    names = getattr((data.features or {}).get(entry.label), "names", None)
    rows = (_row(entry, row, names) for row in islice(data, entry.rows))
    return [row for row in rows if entry.kept is None or row["label"] in entry.kept]


def _row(entry: HubSet, row: Mapping[str, Any], names: Sequence[str] | None) -> Row:
    needed = (entry.text, *entry.prompt, *filter(None, (entry.label, entry.tests)))
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"no column {missing[0]}, but {', '.join(row)}; --columns names others")
    if entry.label is not None:
        label = str(row[entry.label] if names is None else names[row[entry.label]])
        return {"text": str(row[entry.text]), "label": entry.labels.get(label, label)}
    if entry.prompt:
        tests = row[entry.tests] if entry.tests else ()
        return question((row[name] for name in entry.prompt), row[entry.text], tests)
    return {"text": str(row[entry.text])}


# From a folder of local copies.


def _sentences(file: str, members: Mapping[str, str]) -> Callable[[Path], Splits]:
    """Sentences of two classes, in an archive with a file for each."""

    def read(folder: Path) -> Splits:
        with zipfile.ZipFile(folder / file) as archive:
            paths = {Path(path).name: path for path in archive.namelist()}
            lines = {member: archive.read(paths[member]).decode().splitlines() for member in members}
        labels = ((line, label) for member, label in members.items() for line in lines[member])
        return split([{"text": line.strip(), "label": label} for line, label in labels])

    return read


def _intents(folder: Path) -> Splits:
    """clinc150 has splits."""
    found: dict[str, list[list[str]]] = json.loads((folder / "clinc150.json").read_text(encoding="utf-8"))
    names: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
    rows: dict[Split, list[Row]] = {}
    for part, name in names.items():
        rows[part] = [{"text": text, "label": label} for text, label in found[name]]
    return completed(rows)


def _questions(
    file: str, prompt: tuple[str, ...], text: str, tests: str | None = None
) -> Callable[[Path], Splits]:
    def read(folder: Path) -> Splits:
        rows = read_rows(folder / file)
        return split(
            [question((row[name] for name in prompt), row[text], row[tests] if tests else ()) for row in rows]
        )

    return read


def _categories(folder: Path) -> Splits:
    return split([{"text": row["text"], "label": row["category"]} for row in read_rows(folder / "train.csv")])


LOCAL: Mapping[str, tuple[str, Callable[[Path], Splits]]] = {
    "rt_polarity": (
        "rt_polarity",
        _sentences("sentence_polarity.zip", {"rt-polarity.neg": "negative", "rt-polarity.pos": "positive"}),
    ),
    "subjectivity": (
        "subjectivity",
        _sentences(
            "subjectivity.zip",
            {"plot.tok.gt9.5000": "objective", "quote.tok.gt9.5000": "subjective"},
        ),
    ),
    "banking77": ("banking77", _categories),
    "clinc150": ("clinc150", _intents),
    "instructions": (
        "instruct_1100",
        _questions("instruction-data.json", ("instruction", "input"), "output"),
    ),
    "maths": ("gsm8k", _questions("train.jsonl", ("question",), "answer")),
    "code": ("mbpp", _questions("mbpp.train.jsonl", ("text",), "code", "test_list")),
}
"""Folder, and what reads it."""
LOCAL_TEXTS = {
    "novels": "books",
    "shakespeare": "tinyshakespeare",
    "stories": "tinystories_sample",
    "encyclopedia": "wiki_demo",
    "articles": "wikitext2",
    "python_code": "python_code",
}


def question(parts: Iterable[Any], answer: Any, tests: Iterable[Any] = ()) -> Row:
    """With `tests`, one on each line, if there are some."""
    row = asked(" ".join(str(part) for part in parts if part), str(answer).replace("\r\n", "\n"))
    lines = "\n".join(map(str, tests))
    return {**row, "tests": lines} if lines else row


# Splits.


def split(rows: Sequence[Row]) -> Splits:
    """Shuffled; a fifth is held out, half of it for validation."""
    shuffled = random.Random(0).sample(rows, len(rows))
    held_out = int(len(rows) * HELD_OUT)
    return {
        "test": shuffled[: held_out // 2],
        "validation": shuffled[held_out // 2 : held_out],
        "train": shuffled[held_out:],
    }


def completed(found: Mapping[Split, Sequence[Row]]) -> Splits:
    """With a tenth of the training rows for each split that is not there; all shuffled."""
    rows: Splits = {part: random.Random(0).sample(some, len(some)) for part, some in found.items()}
    tenth = int(len(rows["train"]) * HELD_OUT) // 2
    for part in ("test", "validation"):
        if part not in rows:
            rows[part], rows["train"] = rows["train"][:tenth], rows["train"][tenth:]
    return rows
