"""Peak anonymous memory of extract and apply at three model sizes: it must not grow with the model.

What extract holds grows with the package until a part of it is full and written. So the largest model is
extracted with p = 0 as well, where the package takes several parts.
"""

from __future__ import annotations

from . import llama
from .apply import apply
from .common import scratch
from .extract import ANONYMOUS_MB, extract
from .report import Report, Row

SIZES = ("117M", "468M", "936M")


def run(runs: int) -> Report:
    """`runs` processes of each kind and size, the page cache as it is."""
    rows = [row for name in SIZES for row in _at(name, 0.9, runs)]
    growth = [
        Row(what=f"{verb}: {SIZES[-1]} / {SIZES[0]}", values=[last.median / first.median], unit="×")
        for verb, first, last in zip(("extract", "apply"), rows[:2], rows[-2:], strict=True)
    ]
    return Report(
        title="Peak anonymous memory by model size, bf16", rows=rows + growth + _at(SIZES[-1], 0.0, runs)
    )


def _at(name: str, p: float, runs: int) -> list[Row]:
    pair = llama.pair(name)
    with scratch() as folder:
        extracted = [extract(pair, folder / "package", p).anonymous for _ in range(runs)]
        applied = [apply(pair.base, folder).anonymous for _ in range(runs)]
    verbs = (("extract", extracted), ("apply", applied))
    return [
        Row(what=f"{verb} {name}, p = {p:g}", values=values, unit="MB", at_most=ANONYMOUS_MB)
        for verb, values in verbs
    ]
