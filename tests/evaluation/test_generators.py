"""The generators that all code of a process shares, borrowed and given back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from dare_train.evaluation.generators import borrowed_generators


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def draws() -> tuple[float, ...]:
    return random.random(), float(np.random.random()), float(torch.rand(1))


@pytest.mark.parametrize("seeds", [{}, {"python": 0, "others": 3}])
def test_they_are_as_they_were(seeds: dict[str, int]) -> None:
    before = states()
    with borrowed_generators(**seeds):
        draws()
    assert states() == before
    with pytest.raises(ZeroDivisionError), borrowed_generators(**seeds):
        1 / (draws()[0] * 0)
    assert states() == before


def test_without_seeds_they_go_on() -> None:
    with borrowed_generators():
        first = draws()
    assert draws() == first


def test_with_seeds_they_begin_alike() -> None:
    with borrowed_generators(python=5, others=6):
        first = draws()
    generator = torch.Generator().manual_seed(6)
    assert first == (
        random.Random(5).random(),
        float(np.random.RandomState(6).random_sample()),
        float(torch.rand(1, generator=generator)),
    )
    draws()
    with borrowed_generators(python=5, others=6):
        assert draws() == first
