"""Where the command writes: nowhere, to what knows few characters, and to who has gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import save_weights

from dare_train import extract


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, by in (("base", 0), ("tuned", 1)):
        (folder / name).mkdir()
        weights = {"[/x].é²\u202e.weight": np.full((4, 4), by, np.float32)}
        save_weights(weights, folder / name / "model.safetensors")
    return extract(folder / "base", folder / "tuned", folder / "package", p=0).path


def told(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], env={**os.environ, **env}, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.fixture
def inspect(package: Path) -> str:
    return f"'{sys.executable}' -m dare_train inspect --tensors '{package}'"


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams(inspect: str, closing: str) -> None:
    done = told(f"exec {inspect} {closing}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_that_knows_ascii_only(inspect: str) -> None:
    done = told(inspect, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"[/x].\xe9\xb2\u202e.weight" in done.stdout


def test_a_reader_that_has_gone(inspect: str) -> None:
    done = told(f"{inspect} | true; echo ${{PIPESTATUS[0]}}")
    assert "Traceback" not in done.stderr


def test_errors_name_paths_and_obey_none(package: Path) -> None:
    command = f"'{sys.executable}' -m dare_train inspect $'no\\e[2Jsuch\\xff'"
    done = told(command)
    assert done.returncode == 1
    assert r"no\x1b[2Jsuch\udcff" in done.stderr
    assert done.stderr.count("\n") == 1
