"""Measurements, kept one by one, so that a study that was killed, or asked for more, goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from .._version import __version__
from ..errors import CheckpointError, ConfigError, printable
from ..parallel.place_lock import kept, locked
from ..parallel.ranks import launched_world
from ..parallel.staged_file import tidy, write_whole
from ..parallel.staged_folder import storage_errors
from ..reading.plain_files import content, reason
from ..reading.structures import LARGEST, json_in, json_of
from ..weights.protocol import Weights
from .swapped_model import SwappedModel

if TYPE_CHECKING:
    import torch

Evaluate = Callable[["torch.nn.Module"], Union[float, Mapping[str, float]]]
"""Called with the model at each point; returns a number, or several by name. It leaves the weights alone."""
Progress = Callable[[int, int], object]
"""Called with the points done and all there are."""
Key = tuple[str, float, int]
"""Variant, drop rate (or another setting), seed."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement."""

    variant: str
    p: float
    """The drop rate, or what else there is more or less of in the variant."""
    seed: int
    metrics: Mapping[str, float]

    @property
    def key(self) -> Key:
        return self.variant, self.p, self.seed

    def as_json(self) -> dict[str, Any]:
        return {"variant": self.variant, "p": self.p, "seed": self.seed, "metrics": dict(self.metrics)}


def measured(
    swapped: SwappedModel,
    wanted: Sequence[Key],
    weights_at: Callable[[Key], tuple[Weights, Mapping[str, float]]],
    evaluate: Evaluate,
    journal: Journal,
    progress: Progress | None,
) -> tuple[Point, ...]:
    """Evaluate a model with the weights of each point, unless the journal has it already.

    `weights_at` gives the weights, and figures of theirs that go with what is measured.

    Raises:
        ConfigError: `evaluate` gives no finite numbers.
        OutputExists: another process is measuring into the same journal.
    """
    with alone_with(journal.path), swapped:
        points = {point.key: point for point in journal.read()}
        for number, key in enumerate(wanted):
            if key not in points:
                weights, figures = weights_at(key)
                swapped.swap_in(weights)
                points[key] = Point(
                    variant=key[0],
                    p=key[1],
                    seed=key[2],
                    metrics={**numbers(evaluate(swapped.model)), **figures},
                )
                journal.add(points[key])
            if progress is not None:
                progress(number + 1, len(wanted))
    return tuple(points[key] for key in wanted)


def numbers(given: float | Mapping[str, float]) -> dict[str, float]:
    """What an evaluation gave, by name.

    Raises:
        ConfigError: it is not finite numbers.
    """
    metrics = dict(given) if isinstance(given, Mapping) else {"metric": given}
    try:
        finite = {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError):
        finite = {}
    if not finite or not all(np.isfinite(value) for value in finite.values()):
        raise ConfigError("evaluate", expected="a finite number, or several by name", found=repr(given))
    return finite


def samples(points: Iterable[Point], variant: str, metric: str) -> dict[float, list[float]]:
    """By drop rate, ascending, what the seeds gave.

    Raises:
        ConfigError: a point has no such metric.
    """
    by_rate: dict[float, list[float]] = {}
    for point in sorted((point for point in points if point.variant == variant), key=lambda point: point.p):
        if metric not in point.metrics:
            names = ", ".join(sorted(point.metrics))
            raise ConfigError(
                f"measurements of {printable(variant, 100)}",
                expected=f"{printable(metric, 100)} in each",
                found=f"only {printable(names, 100)} at p = {point.p:g}",
                remedy="does the evaluation give the same metrics each time? Else the record was damaged",
            )
        by_rate.setdefault(point.p, []).append(point.metrics[metric])
    return by_rate


class Journal:
    """Points as they are measured, a line for each, below a line that says what all of them depend on.

    Args:
        path: of the file.
        base, tuned: fingerprints of the weights.
        setup: whatever else they depend on.

    Raises:
        CheckpointError: `read` found another model's, or some of another setup.
    """

    def __init__(self, path: Path, base: str, tuned: str, setup: Mapping[str, Any] | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._head = {"base": base, "tuned": tuned, "setup": json.loads(json.dumps(setup or {}))}

    def read(self) -> list[Point]:
        lines = _text_of(self.path).split("\n") if self.path.exists() else []
        if not lines or not lines[0]:
            write_whole(self.path, f"{json.dumps(self._head)}\n".encode())
            return []
        kept = _kept(lines[0], _Head, self.path, 1)
        if (kept.base, kept.tuned) != (self._head["base"], self._head["tuned"]):
            expected = f"a study of {self._head['tuned'][:12]}… on {self._head['base'][:12]}…"
            found = f"one of a model {kept.tuned[:12]}…"
            raise CheckpointError(
                str(self.path), expected=expected, found=found, remedy="choose another folder"
            )
        check_setup(self.path, kept.setup, self._head["setup"])
        whole = lines[1:-1]
        points = [_kept(line, Point, self.path, number) for number, line in enumerate(whole, 2)]
        if lines[-1]:  # a line without its end was being written when the process died
            write_whole(self.path, "".join(f"{line}\n" for line in (lines[0], *whole)).encode())
        return points

    def add(self, point: Point) -> None:
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point.as_json()) + "\n")


