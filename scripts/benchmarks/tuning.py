"""What sparse tuning costs and saves: time per step and the optimizer's state, beside dense AdamW's in the
same process.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

from . import finetune
from .report import Report, Row

P = 0.9
STEPS = 4
"""In a row, of each kind in turn."""
BATCH = 32
TIME, STATE = 1.15, 0.15


def run(runs: int) -> Report:
    """`runs` times, some steps of dense tuning and as many of sparse tuning; the first of each are not
    counted.
    """
    import torch

    from dare_train import sparse_tuning

    rows = finetune.examples()[: BATCH * STEPS]
    batches = [
        {key: torch.tensor([row[key] for row in rows[i * BATCH : (i + 1) * BATCH]]) for key in rows[0]}
        for i in range(STEPS)
    ]
    model: Any = finetune.classifier().train()
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    state: dict[str, int] = {}
    for number in range(runs + 1):
        for kind in seconds:
            optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
            with sparse_tuning(model, optimizer, p=P) if kind == "sparse" else nullcontext():
                _steps(model, optimizer, batches[:1])
                begun = time.perf_counter()
                _steps(model, optimizer, batches)
                if number:
                    seconds[kind].append((time.perf_counter() - begun) / STEPS)
                state[kind] = sum(value.nbytes for one in optimizer.state.values() for value in one.values())
    ratios = [sparse / dense for sparse, dense in zip(seconds["sparse"], seconds["dense"], strict=True)]
    return Report(
        title=f"Sparse tuning, p = {P:g}: all-MiniLM-L6-v2, 22.7 M, fp32, AdamW, {BATCH} texts "
        f"of {finetune.LONGEST} tokens",
        rows=[
            Row(what="a step of dense tuning", values=seconds["dense"], unit="s"),
            Row(what="a step of sparse tuning", values=seconds["sparse"], unit="s"),
            Row(what="sparse / dense", values=ratios, unit="×", at_most=TIME),
            Row(what="optimizer state, dense", values=[state["dense"]], unit="B"),
            Row(what="optimizer state, sparse", values=[state["sparse"]], unit="B"),
            Row(what="sparse / dense", values=[state["sparse"] / state["dense"]], unit="×", at_most=STATE),
        ],
        notes=[f"each run: {STEPS} steps of each kind, after one that is not counted"],
    )


def _steps(model: Any, optimizer: Any, batches: list[dict[str, Any]]) -> None:
    import torch

    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
