"""The architectures that people use most, each step against what `save_pretrained` and PEFT write;
`scripts/architectures` tries all of them.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
from zoo import records  # noqa: E402
from zoo.__main__ import parser  # noqa: E402
from zoo.catalogue import MOST_USED, architectures, named  # noqa: E402
from zoo.table import summary, table  # noqa: E402
from zoo.trial import STEPS, Outcome, Record, tried  # noqa: E402

WITHOUT_LORA = {"MambaForCausalLM"}
"""Of those, what PEFT cannot adapt or merge."""


def test_there_are_forty() -> None:
    names = {architecture.name for architecture in architectures()}
    assert len(set(MOST_USED)) == 40
    assert set(MOST_USED) <= names
    assert len(names) > 600


@pytest.mark.parametrize("name", MOST_USED)
def test_every_step_is_right(name: str) -> None:
    with warnings.catch_warnings():
        record = tried(named(name))
    assert record.unbuilt == ""
    expected = dict.fromkeys(STEPS, "right")
    if name in WITHOUT_LORA:
        expected |= dict.fromkeys(STEPS[-2:], "not possible")
    assert {step: outcome.verdict for step, outcome in record.steps.items()} == expected, record.steps


def test_records_are_kept_and_told(tmp_path: Path) -> None:
    right = dict.fromkeys(STEPS, Outcome("right"))
    made = [
        Record("A", "causal", "a", steps=right, seconds=1.5),
        Record("B", "vision", "b", steps={**right, "merge": Outcome("refused", "x in /tmp/zoo-1/base: why")}),
        Record("C", "vision", "c", unbuilt="no default"),
    ]
    for record in made:
        records.write(tmp_path / "records", record)
    assert [records.read(tmp_path / "records", name) for name in "ABC"] == made
    assert records.read(tmp_path / "records", "D") is None
    assert "3 classes of 3 model types, 2 of them built." in summary(made)
    assert "| merge | 1 | 0 | 1 | 0 |" in summary(made)
    page = table(made, ["E"])
    assert "* merge, refused: B: x in why\n" in page
    assert "* C: no default\n" in page
    assert page.endswith("## What was not tried yet\n\nE\n")


def test_parts_of_the_work_tile_it(capsys: pytest.CaptureFixture[str]) -> None:
    everything = architectures()
    shards = [parser().parse_args(["--shard", f"{number}/3"]).shard for number in (1, 2, 3)]
    parts = [everything[number - 1 :: count] for number, count in shards]
    assert sorted(one.name for part in parts for one in part) == [one.name for one in everything]
    for text in ("0/3", "4/3", "x", "1/"):
        with pytest.raises(SystemExit):
            parser().parse_args(["--shard", text])
    assert "expected I/N" in capsys.readouterr().err
