"""`dare-train merge` of 468 M bf16 models: two by `dare_ties` beside mergekit, and three packages beside
`cp`.

mergekit and we take turns in the same minutes on the same files, drop rate 0.9 and weight 0.5 for both.
"""

from __future__ import annotations

import json
from pathlib import Path

from . import agreement, llama
from .apply import copy
from .common import remove, scratch
from .peers import PEERS, environment
from .process import DARE_TRAIN, Measured, measure
from .report import Report, Row

DROP_RATE = 0.9
ANONYMOUS_MB = 800
FACTOR, SECONDS = 3.0, 1.0
"""Merging three packages may take FACTOR × the time of copying the base's file, plus SECONDS."""


def run(runs: int) -> Report:
    """`runs` rounds of each after one that is not counted; then agreement with mergekit on small models."""
    peers, pair = environment(), llama.pair("468M")
    models = [pair.tuned, *llama.others("468M", 2)]
    with scratch() as folder:
        beside = [
            (mergekit(peers, pair.base, models[:2], folder), ours(pair.base, models[:2], folder))
            for _ in range(1 + runs)
        ][1:]
        packages = [
            package(pair.base, model, folder / f"package-{seed}", seed) for seed, model in enumerate(models)
        ]
        sums = [
            (copy(pair.base, folder / "out"), added_up(pair.base, packages, folder)) for _ in range(1 + runs)
        ][1:]
    rows = [*_beside(beside), *_sums(sums), *agreement.rows(peers)]
    return Report(title=f"dare-train merge: 468 M, bf16, beside {PEERS[0]}", rows=rows, notes=agreement.NOTES)


def mergekit(peers: Path, base: Path, models: list[Path], folder: Path) -> Measured:
    """mergekit's `dare_ties`; JSON is YAML too."""
    parameters = {"weight": 0.5, "density": round(1 - DROP_RATE, 6)}
    config = {
        "merge_method": "dare_ties",
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": parameters} for model in models],
        "dtype": "bfloat16",
    }
    (folder / "merge.yml").write_text(json.dumps(config))
    remove(folder / "out")
    command: list[str | Path] = [
        peers / "mergekit-yaml",
        folder / "merge.yml",
        folder / "out",
        "--no-copy-tokenizer",
        "--quiet",
    ]
    return measure(command, env={"HF_HUB_OFFLINE": "1"})


def ours(base: Path, models: list[Path], folder: Path) -> Measured:
    """The same by one of our processes."""
    remove(folder / "out")
    options = ["--method", "dare_ties", "--p", str(DROP_RATE), "--weight", "0.5", "--weight", "0.5"]
    return measure([*DARE_TRAIN, "merge", base, *models, "--out", folder / "out", *options])


def package(base: Path, tuned: Path, out: Path, seed: int) -> Path:
    measure([*DARE_TRAIN, "extract", base, tuned, "--out", out, "--p", str(DROP_RATE), "--seed", str(seed)])
    return out


def added_up(base: Path, packages: list[Path], folder: Path) -> Measured:
    """Three packages by `task_arithmetic`."""
    remove(folder / "out")
    weights = [word for _ in packages for word in ("--weight", "0.3")]
    return measure(
        [
            *DARE_TRAIN,
            "merge",
            base,
            *packages,
            "--out",
            folder / "out",
            "--method",
            "task_arithmetic",
            *weights,
        ]
    )


def _beside(rounds: list[tuple[Measured, Measured]]) -> list[Row]:
    return [
        Row(
            what="mergekit, dare_ties of two models",
            values=[theirs.seconds for theirs, _ in rounds],
            unit="s",
        ),
        Row(what="dare-train merge, the same", values=[own.seconds for _, own in rounds], unit="s"),
        Row(
            what="times faster",
            values=[theirs.seconds / own.seconds for theirs, own in rounds],
            unit="×",
            at_least=10,
        ),
        Row(what="mergekit: peak anonymous", values=[theirs.anonymous for theirs, _ in rounds], unit="MB"),
        Row(
            what="dare-train merge: peak anonymous",
            values=[own.anonymous for _, own in rounds],
            unit="MB",
            at_most=ANONYMOUS_MB,
        ),
    ]


def _sums(rounds: list[tuple[Measured, Measured]]) -> list[Row]:
    allowed = [own.seconds / (FACTOR * cp.seconds + SECONDS) for cp, own in rounds]
    return [
        Row(what="cp of the base's file", values=[cp.seconds for cp, _ in rounds], unit="s"),
        Row(
            what="merge of three packages, task_arithmetic",
            values=[own.seconds for _, own in rounds],
            unit="s",
        ),
        Row(what=f"merge / ({FACTOR:g} cp + {SECONDS:g} s)", values=allowed, unit="×", at_most=1),
        Row(
            what="merge of three packages: peak anonymous",
            values=[own.anonymous for _, own in rounds],
            unit="MB",
        ),
    ]
