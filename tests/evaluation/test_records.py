"""What is kept of measurements is never lost: by a kill, by a full disk, by two who measure at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dare_train.errors import ConfigError, OutputExists, StorageError
from dare_train.evaluation.measurements import Journal, MeasurementRecord, Point, alone_with, samples

POINTS = [Point(variant="dare", p=0.5, seed=seed, metrics={"accuracy": 0.5}) for seed in range(20)]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    found = Journal(tmp_path / "points.jsonl", "b", "t", {})
    assert found.read() == []
    for point in POINTS:
        found.add(point)
    return found


def test_reading_a_whole_journal_writes_nothing(journal: Journal) -> None:
    before = journal.path.stat()
    assert journal.read() == POINTS
    after = journal.path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_point_with_other_metrics_is_named(journal: Journal) -> None:
    journal.add(Point(variant="dare", p=0.9, seed=0, metrics={"accurbcy": 0.5}))
    with pytest.raises(ConfigError, match=r"expected accuracy in each, found only accurbcy at p = 0\.9"):
        samples(journal.read(), "dare", "accuracy")


def test_a_line_that_was_cut_goes_and_the_rest_stays(journal: Journal) -> None:
    with journal.path.open("a") as file:
        file.write('{"variant": "cut')
    assert journal.read() == POINTS
    journal.add(POINTS[0])
    assert len(journal.read()) == len(POINTS) + 1


def test_a_full_disk_loses_no_point(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    with journal.path.open("a") as file:
        file.write('{"variant": "cut')

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="free some space"):
            journal.read()
    assert journal.read() == POINTS
    assert names(journal.path.parent) == ["points.jsonl"]


def test_two_do_not_measure_into_one_record(journal: Journal) -> None:
    told = pytest.raises(OutputExists, match=rf"found process {os.getpid()} on")
    with alone_with(journal.path), told, alone_with(journal.path):
        pass
    with alone_with(journal.path):
        assert journal.read() == POINTS
    assert names(journal.path.parent) == ["points.jsonl"]


def test_processes_of_one_launcher_are_one(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with alone_with(journal.path), alone_with(journal.path):
        assert journal.read() == POINTS


def test_what_a_kill_left_beside_a_record_goes(journal: Journal) -> None:
    for name in (
        ".points.jsonl.lock",
        ".points.jsonl.00000000-1-00000000.partial",
        ".points.jsonl.study.lock",
    ):
        (journal.path.parent / name).write_text("")
    with alone_with(journal.path):
        pass
    assert names(journal.path.parent) == ["points.jsonl"]


def test_a_record_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "search.json"
    MeasurementRecord(path, {"a": 1}).measured("one", lambda: {"x": 1.0})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            MeasurementRecord(path, {"a": 1}).measured("two", lambda: {"x": 2.0})
    assert set(MeasurementRecord(path, {"a": 1}).all) == {"one"}
    assert names(tmp_path) == ["search.json"]
