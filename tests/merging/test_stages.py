"""A file of several merges: in which order, from where to where, and what they come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import dare_train
from quantised_models import LLAMA, save_model
from safetensors.torch import load_file

from dare_train.errors import ConfigError
from dare_train.merging.config.mergekit import read
from dare_train.merging.config.stages import stages_of

NAME = "model.layers.0.mlp.up_proj.weight"
OUT, PARTS = Path("out"), Path("out-parts")


def linear(*models: str, **keys: Any) -> dict[str, Any]:
    listed = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": listed, **keys}


def written(*documents: Any) -> Path:
    path = Path("c.yml")
    path.write_text(yaml.safe_dump_all(documents))
    return path


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.chdir(tmp_path)
    found = {}
    for seed, name in enumerate("abcd"):
        found[name] = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        save_model({NAME: found[name]}, Path(name), LLAMA)
    return found


def test_the_unnamed_one_is_the_result(states: dict[str, torch.Tensor]) -> None:
    written(
        linear("second", "c"),
        linear("first", "b", name="second"),
        {"merge_method": "passthrough", "models": [{"model": "a"}], "name": "first"},
    )
    done = dare_train("merge", "c.yml", "--out", "out", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    expected = 0.5 * (0.5 * (states["a"] + states["b"]) + states["c"])
    torch.testing.assert_close(load_file("out/model.safetensors")[NAME], expected)
    assert sorted(path.name for path in PARTS.iterdir()) == ["first", "second"]
    torch.testing.assert_close(load_file("out-parts/first/model.safetensors")[NAME], states["a"])
    again = read(Path("out/dare_merge.yml"))[0]
    assert [model.model for model in again.models] == ["out-parts/second", "c"]
    done = dare_train("merge", "c.yml", "--out", "other", "--intermediate-dir", "out-parts", cwd=Path.cwd())
    assert done.returncode != 0
    assert "first: expected a path that does not exist yet" in done.stderr
    words = ["--intermediate-dir", "out-parts", "--overwrite", "--out", "other"]
    assert dare_train("merge", "c.yml", *words, cwd=Path.cwd()).returncode == 0
    assert torch.equal(load_file("other/model.safetensors")[NAME], load_file("out/model.safetensors")[NAME])


def test_where_all_have_names_the_one_that_none_uses_is_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(
        linear("one", "two", name="three"), linear("a", "b", name="one"), linear("one", "c", name="two")
    )
    found = stages_of(path, OUT, PARTS)
    assert [(stage.name, stage.out) for stage in found] == [
        ("one", PARTS / "one"), ("two", PARTS / "two"), ("three", OUT)
    ]  # fmt: skip
    assert [each["model"] for each in found[2].document["models"]] == ["out-parts/one", "out-parts/two"]


def test_names_stand_wherever_models_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = {"model": "one+lora", "layer_range": [0, 2]}
    last = {
        "merge_method": "slerp",
        "base_model": "one",
        "slices": [{"sources": [source, {"model": "b", "layer_range": [0, 2]}]}],
        "parameters": {"t": 0.5},
        "tokenizer": {
            "source": "one",
            "tokens": {"one": {"source": {"kind": "model_token", "model": "one"}}},
        },
        "chat_template": "one",
    }
    (_, found) = stages_of(written(last, linear("a", "b", name="one")), OUT, PARTS)
    document = found.document
    assert document["base_model"] == document["tokenizer"]["source"] == "out-parts/one"
    assert document["slices"][0]["sources"][0]["model"] == "out-parts/one+lora"
    assert document["tokenizer"]["tokens"]["one"]["source"]["model"] == "out-parts/one"
    assert document["chat_template"] == "one"


def test_one_document_is_no_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stages_of(written(linear("a", "b", name="x")), OUT, PARTS) == []


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([linear("a"), linear("b")], "name: expected another for each merge, found two merges without one"),
        (
            [linear("a", name="x"), linear("b", name="x")],
            "name: expected another for each merge, found two merges called 'x'",
        ),
        (
            [linear("a", name="../x"), linear("b")],
            "name: expected the name of a folder, of at most 100 characters, found '../x'",
        ),
        (
            [linear("a", name=5), linear("b")],
            "name: expected the name of a folder, of at most 100 characters, found 5",
        ),
        (
            [linear("y", name="x"), linear("x", name="y"), linear("a")],
            "name: expected merges that need one another in an order, found",
        ),
        (
            [linear("a", name="x"), linear("b", name="y")],
            "name: expected one merge that no other uses, found x, y; leave out the name of the one",
        ),
        ([linear("a", name="x"), [1]], r"the configuration: expected a merge in each document, found \[1\]"),
    ],
)
def test_what_comes_to_no_series_is_refused(
    documents: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        stages_of(written(*documents), OUT, PARTS)


def test_nothing_is_written_before_all_is_read(states: dict[str, torch.Tensor]) -> None:
    written(linear("a", "b", name="first"), {**linear("first", "c"), "merge_method": "bogus"})
    done = dare_train("merge", "c.yml", "--out", "out", cwd=Path.cwd())
    assert done.returncode == 2
    assert "merge_method: expected one of" in done.stderr
    assert not PARTS.exists()
    written(linear("a", "b"))
    done = dare_train("merge", "c.yml", "--out", "out", "--intermediate-dir", "parts", cwd=Path.cwd())
    assert "--intermediate-dir: expected a file of several merges, found one merge" in done.stderr
    assert json.loads(Path("a/config.json").read_text())
