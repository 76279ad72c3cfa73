"""Where recipes' rows come from: the standard library's text, files of one's own, local copies, the Hub."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import inputs  # noqa: E402
import public_data  # noqa: E402
import results  # noqa: E402
import standard_library  # noqa: E402
from standard_library import Splits  # noqa: E402

PARTS = {"train", "validation", "test"}
Rows = Sequence[Mapping[str, Any]]


# The standard library's text.


def texts_of(rows: Splits, part: Any) -> set[tuple[str, ...]]:
    return {tuple(row.values()) for row in rows[part]}


@pytest.mark.parametrize("name", standard_library.LABELLED)
def test_labels_of_the_standard_library(name: str) -> None:
    rows = inputs.labelled(name)
    assert rows == inputs.labelled(name)
    assert rows.keys() == PARTS
    counts = Counter(row["label"] for row in rows["train"])
    assert len(counts) == {"code_or_prose": 2, "packages": 15, "exceptions": 7, "verbs": 12}[name]
    assert {row["label"] for row in rows["test"]} <= counts.keys()
    assert min(map(len, rows.values())) > 80
    assert all(row["text"].strip() for some in rows.values() for row in some)


@pytest.mark.parametrize("name", standard_library.SPOKEN)
def test_questions_of_the_standard_library(name: str) -> None:
    rows = inputs.spoken(name)
    assert rows == inputs.spoken(name)
    assert len(rows["train"]) > 600
    assert len(rows["test"]) > 200
    for row in rows["test"]:
        assert row.keys() == {"prompt", "text"}
        assert row["prompt"].startswith("Question: ")
        assert row["prompt"].endswith("\nAnswer: ")
        assert row["text"]


@pytest.mark.parametrize("name", standard_library.STYLES)
def test_styles_of_the_standard_library(name: str) -> None:
    rows = inputs.style(name)
    assert rows == inputs.style(name)
    assert {len(row["text"]) for some in rows.values() for row in some} == {standard_library.PIECE}
    assert len(rows["train"]) > 200
    assert len(rows["test"]) > 50


def test_tasks_are_different_ones() -> None:
    """They have few texts in common: some lines of code, in both tasks that tell code apart."""
    labelled = [{row["text"] for row in inputs.labelled(name)["test"]} for name in standard_library.LABELLED]
    assert all(
        len(one & other) < 0.2 * len(one) for one in labelled for other in labelled if one is not other
    )
    answers = [{row["text"] for row in inputs.spoken(name)["test"]} for name in standard_library.SPOKEN]
    assert all(len(one & other) < 0.02 * len(one) for one in answers for other in answers if one is not other)


def test_whole_files_are_held_out() -> None:
    files = standard_library.source_files()
    names = [file.name for file in files]
    assert len(names) == len({*names}) > 200
    packages = {name for domain in standard_library.DOMAINS.values() for name in domain}
    for package in {"", *packages}:
        assert {file.part for file in files if file.package == package} == PARTS, package
    assert not {part for file in files for part in Path(file.name).parts} & {"test", "tests"}
    held_out = {file.text for file in files if file.part != "train"}
    assert not held_out & {*standard_library.texts()}, "a decoder is pretrained on what tasks hold out"


def test_hardly_a_test_row_is_in_the_training_rows() -> None:
    """Files may say the same."""
    for name in ("code_or_prose", "exceptions"):
        rows = inputs.labelled(name)
        test, train = texts_of(rows, "test"), texts_of(rows, "train")
        assert len(test & train) < 0.1 * len(test), name


def test_domains_have_packages_of_their_own() -> None:
    domains = inputs.domains(None, public=False)
    labels = [{row["label"] for row in rows["train"]} for rows in domains.values()]
    assert sum(map(len, labels)) == len(set.union(*labels)) == 15
    assert all(rows["test"] for rows in domains.values())


# Files of one's own.

MINE = [{"text": f"text {number}", "label": "odd" if number % 2 else "even"} for number in range(50)]


def as_lines(path: Path, rows: Rows) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_a_file(tmp_path: Path) -> None:
    rows = inputs.labelled(as_lines(tmp_path / "mine.jsonl", MINE))
    assert {part: len(some) for part, some in rows.items()} == {"train": 40, "validation": 5, "test": 5}
    assert sorted(row["text"] for some in rows.values() for row in some) == sorted(
        row["text"] for row in MINE
    )
    questions = [{"q": "Why?", "a": f"Because {number}."} for number in range(20)]
    spoken = inputs.spoken(
        as_lines(tmp_path / "why.jsonl", questions), columns=[("prompt", "q"), ("text", "a")]
    )
    assert {row["prompt"] for row in spoken["train"]} == {"Why?"}
    assert inputs.spoken(as_lines(tmp_path / "mine.jsonl", MINE))["test"][0]["prompt"] == ""


def test_a_folder_with_splits(tmp_path: Path) -> None:
    as_lines(tmp_path / "mine" / "train.jsonl", MINE[:40])
    as_lines(tmp_path / "mine" / "test.jsonl", MINE[40:])
    rows = inputs.labelled(str(tmp_path / "mine"))
    assert {part: len(some) for part, some in rows.items()} == {"train": 36, "validation": 4, "test": 10}
    assert {row["text"] for row in rows["test"]} == {row["text"] for row in MINE[40:]}
    as_lines(tmp_path / "parts" / "a.jsonl", MINE[:25])
    as_lines(tmp_path / "parts" / "b.jsonl", MINE[25:])
    assert {part: len(some) for part, some in inputs.labelled(str(tmp_path / "parts")).items()} == {
        "train": 40, "validation": 5, "test": 5,
    }  # fmt: skip


def test_texts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 1000)
    (tmp_path / "a.md").write_text("a" * 3000)
    (tmp_path / "LICENSE.txt").write_text("not a text")
    as_lines(tmp_path / "c.jsonl", [{"text": "c"}, {"text": "d"}])
    assert inputs.documents(str(tmp_path)) == ["a" * 3000, "b" * 1000, "c", "d"]
    pieces = inputs.style(str(tmp_path), most=5)
    assert sum(map(len, pieces.values())) == 5
    assert pieces["train"][0]["text"] == "a" * standard_library.PIECE


def test_what_tasks_are_called(tmp_path: Path) -> None:
    path = as_lines(tmp_path / "my.reviews.jsonl", MINE)
    names = [path, str(tmp_path), "rt_polarity", "owner/some.name-1.5", "owner/name:config"]
    assert [*map(inputs.short, names)] == [
        "my.reviews",
        tmp_path.name,
        "rt_polarity",
        "some.name-1.5",
        "name",
    ]


# Local copies.


def archive(path: Path, members: Mapping[str, str]) -> None:
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(f"folder/{name}", text)


def test_local_copies(tmp_path: Path) -> None:
    archive(
        tmp_path / "subjectivity" / "subjectivity.zip",
        {"plot.tok.gt9.5000": "it rains \n" * 30, "quote.tok.gt9.5000": "it bores \n" * 30},
    )
    rows = inputs.labelled("subjectivity", tmp_path)
    assert {(row["text"], row["label"]) for some in rows.values() for row in some} == {
        ("it rains", "objective"),
        ("it bores", "subjective"),
    }
    as_lines(tmp_path / "gsm8k" / "train.jsonl", [{"question": "1 + 1?", "answer": "2\r\n"}] * 10)
    assert inputs.spoken("maths", tmp_path)["test"] == [
        {"prompt": "Question: 1 + 1?\nAnswer: ", "text": "2\n"}
    ]
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("x" * 4100)
    assert sum(map(len, inputs.style("shakespeare", tmp_path).values())) == 10
    clinc = {name: [["who is it", "who_made_you"], ["pay", "pay_bill"]] for name in ("train", "val", "test")}
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150" / "clinc150.json").write_text(json.dumps(clinc))
    domains = inputs.domains(tmp_path, public=True)
    assert domains["banking"]["test"] == [{"text": "pay", "label": "pay_bill"}]
    assert domains["home"]["train"] == []


# The Hub, with a stand-in for the library.


class HubRows:
    """What `load_dataset` returns, as far as it is used."""

    def __init__(self, rows: Rows, names: Mapping[str, Sequence[str]]) -> None:
        self.rows = rows
        self.features = {name: types.SimpleNamespace(names=names.get(name)) for name in rows[0]}
        for name, feature in self.features.items():
            if name not in names:
                del feature.names

    def __iter__(self) -> Any:
        return iter(self.rows)


Asked = list[tuple[str, str | None, str]]
PublicHub = Callable[..., Asked]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> PublicHub:
    """`hub(row, names)` puts data sets with forty such rows in a stand-in's place, and returns what is asked
    of it.
    """

    def stand_in(row: Mapping[str, Any], names: Mapping[str, Sequence[str]] | None = None) -> Asked:
        asked: Asked = []

        def load_dataset(
            path: str, name: str | None = None, *, split: str, streaming: bool = False
        ) -> HubRows:
            assert streaming == any(
                entry.rows is not None for entry in public_data.ON_HUB.values() if entry.id == path
            )
            asked.append((path, name, split))
            return HubRows([row] * 40, names or {})

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        return asked

    return stand_in


THREE = ("train", "validation", "test")
LABELS_ON_HUB = {
    "rt_polarity": (
        "cornell-movie-review-data/rotten_tomatoes",
        None,
        THREE,
        "label",
        {"label": ["neg", "pos"]},
        "positive",
    ),
    "subjectivity": ("SetFit/subj", None, ("train", "test"), "label_text", {}, "1"),
    "banking77": ("mteb/banking77", None, ("train", "test"), "label_text", {}, "1"),
    "clinc150": ("clinc/clinc_oos", "plus", THREE, "intent", {"intent": ["oos", "pay_bill"]}, "pay_bill"),
}


@pytest.mark.parametrize("name", public_data.LABELLED)
def test_labels_on_the_hub(name: str, hub: PublicHub, tmp_path: Path) -> None:
    path, config, splits, column, names, label = LABELS_ON_HUB[name]
    asked = hub({"text": "a text", column: 1}, names)
    rows = inputs.labelled(name, tmp_path)
    assert asked == [(path, config, split) for split in splits]
    assert rows.keys() == PARTS
    assert all(row == {"text": "a text", "label": label} for some in rows.values() for row in some)
    assert min(map(len, rows.values())) == (40 if splits == THREE else 4)


def test_rows_out_of_scope_are_left_out(hub: PublicHub) -> None:
    hub({"text": "a text", "intent": 0}, {"intent": ["oos", "pay_bill"]})
    assert inputs.labelled("clinc150") == {"train": [], "validation": [], "test": []}
    assert (
        sum(map(len, public_data.DOMAINS.values())) == len(public_data.ON_HUB["clinc150"].kept or ()) == 105
    )


QUESTIONS_ON_HUB = {
    "instructions": (
        "tatsu-lab/alpaca",
        None,
        "train",
        {"instruction": "Say", "input": "yes", "output": "Yes"},
        "Say yes",
    ),
    "maths": ("openai/gsm8k", "main", "train", {"question": "Why?", "answer": "Yes"}, "Why?"),
    "code": (
        "google-research-datasets/mbpp",
        "full",
        "train+validation+prompt",
        {"text": "Do", "code": "Yes", "test_list": ["assert do()", "assert not undo()"]},
        "Do",
    ),
}


@pytest.mark.parametrize("name", public_data.SPOKEN)
def test_questions_on_the_hub(name: str, hub: PublicHub) -> None:
    path, config, split, row, question = QUESTIONS_ON_HUB[name]
    asked = hub(row)
    rows = inputs.spoken(name)
    assert asked == [(path, config, split)]
    tests = {"tests": "assert do()\nassert not undo()"} if name == "code" else {}
    assert rows["test"][0] == {"prompt": f"Question: {question}\nAnswer: ", "text": "Yes", **tests}


TEXTS_ON_HUB = {
    "novels": ("emozilla/pg19-test", None, "test", "text"),
    "shakespeare": ("Trelis/tiny-shakespeare", None, "train", "Text"),
    "stories": ("roneneldan/TinyStories", None, "validation", "text"),
    "encyclopedia": ("wikimedia/wikipedia", "20231101.simple", "train", "text"),
    "articles": ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", "text"),
    "python_code": ("codeparrot/codeparrot-clean-valid", None, "train", "content"),
}


@pytest.mark.parametrize("name", public_data.PLAIN)
def test_texts_on_the_hub(name: str, hub: PublicHub) -> None:
    path, config, split, column = TEXTS_ON_HUB[name]
    asked = hub({column: "x" * 500})
    found = inputs.documents(name)
    assert asked == [(path, config, split)]
    assert {*found} == {"x" * 500}
    assert len(found) == min(40, public_data.ON_HUB[name].rows or 40)


def test_a_hub_data_set_of_ones_own(hub: PublicHub) -> None:
    asked = hub({"sentence": "a text", "stars": 1}, {"stars": ["bad", "good"]})
    rows = inputs.labelled("owner/name:config", columns=[("text", "sentence"), ("label", "stars")])
    assert asked == [("owner/name", "config", "train")]
    assert rows["test"][0] == {"text": "a text", "label": "good"}


def test_the_table_is_complete() -> None:
    assert {*public_data.ON_HUB} == {*public_data.LABELLED, *public_data.SPOKEN, *public_data.PLAIN}
    assert {*public_data.LOCAL} == {*public_data.LABELLED, *public_data.SPOKEN}
    assert {*public_data.LOCAL_TEXTS} == {*public_data.PLAIN} >= {*public_data.STYLES}


# What cannot be had.

WAYS = "; give another's Hub id (owner/name), or a folder that has it with DARE_TRAIN_DATA=FOLDER"


def refusal(task: str, data: Path | None = None) -> str:
    with pytest.raises(SystemExit) as caught:
        inputs.labelled(task, data)
    return str(caught.value.code)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    gone = "the Hub did not give mteb/banking77 (ConnectionError: no route)"
    assert refusal("banking77") == f"no data set banking77: {gone}{WAYS}"
    assert (
        refusal("banking77", tmp_path)
        == f"no data set banking77: not in {tmp_path} (no folder banking77), and {gone}{WAYS}"
    )
    assert refusal("me/mine").startswith("no data set me/mine: the Hub did not give me/mine (ConnectionError")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert (
        refusal("banking77")
        == f'no data set banking77: the Hub needs the library datasets (pip install -e ".[data]"){WAYS}'
    )


def test_names_files_and_columns_that_are_not_there(hub: PublicHub, tmp_path: Path) -> None:
    names = "rt_polarity, subjectivity, banking77, clinc150, code_or_prose, packages, exceptions, verbs"
    unknown = f": neither a file, nor a Hub id (owner/name), nor one of {names}{WAYS}"
    assert refusal("nosuch") == f"no data set nosuch{unknown}"
    assert refusal("nosuch.jsonl") == f"no data set nosuch.jsonl{unknown}"
    assert refusal("some/nosuch.csv") == f"no data set some/nosuch.csv{unknown}"
    path = as_lines(tmp_path / "mine.jsonl", [{"text": "a", "stars": 1}])
    assert (
        refusal(path)
        == f"{path}: no column label, but text, stars; say which it is with --columns label=NAME"
    )
    (tmp_path / "broken.jsonl").write_text("{")
    assert refusal(str(tmp_path / "broken.jsonl")).startswith(f"{tmp_path / 'broken.jsonl'}: ")
    (tmp_path / "empty").mkdir()
    assert refusal(str(tmp_path / "empty")).startswith(
        f"no data set {tmp_path / 'empty'}: no rows in a file that ends in .csv, "
    )
    hub({"text": "a", "stars": 1})
    assert "(ValueError: no column label, but text, stars; --columns names others)" in refusal("me/mine")


def said(recipe: str, *options: str, **environment: str) -> tuple[int, str]:
    """A recipe's status, and the last line that it writes to stderr."""
    clean = {name: value for name, value in os.environ.items() if name != "DARE_TRAIN_DATA"}
    done = subprocess.run(
        [sys.executable, f"recipes/{recipe}", *options],
        cwd=ROOT,
        env={**clean, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_a_recipe_says_in_one_line_what_it_lacks(tmp_path: Path) -> None:
    status, line = said(
        "encoder.py", "--tasks", "banking77", "--out", str(tmp_path / "out"), "--data", str(tmp_path)
    )
    assert status == 1
    assert line.startswith(
        f"no data set banking77: not in {tmp_path} (no folder banking77), and the Hub did not "
        "give mteb/banking77 ("
    )
    assert line.endswith(WAYS)


# All results again.


def test_results_lists_each_recipe_that_the_page_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    named = {
        recipe.stem for recipe in (ROOT / "recipes").glob("*.py") if f"recipes/{recipe.name}" in page
    } - {"results", "public_data"}
    listed = {command.split(".py")[0] for commands in results.COMMANDS.values() for command in commands}
    assert listed == named >= {"encoder", "merge_tasks", "pretrain_decoder"}
    monkeypatch.setattr(sys, "argv", ["results.py", "--list", "--only", "decoder", "encoder"])
    monkeypatch.delenv("DARE_TRAIN_DATA", raising=False)
    results.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "python recipes/pretrain_decoder.py --full --out runs/decoder-base"
    assert lines[-1] == "python recipes/encoder.py --full --out runs/encoder"
    assert len(lines) == 4


@pytest.mark.parametrize("name", results.COMMANDS)
def test_recipes_know_the_options_that_results_gives_them(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an option beside them that none has, which is the only one that each refuses."""
    for command in results.COMMANDS[name]:
        recipe, *options = command.split()
        monkeypatch.setattr(sys, "argv", [recipe, *options, "--data", str(ROOT), "--no-such-option"])
        with pytest.raises(SystemExit):
            importlib.import_module(Path(recipe).stem).parse()
        assert (
            capsys.readouterr().err.splitlines()[-1]
            == f"{recipe}: error: unrecognized arguments: --no-such-option"
        )


def test_a_folder_for_all_recipes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("DARE_TRAIN_DATA", str(tmp_path))
    parser = argparse.ArgumentParser()
    inputs.data_arguments(parser)
    assert parser.parse_args([]).data == tmp_path
    monkeypatch.delenv("DARE_TRAIN_DATA")
    parser = argparse.ArgumentParser()
    inputs.data_arguments(parser)
    with pytest.raises(
        SystemExit, match=f"^no folder {tmp_path / 'nosuch'}, which --data or DARE_TRAIN_DATA names$"
    ):
        parser.parse_args(["--data", str(tmp_path / "nosuch")])
    with pytest.raises(SystemExit):
        parser.parse_args(["--columns", "txt=a"])
    assert capsys.readouterr().err.endswith("expected text=NAME, label=NAME or prompt=NAME, found txt=a\n")
    options = parser.parse_args(["--columns", "text=a", "label=b"])
    assert options.columns == [("text", "a"), ("label", "b")]
    assert options.data is None
    options.full = False
    assert inputs.usual(["public"], ["standard"], options) == ("standard",)
    options.full = True
    assert inputs.usual(["public"], ["standard"], options) == ("public",)
