"""Slices whose layers have other places in the result, against sums written down layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_models import LLAMA, save_model
from safetensors.torch import load_file

from dare_train import extract
from dare_train.errors import ConfigError
from dare_train.merging.config.mergekit import read
from dare_train.merging.config.task import MergeTask
from dare_train.merging.merge import run

State = dict[str, np.ndarray[Any, Any]]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def layer(number: int) -> str:
    return f"model.layers.{number}.mlp.up_proj.weight"


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    """Models of six layers."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        names = [*(layer(number) for number in range(6)), EMBEDDING, HEAD, NORM]
        state = {which: torch.randn(4, 4, generator=generator) for which in names}
        config = {**LLAMA, "num_hidden_layers": 6, "layer_types": [*"uvwxyz"], "vocab_size": 4}
        save_model(state, Path(name), config)
        found[name] = {which: tensor.numpy() for which, tensor in state.items()}
    return found


def part(*sources: tuple[str, int, int, float], **keys: Any) -> dict[str, Any]:
    listed = [
        {"model": name, "layer_range": [first, last], "parameters": {"weight": weight}}
        for name, first, last, weight in sources
    ]
    return {"sources": listed, **keys}


def merged(method: str, slices: list[Any], **keys: Any) -> State:
    recipe, _ = read(f"{ {'merge_method': method, 'slices': slices, **keys}!r}")
    assert read(recipe.to_yaml())[0] == recipe
    run(MergeTask.of(recipe), "out", overwrite=True)
    return {name: tensor.numpy() for name, tensor in load_file("out/model.safetensors").items()}


def close(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)


def test_layers_are_merged_with_layers_of_other_places(states: dict[str, State]) -> None:
    a, b = states["a"], states["b"]
    slices = [part(("a", 0, 2, 0.25), ("b", 4, 6, 0.75)), part(("b", 1, 3, 0.5), ("a", 0, 2, 0.5))]
    found = merged("linear", slices)
    expected = {layer(n): 0.25 * a[layer(n)] + 0.75 * b[layer(n + 4)] for n in (0, 1)}
    expected |= {layer(n + 2): 0.5 * b[layer(n + 1)] + 0.5 * a[layer(n)] for n in (0, 1)}
    expected[EMBEDDING] = 0.25 * a[EMBEDDING] + 0.75 * b[EMBEDDING]
    expected |= {name: 0.5 * a[name] + 0.5 * b[name] for name in (HEAD, NORM)}
    close(found, expected)
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (4, [*"uvuv"])  # the first model's


def test_layers_are_repeated_by_models_of_their_own(states: dict[str, State]) -> None:
    """Without a base, and with no model in all slices: a frankenmerge by `linear`."""
    found = merged("linear", [part(("a", 0, 4, 1.0)), part(("b", 2, 6, 1.0))])
    expected = {layer(n): states["a"][layer(n)] for n in range(4)}
    expected |= {layer(n + 4): states["b"][layer(n + 2)] for n in range(4)}
    close(found, {**expected, EMBEDDING: states["a"][EMBEDDING], **{n: states["b"][n] for n in (HEAD, NORM)}})
    assert json.loads(Path("out/config.json").read_text())["layer_types"] == [*"uvwxwxyz"]


def test_deltas_are_from_the_bases_own_layers(states: dict[str, State]) -> None:
    base, a = states["base"], states["a"]
    slices = [part(("base", 3, 5, 1), ("a", 0, 2, 0.5)), part(("a", 2, 4, 2.0))]
    found = merged("task_arithmetic", slices, base_model="base")
    expected = {layer(n): base[layer(n + 3)] + 0.5 * (a[layer(n)] - base[layer(n + 3)]) for n in (0, 1)}
    expected |= {layer(n): base[layer(n)] + 2 * (a[layer(n)] - base[layer(n)]) for n in (2, 3)}
    expected[EMBEDDING] = base[EMBEDDING] + 0.5 * (a[EMBEDDING] - base[EMBEDDING])
    expected |= {name: base[name] + 2 * (a[name] - base[name]) for name in (HEAD, NORM)}
    close(found, expected)


def test_gradients_run_over_the_layers_of_a_slice(states: dict[str, State]) -> None:
    slices = [{**part(("base", 2, 5, 1), ("a", 2, 5, 1)), "parameters": {"t": [0, 1]}}]
    for source in slices[0]["sources"]:
        del source["parameters"]
    found = merged("slerp", slices, base_model="base")
    np.testing.assert_allclose(found[layer(0)], states["base"][layer(2)], atol=1e-6)
    np.testing.assert_allclose(found[layer(2)], states["a"][layer(4)], atol=1e-6)
    left, right = states["base"][layer(3)], states["a"][layer(3)]
    angle = np.arccos((left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right))
    np.testing.assert_allclose(found[layer(1)], (left + right) * np.sin(angle / 2) / np.sin(angle), atol=1e-5)


def test_a_slice_of_no_layers_says_what_follows_them(states: dict[str, State]) -> None:
    slices = [part(("a", 0, 6, 1.0)), part(("a", 6, 6, 0.0), ("b", 6, 6, 1.0))]
    found = merged("linear", slices)
    expected = {name: states["b" if name in (HEAD, NORM) else "a"][name] for name in states["a"]}
    close(found, expected)
    slices = [part(("b", 0, 0, 1.0)), part(("a", 1, 6, 1.0))]
    expected = {layer(n): states["a"][layer(n + 1)] for n in range(5)}
    expected |= {EMBEDDING: states["b"][EMBEDDING], **{name: states["a"][name] for name in (HEAD, NORM)}}
    close(merged("linear", slices), expected)


def test_what_cannot_move_is_refused(states: dict[str, State]) -> None:
    with pytest.raises(ConfigError, match=r"layer_range of a: expected at most 6, .*, found \[4, 8\]"):
        merged("linear", [part(("a", 0, 2, 1)), part(("a", 4, 8, 1))])
    extract("base", "a", "package", p=0)
    with pytest.raises(ConfigError, match="package: expected checkpoints, where layers move, found a"):
        merged("task_arithmetic", [part(("package", 2, 4, 1))], base_model="base")
    other = {
        name.replace("layers", "blocks"): tensor for name, tensor in load_file("b/model.safetensors").items()
    }
    save_model(other, Path("other"), LLAMA)
    with pytest.raises(ConfigError, match=r"other: expected layers called model\.layers, as others"):
        merged("linear", [part(("a", 0, 2, 1)), part(("other", 3, 5, 1))])
    recipe, _ = read(f"{ {'merge_method': 'linear', 'slices': [part(('a', 1, 3, 1))]}!r}")
    with pytest.raises(ConfigError, match="slices: expected layers in their places, for a package"):
        run(MergeTask.of(recipe), "out", package=True)
