"""What tests of the studies share: a fine-tuned model, and words that a tiny tokenizer knows."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from training import classifier
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def tuned_model(
    base: Path, seed: int = 1, dtype: torch.dtype = torch.float32, by: float = 0.02
) -> PreTrainedModel:
    """The encoder with its head after a random step."""
    model, generator = classifier(base, dtype=dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (by * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return model.eval()


class Words:
    """A tokenizer whose tokens are `w0` to `w59`."""

    @staticmethod
    def save(folder: Path) -> None:
        inner = Tokenizer(models.WordLevel({f"w{number}": number for number in range(60)}, unk_token="w0"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w0").save_pretrained(
            folder
        )
