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


def _bnb4_state(**more: Any) -> torch.Tensor:
    """What bitsandbytes keeps as text, of a weight of 32 x 32."""
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 32], **more}
    return torch.tensor([*json.dumps(said).encode()], dtype=torch.uint8)


def _bnb4(module: str, full: torch.Tensor, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    weight = f"{module}.weight"
    return {
        weight: torch.randint(0, 256, (512, 1), dtype=torch.uint8, generator=generator),
        f"{weight}.absmax": full.float().abs().reshape(16, 64).amax(1),
        f"{weight}.quant_map": torch.linspace(-1, 1, 16),
        f"{weight}.quant_state.bitsandbytes__nf4": _bnb4_state(),
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


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    bounds = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(*bounds, shape, generator=generator, dtype=dtype)


def _fp8_blocks(module: str, full: torch.Tensor, seed: int) -> State:
    parts = _fp8(module, full, seed)
    return {**parts, f"{module}.weight_scale_inv": torch.tensor([[0.5, 1.5], [0.25, 3.0]])}


def _fp8_powers(module: str, full: torch.Tensor, seed: int) -> State:
    scales = torch.tensor([[127, 126], [129, 125]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return {**_fp8(module, full, seed), f"{module}.weight_scale_inv": scales}


def _fp8_rows(module: str, full: torch.Tensor, seed: int) -> State:
    scale = full.float().abs().amax(1, keepdim=True) / 448
    packed = (full.float() / scale).to(torch.float8_e4m3fn)
    return {
        f"{module}.weight": packed,
        f"{module}.weight_scale": scale,
        f"{module}.input_scale_ub": torch.tensor([1200.0]),
    }


def _fp8_alone(module: str, full: torch.Tensor, seed: int) -> State:
    return {f"{module}.weight": full.float().to(torch.float8_e4m3fn)}


def _bnb4_nested(module: str, full: torch.Tensor, seed: int) -> State:
    weight = f"{module}.weight"
    return {
        **_bnb4(module, full, seed),
        f"{weight}.absmax": _drawn((16,), torch.uint8, seed + 1),
        f"{weight}.nested_absmax": full.float().abs().amax().reshape(1),
        f"{weight}.nested_quant_map": torch.linspace(-1, 1, 256),
        f"{weight}.quant_state.bitsandbytes__nf4": _bnb4_state(
            nested_blocksize=256, nested_dtype="float32", nested_offset=0.75
        ),
    }


def _bnb4_stored_in_bf16(module: str, full: torch.Tensor, seed: int) -> State:
    """`bnb_4bit_quant_storage`: bits that are no numbers, NaN among them."""
    parts = _bnb4(module, full, seed)
    words = _drawn((512,), torch.uint8, seed)
    words[:2] = torch.tensor([0xFF, 0x7F])
    return {**parts, f"{module}.weight": words.view(torch.bfloat16).reshape(-1, 1)}


def _int8(module: str, full: torch.Tensor, seed: int) -> State:
    scale = full.float().abs().amax(1, keepdim=True) / 127
    packed = (full.float() / scale).round().to(torch.int8)
    return {f"{module}.weight": packed, f"{module}.weight_scale": scale.bfloat16()}


def _int8_zeros(module: str, full: torch.Tensor, seed: int) -> State:
    return {**_int8(module, full, seed), f"{module}.weight_zero_point": _drawn((32, 1), torch.int8, seed)}


def _nvfp4(module: str, full: torch.Tensor, seed: int) -> State:
    return {
        f"{module}.weight_packed": _drawn((32, 16), torch.uint8, seed),
        f"{module}.weight_scale": full[:, :2].float().to(torch.float8_e4m3fn),
        f"{module}.weight_global_scale": torch.tensor([0.5]),
        f"{module}.input_global_scale": torch.tensor([0.25]),
    }


def _modelopt(module: str, full: torch.Tensor, seed: int) -> State:
    return {
        f"{module}.weight": _drawn((32, 16), torch.uint8, seed),
        f"{module}.weight_scale": full[:, :2].float().to(torch.float8_e4m3fn),
        f"{module}.weight_scale_2": torch.tensor(0.5),
        f"{module}.input_scale": torch.tensor(0.25),
    }


def _torchao_zeros(module: str, full: torch.Tensor, seed: int) -> State:
    return {**_torchao(module, full, seed), f"{module}._weight_zero_point": _drawn((32, 1), torch.int8, seed)}


def _quanto(module: str, full: torch.Tensor, seed: int) -> State:
    parts = _int8(module, full, seed)
    return {
        f"{module}.weight._data": parts[f"{module}.weight"],
        f"{module}.weight._scale": parts[f"{module}.weight_scale"],
        f"{module}.input_scale": torch.ones(()),
        f"{module}.output_scale": torch.ones(()),
    }


def _hqq(module: str, full: torch.Tensor, seed: int) -> State:
    return {
        f"{module}.W_q": _drawn((16, 32), torch.uint8, seed),
        f"{module}.scale": full[:, :1].clone(),
        f"{module}.zero": full[:, 1:2].clone(),
        f"{module}.shape": torch.tensor([32, 32]),
    }


def _aqlm(module: str, full: torch.Tensor, seed: int) -> State:
    return {
        f"{module}.codes": _drawn((32, 4, 1), torch.int16, seed),
        f"{module}.codebooks": full.reshape(1, 128, 1, 8).half(),
        f"{module}.scales": full[:, :1].reshape(32, 1, 1, 1).half(),
    }


def _exl3(module: str, full: torch.Tensor, seed: int) -> State:
    return {
        f"{module}.trellis": _drawn((2, 2, 48), torch.int16, seed),
        f"{module}.suh": full[0].half(),
        f"{module}.svh": full[1].half(),
    }


def _unheard_of(module: str, full: torch.Tensor, seed: int) -> State:
    parts = _torchao(module, full, seed)
    return {
        f"{module}.trellis": parts[f"{module}._weight_qdata"],
        f"{module}.trellis_scales": parts[f"{module}._weight_scale"],
    }


def _words(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator)


def _gptq_by_groups(module: str, full: torch.Tensor, seed: int) -> State:
    """4 bits, two groups of inputs in another order; no zero is 15."""
    return {
        f"{module}.qweight": _words((4, 32), seed),
        f"{module}.qzeros": _words((2, 4), seed + 1) & 0x77777777,
        f"{module}.scales": (full[:2].abs() / 8).half(),
        f"{module}.g_idx": torch.arange(32, dtype=torch.int32) % 2,
    }


def _awq_gemm(module: str, full: torch.Tensor, seed: int) -> State:
    return {
        f"{module}.qweight": _words((32, 4), seed),
        f"{module}.qzeros": _words((2, 4), seed + 1),
        f"{module}.scales": (full[:2].abs() / 8).half(),
    }


def _packed_rows(module: str, full: torch.Tensor, seed: int) -> State:
    return {
        f"{module}.weight_packed": _words((32, 4), seed),
        f"{module}.weight_scale": full[:, :2].abs() / 8,
        f"{module}.weight_shape": torch.tensor([32, 32]),
    }


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
_PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"},
        }
    },
}  # fmt: skip

_MAKERS: dict[str, tuple[Parts, str | dict[str, Any]]] = {
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
    "fp8 blocks": (_fp8_blocks, "fp8"),
    "fp8 powers": (_fp8_powers, "fp8"),
    "fp8 rows": (_fp8_rows, "fbgemm_fp8"),
    "fp8 alone": (_fp8_alone, ""),
    "bnb 4 nested": (_bnb4_nested, "bitsandbytes"),
    "bnb 4 in bf16": (_bnb4_stored_in_bf16, "bitsandbytes"),
    "int8": (_int8, "compressed-tensors"),
    "int8 zeros": (_int8_zeros, "compressed-tensors"),
    "nvfp4": (_nvfp4, "compressed-tensors"),
    "modelopt": (_modelopt, "modelopt"),
    "torchao zeros": (_torchao_zeros, "torchao"),
    "quanto": (_quanto, "quanto"),
    "hqq": (_hqq, "hqq"),
    "aqlm": (_aqlm, "aqlm"),
    "exl3": (_exl3, "exl3"),
    "gptq by groups": (_gptq_by_groups, _GPTQ),
    "awq gemm": (_awq_gemm, _AWQ),
    "packed rows": (_packed_rows, _PACKED),
}

SCHEMES = {
    "fp8": "fp8 with scales", "fp8 static": "fp8 with scales", "gptq": "GPTQ", "awq": "AWQ",
    "bnb 8": "bitsandbytes 8-bit", "bnb 4": "bitsandbytes 4-bit", "compressed-tensors": "compressed-tensors",
    "torchao": "torchao", "mxfp4": "mxfp4", "unheard of": "", "fp8 blocks": "fp8 with scales",
    "fp8 powers": "fp8 with scales", "fp8 rows": "fp8 with scales", "fp8 alone": "fp8 without scales",
    "bnb 4 nested": "bitsandbytes 4-bit", "bnb 4 in bf16": "bitsandbytes 4-bit", "int8": "",
    "int8 zeros": "", "nvfp4": "compressed-tensors", "modelopt": "", "torchao zeros": "torchao",
    "quanto": "", "hqq": "", "aqlm": "", "exl3": "",
    "gptq by groups": "GPTQ", "awq gemm": "AWQ", "packed rows": "compressed-tensors",
}  # fmt: skip
"""What messages call each, also where no configuration names it."""
FORMULAS = (
    "fp8", "fp8 static", "fp8 blocks", "fp8 powers", "fp8 rows", "fp8 alone", "bnb 8", "mxfp4", "int8",
)  # fmt: skip
OTHER_FORMULAS = (
    "bnb 4", "bnb 4 nested", "bnb 4 in bf16", "gptq by groups", "awq gemm", "packed rows", "torchao",
    "torchao zeros", "int8 zeros",
)  # fmt: skip
"""Which are more than a product of two tensors."""


def quantised(scheme: str, full: State, seed: int = 0) -> tuple[State, dict[str, Any]]:
    """A model in a scheme, and its configuration."""
    parts, method = _MAKERS[scheme]
    state: State = {}
    for number, (name, tensor) in enumerate(full.items()):
        module = name.removesuffix(".weight")
        state |= parts(module, tensor, seed + number) if name.endswith("proj.weight") else {name: tensor}
    said = {"quant_method": method} if isinstance(method, str) else method
    return state, {**LLAMA, **({"quantization_config": said} if method else {})}
