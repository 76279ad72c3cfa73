"""`PackageCache`: fine-tunes of one base by turns, to the bit, within the memory that they are given."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_states import base_state, same, to, tuned_state
from tiny import State, refusal

from dare_train import PackageCache, apply_, extract
from dare_train.applying import device_packages as on_devices
from dare_train.errors import BaseMismatch, ConfigError, DeviceMemoryError, ResultMismatch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["torch", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Torch's kernels in place of a device's, and Triton's, in its interpreter where there is no GPU."""
    monkeypatch.setenv("DARE_TRAIN_KERNELS", request.param)
    with np.errstate(all="ignore"):
        yield request.param


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("packages")
    options: list[dict[str, Any]] = [dict(p=0.5), dict(p=0.9, values="int8"), dict(p=0.0, whole="f16")]
    return [
        extract(base_state(), tuned_state(n), place / f"{n}", seed=n, **own).path
        for n, own in enumerate(options)
    ]


def result(package: Path, weight: float = 1.0) -> State:
    """By the CPU's kernels."""
    state = base_state()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DARE_TRAIN_KERNELS", "cpu")
        apply_(state, package, weights=[weight])
    return state


def test_packages_by_turns_without_their_files(
    packages: list[Path], device: torch.device, tmp_path: Path
) -> None:
    """Every state is that of `apply_`, in the storage that the model had; the second time nothing is read."""
    model = to(base_state(), device)
    places = {name: tensor.data_ptr() for name, tensor in model.items()}
    copies = [shutil.copytree(package, tmp_path / package.name) for package in packages]
    cache = PackageCache(model)
    for copy, package in zip(copies, packages, strict=True):
        cache.use(copy)
        assert same(model, result(package))
        shutil.rmtree(copy)
    assert cache.packages == [str(copy) for copy in copies]
    for number in (1, 0, 2, 0):
        cache.use(copies[number])
        assert cache.active == str(copies[number])
        assert same(model, result(packages[number]))
    cache.use(copies[0])
    assert cache.packages[-1] == str(copies[0])
    cache.revert()
    assert cache.active is None
    assert same(model, base_state())
    assert {name: tensor.data_ptr() for name, tensor in model.items()} == places


def test_weights_are_packages_of_their_own(packages: list[Path], device: torch.device) -> None:
    model = to(base_state(), device)
    cache = PackageCache(model)
    for weight in (0.5, 1.0, 0.5):
        cache.use(packages[0], weight=weight)
        assert same(model, result(packages[0], weight))
    assert len(cache.packages) == 2
    cache.drop(packages[0])
    assert (cache.packages, cache.active, cache.nbytes) == ([], None, 0)
    assert same(model, base_state())


def test_the_with_block_leaves_the_base(packages: list[Path], device: torch.device) -> None:
    model = to(base_state(), device)
    cache = PackageCache(model)

    def fail() -> None:
        with cache.applied(packages[1]):
            assert same(model, result(packages[1]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert same(model, base_state())
    assert cache.packages == [str(packages[1])]


def test_memory_is_bounded_and_what_was_not_used_for_longest_goes(
    packages: list[Path], device: torch.device
) -> None:
    model = to(base_state(), device)
    sizes = []
    for package in packages:
        cache = PackageCache(model)
        cache.use(package)
        sizes.append(cache.nbytes)
        cache.revert()
    cache = PackageCache(model, memory=sum(sizes) - min(sizes) + 2000)
    for number in (0, 1, 0, 2):
        cache.use(packages[number])
        assert cache.nbytes <= cache.memory
    assert (
        cache.packages == [str(packages[2])]
        if sizes[0] + sizes[2] > cache.memory
        else [str(packages[0]), str(packages[2])]
    )
    assert same(model, result(packages[2]))
    cache.revert()
    with pytest.raises(DeviceMemoryError) as caught:
        PackageCache(model, memory=1000).use(packages[0])
    refusal(
        caught.value,
        DeviceMemoryError,
        "PackageCache: expected packages of at most 1,000 bytes, found one that takes",
        "raise memory=",
    )


def test_a_full_device_loses_old_packages_before_it_refuses_new_ones(
    packages: list[Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, honest = to(base_state(), device), on_devices.residents
    cache = PackageCache(model)
    cache.use(packages[0])
    cache.use(packages[1])

    def full(*arguments: Any) -> Any:
        if len(cache.packages) > 1:
            raise DeviceMemoryError("cuda:0", expected="2 MB", found="none")
        return honest(*arguments)

    monkeypatch.setattr(on_devices, "residents", full)
    cache.use(packages[2])
    assert cache.packages == [str(packages[1]), str(packages[2])]
    assert same(model, result(packages[2]))
    monkeypatch.setattr(on_devices, "residents", lambda *_: full_always())
    with pytest.raises(DeviceMemoryError, match="cuda:0"):
        cache.use(packages[0])
    assert (cache.active, cache.packages) == (None, [])
    assert same(model, base_state())


def full_always() -> Any:
    raise DeviceMemoryError("cuda:0", expected="2 MB", found="none")


def test_another_base_is_refused_untouched(packages: list[Path], device: torch.device) -> None:
    model = to(base_state(), device)
    model["bf16"].view(-1)[7] += 1
    before = to(model, device)
    with pytest.raises(BaseMismatch, match="bf16: expected fingerprint"):
        PackageCache(model).use(packages[0])
    assert same(model, before)


def test_a_result_that_is_not_the_recorded_one_is_taken_back(
    packages: list[Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache_module = (
        to(base_state(), device),
        __import__("dare_train.applying.cache", fromlist=["Resolver"]),
    )
    honest = cache_module.Resolver.check_result_print
    monkeypatch.setattr(
        cache_module.Resolver,
        "check_result_print",
        lambda self, name, found: honest(self, name, found.plus((1, 0))),
    )
    cache = PackageCache(model)
    with pytest.raises(ResultMismatch):
        cache.use(packages[0])
    assert (cache.active, cache.packages) == (None, [])
    assert same(model, base_state())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_while_swapping_finds_its_way_back(
    packages: list[Path], device: torch.device, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, honest, done = to(base_state(), device), on_devices.Resident.apply, []
    cache = PackageCache(model)
    cache.use(packages[0])
    cache.use(packages[1])

    def interrupted(self: Any) -> None:
        honest(self)
        done.append(self)
        if len(done) == 2:
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(on_devices.Resident, "apply", interrupted)
        with pytest.raises(error):
            cache.use(packages[0])
    cache.revert()
    assert same(model, base_state())


def test_a_model_that_no_kernels_work_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        PackageCache({"a": torch.zeros(4, 5).T})
    refusal(
        caught.value,
        ConfigError,
        "a: expected a whole, contiguous tensor where kernels of a device work",
        "apply_ works anywhere",
    )
    monkeypatch.delenv("DARE_TRAIN_KERNELS")
    with pytest.raises(ConfigError, match="move the model to a GPU whole"):
        PackageCache({"a": torch.zeros(4)})
    assert PackageCache({"a": torch.zeros(4)}, kernels="torch").packages == []
    with pytest.raises(ConfigError, match="memory: expected a number of bytes above 0, found 0"):
        PackageCache({"a": torch.zeros(4)}, memory=0)
