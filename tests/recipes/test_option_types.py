"""What recipes take for numbers: 0 steps, which a Trainer takes for three epochs, are refused."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import option_types  # noqa: E402


@pytest.mark.parametrize(
    ("kind", "words", "refused"),
    [
        (option_types.count, {"1": 1, "40": 40}, {"0", "-1", "1.5", "nan", "", "many"}),
        (option_types.seed, {"0": 0, "7": 7, str(2**32 - 1): 2**32 - 1}, {"-1", str(2**32), "0.5"}),
        (option_types.positive, {"2e-4": 2e-4, "120": 120.0}, {"0", "-1", "nan", "inf", "fast"}),
        (option_types.drop_rate, {"0": 0.0, "0.9": 0.9}, {"1", "-0.1", "1.5", "nan", "0.9999999"}),
        (option_types.density, {"1": 1.0, "0.1": 0.1}, {"0", "1.1", "-1", "nan"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_numbers(
    kind: Callable[[str], Any], words: dict[str, Any], refused: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser(prog="recipe")
    parser.add_argument("--number", type=kind)
    for word, value in words.items():
        assert parser.parse_args([f"--number={word}"]).number == value
    for word in refused:
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([f"--number={word}"])
        assert caught.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.match("recipe: error: argument --number: (expected|invalid) ", said)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_reads_its_numbers_so(path: Path) -> None:
    assert not re.search(r"type=(int|float)\b", path.read_text())
