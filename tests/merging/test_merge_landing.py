"""Merges of weights finer than the base's: what is small is not lost before it is merged, nor at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fine_tunes import load, lora, save_decoder
from peft import PeftModel
from safetensors.torch import load_file
from tiny import State, save
from typer.testing import CliRunner

from dare_train import merge
from dare_train.cli.main import app
from dare_train.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
STEP = 2.0**-7
"""Of bf16 at 1."""


def result(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["w"]


def fine(seed: int, size: float = STEP / 20) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.ones(4096) + size * torch.rand(4096, generator=generator)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save({"w": torch.ones(4096).bfloat16()}, tmp_path / "base")


METHODS = {
    "task_arithmetic": {},
    "breadcrumbs": {"density": 0.9},
    "ties": {"density": 1.0},
    "slerp": {"t": 0.5},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
}


@pytest.mark.parametrize("method", METHODS)
def test_rounded_to_the_nearest_nothing_is_left_and_by_draws_all_is(
    base: Path, tmp_path: Path, method: str
) -> None:
    models = [save(fine(seed), tmp_path / f"model-{seed}") for seed in (1, 2)]
    weights = None if method == "slerp" else [0.5, 0.5]
    exact = tmp_path / "exact"
    options = {"method": method, "weights": weights, **METHODS[method]}
    merge(base, models, exact, out_dtype="F32", **options)
    expected = float((result(exact) - 1).mean())
    assert expected > 0
    for rounding in ("nearest", "stochastic"):
        merge(base, models, tmp_path / rounding, rounding=rounding, allow_unchanged=True, **options)
        assert result(tmp_path / rounding).dtype == torch.bfloat16
    if method != "della_linear":
        assert torch.equal(result(tmp_path / "nearest"), torch.ones(4096).bfloat16())
    of_draws = result(tmp_path / "stochastic").double() - 1
    assert float(of_draws.mean()) == pytest.approx(expected, abs=4 * float(of_draws.std()) / 64)


def test_the_seed_decides_where_elements_land(base: Path, tmp_path: Path) -> None:
    model = save(fine(1), tmp_path / "model")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        merge(base, [model], tmp_path / name, rounding="stochastic", seed=seed)
    assert torch.equal(result(tmp_path / "a"), result(tmp_path / "b"))
    assert not torch.equal(result(tmp_path / "a"), result(tmp_path / "c"))


def test_elements_that_no_model_moves_keep_their_words(tmp_path: Path) -> None:
    base = save({"w": torch.full((64,), -0.0).bfloat16()}, tmp_path / "base")
    model = save({"w": torch.full((64,), -0.0)}, tmp_path / "model")
    merge(base, [model], tmp_path / "out", rounding="stochastic", allow_unchanged=True)
    assert torch.equal(result(tmp_path / "out").view(torch.int16), torch.full((64,), -(2**15)).short())


def test_adapters_are_not_rounded_before_they_are_dropped_from(tmp_path: Path) -> None:
    """LoRA (arXiv 2106.09685) on a bf16 base: dropping and rescaling lifts what rounding would lose."""
    base = save_decoder(tmp_path / "base", dtype=torch.bfloat16)
    model = lora(load(base), init_lora_weights=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2e-3)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    name = "model.layers.0.mlp.down_proj.weight"
    whole = load(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(whole, tmp_path / "adapter").merge_and_unload()
    before = load_file(base / "model.safetensors")[name].double()
    delta = exact.state_dict()[name].double() - before
    merge(base, [tmp_path / "adapter"], tmp_path / "out", p=0.9, rounding="stochastic")
    moved = load_file(tmp_path / "out/model.safetensors")[name].double() - before
    share = float((moved * delta).sum() / delta.square().sum())
    assert share == pytest.approx(1, abs=4 * np.sqrt(10 / delta.numel()))


def test_a_configuration_has_it_on_record(base: Path, tmp_path: Path) -> None:
    model = save(fine(1), tmp_path / "model")
    report = merge(base, [model], tmp_path / "out", rounding="stochastic")
    (tmp_path / "again.yml").write_text(report.recipe.to_yaml())
    assert yaml.safe_load(report.recipe.to_yaml())["rounding"] == "stochastic"
    told = CliRunner().invoke(app, ["merge", str(tmp_path / "again.yml"), "--out", str(tmp_path / "again")])
    assert told.exit_code == 0, told.output
    assert torch.equal(result(tmp_path / "again"), result(tmp_path / "out"))
    words = ["merge", str(base), str(model), "--rounding", "stochastic", "--out", str(tmp_path / "third")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert torch.equal(result(tmp_path / "third"), result(tmp_path / "out"))


def test_the_bases_dtype_can_be_asked_for_by_name(base: Path, tmp_path: Path) -> None:
    model = save(fine(1), tmp_path / "model")
    merge(base, [model], tmp_path / "drawn", rounding="stochastic")
    merge(base, [model], tmp_path / "base dtype", dtype="base")
    words = ["merge", str(base), str(model), "--dtype", "base", "--out", str(tmp_path / "told")]
    assert CliRunner().invoke(app, words).exit_code == 0
    for name in ("base dtype", "told"):
        assert torch.equal(result(tmp_path / name), result(tmp_path / "drawn"))
    merge(base, [model], tmp_path / "nearest", dtype="base", rounding="nearest", allow_unchanged=True)
    assert torch.equal(result(tmp_path / "nearest"), torch.ones(4096).bfloat16())
    with pytest.raises(ConfigError, match=r"out_dtype: expected none"):
        merge(base, [model], tmp_path / "out", dtype="base", out_dtype="F32")
    with pytest.raises(ConfigError, match=r"dtype: expected one of base"):
        merge(base, [model], tmp_path / "out", dtype="trained")


def test_other_roundings_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounding.*stochastic"):
        merge(base, [base], tmp_path / "out", rounding="up")
