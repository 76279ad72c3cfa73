"""Kernels of a GPU on a 7 B-shaped bf16 model at p = 0.9, beside a copy of the same bytes on the same GPU in
the same run.

Times are of the device (CUDA events), medians of runs after two that are not counted. Bandwidth is bytes read
plus bytes written, as counted at the top of `dare_train/kernels/cuda.py`, over time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import zstandard
from safetensors.torch import load_file
from torch import Tensor

from dare_train import apply_, extract
from dare_train.config import threshold_of
from dare_train.dtypes import DTYPES
from dare_train.kernels.launch_tables import Masks, Row, Rows, Term, offsets_of
from dare_train.merging.config.task import task_of
from dare_train.merging.merge import merged_weights
from dare_train.parallel.threads import ordered_map

from . import llama
from .common import WEIGHTS, scratch
from .report import Report
from .report import Row as Line

DROP_RATE = 0.9
FACTOR = 65536 / (65536 - threshold_of(DROP_RATE))
BASELINE_ELEMENTS = 1 << 30
"""Of the comparison with torch, whose indices alone take eight bytes for each kept element."""


def run(runs: int) -> Report:
    """`runs` launches of each kernel.

    Raises:
        SystemExit: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit("scripts/bench gpu needs a CUDA device, and this machine has none")
    model = Model.random()  # before anything is loaded: it takes most of the memory
    rows = [*_memory(model, runs), *_beside_torch(runs), *_cold(runs), *_merge(runs)]
    return Report(
        title=f"Kernels on {torch.cuda.get_device_name()}, 7 B-shaped, bf16, p = {DROP_RATE}",
        rows=rows,
        notes=_versions(),
    )


def _versions() -> list[str]:
    import triton

    return [
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}, "
        f"driver {_driver()}"
    ]


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return (
        version.read_text().split("\n")[0].split("Module")[-1].split()[0] if version.exists() else "unknown"
    )


@dataclass(frozen=True)
class Model:
    """Weights as Llama 2 7 B has them, and what packages keep of them."""

    rows: Rows
    masks: list[Masks]
    offsets: list[Tensor]
    values: list[Tensor]
    own: Tensor

    @classmethod
    def random(cls) -> Model:
        flats = [torch.randint(0, 1 << 15, (numel,), dtype=torch.int16, device="cuda") for numel in _sizes()]
        rows = Rows(
            dtype=DTYPES["BF16"], rows=tuple(Row(flat=flat, start=0, count=flat.numel()) for flat in flats)
        )
        masks = [
            Masks(
                keys=[7919 * seed + n for n in range(len(flats))],
                thresholds=[threshold_of(DROP_RATE)] * len(flats),
            )
            for seed in range(3)
        ]
        counts = [_kernels().counts(rows, one) for one in masks]
        values = [
            torch.randint(0, 1 << 15, (int(one.sum()),), dtype=torch.int16, device="cuda") for one in counts
        ]
        return cls(rows, masks, [offsets_of(one) for one in counts], values, torch.empty_like(values[0]))

    @property
    def bytes(self) -> int:
        return sum(row.count for row in self.rows.rows) * 2

    @property
    def kept_bytes(self) -> int:
        return self.values[0].nbytes


def _kernels() -> Any:
    from dare_train.kernels import cuda

    return cuda


def _sizes() -> list[int]:
    hidden, inner, layers, vocabulary = 4096, 11008, 32, 32000
    layer = [hidden * hidden] * 4 + [hidden * inner] * 3 + [hidden] * 2
    return [vocabulary * hidden] * 2 + layer * layers + [hidden]


def _memory(model: Model, runs: int) -> list[Line]:
    """Each kernel's bandwidth, as a share of a copy's, or of a read's."""
    kernels, rows, n, kept = _kernels(), model.rows, model.bytes, model.kept_bytes
    copy, read = _copy_and_read(n, runs)
    masks, offsets, values = model.masks[0], model.offsets[0], model.values[0]
    term = Term(masks=masks, offsets=offsets, values=values, factors=[FACTOR] * len(rows.rows))
    three = [
        Term(masks=m, offsets=o, values=v, factors=[FACTOR / 3] * len(rows.rows))
        for m, o, v in zip(model.masks, model.offsets, model.values, strict=True)
    ]
    printed = _seconds(lambda: kernels.fingerprint(rows), runs)
    taken = _seconds(lambda: kernels.take(rows, masks, offsets, model.own), runs)
    tuned, new = (
        Rows(
            dtype=rows.dtype,
            rows=tuple(Row(flat=row.flat.clone(), start=0, count=row.count) for row in rows.rows),
        ),
        torch.empty_like(values),
    )
    extracted = _seconds(lambda: kernels.take_both(rows, tuned, masks, offsets, model.own, new), runs)
    counted = _seconds(lambda: kernels.counts(rows, masks), runs)
    put = _seconds(lambda: kernels.put(rows, masks, offsets, values), runs)
    back = _seconds(lambda: kernels.put(rows, masks, offsets, model.own), runs)
    one = _seconds(lambda: kernels.add(rows, [term]), runs)
    several = _seconds(lambda: kernels.add(rows, three), runs)
    copied = [2 * n / seconds for seconds in copy]
    return [
        Line(what="copy on the device", values=[rate / 1e12 for rate in copied], unit="TB/s"),
        Line(
            what="read on the device (torch.sum)",
            values=[n / seconds / 1e12 for seconds in read],
            unit="TB/s",
        ),
        _share("apply: one resident package put into place", put, 2 * n + kept, median(copied), 0.7),
        Line(what="apply: the same", values=[1e3 * seconds for seconds in put], unit="ms"),
        _share("revert: the words that were there, put back", back, 2 * n + kept, median(copied), 0.6),
        _share(
            "extract: kept words of base and tuned gathered in one pass",
            extracted,
            2 * (n + kept),
            median(copied),
            0.6,
        ),
        _share("snapshot: kept words of the weights gathered", taken, n + kept, median(copied), None),
        Line(
            what="counts of kept words, before either",
            values=[1e3 * seconds for seconds in counted],
            unit="ms",
        ),
        _share("fingerprint, of a read", printed, n, n / median(read), 0.8),
        _share("apply: one package by the arithmetic law", one, 2 * n + kept, median(copied), None),
        Line(
            what="three packages in one pass / one",
            values=[t / median(one) for t in several],
            unit="×",
            at_most=1.6,
        ),
    ]


