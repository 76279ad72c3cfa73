"""Names in packages are those of files, also where the model in memory has others: fused experts, old names,
prefixes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import FSDP, run_ranks, train_on
from safetensors.torch import load_file, save_file
from tiny import DECODER
from training import save_base
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    MixtralConfig,
    Qwen3MoeConfig,
    set_seed,
)

from dare_train import DareCallback, DeltaPackage, apply, apply_, extract
from dare_train.weights.live.live import LiveWeights

CONFIGS = {
    "mixtral": MixtralConfig(**DECODER, num_local_experts=3, num_labels=3, pad_token_id=0),
    "qwen3_moe": Qwen3MoeConfig(
        **DECODER, moe_intermediate_size=8, num_experts=3, num_experts_per_tok=2, num_labels=3, pad_token_id=0
    ),
}


def save_moe(kind: str, folder: Path) -> Path:
    set_seed(5)
    AutoModelForSequenceClassification.from_config(CONFIGS[kind]).save_pretrained(folder)
    return folder


def moe(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("kind", CONFIGS)
def test_live_names_and_words_are_those_of_the_files(tmp_path: Path, kind: str) -> None:
    base = save_moe(kind, tmp_path / "base")
    saved, live = load_file(base / "model.safetensors"), LiveWeights(moe(base))
    assert {name: info.shape for name, info in live.tensors.items()} == {
        name: tuple(t.shape) for name, t in saved.items()
    }
    assert sum(".experts." in name for name in live.tensors) == 2 * 3 * 3
    for name, tensor in saved.items():
        assert live.read(name, 0, tensor.numel()).tobytes() == tensor.numpy().tobytes(), name


def trained(rank: int, engine: str, kind: str, base: Path, out: Path) -> str:
    callback = DareCallback(p=0.5)
    wrapped = {
        "fsdp_config": {
            **FSDP["fsdp2"],
            "transformer_layer_cls_to_wrap": [f"{CONFIGS[kind].__class__.__name__[:-6]}DecoderLayer"],
        }
    }
    train_on(engine, lambda: moe(base), out, callback, **(wrapped if engine == "fsdp2" else {}))
    assert callback.package is not None
    return callback.package.manifest.result


@pytest.mark.parametrize(
    ("engine", "world"), [("single", 1), ("ddp", 2), ("zero3", 2), ("fsdp2", 2)], ids=str
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_packages_of_mixtures_of_experts(tmp_path: Path, kind: str, engine: str, world: int) -> None:
    base, out = save_moe(kind, tmp_path / "base"), tmp_path / "out"
    run_ranks(trained, world, engine, kind, base, out)
    package = DeltaPackage.open(out / "dare/final")
    assert set(package.records) == set(load_file(base / "model.safetensors"))
    assert {record.kind for record in package.manifest.tensors} == {"delta"}
    package.verify(base)
    apply(base, package, tmp_path / "result")
    model = moe(tmp_path / "result")
    assert LiveWeights(model).tensors.keys() == package.records.keys()
    undo = apply_(received := moe(base), package)
    assert all(
        torch.equal(a, b)
        for a, b in zip(received.state_dict().values(), model.state_dict().values(), strict=True)
    )
    undo.revert()
    assert all(
        torch.equal(a, b)
        for a, b in zip(received.state_dict().values(), moe(base).state_dict().values(), strict=True)
    )
    if engine != "zero3":
        checkpoint = extract(base, out / "checkpoint-4", tmp_path / "extracted", p=0.5)
        assert package.manifest.result == checkpoint.manifest.result


def test_files_with_names_of_years_ago(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in load_file(base / "model.safetensors").items()
    }
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    assert LiveWeights(BertModel.from_pretrained(base)).tensors.keys() == old.keys()
