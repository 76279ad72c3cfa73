"""The random generators that everything in a process shares: Python's, numpy's and torch's. Code of others
that uses them borrows them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

CPU = torch.device("cpu")


@contextmanager
def borrowed_generators(
    device: torch.device = CPU, *, python: int | None = None, others: int | None = None
) -> Iterator[None]:
    """A block after which they are as they were, also if it fails.

    Args:
        device: where the block works; torch has a generator there besides that of the CPU.
        python: seed that Python's has at the beginning of the block; by default it goes on.
        others: the same for those of numpy and torch.
    """
    state, state_of_numpy = random.getstate(), np.random.get_state()
    places = [] if device.type in ("cpu", "mps") else [device]  # torch forks no generator of mps
    try:
        with torch.random.fork_rng(places, device_type=device.type if places else "cpu"):
            if python is not None:
                random.setstate(random.Random(python).getstate())
            if others is not None:
                _begin(places, others)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(state_of_numpy)


def _begin(places: list[torch.device], seed: int) -> None:
    np.random.set_state(np.random.RandomState(seed).get_state())
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    for place in places:
        begun = torch.Generator(place).manual_seed(seed).get_state()
        torch.get_device_module(place).set_rng_state(begun, place)
