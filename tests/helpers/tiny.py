"""Tiny models, and what a refusal looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dare_train import apply, extract
from dare_train.errors import DareError

State = dict[str, torch.Tensor]
DECODER: dict[str, Any] = dict(
    vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip
"""Sizes in a decoder's configuration."""


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def base_state() -> State:
    return {
        "a.weight": random_tensor(20, 30),
        "b.weight": random_tensor(50, seed=1),
        "c.count": torch.arange(4),
    }


def moved(state: State, by: float = 0.125) -> State:
    return {name: tensor + by if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def save(state: State, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    return folder


def refusal(error: DareError, kind: type[DareError], *texts: str) -> None:
    message = str(error)
    assert type(error) is kind, f"{type(error).__name__}: {message}"
    assert "\n" not in message
    assert len(message) < 600
    for text in texts:
        assert text in message, f"{text!r} is not in: {message}"


def apply_refused(base: Path, packages: Any, kind: type[DareError], *texts: str, **options: Any) -> None:
    place = base.parent / "results"
    place.mkdir()
    with pytest.raises(DareError) as caught:
        apply(base, packages, place / "out", **options)
    assert list(place.iterdir()) == []
    refusal(caught.value, kind, *texts)


def extract_refused(
    base: Any, tuned: Any, place: Path, kind: type[DareError], *texts: str, **options: Any
) -> None:
    place.mkdir(exist_ok=True)
    before = sorted(place.rglob("*"))
    with pytest.raises(DareError) as caught:
        extract(base, tuned, place / "out", **options)
    assert sorted(place.rglob("*")) == before
    refusal(caught.value, kind, *texts)
