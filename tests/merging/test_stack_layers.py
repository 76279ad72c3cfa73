"""`stack_layers`: what configurations say with `passthrough`, from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import dare_train
from quantised_models import LLAMA, save_model
from safetensors.torch import load_file

from dare_train import Layers, stack_layers
from dare_train.errors import CheckpointError, ConfigError, OutputExists

OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
State = dict[str, torch.Tensor]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    """Two models of four layers, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    made = {}
    for number, model in enumerate("ab"):
        generator = torch.Generator().manual_seed(number)
        names = [*OUTSIDE, *(f"model.layers.{n}.{which}.weight" for n in range(4) for which in ("up", "o"))]
        made[model] = {name: torch.randn(3, 2, generator=generator).bfloat16() for name in names}
        save_model(made[model], Path(model), {**LLAMA, "num_hidden_layers": 4})
    return made


def layer(models: dict[str, State], model: str, number: int, which: str) -> torch.Tensor:
    return models[model][f"model.layers.{number}.{which}.weight"]


def test_layers_of_models_one_on_the_other(models: dict[str, State]) -> None:
    report = stack_layers(
        [Layers("a", 0, 2), Layers(Path("b"), 2), Layers("a", 1, 2, scale={"o.weight": 0, "up": 0.5})], "out"
    )
    found = load_file("out/model.safetensors")
    sources = [("a", 0), ("a", 1), ("b", 2), ("b", 3)]
    for place, (model, number) in enumerate(sources):
        for which in ("up", "o"):
            expected = layer(models, model, number, which)
            assert torch.equal(found[f"model.layers.{place}.{which}.weight"], expected)
    assert torch.equal(found["model.layers.4.up.weight"], layer(models, "a", 1, "up") * 0.5)
    assert not found["model.layers.4.o.weight"].any()
    assert all(torch.equal(found[name], models["a"][name]) for name in OUTSIDE)
    assert (report.layers, len(found)) == (5, 13)
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 5


def test_the_recipe_makes_it_again(models: dict[str, State]) -> None:
    layers = [Layers("a", 0, 3, scale=0.25), Layers("b", scale={"o": 2.0})]
    stack_layers(layers, "out", base_model="b", out_dtype="F32")
    done = dare_train("merge", "out/dare_merge.yml", "--out", "again", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json", "dare_merge.yml"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()


@pytest.mark.parametrize(
    ("layers", "options", "text"),
    [
        ([], {}, "layers: expected a list of at least one Layers"),
        (["a"], {}, "layers: expected a list of at least one Layers"),
        ([("a", 0, 9)], {}, r"layer_range of a: expected at most 4, as many as a has, found \[0, 9\]"),
        ([("a", 4)], {}, "slices: expected at least one layer, found none"),
        ([("a", 0, 1)], {"out_dtype": "float32"}, "out_dtype: expected one of F64, F32, F16, BF16"),
        ([("a", 0, 1)], {"chat_template": "nobody"}, "chat_template"),
    ],
)
def test_what_cannot_be_stacked_is_refused(
    models: dict[str, State], layers: list[Any], options: dict[str, Any], text: str
) -> None:
    given = [Layers(*each) if isinstance(each, tuple) else each for each in layers]
    with pytest.raises(ConfigError, match=text):
        stack_layers(given, "out", **options)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("a", 2, 1), "layers of a: expected 0 ≤ first ≤ last, found 2, 1"),
        (("a", -1), "layers of a: expected 0 ≤ first ≤ last, found -1, None"),
        (("a", 0, 1.0), "layers of a: expected 0 ≤ first ≤ last"),
        (("a", 0, 1, "half"), "scale: expected a number, or numbers by name, found 'half'"),
        (("a", 0, 1, {"o": True}), "scale: expected a number, or numbers by name, found True"),
    ],
)
def test_what_no_layers_are_is_told_at_once(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Layers(*arguments)


def test_places_are_looked_at_before_anything_is_written(models: dict[str, State]) -> None:
    with pytest.raises(CheckpointError):
        stack_layers([Layers("nowhere", 0, 1)], "out")
    stack_layers([Layers("a", 0, 1)], "out")
    with pytest.raises(OutputExists):
        stack_layers([Layers("a", 0, 1)], "out")
    stack_layers([Layers("b", 0, 1)], "out", overwrite=True)
    assert torch.equal(load_file("out/model.safetensors")["lm_head.weight"], models["b"]["lm_head.weight"])
