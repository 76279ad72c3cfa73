"""`find_q`: the q under which outputs change least, and weights left as they were."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import dare_train
from dare_train import find_q
from dare_train.config import threshold_of
from dare_train.errors import ConfigError
from dare_train.package.masks import Mask, key_of

P = 0.8


class Layer(torch.nn.Module):
    """One linear layer without anything around it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data = weight

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.linear(x)}


def pair() -> tuple[Layer, Layer, list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(24, 64, generator=generator)
    tuned = base + 0.1 * torch.randn(24, 64, generator=generator) + 0.05
    batches = [{"x": 1 + torch.randn(16, 64, generator=generator)} for _ in range(2)]
    return Layer(base), Layer(tuned.clone()), batches


def test_changes_are_those_of_the_definition() -> None:
    base, tuned, batches = pair()
    found = find_q(tuned, base, batches, p=P, seed=3, candidates=[0.2, 0.5, 1.0])
    delta = tuned.linear.weight.data - base.linear.weight.data
    kept = torch.zeros(delta.numel())
    mask = Mask(kind="seeded", key=key_of(3, "linear.weight"), threshold=threshold_of(P))
    kept[torch.from_numpy(np.array(mask.positions(0, delta.numel())))] = 1
    x = torch.cat([batch["x"] for batch in batches])
    wanted = tuned(x)["logits"].detach()
    for q, change in found.changes.items():
        dropped = base.linear.weight.data + delta * kept.reshape(delta.shape) / q
        expected = (x @ dropped.T - wanted).square().sum() / wanted.square().sum()
        assert change == pytest.approx(float(expected), rel=0.02)  # values are kept as bfloat16
    assert found.q == min(found.changes, key=lambda q: found.changes[q])


def test_default_candidates_reach_from_dare_to_drop_only() -> None:
    base, tuned, batches = pair()
    changes = find_q(tuned, base, batches, p=P).changes
    assert (min(changes), max(changes), len(changes)) == (0.2, 1.0, 9)


def test_weights_and_mode_are_left_as_they_were() -> None:
    base, tuned, batches = pair()
    tuned.train()
    before = copy.deepcopy(tuned.state_dict())
    find_q(tuned, base, batches, p=P)
    assert tuned.training
    assert all(torch.equal(before[name], tensor) for name, tensor in tuned.state_dict().items())


def test_a_failure_leaves_the_weights_alone() -> None:
    base, tuned, batches = pair()
    before = tuned.linear.weight.data.clone()
    calls = iter(range(100))

    def fails_later(module: Any, arguments: Any) -> None:
        if next(calls) == 3:
            raise RuntimeError("out of memory")

    tuned.register_forward_pre_hook(fails_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        find_q(tuned, base, batches, p=P)
    assert torch.equal(before, tuned.linear.weight.data)


def test_what_it_finds_goes_into_a_merge(tmp_path: Any) -> None:
    base, tuned, batches = pair()
    q = find_q(tuned, base, batches, p=P).q
    weights = [
        {name: tensor.numpy() for name, tensor in model.state_dict().items()} for model in (base, tuned)
    ]
    report = dare_train.merge(weights[0], [weights[1]], tmp_path / "out", p=P, rescale="q", q=q)
    assert report.recipe.rescale == "q"
    assert report.recipe.parameters["q"] == q


@pytest.mark.parametrize("candidates", [[], [0.0], [1.5], [-0.1]])
def test_candidates_out_of_range_are_refused(candidates: list[float]) -> None:
    base, tuned, batches = pair()
    with pytest.raises(ConfigError, match="candidates"):
        find_q(tuned, base, batches, p=P, candidates=candidates)


def test_no_batch_is_refused() -> None:
    base, tuned, _ = pair()
    with pytest.raises(ConfigError, match="batches: expected at least one"):
        find_q(tuned, base, [], p=P)
