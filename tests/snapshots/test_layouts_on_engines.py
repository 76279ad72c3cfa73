"""What files cut, join or turn, and engines spread: each rank writes its share of the file's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import FSDP, run_ranks, train_on
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForSequenceClassification, set_seed

from dare_train import DareCallback, DeltaPackage, extract

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "GteForSequenceClassification": SMALL,
    "MixtralForSequenceClassification": {**SMALL, **EXPERTS},
}
"""Files of the one hold query, key and value in one tensor, gate and up in another; those of the other cut
what holds all experts."""
LAYERS = {
    "GteForSequenceClassification": "GteLayer",
    "MixtralForSequenceClassification": "MixtralDecoderLayer",
}
OPTIONS: dict[str, Any] = {"p": 0.5, "seed": 3, "values": "exact"}


def model_of(kind: str) -> Any:
    set_seed(7)
    maker = getattr(transformers, kind)
    return maker(maker.config_class(**CONFIGS[kind]))


def trained(rank: int, engine: str, kind: str, base: Path, out: Path) -> list[str]:
    callback = DareCallback(**OPTIONS, on_error="raise")
    wrapped = {"transformer_layer_cls_to_wrap": [LAYERS[kind]]}
    told = {"fsdp_config": {**FSDP[engine], **wrapped}} if engine in FSDP else {}
    load = AutoModelForSequenceClassification.from_pretrained
    train_on(engine, lambda: load(base), out, callback, **told)
    return [snapshot.package.manifest.result for snapshot in callback.packages]


def saved(checkpoint: Path, kind: str, folder: Path) -> Path:
    """A checkpoint as `save_pretrained` writes it."""
    sharded = checkpoint / "pytorch_model_fsdp_0"
    folder.mkdir()
    if sharded.exists():
        dcp_to_torch_save(sharded, folder / "whole.bin")
        model = model_of(kind)
        model.load_state_dict(torch.load(folder / "whole.bin")["model"])
        model.save_pretrained(folder)
    else:  # under ZeRO-3 this transformers saves LayerNorm's under names of years ago
        state = load_file(checkpoint / "model.safetensors")
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2", "fsdp1"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_package_is_that_of_the_files(tmp_path: Path, kind: str, engine: str) -> None:
    model = model_of(kind)
    model.save_pretrained(base := tmp_path / "base")
    told = run_ranks(trained, 2, engine, kind, base, tmp_path / "out")
    assert told[0] == told[1]
    tuned = saved(tmp_path / "out/checkpoint-4", kind, tmp_path / "saved")
    ours = DeltaPackage.open(tmp_path / "out/dare/step-4")
    theirs = extract(base, tuned, tmp_path / "again", cast_base=True, **OPTIONS)
    assert ours.manifest.result == theirs.manifest.result
    assert {r.name for r in ours.manifest.tensors} == {r.name for r in theirs.manifest.tensors}
    assert {r.name for r in ours.manifest.tensors} != set(model.state_dict())
    ours.verify(base)
