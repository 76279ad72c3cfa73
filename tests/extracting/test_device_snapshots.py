"""Snapshots of a model whose weights lie on a device: the packages of the CPU's kernels, and only kept words
cross.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_states import base_state, tuned_state
from merging import files_of
from tiny import extract_refused, save
from training import classifier, save_base, train

from dare_train import DareCallback, DareConfig, apply_, extract
from dare_train.errors import ConfigError, NonFiniteDelta
from dare_train.extracting import device_encoding
from dare_train.extracting.assembly import Work, work_of
from dare_train.extracting.device_encoding import gathered, on_devices
from dare_train.extracting.plan import TensorPlan, plan_tensors
from dare_train.kernels import cuda_in_torch as plain
from dare_train.package.masks import Mask
from dare_train.snapshots.capture import take_run
from dare_train.weights.live.live import LiveWeights

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["torch", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Torch's kernels in place of a device's, and Triton's, in its interpreter where there is no GPU."""
    monkeypatch.setenv("DARE_TRAIN_KERNELS", request.param)
    with np.errstate(all="ignore"):
        yield request.param


def refuse_whole_deltas(patched: pytest.MonkeyPatch) -> None:
    """While this holds, `extract` must not read all words of a delta."""
    extraction = sys.modules["dare_train.extracting.extract"]
    honest = extraction._encode

    def checked(task: Any, run: Work) -> Any:
        assert not run.is_delta, "a delta was read whole"
        return honest(task, run)

    patched.setattr(extraction, "_encode", checked)


@pytest.mark.parametrize(
    "options", [dict(p=0.9), dict(p=0.0), dict(p={"bf16": 0.5, "*": 0.0}, whole="f16", exclude="f64")]
)
def test_runs_are_those_that_the_cpu_copies(
    options: dict[str, Any], kernels: str, device: torch.device
) -> None:
    live = LiveWeights({name: tensor.to(device) for name, tensor in tuned_state(1).items()})
    plans = plan_tensors(LiveWeights(base_state()), live, DareConfig(**options))
    work = list(work_of(plans))
    found = gathered(live, work)
    assert [words is not None for words in found] == [run.plan.kind == "delta" for run in work]
    assert sum(words is not None for words in found) > 3
    for words, run in zip(found, work, strict=True):
        if words is not None:
            expected = take_run(live, run, {}).words
            assert words.dtype == expected.dtype
            assert np.array_equal(words, expected)


def test_parts_of_tensors_stored_masks_and_what_comes_later(kernels: str, device: torch.device) -> None:
    """A run in the middle of a tensor, as shards have them; a mask without a seed; a tensor that an adapter
    will be merged into.
    """
    live = LiveWeights({name: tensor.to(device) for name, tensor in base_state().items()})
    stored = np.random.default_rng(3).random(9000) < 0.3
    seeded = TensorPlan(
        index=0,
        name="bf16",
        info=live.tensors["bf16"],
        kind="delta",
        mask=Mask(kind="seeded", key=5, threshold=30000),
    )
    by_hand = TensorPlan(
        index=1, name="bf16", info=live.tensors["bf16"], kind="delta", mask=Mask(kind="stored"), stored=stored
    )
    work = [Work(seeded, 1001, 7000), Work(by_hand, 8, 3000), Work(seeded, 0, 9000)]
    for words, run in zip(gathered(live, work), work, strict=True):
        assert words is not None
        assert np.array_equal(words, take_run(live, run, {}).words)
    assert gathered(live, work, later={"bf16"}) == [None] * 3


def test_tensors_that_do_not_lie_in_one_place_are_the_cpus(kernels: str, device: torch.device) -> None:
    live = LiveWeights({"a": torch.zeros(4, 5, device=device).T, "b": torch.zeros(7, device=device)})
    assert on_devices(live) == {"b"}
    plan = TensorPlan(index=0, name="a", info=live.tensors["a"], kind="delta", mask=Mask(kind="all"))
    assert gathered(live, [Work(plan, 0, 20)]) == [None]


def test_packages_of_a_training_run_are_the_same(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    options: dict[str, Any] = dict(p={"*bias": 0.0, "*": 0.9}, when="end")
    seen: list[str] = []

    def watched(live: Any, run: Work, *rest: Any) -> Any:
        seen.append(run.plan.kind)
        return take_run(live, run, *rest)

    with monkeypatch.context() as patched:
        patched.setattr("dare_train.snapshots.shared_pass.take_run", watched)
        patched.setattr("dare_train.snapshots.snapshotter.POSITIONS_LIMIT", Never())
        train(classifier(base, dtype=torch.bfloat16), tmp_path / "device", DareCallback(**options))
    assert "delta" not in seen, "whole tensors were copied to the host"
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "cpu")
    train(classifier(base, dtype=torch.bfloat16), tmp_path / "host", DareCallback(**options))
    assert same_package(tmp_path / "device/dare/final", tmp_path / "host/dare/final")


def test_a_callback_is_told_which_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go before the environment's, and callbacks of one run may have different ones."""
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "cpu")
    honest, launched = plain.take, []
    monkeypatch.setattr(plain, "take", lambda *arguments: (launched.append(1), honest(*arguments)))
    both = [
        DareCallback(p=0.5, when="end", name=name, kernels=kernels)
        for name, kernels in (("told", "torch"), ("not", None))
    ]
    train(classifier(base, dtype=torch.bfloat16), tmp_path / "out", *both)
    assert len(launched) == 1
    assert same_package(tmp_path / "out/told/final", tmp_path / "out/not/final")
    with pytest.raises(ConfigError, match="kernels: expected one of torch, cpu, cuda, found 'gpu'"):
        DareCallback(kernels="gpu")


