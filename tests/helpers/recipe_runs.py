"""Recipes, started as their users start them, and what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
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
    """By default each is done in seconds; a busy machine may take minutes."""
    command = [sys.executable, f"recipes/{recipe}", *options]
    return subprocess.run(
        command,
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
