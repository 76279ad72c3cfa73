"""Recipes, run as their users run them, and what they measured."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
VARIABLE = "DARE_TRAIN_DATA"


def stranger() -> dict[str, str]:
    """The environment of a clone with nothing beside it, and of no network."""
    return {
        **{name: value for name, value in os.environ.items() if name != VARIABLE},
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }


def tried(
    recipe: str, *options: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """In a process forked from one that has imported the libraries.

    By default each is done in seconds; a busy machine may take minutes.
    """
    server, command = _server(), [f"recipes/{recipe}", *options]
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        run = {"recipe": command[0], "options": options, "environment": dict(environment or stranger())}
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps({**run, "out": str(out), "err": str(err)}) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], 300)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise subprocess.TimeoutExpired(command, 300, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(
            command, int(server.stdout.readline()), out.read_text(), err.read_text()
        )


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, whose end closes its input."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("recipe_server.py"))],
        cwd=ROOT,
        env=stranger(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def started(
    recipe: str,
    *options: str,
    launcher: Sequence[str] = (sys.executable,),
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """In a process of its own from the first import on, as users start it."""
    return subprocess.run(
        [*launcher, f"recipes/{recipe}", *options],
        cwd=ROOT,
        env=environment or stranger(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def told(recipe: str, *options: str, environment: Mapping[str, str] | None = None) -> str:
    """What it prints."""
    done = tried(recipe, *options, environment=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def measured(folder: Path, name: str) -> dict[str, Any]:
    """The figures of a study; its page and its pictures are there, too."""
    figures: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.html").stat().st_size > 20_000
    assert list(folder.glob(f"{name}-*.png"))
    return figures


def means(figures: Mapping[str, Any], metric: str) -> dict[tuple[str, float], float]:
    """By variant and drop rate."""
    groups: dict[tuple[str, float], list[float]] = {}
    for point in figures["points"]:
        groups.setdefault((point["variant"], point["p"]), []).append(point["metrics"][metric])
    return {key: fmean(values) for key, values in groups.items()}
