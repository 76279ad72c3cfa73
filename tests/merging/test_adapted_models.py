"""`model+adapter` as a model, as a base, and as what layers are copied from, against sums in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_models import LLAMA, save_model
from safetensors.torch import load_file, save_file

from dare_train import merge
from dare_train.errors import ConfigError
from dare_train.merging.config.stack import read_stack
from dare_train.merging.models.references import parts_of
from dare_train.merging.stacking import stack

State = dict[str, torch.Tensor]
QUERY = "model.layers.0.self_attn.q_proj"
NAMES = (f"{QUERY}.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")


def state(seed: int, around: State | None = None) -> State:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(8, 8, generator=generator) * (0.1 if around else 1) for name in NAMES}
    return {
        name: (drawn[name] + around[name].float() if around else drawn[name]).bfloat16() for name in NAMES
    }


def adapter(name: str, seed: int) -> np.ndarray[Any, Any]:
    """As PEFT writes one, of rank 2 and scale 1.5. Returns its update."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 8, generator=generator) * 0.3, torch.randn(8, 2, generator=generator) * 0.3
    Path(name).mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    Path(name, "adapter_config.json").write_text(json.dumps(config))
    wrapped = {f"base_model.model.{QUERY}.lora_A.weight": a, f"base_model.model.{QUERY}.lora_B.weight": b}
    save_file(wrapped, f"{name}/adapter_model.safetensors")
    return 1.5 * (b.double().numpy() @ a.double().numpy())


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    base = state(1)
    states = {"base": base, "a": state(2, base)}
    for name, tensors in states.items():
        save_model(tensors, Path(name), LLAMA)
        Path(name, "generation_config.json").write_text(json.dumps({"of": name}))
    return {**states, "lora": adapter("lora", 3)}


def wide(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.double().numpy()


def test_a_model_with_an_adapter_is_that_model(models: dict[str, Any]) -> None:
    merge("base", ["a+lora", "a"], "out", weights=[0.5, 0.25], out_dtype="F32")
    found = load_file("out/model.safetensors")
    for name in NAMES:
        base, a = wide(models["base"][name]), wide(models["a"][name])
        update = models["lora"] if name.startswith(QUERY) else 0
        expected = base + 0.5 * (a + update - base) + 0.25 * (a - base)
        np.testing.assert_allclose(wide(found[name]), expected, rtol=0, atol=1e-5)


def test_nothing_is_rounded_before_the_sum(models: dict[str, Any]) -> None:
    merge("a", ["a+lora"], "out", weights=[1.0])
    found = load_file("out/model.safetensors")[f"{QUERY}.weight"]
    exact = models["a"][f"{QUERY}.weight"].double() + torch.from_numpy(models["lora"])
    assert torch.equal(found, exact.float().bfloat16())


def test_a_base_with_an_adapter_has_its_dtypes(models: dict[str, Any]) -> None:
    """As if it had been merged and saved: the result has that grid, and its other files."""
    merge("a+lora", ["base"], "out", weights=[0.5])
    exact = models["a"][f"{QUERY}.weight"].double() + torch.from_numpy(models["lora"])
    base = wide(exact.float().bfloat16())
    expected = base + 0.5 * (wide(models["base"][f"{QUERY}.weight"]) - base)
    found = load_file("out/model.safetensors")[f"{QUERY}.weight"]
    assert torch.equal(found, torch.from_numpy(expected).float().bfloat16())
    assert json.loads(Path("out/generation_config.json").read_text()) == {"of": "a"}


def test_layers_are_copied_with_an_adapter(models: dict[str, Any]) -> None:
    text = {"merge_method": "passthrough", "models": [{"model": "a+lora"}]}
    Path("c.yml").write_text(json.dumps(text))
    what = read_stack(Path("c.yml"))
    assert what is not None
    stack(what, Path("out"))
    found = load_file("out/model.safetensors")
    exact = models["a"][f"{QUERY}.weight"].double() + torch.from_numpy(models["lora"])
    assert torch.equal(found[f"{QUERY}.weight"], exact.float().bfloat16())
    assert torch.equal(found[NAMES[1]], models["a"][NAMES[1]])


def test_a_folder_may_have_a_plus_in_its_name(models: dict[str, Any]) -> None:
    Path("a").rename("a+b")
    assert parts_of("a+b") == ["a+b"]
    merge("base", ["a+b"], "out")
    assert torch.equal(load_file("out/model.safetensors")[NAMES[1]], models["a"][NAMES[1]])


def test_what_is_no_adapter_is_refused(models: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"a\+base: expected an adapter after the plus, found the model"):
        merge("base", ["a+base"], "out")
    for name in ("a+lora+lora", "a+", "+lora"):
        with pytest.raises(ConfigError, match=r"expected model\+adapter, found [23] parts; merge the first"):
            merge("base", [name], "out")
    with pytest.raises(ConfigError, match="base: expected one checkpoint under a package, found a"):
        merge("a+lora", ["base"], "out", package=True)
