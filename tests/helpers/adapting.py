"""Adapters as PEFT writes them, and what merging one means in a few lines of float64."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dare_train.weights.files.checkpoint import Checkpoint
from dare_train.weights.lora.lora_checkpoint import AdapterWeights, merge_adapter

State = dict[str, torch.Tensor]
PRECISION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def adapt(model: torch.nn.Module, folder: Path, **options: Any) -> PeftModel:
    """`model` with an adapter of random factors, trained biases and heads, and the adapter saved in
    `folder`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own: what it does meanwhile is not what is tested
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted.save_pretrained(folder)
    return adapted


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_adapter(folder: Path, tensors: State, **fields: Any) -> Path:
    """As PEFT writes one."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def seen(base: Path, adapter: Path) -> AdapterWeights:
    weights = merge_adapter(Checkpoint.open(adapter), Checkpoint.open(base))
    assert isinstance(weights, AdapterWeights)
    return weights


def words(tensor: torch.Tensor) -> np.ndarray:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(f"<u{tensor.element_size()}")


def differing(base: Path, adapter: Path, expected: State) -> list[str]:
    """Names of tensors that are not `expected`, to the bit, of those that either has."""
    weights = seen(base, adapter)
    found = {name: weights.read(name, 0, info.numel) for name, info in weights.tensors.items()}
    common = found.keys() & expected.keys()
    unequal = {name for name in common if not np.array_equal(found[name], words(expected[name]))}
    return sorted(unequal | (found.keys() ^ expected.keys()))


def merged_by_definition(base: State, folder: Path, *, transposed: bool = False) -> State:
    """W + s · B A, and DoRA's norm, in float64 and rounded once; everything else that the adapter holds in
    place of the base's.
    """
    tensors = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    result = dict(base)
    for key, tensor in tensors.items():
        name = key.replace(".base_layer", "")
        if (
            "lora_" not in key
            and not re.search("original_module|modules_to_save", key)
            and (name in base or "classifier" in name)
        ):
            result[name] = tensor.to(base[name].dtype) if name in base else tensor
    for key in tensors:
        if key.endswith(("lora_A.weight", "lora_embedding_A")):
            module = key.partition(".lora_")[0]
            result[f"{module}.weight"] = _merged(
                result[f"{module}.weight"], module, tensors, config, transposed
            )
            if f"{module}.lora_B.bias" in tensors:
                bias = result[f"{module}.bias"]
                moved = bias.double() + _scaling(module, config) * tensors[f"{module}.lora_B.bias"].double()
                result[f"{module}.bias"] = rounded(moved, bias.dtype)
    return result


def _merged(
    weight: torch.Tensor, module: str, tensors: State, config: dict[str, Any], transposed: bool
) -> torch.Tensor:
    embedding = f"{module}.lora_embedding_A" in tensors
    suffix = "lora_embedding_{}" if embedding else "lora_{}.weight"
    a, b = (tensors[f"{module}.{suffix.format(side)}"].double().flatten(1) for side in "AB")
    update = _scaling(module, config) * torch.from_numpy(b.numpy() @ a.numpy())
    moved = weight.double() + (update.T if embedding or transposed else update.reshape(weight.shape))
    if config["use_dora"]:
        magnitude = tensors[f"{module}.lora_magnitude_vector"].double()
        moved = (magnitude / moved.square().sum(1).sqrt())[:, None] * moved
    return rounded(moved, weight.dtype)


def _scaling(module: str, config: dict[str, Any]) -> float:
    def value(pattern: str, default: str) -> float:
        fits = [number for key, number in config[pattern].items() if re.match(rf"(.*\.)?({key})$", module)]
        return fits[0] if fits else config[default]

    rank, alpha = value("rank_pattern", "r"), value("alpha_pattern", "lora_alpha")
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 rounded once to nearest-even: torch goes by way of float32."""
    fraction, exponent = np.frexp(values.numpy())
    precision = PRECISION[dtype]
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(fraction, precision)), exponent - precision)).to(dtype)
