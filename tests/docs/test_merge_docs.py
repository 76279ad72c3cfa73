"""docs/merging.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import dare_train
from dare_train.merging.config.recipe import RESCALES
from dare_train.merging.methods.registry import MERGE_METHODS

TEXT = (Path(__file__).parents[2] / "docs/merging.md").read_text()
ROWS = {
    name: line
    for line in TEXT.splitlines()
    if line.startswith("| `")
    for name in re.findall(r"`(\w+)`", line.split("|")[1])
}
EVERYWHERE = {"weight", "p", "q", "lambda"}


def test_every_method_has_a_row_and_no_row_is_without_a_method() -> None:
    assert ROWS.keys() == MERGE_METHODS.keys()


@pytest.mark.parametrize("name", sorted(MERGE_METHODS))
def test_the_row_names_the_parameters_with_their_defaults(name: str) -> None:
    row = ROWS[name].split("|")[3]
    told = dict(re.findall(r"`(\w+)`(?: \(([^)]*)\))?", row))
    for parameter in MERGE_METHODS[name].parameters:
        if parameter.name in EVERYWHERE and (parameter.name != "p" or not parameter.default):
            continue
        if name == "consensus_ta" or parameter.name in ("of",):
            assert parameter.name in row
        elif name != "consensus_ties" or parameter.name in ("mask_threshold", "agree"):
            default = str(parameter.default).lower().removesuffix(".0").replace("e-0", "e-")
            assert default in told[parameter.name].split(", ")


def test_every_rescale_rule_is_explained() -> None:
    assert set(re.findall(r"^\* `(\w+)`(?: \(default\))?:", TEXT, re.MULTILINE)) == set(RESCALES)


def test_the_method_of_ones_own_runs(tmp_path: Path) -> None:
    (block,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
        if "register_merge_method" in block
    ]
    try:
        exec(block, {"numpy": np})
        base = {"w": np.zeros(9, np.float32)}
        models = [{"w": np.full(9, value, np.float32)} for value in (1, 2, 6)]
        dare_train.merge(base, models, tmp_path / "out", method="median")
    finally:
        MERGE_METHODS.pop("median", None)
    from safetensors.numpy import load_file

    assert (load_file(tmp_path / "out/model.safetensors")["w"] == 2).all()
