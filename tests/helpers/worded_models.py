"""A tiny language model on disk with a tokenizer, and texts for it: what trainers of other libraries need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]


def save_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, *, tied: bool = True) -> Path:
    set_seed(9)
    shape: dict[str, Any] = dict(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, tie_word_embeddings=tied)).to(
        dtype
    ).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def save_texts(path: Path, count: int = 24) -> Path:
    """Lines of JSON, each with a text of twelve words."""
    texts = (" ".join(f"w{(7 * i + j) % 40}" for j in range(12)) for i in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
