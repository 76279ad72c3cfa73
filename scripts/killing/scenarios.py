"""What is done while it is killed: each command that writes, onto nothing and over an older result."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import dare_train

State = str
"""`absent`, `old`, `new`, or something that must never be."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One action in a folder of its own."""

    name: str
    act: Callable[[Path], object]
    """Does it, in `place`; a second time over what the first left."""
    prepare: Callable[[Path], object]
    """Makes `place` as it is before."""
    state: Callable[[Path], State]
    """What `place` holds afterwards."""
    allowed: frozenset[State]
    finished: State = "new"
    below: str = ""
    """The part of `place` in which calls count."""
    slow: bool = False
    """Takes a second instead of milliseconds."""


def models(folder: Path) -> tuple[Path, Path, Path]:
    """A base and two fine-tunes, of three files each."""
    generator = np.random.default_rng(7)
    base = {f"layers.{n}.w": generator.normal(size=(24, 40)).astype(np.float32) for n in range(3)}
    places = []
    for number, name in enumerate(("base", "tuned", "other")):
        place = folder / name
        place.mkdir(parents=True)
        moved = {key: array + np.float32(number) * 0.01 * array for key, array in base.items()}
        save_file(moved, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps({"model": name}))
        places.append(place)
    return places[0], places[1], places[2]


def content(folder: Path) -> dict[str, str] | None:
    """Each file's digest, hidden ones too."""
    if not folder.exists():
        return None
    files = [folder] if folder.is_file() else [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def of_folders(inputs: Path) -> list[Scenario]:
    """The commands whose result is one folder or file, the same bytes every time."""
    base, tuned, other = models(inputs)
    package = dare_train.extract(base, tuned, inputs / "package", p=0.5).path
    older = dare_train.extract(base, other, inputs / "older", p=0.5).path
    model = inputs / "older-model"
    dare_train.apply(base, older, model)
    fisher = inputs / "older.fisher.safetensors"
    dare_train.save_statistics(fisher, "fisher", {"w": np.zeros(9, np.float32)}, examples=1)

    def merge(place: Path, **options: Any) -> None:
        models, weights = [tuned, package], [0.5, 0.25]
        dare_train.merge(base, models, place / "out", weights=weights, overwrite=True, **options)

    def statistics(place: Path) -> None:
        tensors = {"w": np.ones(9, np.float32)}
        dare_train.save_statistics(place / "out", "fisher", tensors, examples=2)

    def extract(place: Path) -> None:
        dare_train.extract(base, tuned, place / "out", p=0.5, overwrite=True)

    actions: dict[str, tuple[Callable[[Path], object], Path]] = {
        "extract": (
            lambda place: dare_train.extract(base, tuned, place / "out", p=0.5, overwrite=True),
            older,
        ),
        "apply": (lambda place: dare_train.apply(base, package, place / "out", overwrite=True), model),
        "merge": (merge, model),
        "merge into a package": (lambda place: merge(place, package=True), older),
        "statistics": (statistics, fisher),
    }
    return [
        scenario
        for name, (act, old) in actions.items()
        for scenario in (_onto(name, act, None), _onto(f"{name}, over an older one", act, old))
    ]


def _onto(name: str, act: Callable[[Path], object], old: Path | None) -> Scenario:
    wanted: dict[State, dict[str, str] | None] = {"absent": None}
    if old is not None:
        wanted = {"old": content(old)}

    def prepare(place: Path) -> None:
        if "new" not in wanted:
            act(place)
            wanted["new"] = content(place / "out")
            shutil.rmtree(place)
            place.mkdir()
        if old is not None:
            (shutil.copytree if old.is_dir() else shutil.copyfile)(old, place / "out")

    def state(place: Path) -> State:
        found = content(place / "out")
        return next((state for state, whole in wanted.items() if whole == found), "half")

    return Scenario(
        name=name,
        act=act,
        prepare=prepare,
        state=state,
        allowed=frozenset({"new", "absent" if old is None else "old"}),
    )


def of_records(inputs: Path) -> list[Scenario]:
    """What a study keeps of its measurements: a line for each, of which none that was told is lost."""
    from dare_train.evaluation.measurements import Journal, MeasurementRecord, Point, alone_with

    def points(count: int) -> list[Point]:
        return [Point(variant="dare", p=0.5, seed=seed, metrics={"x": 1.0}) for seed in range(count)]

    def journal(place: Path) -> Journal:
        return Journal(place / "points.jsonl", "b", "t", {})

    def fill(place: Path) -> None:
        journal(place).read()
        for point in points(5):
            journal(place).add(point)
        with (place / "points.jsonl").open("a") as file:
            file.write('{"variant": "cut')  # as a kill leaves it

    def go_on(place: Path) -> None:
        with alone_with(place / "points.jsonl"):
            known = {point.seed for point in journal(place).read()}
            for point in points(8):
                if point.seed not in known:
                    journal(place).add(point)

    def state(place: Path) -> State:
        shutil.copyfile(place / "points.jsonl", place.with_name("looked-at.jsonl"))
        seeds = [point.seed for point in Journal(place.with_name("looked-at.jsonl"), "b", "t", {}).read()]
        if seeds == list(range(8)):
            return "new"
        return "going on" if seeds[:5] == list(range(5)) else f"lost: {seeds}"

    def measure(place: Path) -> None:
        with alone_with(place / "search.json"):
            record = MeasurementRecord(place / "search.json", {"a": 1})
            for name in ("one", "two"):
                record.measured(name, lambda: {"x": 2.0})

    def measured(place: Path) -> State:
        if not (place / "search.json").exists():
            return "absent"
        record = MeasurementRecord(place / "search.json", {"a": 1})
        return "new" if set(record.all) == {"one", "two"} else "going on"

    nothing: Callable[[Path], object] = lambda place: None  # noqa: E731
    return [
        Scenario(
            name="journal of a study",
            act=go_on,
            prepare=fill,
            state=state,
            allowed=frozenset({"going on", "new"}),
        ),
        Scenario(
            name="record of a search",
            act=measure,
            prepare=nothing,
            state=measured,
            allowed=frozenset({"absent", "going on", "new"}),
        ),
    ]


def litter(place: Path) -> list[str]:
    """Hidden names anywhere below: nothing that is complete has one. In a Trainer's checkpoints they are
    safetensors', which writes beside first.
    """
    found = (path.relative_to(place) for path in place.rglob(".*"))
    return sorted(str(path) for path in found if not path.parent.name.startswith("checkpoint-"))
