"""`scripts/kill` finds nothing wrong, and would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
CAMPAIGN = ["--rounds", "5", "--only", "statistics, over", "--faults", "killed before"]
PLANTED = {
    "litter is left": "import dare_train.parallel.staged_file as s; s.clear = lambda *_, **__: None",
    "a file is written in place": """
from contextlib import contextmanager
import dare_train.merging.statistics.statistics_file as s
@contextmanager
def in_place(path):
    with path.open("wb") as file:
        yield file
s.staged_file = in_place
""",
}


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment with the layer below."""
    library = tmp_path_factory.mktemp("layer") / "faults.so"
    source = SCRIPTS / "killing/faults.c"
    subprocess.run(["cc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    path = os.pathsep.join([str(SCRIPTS), *(path for path in sys.path if path)])
    return {**os.environ, "PYTHONPATH": path, "LD_PRELOAD": str(library), "DARE_TRAIN_FAULTS": str(library)}


def campaign(layer: dict[str, str], before: str) -> subprocess.CompletedProcess[str]:
    code = f"{before}\nimport sys; from killing.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *CAMPAIGN]
    return subprocess.run(command, env=layer, capture_output=True, text=True, check=False, timeout=300)


def test_every_call_of_a_writer_may_be_its_last(layer: dict[str, str]) -> None:
    done = campaign(layer, "")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong, seed 0" in done.stdout
    counts = {state: int(count) for count, state in _states(done.stdout)}
    assert counts.keys() == {"old", "new"}
    assert sum(counts.values()) >= 10


def _states(text: str) -> list[tuple[str, str]]:
    (line,) = [line for line in text.splitlines() if "killed before" in line and "rounds:" in line]
    return [tuple(part.split()) for part in line.split("rounds: ")[1].split(", ")]  # type: ignore[misc]


@pytest.mark.parametrize("fault", PLANTED)
def test_what_is_wrong_would_be_found(layer: dict[str, str], fault: str) -> None:
    done = campaign(layer, PLANTED[fault])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG statistics, over an older one, killed before, call" in done.stdout
