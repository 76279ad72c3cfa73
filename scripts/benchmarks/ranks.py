"""What a snapshot costs where two processes train one model: memory of each, and how long training waits.

The bound on memory is what a snapshot must copy, the kept weights that a rank holds, and a fixed allowance.
Waiting is held against the fastest that the engine itself writes the same weights, without its optimizer's
state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dare_train import DeltaPackage, extract

from . import llama
from .common import scratch
from .process import measure
from .report import Report, Row

WORLD = 2
P = 0.9
MEMORY_OF, TIME_OF = "468M", "117M"
"""Models: the one whose snapshots' memory is measured, and a smaller one that also trains, with its
optimizer, under each engine."""
ALLOWANCE_MB = 256
SHARE = 0.25
ENGINES = {"ddp": "DDP", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
OWN = {"ddp": "save_pretrained", "zero3": "save_16bit_model", "fsdp2": "distributed.checkpoint"}
"""How each engine's weights are saved."""


def run(runs: int) -> Report:
    """`runs` snapshots under FSDP2 for memory, and as many snapshots and saves under each engine for time."""
    rows = [*_memory(runs), *(row for engine in ENGINES for row in _waiting(engine, runs))]
    notes = [
        "memory: all that came since before Snapshotter.begin, masks worked out ahead included; "
        "the larger of two ranks",
        "time: until the last rank is done; the first snapshot is counted too",
    ]
    return Report(
        title=f"Snapshots on two ranks, gloo: Llama-shaped, bf16, p = {P:g}", rows=rows, notes=notes
    )


def _on_ranks(what: str, size: str, runs: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank measured."""
    llama.pair(size)  # made once, before several look for it
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    measure(
        [*torchrun, "-m", "benchmarks.one_rank", what, size, str(runs), folder],
        env={"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"},
    )
    return json.loads((folder / "measured.json").read_text())


def _memory(runs: int) -> list[Row]:
    with scratch() as folder:
        ranks = _on_ranks("memory", MEMORY_OF, runs, folder)
        _check(folder)
    bound = (1 - P) * 2 * max(rank["held"] for rank in ranks) / 1e6 + ALLOWANCE_MB
    peaks, stays = (
        [max(of_run) for of_run in zip(*(rank[what] for rank in ranks), strict=True)]
        for what in ("peaks", "stays")
    )
    return [
        Row(
            what=f"{MEMORY_OF}, FSDP2: anonymous memory of a rank for it",
            values=peaks,
            unit="MB",
            at_most=bound,
        ),
        Row(what=f"{MEMORY_OF}, FSDP2: of it kept between snapshots", values=stays, unit="MB"),
    ]


def _check(folder: Path) -> None:
    """Both ranks' package is the one that a single process extracts.

    Raises:
        RuntimeError: it is not.
    """
    pair = llama.pair(MEMORY_OF)
    expected = extract(pair.base, pair.tuned, folder / "extracted", p=P).manifest.result
    found = DeltaPackage.open(folder / "dare/step-0").manifest.result
    if found != expected:
        raise RuntimeError(f"the ranks' package gives {found}, one process's {expected}")


def _waiting(engine: str, runs: int) -> list[Row]:
    with scratch() as folder:
        seconds = _on_ranks(engine, TIME_OF, runs, folder)[0]
    name = ENGINES[engine]
    ratios = [waited / saved for waited, saved in zip(seconds["snapshot"], seconds["save"], strict=True)]
    return [
        Row(what=f"{TIME_OF}, {name}: training waits for a snapshot", values=seconds["snapshot"], unit="s"),
        Row(what=f"{name}: {OWN[engine]}", values=seconds["save"], unit="s"),
        Row(what=f"{name}: checkpoint with optimizer", values=seconds["checkpoint"], unit="s"),
        Row(what=f"{name}: snapshot / {OWN[engine]}", values=ratios, unit="×", at_most=SHARE),
        Row(
            what=f"{name}: asking whether one is written",
            values=[1000 * one for one in seconds["finished"]],
            unit="ms",
        ),
    ]