@dataclass(frozen=True, kw_only=True)
class _Head:
    """A journal's first line."""

    base: str
    tuned: str
    setup: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What a `MeasurementRecord` keeps."""

    written_by: str
    setup: dict[str, Any]
    measured: dict[str, Any]


_DAMAGED = "it was damaged, or is something else; move it away to measure anew"


def _text_of(path: Path) -> str:
    raw = content(path, at_most=LARGEST, expected="measurements", remedy=_DAMAGED)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        found = reason(error)
        raise CheckpointError(str(path), expected="measurements", found=found, remedy=_DAMAGED) from error


def _kept(line: str, kind: Any, path: Path, number: int) -> Any:
    where = f"{path}: line {number}"
    return json_of(line, kind, where=where, expected="measurements", remedy=_DAMAGED)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the only one who writes a study into a folder, or anything else in its place. Processes that a
    launcher started together share it, and a study's steps in one thread do.

    Raises:
        OutputExists: somebody else is at work there; it says who.
    """
    if launched_world() > 1:
        yield
        return
    with ExitStack() as stack:
        with storage_errors(folder):
            stack.enter_context(kept(folder))
        yield


@contextmanager
def alone_with(record: Path) -> Iterator[None]:
    """Be the only one who measures into a record, and `alone_in` its folder.

    Raises:
        OutputExists: somebody else does; it says who.
    """
    if launched_world() > 1:
        yield
        return
    with alone_in(record.parent), ExitStack() as stack:
        with storage_errors(record):
            record.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(record.with_name(f"{record.name}.study")))
            tidy(record)
        yield


def check_setup(path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with measurements that depend on something else: `kept` is what a file's depend on, as
    JSON has it.

    Raises:
        CheckpointError: they differ; it names the first difference.
    """
    for name, kept_value, wanted_value in _differences(kept, wanted):
        measured = f"with {name} {kept_value}" if kept_value is not None else f"without {name}"
        wanted_text = (
            f"measurements with {name} {wanted_value}"
            if wanted_value is not None
            else f"measurements without {name}"
        )
        raise CheckpointError(
            str(path), expected=wanted_text, found=f"some {measured}", remedy="choose another folder"
        )


def _differences(
    kept: Mapping[str, Any], wanted: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Full names of entries that differ, and both of their values."""
    for name in dict.fromkeys((*wanted, *kept)):
        kept_value = kept.get(name)
        wanted_value = wanted.get(name)
        if isinstance(kept_value, Mapping) and isinstance(wanted_value, Mapping):
            yield from _differences(kept_value, wanted_value, f"{within}{name}.")
        elif kept_value != wanted_value:
            yield f"{within}{name}", kept_value, wanted_value


class MeasurementRecord:
    """A JSON file of measurements by name, below what they depend on.

    Raises:
        CheckpointError: when made, for a file of another setup.
    """

    def __init__(self, path: Path, setup: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        plain_setup = json.loads(json.dumps(setup))
        self._kept: dict[str, Any] = {
            "written_by": f"dare_train {__version__}",
            "setup": plain_setup,
            "measured": {},
        }
        if path.exists():
            kept = json_in(path, _Record, expected="measurements", remedy=_DAMAGED)
            check_setup(path, kept.setup, plain_setup)
            self._kept = asdict(kept)

    @property
    def all(self) -> Mapping[str, Any]:
        """In the order in which they were measured."""
        measured: dict[str, Any] = self._kept["measured"]
        return measured

    def measured(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> Any:
        """What was measured by that name, as JSON has it: now, unless it was before."""
        if name not in self.all:
            self._kept["measured"][name] = json.loads(json.dumps(measure()))
            write_whole(self.path, f"{json.dumps(self._kept, indent=1)}\n".encode())
        return self.all[name]
