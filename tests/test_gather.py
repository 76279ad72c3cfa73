"""Snapshots of a model whose weights lie on a device: the packages of the CPU's kernels, and only kept words cross."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import files_of
from test_device import base_state, tuned_state
from training import classifier, save_base, train

from dare_train import DareCallback, DareConfig
from dare_train.assembly import work_of
from dare_train.capture import take_run
from dare_train.gather import gathered
from dare_train.masks import Mask
from dare_train.plan import plan_tensors
from dare_train.segments import TensorPlan
from dare_train.shards import LiveWeights

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["reference", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Torch's kernels in place of a device's, and Triton's, in its interpreter where there is no GPU."""
    monkeypatch.setenv("DARE_TRAIN_KERNELS", request.param)
    with np.errstate(all="ignore"):
        yield request.param


@pytest.mark.parametrize("options", [dict(p=0.9), dict(p=0.0), dict(p={"bf16": 0.5, "*": 0.0}, whole="f16", exclude="f64")])
def test_runs_are_those_that_the_cpu_copies(options: dict[str, Any], kernels: str, device: torch.device) -> None:
    live = LiveWeights({name: tensor.to(device) for name, tensor in tuned_state(1).items()})
    plans = plan_tensors(LiveWeights(base_state()), live, DareConfig(**options))
    work = list(work_of(plans))
    found = gathered(live, work)
    assert [run is not None for run in found] == [plan.kind == "delta" for plan, _, _ in work]
    assert sum(run is not None for run in found) > 3
    for run, one in zip(found, work, strict=True):
        if run is not None:
            expected = take_run(live, *one, {})
            assert (run.plan, run.start, run.length) == (expected.plan, expected.start, expected.length)
            assert run.words.dtype == expected.words.dtype
            assert np.array_equal(run.words, expected.words)


def test_parts_of_tensors_stored_masks_and_what_comes_later(kernels: str, device: torch.device) -> None:
    """A run in the middle of a tensor, as shards have them; a mask without a seed; a tensor that an adapter will be merged into."""
    live = LiveWeights({name: tensor.to(device) for name, tensor in base_state().items()})
    stored = np.random.default_rng(3).random(9000) < 0.3
    seeded = TensorPlan(index=0, name="bf16", info=live.tensors["bf16"], kind="delta", mask=Mask(kind="seeded", key=5, threshold=30000))
    by_hand = TensorPlan(index=1, name="bf16", info=live.tensors["bf16"], kind="delta", mask=Mask(kind="stored"), stored=stored)
    work = [(seeded, 1001, 7000), (by_hand, 8, 3000), (seeded, 0, 9000)]
    for run, one in zip(gathered(live, work), work, strict=True):
        assert run is not None
        assert np.array_equal(run.words, take_run(live, *one, {}).words)
    assert gathered(live, work, later={"bf16"}) == [None] * 3


def test_tensors_that_do_not_lie_in_one_place_are_the_cpus(kernels: str, device: torch.device) -> None:
    live = LiveWeights({"a": torch.zeros(4, 5, device=device).T})
    plan = TensorPlan(index=0, name="a", info=live.tensors["a"], kind="delta", mask=Mask(kind="all"))
    assert gathered(live, [(plan, 0, 20)]) == [None]


def test_packages_of_a_training_run_are_the_same(kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    options: dict[str, Any] = dict(p={"*bias": 0.0, "*": 0.9}, when="end")
    seen: list[str] = []

    def watched(live: Any, plan: TensorPlan, *rest: Any) -> Any:
        seen.append(plan.kind)
        return take_run(live, plan, *rest)

    with monkeypatch.context() as patched:
        patched.setattr("dare_train.snapshot.take_run", watched)
        train(classifier(base, dtype=torch.bfloat16), tmp_path / "device", DareCallback(**options))
    assert "delta" not in seen, "whole tensors were copied to the host"
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "cpu")
    train(classifier(base, dtype=torch.bfloat16), tmp_path / "host", DareCallback(**options))
    ours, theirs = files_of(tmp_path / "device/dare/final"), files_of(tmp_path / "host/dare/final")
    assert [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)] == []
