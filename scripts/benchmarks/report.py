"""What was measured, beside its target: rows, tables and JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import dare_train


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity, measured once or several times. Its median is held against the target, if it has one."""

    what: str
    values: Sequence[float]
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.at_most is not None:
            return self.median <= self.at_most
        return None if self.at_least is None else self.median >= self.at_least

    def cells(self) -> tuple[str, ...]:
        spread = f"{number(min(self.values))} – {number(max(self.values))}" if len(self.values) > 1 else ""
        bound = self.at_most if self.at_most is not None else self.at_least
        target = "" if bound is None else f"{'≤' if self.at_most is not None else '≥'} {number(bound)}"
        met = {None: "", True: "[green]met[/]", False: "[bold red]missed[/]"}[self.met]
        return self.what, number(self.median), spread, self.unit, target, met


@dataclass(frozen=True, kw_only=True)
class Report:
    """One table: its rows, and what a reader must know to trust them."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: every run of every row."""
        rows = [
            {**vars(row), "values": list(row.values), "median": row.median, "met": row.met}
            for row in self.rows
        ]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}


def number(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def show(report: Report) -> None:
    table = Table(
        box=SIMPLE_HEAD,
        title=report.title,
        title_justify="left",
        caption="\n".join(report.notes),
        caption_justify="left",
    )
    table.add_column("measured", overflow="fold")
    for heading in ("median", "min – max", "", "target", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in report.rows:
        table.add_row(*row.cells())
    Console().print(table)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "dare_train": dare_train.__version__,
        "load_before": os.getloadavg()[0],
    }
