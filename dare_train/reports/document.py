"""What a study found, as data: figures, tables and curves, from which its files, its page and its wandb
charts are all made.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean, stdev
from typing import Any

from .._version import __version__
from ..errors import ConfigError

Cell = str | float | int
"""Of a table: text, or a number that is written with four digits."""

_LIBRARIES = ("torch", "transformers", "numpy", "numba")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A measurement against something, with the interval that the true mean is in."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    half: tuple[float, ...] = ()
    """Half the width of the 95 % confidence interval at each x; empty where there was one measurement
    only."""
    dashed: bool = False
    """For what was calculated rather than measured."""

    @classmethod
    def over(cls, label: str, samples: Mapping[float, Sequence[float]]) -> Curve:
        """The mean and its interval of several measurements at each x."""
        places = [(x, *interval(values)) for x, values in samples.items()]
        halves = tuple(half for _, _, half in places)
        return cls(
            label=label,
            x=tuple(x for x, _, _ in places),
            y=tuple(y for _, y, _ in places),
            half=halves if any(halves) else (),
        )

    def as_json(self) -> dict[str, Any]:
        return {"label": self.label, "x": list(self.x), "y": list(self.y), "half": list(self.half)}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves in one pair of axes."""

    name: str
    """Of its file, without an ending."""
    title: str
    caption: str
    """What is shown and how it was measured, for someone who sees nothing else."""
    x: str
    y: str
    """What the axes are, with their unit."""
    curves: tuple[Curve, ...]
    log_x: bool = False
    log_y: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines by label."""
    y_range: tuple[float, float] | None = None
    """What is shown of the y axis, where some curves go far beyond."""
    ticks: tuple[str, ...] = ()
    """Names of the places 0, 1, 2, … on the x axis, where those are no numbers."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Numbers in rows and columns as colours."""

    name: str
    """Of its file, without an ending."""
    title: str
    caption: str
    x: str
    y: str
    """What columns and rows are."""
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """A tuple for each row; None is left blank."""
    log: bool = False
    """Whether colours are in proportion to the numbers' logarithms."""


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [
            [
                cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"
                for cell in row
            ]
            for row in self.rows
        ]

    def markdown(self) -> str:
        lines = [self.columns, tuple("---" for _ in self.columns), *self.cells()]
        text = "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        return f"**{self.title}**\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the answer in figures, and everything that is needed to ask it again."""

    name: str
    """Of its files."""
    title: str
    question: str
    findings: tuple[str, ...]
    """The answer, a sentence each."""
    setup: Mapping[str, Any]
    """What was measured, with which options."""
    data: Mapping[str, Any]
    """Every figure, unrounded."""
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart | HeatMap, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The same for the same measurements: no times, no paths of this run's results."""
        return {
            "written_by": f"dare_train {__version__}",
            "study": self.name,
            "setup": {**self.setup, **versions()},
            **self.data,
        }

    def json(self) -> str:
        return json.dumps(self.as_json(), indent=1) + "\n"

    def markdown(self) -> str:
        """What a terminal shows."""
        return "\n".join(
            [
                f"# {self.title}",
                "",
                self.question,
                "",
                *(f"* {finding}" for finding in self.findings),
                "",
                *(table.markdown() for table in self.tables),
            ]
        )


def versions() -> dict[str, str]:
    """Of what a measurement may depend on."""
    numbers = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue
    return numbers


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of several measurements, and half the width of its 95 % confidence interval by Student's t; 0
    for one alone.

    Raises:
        ConfigError: SciPy is not installed.
    """
    if len(values) < 2:
        return values[0], 0.0
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ConfigError(
            "study", expected="SciPy", found="not installed", remedy='pip install "dare_train[study]"'
        ) from error
    return fmean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def with_interval(values: Sequence[float]) -> str:
    """For a table."""
    mean, half = interval(values)
    return f"{mean:.4g} ± {half:.2g}" if half else f"{mean:.4g}"
