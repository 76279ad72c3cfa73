"""What a comparison at equal bytes says: one curve for each way to store a delta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from ..evaluation.measurements import samples
from ..studies.comparison import CONTENDERS, Comparison
from .document import Chart, Curve, Study, Table, with_interval

_OURS = ("dare", "dare_int4", "dare_sign")


def comparison_study(
    comparison: Comparison, *, title: str = "What a delta is worth in bytes", name: str = "compare"
) -> Study:
    return Study(
        name=name,
        title=title,
        question="How good is the model when its delta takes so many bits, and which way of "
        "making it small is best at each size?",
        findings=tuple(line for metric in comparison.metrics for line in _findings(comparison, metric)),
        setup=comparison.setup,
        data=comparison.as_json(),
        tables=tuple(_table(comparison, metric) for metric in comparison.metrics),
        charts=tuple(_chart(comparison, metric, name) for metric in comparison.metrics),
    )


def beaten(comparison: Comparison, metric: str) -> tuple[list[str], list[str]]:
    """Points of other contenders that a DARE package of at most their size does at least as well as, in the
    mean over masks; and those that none does."""
    sign = comparison.better(metric)
    ours = [
        (bits, fmean(values)) for name in _OURS for bits, values in comparison.curve(name, metric).items()
    ]
    lost: list[str] = []
    won: list[str] = []
    for name in (contender for contender in comparison.contenders if contender not in (*_OURS, "dense")):
        for bits, values in comparison.curve(name, metric).items():
            best = max((sign * mean for size, mean in ours if size <= bits), default=None)
            (won if best is not None and best >= sign * fmean(values) else lost).append(
                f"{CONTENDERS[name]} at {bits:.3g} bits"
            )
    return won, lost


def _findings(comparison: Comparison, metric: str) -> Iterator[str]:
    dense, base = (fmean(next(iter(comparison.curve(name, metric).values()))) for name in ("dense", "base"))
    yield f"{metric}: {dense:.4g} with all of the delta, {base:.4g} without."
    won, lost = beaten(comparison, metric)
    yield (
        f"{metric}: a DARE package of no more bytes is at least as good as {len(won)} of the "
        f"{len(won) + len(lost)} rival points" + (f"; not as {_some(lost)}." if lost else ".")
    )


def _some(points: Sequence[str]) -> str:
    return ", ".join(points[:4]) + (f" and {len(points) - 4} more" if len(points) > 4 else "")


def _chart(comparison: Comparison, metric: str, name: str) -> Chart:
    curves = [
        Curve.over(CONTENDERS[contender], comparison.curve(contender, metric))
        for contender in comparison.contenders
        if contender != "dense"
    ]
    dense, base = (
        fmean(next(iter(comparison.curve(contender, metric).values()))) for contender in ("dense", "base")
    )
    masks, adapters = (
        len({point.seed for point in comparison.points if point.variant == name}) for name in ("dare", "lora")
    )
    trained = f", of LoRA over {adapters} adapters" if adapters > 1 else ""
    bands = f"Bands: 95 % confidence over {masks} masks{trained}." if masks > 1 else "One mask."
    return Chart(
        name=f"{name}-{metric}",
        title=f"{metric} against the size of the delta",
        caption="Sizes are those of whole packages for DARE and magnitude pruning, and of the "
        "bare numbers for the others; "
        f"{comparison.parameters:,} parameters. {bands}",
        x="bits per parameter",
        y=metric,
        curves=tuple(curves),
        log_x=True,
        levels={"all of the delta": dense, "none of it": base},
    )


def _table(comparison: Comparison, metric: str) -> Table:
    rows = []
    for name in comparison.contenders:
        sizes = {p: values[0] for p, values in samples(comparison.points, name, "bits").items()}
        for p, values in samples(comparison.points, name, metric).items():
            rows.append((CONTENDERS[name], _setting(name, p), sizes[p], with_interval(values)))
    return Table(
        title=f"{metric} by size",
        columns=("how the delta is stored", "setting", "bits per parameter", metric),
        rows=tuple(rows),
        note="± half of the 95 % confidence interval over masks. The lossless package holds the "
        "fine-tuned weights to the bit.",
    )


def _setting(name: str, p: float) -> str:
    if name in ("svd", "lora"):
        return f"rank {p:g}"
    return "" if name in ("dense", "one_bit") else f"p = {p:g}"
