"""Damaged records of earlier measurements: one error that names file and line, or field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dare_train.errors import CheckpointError
from dare_train.evaluation.measurements import Journal, MeasurementRecord, Point
from dare_train.evaluation.texts import read_rows

HEAD = {"base": "b", "tuned": "t", "setup": {}}
POINT = {"variant": "dare", "p": 0.5, "seed": 1, "metrics": {"loss": 0.25}}


def journal(path: Path, *lines: object) -> Journal:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return Journal(path, "b", "t", {})


def test_points_come_back(tmp_path: Path) -> None:
    point = Point(variant="dare", p=0.5, seed=1, metrics={"loss": 0.25})
    assert journal(tmp_path / "points.jsonl", HEAD, POINT).read() == [point]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"base": "b'], r"points\.jsonl: line 1: expected measurements, found Unterminated string"),
        (["[]"], r"points\.jsonl: line 1: expected measurements, found array"),
        ([{"base": "b"}], r"line 1: expected measurements, found .* missing required field tuned"),
        ([{**HEAD, "setup": 3}], r"line 1: setup: expected object, found int"),
        ([HEAD, {"variant": "x"}], r"line 2: expected measurements, found .* missing required field p"),
        ([HEAD, POINT, {**POINT, "p": "half"}], r"line 3: p: expected float, found str"),
        (
            [HEAD, {**POINT, "metrics": {"loss": []}}],
            r"line 2: metrics.*: expected float, found array",
        ),
        ([HEAD, "[" * 5000], r"line 2: expected measurements, found values nested too deep"),
    ],
    ids=range(8),
)
def test_damaged_journals(tmp_path: Path, lines: list[object], message: str) -> None:
    damaged = journal(tmp_path / "points.jsonl", *lines)
    before = (tmp_path / "points.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        damaged.read()
    assert (tmp_path / "points.jsonl").read_bytes() == before


@pytest.mark.parametrize("raw", [b'{"setup": {', b"{}", b"1", b"\xff", b"[" * 5000, b'{"setup": []}'])
def test_damaged_measurements(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "search.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"search\.json.*move it away to measure anew"):
        MeasurementRecord(tmp_path / "search.json", {"a": 1})


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("d.csv", b"text,label\n" + b"x" * 200_000 + b",1\n"),
        ("d.json", b"1"),
        ("d.json", b"[" * 5000),
        ("d.json", b'["a"]'),
        ("d.jsonl", b'"a"\n'),
        ("d.jsonl", b"{]\n"),
        ("d.txt", b"\xff"),
    ],
)
def test_data_that_cannot_be_read(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"{name}.*: expected"):
        read_rows(tmp_path / name)
