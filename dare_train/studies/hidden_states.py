"""The embeddings that a model of transformers makes of texts, before its first layer and after each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..errors import ConfigError
from ..evaluation.linear_layers import Batch, evaluating


def enough_of(batches: Iterable[Batch], tokens: int) -> list[Batch]:
    """The first batches that hold so many tokens."""
    kept: list[Batch] = []
    count = 0
    for batch in batches:
        kept.append({name: value for name, value in batch.items() if name != "labels"})
        count += int(token_places(batch).sum())
        if count >= tokens:
            break
    if not kept:
        raise ConfigError("batches", expected="at least one", found="none")
    return kept


def token_places(batch: Batch) -> torch.Tensor:
    """bool [batch, seq]: the tokens that count."""
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor):
        return mask.bool()
    ids = next(
        (value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim() >= 2), None
    )
    if ids is None:
        raise ConfigError("batches", expected="tensors [batch, seq]", found=f"{sorted(batch)}")
    return torch.ones(ids.shape[:2], dtype=torch.bool)


@torch.no_grad()
def hidden_states(model: torch.nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Embeddings [tokens, hidden] before the first layer and after each."""
    device = next(model.parameters()).device
    parts = list[list[torch.Tensor]]()
    with evaluating(model):
        for batch in batches:
            inputs = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
            if states is None:
                raise ConfigError(
                    "model",
                    expected="one that tells hidden_states, as those of transformers do",
                    found=type(model).__name__,
                )
            places = token_places(batch).to(device)
            parts.append([state[places].float() for state in states])
    return [torch.cat(states) for states in zip(*parts, strict=True)]


def cosines_of(dense_states: Sequence[torch.Tensor], other_states: Sequence[torch.Tensor]) -> Iterator[float]:
    """Of each pair of states, in the mean over tokens."""
    for dense, other in zip(dense_states, other_states, strict=True):
        yield float(torch.nn.functional.cosine_similarity(dense.double(), other.double(), dim=-1).mean())