def _copy_and_read(nbytes: int, runs: int) -> tuple[list[float], list[float]]:
    """Seconds that torch takes to copy so many bytes, and to read them."""
    source = torch.zeros(nbytes // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), runs), _seconds(lambda: torch.sum(source), runs)


def _share(what: str, seconds: list[float], nbytes: int, full: float, least: float | None) -> Line:
    return Line(what=what, values=[nbytes / one / full for one in seconds], unit="of it", at_least=least)


def _beside_torch(runs: int) -> list[Line]:
    """The same sum with torch: a dense mask, `torch.where` and `index_add_`, as far as its memory goes."""
    kernels, count = _kernels(), BASELINE_ELEMENTS
    base = torch.randn(count, device="cuda").bfloat16()
    rows = Rows(dtype=DTYPES["BF16"], rows=(Row(flat=base.view(torch.int16), start=0, count=count),))
    masks = Masks(keys=[1], thresholds=[threshold_of(DROP_RATE)])
    counts = kernels.counts(rows, masks)
    values = torch.empty(int(counts.sum()), dtype=torch.int16, device="cuda")
    offsets = offsets_of(counts)
    kernels.take(rows, masks, offsets, values)
    term = Term(masks=masks, offsets=offsets, values=values, factors=[FACTOR])
    ours = _seconds(lambda: kernels.add(rows, [term]), runs)
    extra = _peak(lambda: kernels.add(rows, [term]))
    kept = torch.rand(count, device="cuda") >= DROP_RATE
    delta = torch.zeros(int(kept.sum()), dtype=torch.bfloat16, device="cuda")

    def dense() -> None:
        added = torch.zeros_like(base).index_add_(0, kept.nonzero().reshape(-1), delta)
        base.copy_(torch.where(kept, base.float() + FACTOR * added.float(), base.float()))

    theirs = _seconds(dense, runs)
    return [
        Line(
            what="torch (mask, where, index_add) / ours",
            values=[median(theirs) / one for one in ours],
            unit="×",
            at_least=8,
        ),
        Line(what="our peak extra memory / torch's", values=[extra / _peak(dense)], unit="×", at_most=0.25),
    ]


def _cold(runs: int) -> list[Line]:
    """A package file in the page cache, until the model has it on it and both fingerprints agree; wall
    time.
    """
    pair = llama.pair("468M")
    state = load_file(pair.base / WEIGHTS, device="cuda")
    with scratch() as folder:
        package = extract(pair.base, pair.tuned, folder / "package", p=DROP_RATE)
        frames = [
            bytes(frame)
            for name, record in package.records.items()
            for _, frame in package.frames(name, 0, record.info.numel)
        ]

        def least() -> None:
            torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8).cuda()
            for _ in ordered_map(zstandard.decompress, frames):
                pass

        times, applied = [], list[Any]()
        for _ in range(runs + 1):
            floor = _wall(least)
            times.append((_wall(lambda: applied.append(apply_(state, package.path))), floor))
            applied.pop().revert()
    return [
        Line(what="cold: apply_ of a 468 M package", values=[1e3 * own for own, _ in times[1:]], unit="ms"),
        Line(
            what="cold / (compressed bytes to the device + zstd on all cores)",
            values=[a / b for a, b in times[1:]],
            unit="×",
            at_most=3,
        ),
    ]


def _merge(runs: int) -> list[Line]:
    """TIES of two models, nothing written: from where they lie to words in the host's memory; wall time."""
    pair = llama.pair("468M")
    there, here = (
        [load_file(one / WEIGHTS, device=device) for one in (pair.base, pair.tuned, pair.tuned)]
        for device in ("cuda", "cpu")
    )
    times = [(_wall(lambda: _merged(there)), _wall(lambda: _merged(here))) for _ in range(runs + 1)][1:]
    return [
        Line(
            what="merge: ties of two 468 M models on the device, to the host",
            values=[1e3 * own for own, _ in times],
            unit="ms",
        ),
        Line(
            what="the same on all cores / on the device",
            values=[other / own for own, other in times],
            unit="×",
        ),
    ]


def _merged(states: list[dict[str, Tensor]]) -> None:
    base, *models = states
    merged = merged_weights(task_of(base, models, method="ties"))
    work = [(name, *run) for name in merged.tensors for run in merged.runs(name)]
    for _ in ordered_map(lambda run: merged.run(*run), work):
        pass


def _wall(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _seconds(work: Callable[[], Any], runs: int) -> list[float]:
    """Of the device, for each of the runs after two more."""
    times = []
    for _ in range(runs + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
        time.sleep(0.01)
    return times[2:]


def _peak(work: Callable[[], Any]) -> int:
    """Bytes that it takes at its peak, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
