"""Names that wrappers of training left in files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from quantised_models import save_model
from safetensors.torch import load_file

from dare_train import apply, extract, merge
from dare_train.weights.files.checkpoint import Checkpoint
from dare_train.weights.lora.opening import open_weights
from dare_train.weights.wrapper_names import without_wrappers

NAMES = ["model.embed.weight", "model.layers.0.w", "model.layers.1.w", "lm_head.weight"]
WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "ddp": lambda name: f"module.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the other way": lambda name: f"_orig_mod.module.{name}",
    "twice": lambda name: f"module.module.{name}",
    "inside": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "fsdp": lambda name: (
        f"_fsdp_wrapped_module.{name.replace('layers.0.', 'layers.0._fsdp_wrapped_module.')}"
    ),
    "checkpointed": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_taken_out(kind: str) -> None:
    wrapped = [WRAPPED[kind](name) for name in NAMES]
    assert without_wrappers(wrapped) == dict(zip(NAMES, wrapped, strict=True))


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        ["module.a", "b"],
        ["module."],
        ["0.module.weight", "1.module.weight"],
        ["_orig_mod.a", "a"],
        ["base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"],
        ["base_model.model.a.base_layer.weight", "base_model.model.b"],
        [],
    ],
)
def test_what_is_no_wrapper_stays(names: list[str]) -> None:
    assert without_wrappers(names) == {name: name for name in names}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_is_the_model(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = {name: torch.ones(3) * number for number, name in enumerate(NAMES)}
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    folder = save_model(base, tmp_path / "base", {})
    with caplog.at_level(logging.WARNING, "dare_train"):
        wrapped = save_model({WRAPPED[kind](name): t for name, t in tuned.items()}, tmp_path / "wrapped", {})
        opened = Checkpoint.open(wrapped)
    assert "wrapped: names without " in caplog.text
    assert opened.tensors.keys() == tuned.keys()
    apply(folder, extract(folder, wrapped, tmp_path / "package", p=0), tmp_path / "applied")
    merge(folder, [wrapped], tmp_path / "merged")
    memory = {WRAPPED[kind](name): tensor for name, tensor in tuned.items()}
    merge(base, [memory], tmp_path / "of-memory")
    for out in ("applied", "merged", "of-memory"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == tuned.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tuned.items())
    arrays = {name: tensor.numpy() for name, tensor in memory.items()}
    assert open_weights(arrays).tensors.keys() == tuned.keys()
    assert np.array_equal(open_weights(arrays).read(NAMES[0], 0, 3), opened.read(NAMES[0], 0, 3))
