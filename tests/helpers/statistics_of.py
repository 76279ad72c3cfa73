"""Statistics, compared."""

from __future__ import annotations

import torch

State = dict[str, torch.Tensor]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    # What a bias of keys does, softmax undoes: of its gradient, which is 0, only rounding remains.
    assert float((found.double() - expected).norm()) <= max(tolerance * float(expected.norm()), 1e-20)


def assert_same(found: State, expected: State, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close(found[name], tensor.double(), tolerance)
