"""Tiny models of several architectures, a base and a fine-tune of each, and what PEFT makes of an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_DECODER: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_ENCODER: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
    num_labels=3,
)  # fmt: skip
_GPT2: dict[str, Any] = dict(
    n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2
)

KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "qwen2, with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
    "bert, a classifier": lambda: BertForSequenceClassification(BertConfig(**_ENCODER)),
    "gpt2, as [in, out]": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, tie_word_embeddings=False)),
    "mixtral, files of experts": lambda: MixtralForCausalLM(MixtralConfig(**_DECODER, num_local_experts=4)),
}


@dataclass(frozen=True)
class Pair:
    """A base and its fine-tune on disk."""

    base: Path
    tuned: Path
    kind: type[Any]

    def loaded(self, folder: Path) -> Any:
        return self.kind.from_pretrained(folder, dtype=torch.float32)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.loaded(self.tuned).state_dict()
        return state

    def adapted(self, adapter: Path) -> PeftModel:
        """The base with an adapter, as PEFT loads it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own: it reads deprecated properties of models
            return PeftModel.from_pretrained(self.loaded(self.base), adapter)

    def merged(self, adapter: Path) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.adapted(adapter).merge_and_unload().state_dict()
        return state

    def outputs(self, model: Any) -> torch.Tensor:
        ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits: torch.Tensor = model(ids).logits
        return logits


def pair(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tuned: Callable[[str], bool] = lambda name: True,
    by: float = 0.02,
) -> Pair:
    """`tuned` says which parameters move, at random by `by`."""
    generator = torch.Generator().manual_seed(1)
    model = KINDS[name]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model.save_pretrained(folder / "base")
        for label, parameter in model.named_parameters():
            if tuned(label):
                parameter.add_((torch.randn(parameter.shape, generator=generator) * by).to(dtype))
    model.save_pretrained(folder / "tuned")
    return Pair(folder / "base", folder / "tuned", type(model))
