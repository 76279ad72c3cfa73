"""Packages applied to a model that two ranks hold together, by kernels of a device where a segment lies on
one of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import run_ranks
from safetensors.torch import load_file, save_file
from tiny import State, random_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dare_train import apply, apply_, extract
from dare_train.errors import DeviceMemoryError, RankError
from dare_train.weights.live.live import LiveWeights

WHOLE = 2**20
"""Elements of a segment."""


def base_state() -> State:
    """Of the first tensor each rank has one of two segments, and of the last but one the first rank has all;
    others are cut.
    """
    return {
        "large": random_tensor(4, WHOLE // 2, seed=1),
        "cut": random_tensor(3, 700, seed=2),
        "one": random_tensor(1, 90, seed=3),
        "long": random_tensor(6, WHOLE // 4, seed=4).float(),
    }


def tuned_state(base: State, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in base.items()
    }


def on_shards(
    rank: int, kernels: str, packages: list[Path], expected: Path, failing: int | None = None
) -> dict[str, Any]:
    os.environ["DARE_TRAIN_KERNELS"] = kernels
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    state = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in base_state().items()}
    put, honest = set[tuple[str, int]](), LiveWeights.put

    def watched(self: LiveWeights, name: str, start: int, *rest: Any) -> None:
        put.add((name, start))
        honest(self, name, start, *rest)

    def full(*_: Any) -> Any:
        raise DeviceMemoryError(f"rank {rank}", expected="2 MB", found="none")

    LiveWeights.put = watched  # type: ignore[method-assign]
    if failing == rank:
        from dare_train.applying import device_packages as device

        device.residents = full  # type: ignore[assignment]
    error = ""
    try:
        undo = apply_(state, packages)
    except (DeviceMemoryError, RankError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    else:
        assert same(state, load_file(expected))
        undo.revert()
    assert same(state, base_state())
    dist.destroy_process_group()
    return {"put": sorted(put), "error": error}


def same(state: dict[str, Any], expected: State) -> bool:
    return all(torch.equal(tensor.full_tensor(), expected[name]) for name, tensor in state.items())


@pytest.fixture
def made(tmp_path: Path) -> tuple[list[Path], Path]:
    """A chain of two packages, and what it makes of the base."""
    base, first, second = tmp_path / "base", tmp_path / "first", tmp_path / "second"
    base.mkdir()
    save_file(base_state(), base / "model.safetensors")
    middle = tuned_state(base_state(), 1)
    extract(base_state(), middle, first, p=0.5)
    apply(base, first, tmp_path / "middle")
    middle = load_file(tmp_path / "middle/model.safetensors")
    extract(middle, tuned_state(middle, 2), second, p=0.9)
    apply(base, [first, second], tmp_path / "out")
    return [first, second], tmp_path / "out/model.safetensors"


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_segments_on_one_rank_are_applied_where_they_lie(kernels: str, made: tuple[list[Path], Path]) -> None:
    """What goes over the CPU is what a border between the ranks cuts, and without a device's kernels all."""
    packages, expected = made
    ranks = run_ranks(on_shards, 2, kernels, packages, expected)
    cut, alone = [("cut", 0), ("long", 0)], {"large": [0, WHOLE], "one": [0], "long": [WHOLE]}
    everywhere = [(name, start) for name, starts in alone.items() for start in starts]
    found = sorted({tuple(one) for rank in ranks for one in rank["put"]})
    assert found == sorted(cut if kernels == "torch" else [*cut, *everywhere])


def test_a_rank_without_memory_leaves_the_model_of_all_as_it_was(made: tuple[list[Path], Path]) -> None:
    packages, expected = made
    ranks = run_ranks(on_shards, 2, "torch", packages, expected, 1)
    assert ranks[1]["error"] == "DeviceMemoryError: rank 1: expected 2 MB, found none"
    assert ranks[0]["error"].startswith("RankError: rank 1 failed: rank 1: expected 2 MB")
