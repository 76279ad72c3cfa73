"""Adapters on several ranks, over a base that is not the files' or lies quantised in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import run_ranks, train_on
from fine_tunes import ADAPTERS, load, lora, rows, save_decoder
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from dare_train import DareCallback, DeltaPackage, apply

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def moved(rank: int, engine: str, base: Path, out: Path, adapter: str) -> None:
    engines.FSDP["fsdp2"].update(LAYERS)
    options: dict[str, Any] = dict(max_steps=2, save_strategy="no", train_rows=rows())
    train_on(engine, lambda: ADAPTERS[adapter](load(base)), out, DareCallback(p=0.0), **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("ranks") / "base")


def applied_state(base: Path, run: Path, out: Path) -> dict[str, torch.Tensor]:
    package = DeltaPackage.open(run / "dare/final")
    assert package.manifest.base_model == str(base)
    apply(base, package, out)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def whole_copies(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, torch.Tensor]]:
    """The weights from an adapter's package by ranks with whole copies of the model, once for all engines."""

    @cache
    def of(adapter: str) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("ddp")
        run_ranks(moved, 2, "ddp", base, folder / "out", adapter)
        return applied_state(base, folder / "out", folder / "received")

    return of


@pytest.mark.parametrize(
    ("engine", "adapter"),
    [("zero3", "lora"), ("zero3", "pissa"), ("fsdp2", "lora"), ("fsdp2", "pissa"), ("fsdp2", "fresh layer")],
)
def test_shards_under_an_adapter_give_the_package_of_whole_copies(
    base: Path, whole_copies: Callable[..., Any], tmp_path: Path, engine: str, adapter: str
) -> None:
    run_ranks(moved, 2, engine, base, tmp_path / "out", adapter)
    found = applied_state(base, tmp_path / "out", tmp_path / "received")
    before = load_file(base / "model.safetensors")
    for name, tensor in whole_copies(adapter).items():
        assert torch.allclose(tensor, found[name], atol=2e-3), name
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, before[name])]
    assert any("q_proj" in name for name in changed)


def packed_model(base: Path) -> Any:
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.float32
    )
    return lora(load(base, quantization_config=four_bit, device_map="cpu"))


def on_packed(rank: int, engine: str, base: Path, out: Path) -> None:
    engines.FSDP["fsdp2"].update(LAYERS)
    options: dict[str, Any] = dict(max_steps=2, save_strategy="no", train_rows=rows())
    trainer = train_on(engine, partial(packed_model, base), out, DareCallback(p=0.0), **options)
    state = trainer.model.state_dict()
    factors = {name: tensor for name, tensor in state.items() if "lora_" in name}
    whole = {name: tensor.full_tensor() if engine == "fsdp2" else tensor for name, tensor in factors.items()}
    if rank == 0:
        torch.save(whole, out / "factors.pt")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_qlora_on_two_ranks_updates_the_full_precision_files(base: Path, tmp_path: Path, engine: str) -> None:
    run_ranks(on_packed, 2, engine, base, tmp_path / "out")
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(base)
    apply(base, package, tmp_path / "received")
    received = load_file(tmp_path / "received/model.safetensors")
    factors = torch.load(tmp_path / "out/factors.pt")
    updated = 0
    for name, before in load_file(base / "model.safetensors").items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a = factors.get(f"{module}.lora_A.default.weight")
        expected = before
        if a is not None:
            b = factors[f"{module}.lora_B.default.weight"]
            expected = (before.double() + 2 * b.double() @ a.double()).float()
            updated += 1
        assert torch.equal(received[name], expected), name
    assert updated == 6
