"""Whole command lines, made up of the options that there are and of words that may stand anywhere."""

from __future__ import annotations

import io
import json
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from unittest.mock import patch

import typer
from hypothesis import strategies as st

from dare_train.cli import main as cli
from dare_train.errors import DareError

_LEFT_OUT = {"run"}
"""What runs other commands."""
_NAMES = ["base", "tuned", "package", "adapter", "config.yml", "texts.jsonl", "nothing", "", ".", "out"]
_VALUES = [
    "0", "1", "-1", "0.5", "0.9,0.5", "7", "1e308", "nan", "inf", "²", "1" * 400, "9" * 20, "*", "[", "(",
    "a=b", "a=b=c", "*=0.5", "weight=0.5,1", "weight=0:1:0.5", "weight=0:1:1e-12", "density=0.5", "ties",
    "linear", "slerp", "F32", "BF16", "int4", "exact", "nearest", "stochastic", "union", "norm", "cpu",
    "builtins:len", "json:nothing", ":", "a:", "base:0", "text=text", "label=", "dare", "dare,q", "user/name",
    "user/name@v1", "hf://user/name/x", "~nosuchuser/x", "../x", "x" * 300, "\x1b[2J", "[/x]", "a\nb",
    "=", "-", "--", "--help", "--debug", "--nothing", "out/deeper", "\udcff", "x.png", "x.json", "1e9",
    "0x10", "1e-400", "1_0", "١", "none", "auto", "{}", "[1,2]", "[0-9]+=0.5", "a.b=c", "F64", "bfloat16",
    "all", "base/model.safetensors", "package/dare_config.json", "base/x.png",
]  # fmt: skip
_GOOD = {
    "extract": ["base", "tuned", "--out", "out"],
    "apply": ["base", "package", "--out", "out"],
    "inspect": ["package"],
    "verify": ["package", "--base", "base"],
    "diagnose": ["base", "tuned"],
    "merge": ["base", "tuned", "package", "--out", "out"],
    "lora": ["base", "tuned", "--rank", "2", "--out", "out"],
}
"""By commands, words that are all right: an option more or two say what is not."""


def lines() -> st.SearchStrategy[str]:
    """Lists of words, as JSON."""
    return st.sampled_from(sorted(_options())).flatmap(_of_command).map(json.dumps)


def _of_command(name: str) -> st.SearchStrategy[list[str]]:
    word = st.sampled_from(_NAMES) | st.sampled_from(_VALUES)
    option = st.sampled_from(_options()[name])
    given = st.lists(st.tuples(option, word).map(list) | option.map(lambda one: [one]), max_size=4)
    places = st.lists(st.sampled_from(_NAMES), max_size=3) | st.lists(word, max_size=4)
    out = st.sampled_from(["out", "out", ""]).map(_to) | word.map(_to)
    options = given.map(lambda pairs: [word for pair in pairs for word in pair])
    anything = st.tuples(places, out, options).map(
        lambda parts: [name, *(word for part in parts for word in part)]
    )
    if name not in _GOOD:
        return anything
    return anything | options.map(lambda words: [name, *_GOOD[name], *words])


def _to(folder: str) -> list[str]:
    return ["--out", folder] if folder else []


@cache
def _options() -> dict[str, list[str]]:
    """Of each command. Those that would tell others of it are left out."""
    group = typer.main.get_command(cli.app)
    return {
        name: sorted(
            one
            for option in command.params
            for one in option.opts
            if one.startswith("--") and one != "--wandb"
        )
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        if name not in _LEFT_OUT
    }


class Refused(DareError):
    """As a command said."""


class Unreadable(Exception):
    """A command's end that must not be."""


def run_line(desk: Path, _: Path) -> None:
    """Run the words of `words.json` as a command in this process; whatever it raises is a failure."""
    if not (desk / "words.json").is_file():
        raise Refused("words")
    try:
        words = json.loads((desk / "words.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused("words") from error
    if (
        not isinstance(words, list)
        or not all(isinstance(word, str) for word in words)
        or _LEFT_OUT & {*words}
    ):
        raise Refused("words")
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    told = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with (
        redirect_stdout(said),
        redirect_stderr(told),
        chdir(desk),
        patch.object(sys, "argv", ["dare-train", *words]),
        patch.object(sys, "path", [*sys.path]),
    ):
        code = cli.main()
        said.flush()
        told.flush()
    lines = told.buffer.getvalue().decode(errors="replace").split("\n")  # type: ignore[attr-defined]
    if code not in (0, 1, 2):
        raise Unreadable(f"exit code {code}: {words}")
    if code:
        raise Refused("\n".join(line for line in lines if line.startswith("dare-train: ")) or "usage")
