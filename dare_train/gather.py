"""Kept words of many runs, gathered where the model lies: only they cross to the host."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import ModuleType

import numpy as np
import torch

from .assembly import Work
from .capture import Taken
from .dtypes import DType
from .kernels.choice import kernels_for
from .kernels.rows import Masks, Row, Rows, offsets_of, to_device, to_host
from .segments import TensorPlan
from .shards import LiveWeights


def gathered(live: LiveWeights, work: Sequence[Work], later: Collection[str] = ()) -> list[Taken | None]:
    """Of each run of a delta what its package will need, copied; None where no kernels work on its words where they lie,
    and for tensors `later`.

    One launch for each dtype and device counts the kept words, and one gathers them.
    """
    found: dict[tuple[torch.device, DType], tuple[ModuleType, list[tuple[int, Row]]]] = {}
    for place, (plan, start, count) in enumerate(work):
        wanted = plan.kind == "delta" and start < plan.base_numel and plan.name not in later
        lying = live.lying(plan.name, start, count) if wanted else None
        kernels = kernels_for(lying[0].device) if lying is not None else None
        if lying is not None and kernels is not None:
            row = Row(flat=lying[0], start=start, count=count, offset=lying[1])
            found.setdefault((row.flat.device, live.tensors[plan.name].dtype), (kernels, []))[1].append((place, row))
    taken: list[Taken | None] = [None] * len(work)
    for (_, dtype), (kernels, rows) in found.items():
        words = _gather(kernels, Rows(dtype=dtype, rows=tuple(row for _, row in rows)), [work[place] for place, _ in rows])
        for (place, row), own in zip(rows, words, strict=True):
            taken[place] = Taken(work[place][0], row.start, row.count, own)
    return taken


def _gather(kernels: ModuleType, rows: Rows, work: Sequence[Work]) -> list[np.ndarray]:
    bitmaps = [_bitmap(*one, rows.device) for one in work]
    masks = Masks(
        keys=[plan.mask.key for plan, _, _ in work],
        thresholds=[plan.mask.threshold if plan.mask.kind == "seeded" else 0 for plan, _, _ in work],
        bitmaps=bitmaps if any(bitmap is not None for bitmap in bitmaps) else (),
    )
    counts = kernels.counts(rows, masks)
    sizes = rows.per_row(counts)
    out = torch.empty(sum(sizes), dtype=rows.word, device=rows.device)
    kernels.take(rows, masks, offsets_of(counts), out)
    return np.split(to_host(out).view(rows.dtype.word), np.cumsum(sizes)[:-1])


def _bitmap(plan: TensorPlan, start: int, count: int, device: torch.device) -> torch.Tensor | None:
    if plan.stored is None:
        return None
    return to_device(torch.from_numpy(np.packbits(plan.stored[start : start + count], bitorder="little")), device)
