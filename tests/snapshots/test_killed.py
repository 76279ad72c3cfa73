"""kill -9 at any moment: the output is absent or complete, the old one is never lost, and the next run clears
up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import base_state, moved, save

from dare_train import DeltaPackage, apply, extract
from dare_train.errors import NonFiniteDelta


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base, tuned = save(base_state(), folder / "base"), save(moved(base_state()), folder / "tuned")
    (base / "config.json").write_text("{}")
    (tuned / "config.json").write_text('{"tuned": true}')
    package = extract(base, tuned, folder / "package").path
    old = extract(base, moved(base_state(), 3), folder / "old").path
    apply(base, old, folder / "old-model")
    return {"base": base, "tuned": tuned, "package": package, "old": old, "old-model": folder / "old-model"}


def _kills(inputs: dict[str, Path], action: str, old: Path | None, place: Path) -> list[dict[str, Any]]:
    place.mkdir()
    driver = Path(__file__).parents[1] / "helpers/kill_driver.py"
    given = [inputs["base"], inputs["tuned"], inputs["package"], place, old or ""]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(driver), action, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("action", ["extract", "apply"])
def test_a_kill_leaves_nothing_or_everything(inputs: dict[str, Path], action: str, tmp_path: Path) -> None:
    kills = _kills(inputs, action, None, tmp_path / "place")
    assert sum(kill["status"] == signal.SIGKILL for kill in kills) > 20
    assert {kill["state"] for kill in kills} == {"absent", "new"}
    assert any(kill["left"] for kill in kills)
    assert all(kill["after"] == ["out"] and kill["new"] for kill in kills)


@pytest.mark.parametrize(("action", "old"), [("extract", "old"), ("apply", "old-model")])
def test_a_kill_while_replacing_leaves_the_old_output_or_the_new_one(
    inputs: dict[str, Path], action: str, old: str, tmp_path: Path
) -> None:
    kills = _kills(inputs, action, inputs[old], tmp_path / "place")
    assert sum(kill["status"] == signal.SIGKILL for kill in kills) > 20
    assert {kill["state"] for kill in kills} >= {"old", "new"}
    lost = [kill for kill in kills if kill["state"] not in ("old", "new")]
    assert lost == []
    assert all(kill["after"] == ["out"] and kill["new"] for kill in kills)


def test_the_old_output_comes_back_even_when_the_next_run_fails(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    """As a kill between the two renames leaves it: the old one under its hidden name, the new one still
    partial.
    """
    manifest = DeltaPackage.open(inputs["old"]).manifest
    extract(inputs["base"], moved(base_state(), 3), tmp_path / ".out.replaced")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(NonFiniteDelta):
        extract(inputs["base"], moved(base_state(), float("nan")), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert DeltaPackage.open(tmp_path / "out").manifest.result == manifest.result


def test_neighbours_that_look_like_litter_of_other_outputs_are_left_alone(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    for name in (".other.partial", ".other.replaced", "out.partial", ".out"):
        (tmp_path / name).mkdir()
    extract(inputs["base"], inputs["tuned"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.partial",
        ".other.replaced",
        ".out",
        "out",
        "out.partial",
    ]
