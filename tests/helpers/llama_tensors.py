"""The tensors and the configuration of a LLaMA of one layer, and the factors of an adapter for it."""

from __future__ import annotations

import torch

State = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj"
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 6,
    "torch_dtype": "float32",
}  # fmt: skip


def state(*, tied: bool, rows: int = 6, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    layer = "model.layers.0"
    shapes = {EMBEDDING: (rows, 8), "model.norm.weight": (8,)}
    shapes |= {f"{layer}.self_attn.{which}_proj.weight": (8, 8) for which in "qkvo"}
    shapes |= {f"{layer}.mlp.{which}_proj.weight": (8, 8) for which in ("gate", "up", "down")}
    shapes |= {f"{layer}.{which}_layernorm.weight": (8,) for which in ("input", "post_attention")}
    shapes |= {} if tied else {HEAD: (rows, 8)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def factors(module: str, seed: int = 3, rows: int = 8) -> State:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 8, generator=generator), torch.randn(rows, 2, generator=generator)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
