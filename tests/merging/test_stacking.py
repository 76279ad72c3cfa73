"""Layers of models, stacked: mergekit's `passthrough`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import dare_train
from quantised_models import LLAMA, quantised, save_model
from safetensors.torch import load_file

from dare_train.errors import CheckpointError, ConfigError, NonFiniteDelta, TensorMismatch
from dare_train.merging import stacking
from dare_train.merging.config.stack import read_stack
from dare_train.merging.stacking import stack

State = dict[str, torch.Tensor]


def state(seed: int, layers: int = 4, width: int = 6, **more: torch.Tensor) -> State:
    generator = torch.Generator().manual_seed(seed)
    names = [
        f"model.layers.{layer}.{which}"
        for layer in range(layers)
        for which in ("mlp.up.weight", "norm.weight")
    ]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return {**{name: torch.randn(width, generator=generator).bfloat16() for name in names}, **more}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    monkeypatch.chdir(tmp_path)
    made = {"a": state(1), "b": state(2)}
    for name, tensors in made.items():
        save_model(tensors, Path(name), {**LLAMA, "num_hidden_layers": 4, "layer_types": [*"wxyz"]})
        (Path(name) / "tokenizer.json").write_text(json.dumps({"of": name}))
    return made


def stacked(slices: list[Any], out: str = "out", **keys: Any) -> State:
    Path("c.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": slices, **keys}))
    what = read_stack(Path("c.yml"))
    assert what is not None
    stack(what, Path(out), overwrite=True)
    return load_file(Path(out) / "model.safetensors")


def part(model: str, first: int, last: int, **more: Any) -> dict[str, Any]:
    return {"sources": [{"model": model, "layer_range": [first, last], **more}]}


def test_layers_come_in_any_order_and_more_than_once(models: dict[str, State]) -> None:
    found = stacked([part("a", 0, 2), part("b", 1, 4), part("a", 1, 2)])
    sources = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3), ("a", 1)]
    expected = {
        f"model.layers.{place}.{which}": models[model][f"model.layers.{number}.{which}"]
        for place, (model, number) in enumerate(sources)
        for which in ("mlp.up.weight", "norm.weight")
    }
    outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    expected |= {name: models["a"][name] for name in outside}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (6, [*"wxxyzx"])
    assert json.loads(Path("out/tokenizer.json").read_text()) == {"of": "a"}
    again = dare_train("merge", "out/dare_merge.yml", "--out", "again", cwd=Path.cwd())
    assert again.returncode == 0
    assert "6 layers in 15 tensors, copied" in again.stdout
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_what_lies_before_layers_is_the_firsts_and_behind_them_the_lasts(models: dict[str, State]) -> None:
    found = stacked([part("a", 0, 4), part("b", 3, 4)])
    assert torch.equal(found["model.embed_tokens.weight"], models["a"]["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], models["b"]["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], models["b"]["lm_head.weight"])
    assert torch.equal(
        stacked([part("a", 0, 4), part("b", 4, 4)])["lm_head.weight"], models["b"]["lm_head.weight"]
    )
    stacked([part("a", 0, 4), part("b", 0, 4)], base_model="b")
    assert json.loads(Path("out/tokenizer.json").read_text()) == {"of": "b"}


def test_weights_may_be_scaled(models: dict[str, State]) -> None:
    scale = [{"filter": "up", "value": 0.5}, {"value": 1}]
    found = stacked([part("a", 0, 2, parameters={"scale": scale}), part("b", 2, 4)], dtype="float32")
    before = models["a"]["model.layers.1.mlp.up.weight"].float()
    assert torch.equal(found["model.layers.1.mlp.up.weight"], before * 0.5)
    assert torch.equal(found["model.layers.1.norm.weight"], models["a"]["model.layers.1.norm.weight"].float())
    other = models["b"]["model.layers.2.mlp.up.weight"].float()
    assert torch.equal(found["model.layers.2.mlp.up.weight"], other)
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "float32"


def test_one_model_may_be_taken_as_it_is(models: dict[str, State]) -> None:
    document = {"merge_method": "passthrough", "models": [{"model": "a", "parameters": {"scale": 2}}]}
    Path("c.yml").write_text(json.dumps(document))
    what = read_stack(Path("c.yml"))
    assert what is not None
    stack(what, Path("out"))
    found = load_file("out/model.safetensors")
    assert all(torch.equal(found[name], tensor * 2) for name, tensor in models["a"].items())


def test_many_files(models: dict[str, State], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "_LARGEST_FILE", 30)
    with pytest.raises(FileNotFoundError):
        stacked([part("a", 0, 4)])
    index = json.loads(Path("out/model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == models["a"].keys()
    assert len(set(index.values())) == 6
    found = {name: load_file(f"out/{file}")[name] for name, file in index.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in models["a"].items())


@pytest.mark.usefixtures("models")
def test_what_cannot_be_stacked(tmp_path: Path) -> None:
    save_model(state(3, width=7), tmp_path / "wide", {})
    save_model(state(3, **{"vision.layers.0.weight": torch.ones(2)}), tmp_path / "two", {})
    packed, config = quantised("fp8", {f"model.layers.{n}.q_proj.weight": torch.ones(4, 4) for n in range(2)})
    save_model(packed, tmp_path / "packed", config)
    broken = state(4)
    broken["model.norm.weight"][0] = np.inf
    save_model(broken, tmp_path / "broken", {})
    for slices, kind, text in (
        ([part("a", 0, 5)], ConfigError, r"layer_range of a: expected at most 4, .* found \[0, 5\]"),
        ([part("a", 3, 2)], ConfigError, r"layer_range: expected \[first, last \+ 1\], found \[3, 2\]"),
        ([part("a", 2, 2)], ConfigError, "slices: expected at least one layer, found none"),
        (
            [part("a", 0, 2), part("wide", 2, 4)],
            TensorMismatch,
            r"layer 2: mlp.up.weight: expected shape",
        ),
        (
            [part("two", 0, 2)],
            ConfigError,
            "two: expected one stack of layers, found",
        ),
        ([part("packed", 0, 1)], CheckpointError, "of which layers can be stacked"),
        ([part("broken", 0, 1)], NonFiniteDelta, "model.norm.weight: expected finite BF16"),
        (
            [part("a", 0, 1, parameters={"weight": 1})],
            ConfigError,
            "a parameter of passthrough: scale",
        ),
        (
            [{"sources": [*part("a", 0, 1)["sources"]] * 2}],
            ConfigError,
            "one model: passthrough merges",
        ),
    ):
        with pytest.raises(kind, match=text):
            stacked(slices)
    assert not Path("out").exists()


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("words", [["--method", "ties"], ["--weight", "0.5"], ["--package"]])
def test_options_beside_a_stack_are_refused(words: list[str], tmp_path: Path) -> None:
    Path("c.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": [part("a", 0, 4)]}))
    done = dare_train("merge", "c.yml", *words, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "expected all options in the configuration" in done.stderr or "no --package" in done.stderr
    assert not Path("out").exists()


def test_another_method_is_no_stack(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("merge_method: ties\nbase_model: b\nmodels: [{model: a}]\n")
    assert read_stack(tmp_path / "c.yml") is None


def test_the_tokenizer_may_be_another_models_with_the_same_tokens(models: dict[str, State]) -> None:
    tokens = {"x": 0, "y": 1}
    for name, more in (("a", {}), ("b", {"z": 2})):
        model = {"type": "WordLevel", "vocab": tokens}
        Path(name, "tokenizer.json").write_text(json.dumps({"of": name, "model": model}))
        Path(f"{name}-more").mkdir()
        model = {"type": "WordLevel", "vocab": {**tokens, **more}}
        Path(f"{name}-more", "tokenizer.json").write_text(json.dumps({"of": "more", "model": model}))
    slices = [part("a", 0, 2), part("b", 1, 4)]
    for keys in ({"tokenizer_source": "a-more"}, {"tokenizer": {"source": "a-more"}}):
        stacked(slices, **keys)
        assert json.loads(Path("out/tokenizer.json").read_text())["of"] == "more"
    with pytest.raises(ConfigError, match="tokenizer_source: expected a tokenizer with the tokens of a"):
        stacked(slices, tokenizer_source="b-more")
    with pytest.raises(ConfigError, match=r"tokenizer\.pad_to_multiple_of: expected none: passthrough"):
        stacked(slices, tokenizer={"pad_to_multiple_of": 8})


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_base_with_an_adapter_alone_is_copied(method: str) -> None:
    source = {"model": "a+lora", "layer_range": [0, 4], "parameters": {"weight": 1}}
    top = {"merge_method": method, "base_model": "a+lora", "parameters": {"normalize": False}}
    what = read_stack({**top, "slices": [{"sources": [source]}], "dtype": "bfloat16"})
    assert what is not None
    assert [(each.model, each.first, each.last) for each in what.layers] == [("a+lora", 0, 4)]
    assert what.notes == ("nothing is added to a+lora: it is written as it is",)
    assert read_stack({**top, "models": [{"model": "a+lora"}]}) is not None
    assert read_stack({**top, "models": [{"model": "a+lora"}, {"model": "b"}]}) is None
    assert read_stack({**top, "base_model": "a", "models": [{"model": "a"}]}) is None
