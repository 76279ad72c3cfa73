"""`dare-train extract` of a 468 M bf16 pair that lies in the page cache: the whole process, its time and its
own memory.
"""

from __future__ import annotations

from pathlib import Path

from . import llama
from .common import Pair, bits_per_parameter, remove, scratch
from .process import DARE_TRAIN, Measured, measure
from .report import Report, Row

ANONYMOUS_MB = 600
SECONDS = 4


def run(runs: int) -> Report:
    """`runs` processes after one that is not counted; each package is deleted before the next begins."""
    pair = llama.pair("468M")
    with scratch() as folder:
        package = folder / "package"
        measured = [extract(pair, package) for _ in range(1 + runs)][1:]
        density = bits_per_parameter(package, pair)
    rows = [
        Row(what="wall time", values=[one.seconds for one in measured], unit="s", at_most=SECONDS),
        Row(
            what="peak anonymous memory",
            values=[one.anonymous for one in measured],
            unit="MB",
            at_most=ANONYMOUS_MB,
        ),
        Row(
            what="peak resident set, mapped files included",
            values=[one.resident for one in measured],
            unit="MB",
        ),
        Row(what="package (synthetic deltas: see size)", values=[density], unit="bit/param"),
    ]
    return Report(title="dare-train extract --p 0.9: 468 M, bf16, page cache", rows=rows)


def extract(pair: Pair, package: Path, p: float = 0.9) -> Measured:
    """One process that makes `package` anew."""
    remove(package)
    return measure([*DARE_TRAIN, "extract", pair.base, pair.tuned, "--out", package, "--p", str(p)])