class Never:
    """Compares with nothing: masks that the device makes are not worked out ahead."""

    def __gt__(self, other: object) -> bool:
        pytest.fail("a mask was worked out ahead")


def same_package(ours: Path, theirs: Path) -> bool:
    """Whether two packages are the same but for the runs that wrote them."""
    left, right = files_of(ours), files_of(theirs)
    for files in (left, right):
        files["dare_config.json"] = re.sub(rb'"(run|digest)": "\w+"', rb'"\1": ""', files["dare_config.json"])
    return [name for name in left.keys() | right.keys() if left.get(name) != right.get(name)] == []


@pytest.mark.parametrize(
    "options",
    [
        dict(p=0.9),
        dict(p=0.0),
        dict(p=0.5, values="int8", seed=3),
        dict(p={"bf16": 0.5, "*": 0.0}, whole="f16", exclude="f64"),
    ],
)
def test_packages_of_two_models_on_a_device(
    options: dict[str, Any],
    kernels: str,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bytes of those that the CPU's kernels make; no delta is read whole."""
    base, tuned = (
        {name: tensor.to(device) for name, tensor in state.items()}
        for state in (base_state(), tuned_state(1))
    )
    masks = {"f32": np.random.default_rng(1).random((50, 70)) < 0.2}
    with monkeypatch.context() as patched:
        refuse_whole_deltas(patched)
        extract(base, tuned, tmp_path / "device", masks=masks, **options)
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "cpu")
    extract(base_state(), tuned_state(1), tmp_path / "host", masks=masks, **options)
    assert same_package(tmp_path / "device", tmp_path / "host")


@pytest.mark.parametrize("headed", ["base", "tuned"])
def test_models_whose_names_differ_by_a_prefix(
    headed: str, kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an encoder's do from those of a task model with it: read where they lie, all the same."""
    base, tuned = base_state(), tuned_state(1)
    if headed == "base":
        base = {f"bert.{name}": tensor for name, tensor in base.items()}
    else:
        tuned = {f"bert.{name}": tensor for name, tensor in tuned.items()}
    lying = [{name: tensor.to(device) for name, tensor in state.items()} for state in (base, tuned)]
    with monkeypatch.context() as patched:
        refuse_whole_deltas(patched)
        extract(*lying, tmp_path / "device", p=0.5)
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "cpu")
    extract(base, tuned, tmp_path / "host", p=0.5)
    assert same_package(tmp_path / "device", tmp_path / "host")


def test_batches_of_runs_make_the_same_package(
    kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["dare_train.extracting.extract"], "_AT_ONCE", 1000)
    base, tuned = (
        {name: tensor.to(device) for name, tensor in state.items()}
        for state in (base_state(), tuned_state(1))
    )
    extract(base, tuned, tmp_path / "device", p=0.5)
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "cpu")
    extract(base_state(), tuned_state(1), tmp_path / "host", p=0.5)
    assert same_package(tmp_path / "device", tmp_path / "host")


def test_a_device_works_ahead_of_what_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of the first batch is encoded before the second is asked for."""
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "torch")
    extraction, asked, ahead = sys.modules["dare_train.extracting.extract"], threading.Event(), list[bool]()
    monkeypatch.setattr(extraction, "_AT_ONCE", 1000)
    honest = device_encoding.gathered_pairs
    encode = extraction.encode_gathered
    calls: list[int] = []

    def gathered_pairs(base: LiveWeights, tuned: LiveWeights, work: Sequence[Work]) -> Any:
        calls.append(len(work))
        if len(calls) == 2:
            asked.set()
        return honest(base, tuned, work)

    def encoded(*run: Any) -> Any:
        ahead.append(asked.wait(20))
        return encode(*run)

    monkeypatch.setattr(device_encoding, "gathered_pairs", gathered_pairs)
    monkeypatch.setattr(extraction, "encode_gathered", encoded)
    extract(base_state(), tuned_state(1), tmp_path / "package", p=0.5)
    assert len(calls) > 2
    assert all(ahead)


def test_nan_on_a_device_is_refused_by_name_and_place(
    kernels: str, device: torch.device, tmp_path: Path
) -> None:
    base, tuned = (
        {name: tensor.to(device) for name, tensor in state.items()}
        for state in (base_state(), tuned_state(1))
    )
    tuned["f32"].view(-1)[7] = torch.nan
    extract_refused(
        base,
        tuned,
        tmp_path / "place",
        NonFiniteDelta,
        "f32: expected finite weights, found NaN or infinity at flat index 7",
        p=0.5,
    )
    package = extract(base, tuned, tmp_path / "allowed", p=0.0, allow_nonfinite=True)
    state = {name: tensor.clone() for name, tensor in base.items()}
    apply_(state, package)
    assert state["f32"].view(-1)[7].isnan()


def test_a_model_on_a_device_beside_one_on_disk(kernels: str, device: torch.device, tmp_path: Path) -> None:
    save(base_state(), tmp_path / "base")
    tuned = {name: tensor.to(device) for name, tensor in tuned_state(1).items()}
    extract(tmp_path / "base", tuned, tmp_path / "mixed", p=0.5, base_model="base")
    extract(base_state(), tuned_state(1), tmp_path / "memory", p=0.5, base_model="base")
    assert same_package(tmp_path / "mixed", tmp_path / "memory")
