"""States of a tiny model with tensors of every kind, and another that was tuned."""

from __future__ import annotations

import torch
from tiny import State, random_tensor


def base_state() -> State:
    return {
        "bf16": random_tensor(3, 3000, seed=1),
        "bf16.2": random_tensor(777, seed=2),
        "f32": random_tensor(50, 70, seed=3).float() * 1.1,
        "f16": random_tensor(901, seed=4).half(),
        "f64": random_tensor(33, seed=5).double() / 3,
        "count": torch.arange(4),
        "same": random_tensor(20, seed=6),
        "flags": torch.arange(9) > 2,
        "bytes": torch.arange(9).byte(),
    }


def tuned_state(seed: int, base: State | None = None) -> State:
    """Some elements of most tensors moved a little."""
    state = {}
    for number, (name, tensor) in enumerate((base or base_state()).items()):
        generator = torch.Generator().manual_seed(100 * seed + number)
        noise = (
            torch.randn(tensor.shape, generator=generator)
            * (torch.rand(tensor.shape, generator=generator) < 0.7)
            * 0.05
        )
        state[name] = (
            tensor if name in ("count", "same", "flags", "bytes") else (tensor + noise).to(tensor.dtype)
        )
    return state


def to(state: State, device: torch.device) -> State:
    return {name: tensor.to(device, copy=True) for name, tensor in state.items()}


def same(one: State, other: State) -> bool:
    one, other = to(one, torch.device("cpu")), to(other, torch.device("cpu"))
    return all(
        torch.equal(one[name].view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8))
        for name in one.keys() | other.keys()
    )
