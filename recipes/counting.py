"""What the recipes train on when they are given nothing: a tiny model, and sequences that count by ones, twos
or threes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 256


def save_tiny_model(folder: Path) -> str:
    """A Llama of 120,000 random weights in bfloat16, saved as `from_pretrained` expects it; nothing if it is
    there already.
    """
    if not (folder / "model.safetensors").exists():
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def sequences(count: int, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Examples for a causal language model. The same at the same index, however many there are."""
    rows = [(37 * number + torch.arange(length) * (1 + number % 3)) % VOCABULARY for number in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]
