"""One model, several threads, caches and packages: never a mixture, and always a way back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import State, base_state, moved, save

from dare_train import DeltaPackage, PackageCache, apply_, extract
from dare_train.applying.in_place import Undo
from dare_train.errors import BaseMismatch, CheckpointError, DareError, PackageError
from dare_train.training.subnetwork import Masks
from dare_train.weights.files.checkpoint import Checkpoint


def same(first: State, second: State) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("packages")
    return [
        extract(base_state(), moved(base_state(), 0.125 * (n + 1)), place / f"{n}", p=0.5, seed=n).path
        for n in range(3)
    ]


@pytest.fixture(scope="module")
def results(packages: list[Path]) -> list[State]:
    found = []
    for package in packages:
        state = base_state()
        apply_(state, package)
        found.append(state)
    return found


def at_once(works: list[Callable[[], object]]) -> list[DareError | None]:
    """What each of them raises, all begun together."""
    began = threading.Barrier(len(works))
    raised: list[DareError | None] = [None] * len(works)

    def run(number: int) -> None:
        began.wait()
        try:
            works[number]()
        except DareError as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_of_ten_threads_that_apply_one_does(packages: list[Path], results: list[State]) -> None:
    for _ in range(5):
        model = base_state()
        undone: list[tuple[int, Undo]] = []

        def work(
            number: int, model: State = model, undone: list[tuple[int, Undo]] = undone
        ) -> Callable[[], None]:
            return lambda: undone.append((number, apply_(model, packages[number % 3])))

        raised = at_once([work(number) for number in range(10)])
        assert sum(error is None for error in raised) == 1
        assert all(isinstance(error, BaseMismatch) for error in raised if error is not None)
        ((number, undo),) = undone
        assert same(model, results[number % 3])
        undo.revert()
        assert same(model, base_state())


def test_a_module_and_its_state_dict_are_one_model(packages: list[Path]) -> None:
    state = base_state()
    views = {name: tensor.view(tensor.shape) for name, tensor in state.items()}
    raised = at_once([lambda: apply_(state, packages[0]), lambda: apply_(views, packages[1])])
    assert sum(isinstance(error, BaseMismatch) for error in raised) == 1


def test_threads_share_a_cache(packages: list[Path], results: list[State]) -> None:
    model = base_state()
    cache = PackageCache(model, kernels="torch")
    wrong = []

    def swap(number: int) -> None:
        for turn in range(6):
            chosen = (number + turn) % 3
            with cache.applied(packages[chosen]):
                if not same(model, results[chosen]):
                    wrong.append(chosen)

    assert at_once([lambda n=n: swap(n) for n in range(6)]) == [None] * 6  # type: ignore[misc]
    assert wrong == []
    assert same(model, base_state())


def test_two_caches_on_one_model_do_not_mix(packages: list[Path], results: list[State]) -> None:
    model = base_state()
    first, second = PackageCache(model, kernels="torch"), PackageCache(model, kernels="torch")
    for cache in (first, second):
        cache.use(packages[0])
        cache.revert()
    first.use(packages[1])
    with pytest.raises(BaseMismatch):
        second.use(packages[0])
    assert same(model, results[1])
    first.revert()
    second.use(packages[0])
    assert same(model, results[0])
    second.revert()
    assert same(model, base_state())


def test_a_cache_goes_on_after_what_was_applied_beside_it_is_reverted(
    packages: list[Path], results: list[State]
) -> None:
    model = base_state()
    cache = PackageCache(model, kernels="torch")
    cache.use(packages[0])
    cache.revert()
    undo = apply_(model, packages[1])
    with pytest.raises(BaseMismatch, match="revert what was applied beside it"):
        cache.use(packages[0])
    assert same(model, results[1])
    undo.revert()
    cache.use(packages[0])
    assert same(model, results[0])
    with pytest.raises(BaseMismatch):
        apply_(model, packages[1])
    cache.revert()
    assert same(model, base_state())


def test_a_package_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    model = base_state()
    cache = PackageCache(model, kernels="torch")
    for by in (0.5, 0.25):
        extract(base_state(), moved(base_state(), by), tmp_path / "package", p=0.0, overwrite=True)
        cache.use(tmp_path / "package")
        assert same(model, moved(base_state(), by))
        cache.revert()
    assert len(cache.packages) == 2


def test_a_relative_path_means_the_folder_that_it_means_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base_state()
    cache = PackageCache(model, kernels="torch")
    for name, by in (("one", 0.5), ("two", 0.25)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        extract(base_state(), moved(base_state(), by), "package", p=0.0)
        with cache.applied("package"):
            assert same(model, moved(base_state(), by))
    (tmp_path / "three").mkdir()
    monkeypatch.chdir(tmp_path / "three")
    with pytest.raises(PackageError):
        cache.use("package")


# What was checked is what is used.


def test_a_part_that_changes_after_it_was_checked_is_not_decoded(tmp_path: Path) -> None:
    package = extract(base_state(), moved(base_state()), tmp_path / "package", p=0.0)
    opened = DeltaPackage.open(package.path)
    opened.check_integrity()
    part = package.path / package.manifest.parts[0].file
    damaged = bytearray(part.read_bytes())
    damaged[-3] ^= 1
    with part.open("r+b") as file:  # the same file, as somebody who copies over it does
        file.write(damaged)
    with pytest.raises(PackageError, match="leave the package alone while it is read"):
        list(opened.frames("a.weight", 0, 600))


def test_a_part_that_is_replaced_after_it_was_checked_does_not_count(tmp_path: Path) -> None:
    package = extract(base_state(), moved(base_state()), tmp_path / "package", p=0.0)
    opened = DeltaPackage.open(package.path)
    opened.check_integrity()
    before = [bytes(frame) for _, frame in opened.frames("a.weight", 0, 600)]
    part = package.path / package.manifest.parts[0].file
    other = bytearray(part.read_bytes())
    other[-3] ^= 1
    (tmp_path / "other").write_bytes(other)
    (tmp_path / "other").replace(part)
    assert [bytes(frame) for _, frame in opened.frames("a.weight", 0, 600)] == before


def test_masks_come_of_checked_parts(tmp_path: Path) -> None:
    masks = {"a.weight": torch.arange(600).reshape(20, 30).numpy() % 3 == 0}
    package = extract(base_state(), moved(base_state()), tmp_path / "package", masks=masks)
    assert (Masks.of_package(package.path)["a.weight"] == masks["a.weight"]).all()
    part = package.path / package.manifest.parts[0].file
    for place in (-1, -40, -90):
        damaged = bytearray(part.read_bytes())
        damaged[place] ^= 4
        part.write_bytes(damaged)
        with pytest.raises(PackageError, match="SHA-256"):
            Masks.of_package(package.path)


def test_masks_of_a_tensor_that_grew_keep_its_new_rows(tmp_path: Path) -> None:
    rows = torch.cat([base_state()["a.weight"] + 0.01, torch.ones(3, 30).bfloat16()])
    grown = {**moved(base_state()), "a.weight": rows}
    package = extract(base_state(), grown, tmp_path / "package", p=0.5)
    mask = Masks.of_package(package.path)["a.weight"]
    assert mask.shape == (23, 30)
    assert mask[20:].all()
    assert 0.4 < mask[:20].mean() < 0.6


def test_a_base_that_is_cut_short_while_it_is_read_is_one_error(tmp_path: Path) -> None:
    base = save(base_state(), tmp_path / "base")
    opened = Checkpoint.open(base)
    size = (base / "model.safetensors").stat().st_size
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(size - 1250)
    last = max(opened.tensors, key=lambda name: opened.tensors[name].numel)
    with pytest.raises(CheckpointError, match=r"its end at .*; was it written over, or cut short"):
        opened.read(last, 0, opened.tensors[last].numel)


def test_nothing_is_made_of_two_states_of_a_file(tmp_path: Path) -> None:
    base = save(base_state(), tmp_path / "base")
    opened = Checkpoint.open(base)
    name = next(iter(opened.tensors))
    opened.read(name, 0, 1)
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(
        CheckpointError, match="the file that was opened, found changes to it; was it written"
    ):
        opened.read(name, 0, 1)
