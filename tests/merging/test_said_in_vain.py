"""Filters of a configuration that fit nothing, and cases that never count, are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from llama_tensors import LLAMA, state
from quantised_models import save_model

from dare_train.merging.config.mergekit import read
from dare_train.merging.config.stack import read_stack
from dare_train.merging.config.task import MergeTask
from dare_train.merging.merge import run
from dare_train.merging.stacking import stack

MERGE = """
merge_method: task_arithmetic
base_model: base
models:
- model: model
  parameters: {{weight: {setting}}}
"""
STACK = """
merge_method: passthrough
slices:
- sources:
  - model: base
    layer_range: [0, 1]
- sources:
  - model: model
    layer_range: [0, 1]
    parameters: {{scale: {setting}}}
"""
CASES = [
    ("[{filter: self_attn, value: 0.5}, {value: 1}]", ""),
    ("{filter: self_attn, value: 0.5}", ""),
    ("[]", "an empty list says nothing"),
    ("[{filter: self_atn, value: 0.5}, {value: 1}]", "no tensor's name has self_atn in it: is it misspelt?"),
    ("[{value: 1}, {filter: mlp, value: 0.5}]", "a case never counts, behind one for every tensor"),
    (
        "[{filter: '*', value: 1}, {filter: mlp, value: 0}, {value: 2}]",
        "2 cases never count, behind one for every tensor",
    ),
]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "model")):
        save_model(state(tied=False, seed=seed), tmp_path / name, LLAMA)


def notes_on(text: str) -> Sequence[str]:
    """What is told of the setting, where the configuration is carried out."""
    Path("given.yml").write_text(text)
    stacked = read_stack(Path("given.yml"))
    if stacked is not None:
        notes = stack(stacked, Path("out")).notes
    else:
        recipe, _ = read(Path("given.yml"))
        notes = run(MergeTask.of(recipe), Path("out")).notes
    return [note for note in notes if " of 'model': " in note]


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(("setting", "told"), CASES)
@pytest.mark.parametrize("text", [MERGE, STACK])
def test_cases_that_come_to_nothing_are_told(text: str, setting: str, told: str) -> None:
    notes = notes_on(text.format(setting=setting))
    assert len(notes) == bool(told)
    assert told in "".join(notes)
