"""Small models in the layouts of libraries that quantise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
Parts = Callable[[str, torch.Tensor, int], State]

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "vocab_size": 16,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def weights(seed: int = 0) -> State:
    """A model in full precision: four matrices, and what is never quantised."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.self_attn.{which}_proj" for layer in (0, 1) for which in "qk"]
    state = {f"{name}.weight": torch.randn(32, 32, generator=generator).bfloat16() for name in names}
    state |= {f"{name}.bias": torch.randn(32, generator=generator).bfloat16() for name in names}
    return {**state, "model.embed_tokens.weight": torch.randn(16, 32, generator=generator).bfloat16()}


def save_model(state: State, folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _fp8(module: str, full: torch.Tensor, seed: int) -> State:
    scale = full.float().abs().max() / 448
    packed = (full.float() / scale).to(torch.float8_e4m3fn)
    return {f"{module}.weight": packed, f"{module}.weight_scale_inv": scale.reshape(1, 1)}


def _fp8_static(module: str, full: torch.Tensor, seed: int) -> State:
    parts = _fp8(module, full, seed)
    scale = parts.pop(f"{module}.weight_scale_inv").reshape(())
    return {**parts, f"{module}.weight_scale": scale, f"{module}.input_scale": torch.tensor(0.5)}


def _gptq(module: str, full: torch.Tensor, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31 - 1, (4, 32), dtype=torch.int32, generator=generator)
    return {
        f"{module}.qweight": packed,
        f"{module}.qzeros": torch.full((1, 4), 0x77777777, dtype=torch.int32),
        f"{module}.scales": full[:1].half(),
        f"{module}.g_idx": torch.zeros(32, dtype=torch.int32),
    }


def _awq(module: str, full: torch.Tensor, seed: int) -> State:
    parts = _gptq(module, full, seed)
    return {name: tensor for name, tensor in parts.items() if not name.endswith("g_idx")}


def _bnb8(module: str, full: torch.Tensor, seed: int) -> State:
    scale = full.float().abs().amax(1)
    packed = (full.float() / scale[:, None] * 127).round().to(torch.int8)
    return {
        f"{module}.weight": packed,
        f"{module}.SCB": scale,
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _bnb4(module: str, full: torch.Tensor, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    weight = f"{module}.weight"
    return {
        weight: torch.randint(0, 256, (512, 1), dtype=torch.uint8, generator=generator),
        f"{weight}.absmax": full.float().abs().reshape(16, 64).amax(1),
        f"{weight}.quant_map": torch.linspace(-1, 1, 16),
        f"{weight}.quant_state.bitsandbytes__nf4": torch.zeros(20, dtype=torch.uint8),
    }


def _compressed(module: str, full: torch.Tensor, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.weight_packed": torch.randint(-9, 9, (32, 4), dtype=torch.int32, generator=generator),
        f"{module}.weight_scale": full[:, :1],
        f"{module}.weight_shape": torch.tensor([32, 32]),
    }


def _torchao(module: str, full: torch.Tensor, seed: int) -> State:
    scale = full.float().abs().amax(1, keepdim=True)
    return {
        f"{module}._weight_qdata": (full.float() / scale * 127).to(torch.int8),
        f"{module}._weight_scale": scale.bfloat16(),
    }


def _mxfp4(module: str, full: torch.Tensor, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.weight_blocks": torch.randint(0, 256, (32, 1, 16), dtype=torch.uint8, generator=generator),
        f"{module}.weight_scales": torch.randint(110, 130, (32, 1), dtype=torch.uint8, generator=generator),
    }


def _unheard_of(module: str, full: torch.Tensor, seed: int) -> State:
    parts = _torchao(module, full, seed)
    return {
        f"{module}.trellis": parts[f"{module}._weight_qdata"],
        f"{module}.trellis_scales": parts[f"{module}._weight_scale"],
    }


_MAKERS: dict[str, tuple[Parts, str]] = {
    "fp8": (_fp8, "fp8"),
    "fp8 static": (_fp8_static, "fp8"),
    "gptq": (_gptq, "gptq"),
    "awq": (_awq, "awq"),
    "bnb 8": (_bnb8, "bitsandbytes"),
    "bnb 4": (_bnb4, "bitsandbytes"),
    "compressed-tensors": (_compressed, "compressed-tensors"),
    "torchao": (_torchao, "torchao"),
    "mxfp4": (_mxfp4, "mxfp4"),
    "unheard of": (_unheard_of, "vibes"),
}

SCHEMES = {
    "fp8": "fp8 with scales", "fp8 static": "fp8 with scales", "gptq": "GPTQ", "awq": "AWQ",
    "bnb 8": "bitsandbytes 8-bit", "bnb 4": "bitsandbytes 4-bit", "compressed-tensors": "compressed-tensors",
    "torchao": "torchao", "mxfp4": "mxfp4", "unheard of": "",
}  # fmt: skip
"""What messages call each."""
FORMULAS = ("fp8", "fp8 static", "bnb 8", "mxfp4")


def quantised(scheme: str, full: State, seed: int = 0) -> tuple[State, dict[str, Any]]:
    """A model in a scheme, and its configuration."""
    parts, method = _MAKERS[scheme]
    state: State = {}
    for number, (name, tensor) in enumerate(full.items()):
        module = name.removesuffix(".weight")
        state |= parts(module, tensor, seed + number) if name.endswith("proj.weight") else {name: tensor}
    return state, {**LLAMA, "quantization_config": {"quant_method": method}}
