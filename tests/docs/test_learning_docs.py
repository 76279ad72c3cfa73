"""docs/learning.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from studying import tuned_model
from task_sequences import task
from training import classifier, examples, make_trainer, save_base

from dare_train import ContinualTask, DeltaPackage
from dare_train.training.continual import Strategy
from dare_train.training.lottery_tickets import Kind

TEXT = (Path(__file__).parents[2] / "docs/learning.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def rows(heading: str) -> list[str]:
    """First cells of the table below this head, names only."""
    table = TEXT.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def test_every_strategy_and_every_kind_has_a_row() -> None:
    assert rows("strategy") == [*get_args(Strategy)]
    assert rows("kind") == [*get_args(Kind)]


def test_the_blocks_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = save_base(tmp_path / "encoder")
    classifier(encoder).save_pretrained(tmp_path / "base")
    tuned_model(encoder).save_pretrained(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    tasks: dict[str, ContinualTask] = {"reviews": task(0), "news": task(1)}
    model = classifier(encoder)
    names: dict[str, Any] = {
        "model": model,
        "args": make_trainer(model, tmp_path / "out").args,
        "data": examples(),
        "trainer_of": lambda name: tasks[name].trainer,
        "metric_of": lambda name: tasks[name].evaluate,
        "evaluate": lambda model: tasks["reviews"].evaluate(model),
    }
    for block in BLOCKS:
        exec(block, names)
    assert (tmp_path / "out/dare/final/dare_config.json").exists()
    assert names["found"].own_forgetting == 0.0
    assert [path.name for path in names["packages"]] == ["01-news"]
    assert DeltaPackage.open("package").stats["density"] < 1
    assert names["ticket"].density == pytest.approx(1 / 8, abs=0.01)
    for page in ("run/report/continual.html", "masks/masks.html", "rates/rates.html", "tickets/tickets.html"):
        assert Path(page).exists()
