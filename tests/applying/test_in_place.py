"""`apply_` either arrives or leaves the weights as they were, and `revert` brings them back, bit for bit."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import State, base_state, moved, random_tensor

from dare_train import applied, apply_, extract
from dare_train.errors import BaseMismatch, PackageError, ResultMismatch, TensorMismatch
from dare_train.weights.protocol import SEGMENT

inplace = importlib.import_module("dare_train.applying.in_place")
resolve_module = importlib.import_module("dare_train.applying.resolver")


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels that work on the weights: Numba's, torch's in place of a device's, and Triton's, in its
    interpreter without a GPU.
    """
    monkeypatch.setenv("DARE_TRAIN_KERNELS", request.param)
    with np.errstate(all="ignore"):
        yield request.param


everywhere = pytest.mark.parametrize(
    "kernels", ["cpu", "torch", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


def _copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def _same(one: State, other: State) -> bool:
    return all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one.keys() | other.keys()
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return extract(base_state(), moved(base_state()), tmp_path / "package", p=0.5).path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path]:
    """A tensor of four segments, so that several threads are at work on it."""
    base = {"a": random_tensor(4 * SEGMENT), "b": torch.ones(9)}
    return base, extract(
        base, {"a": base["a"] * 2, "b": base["b"] + 1}, tmp_path_factory.mktemp("large") / "package", p=0.9
    ).path


@everywhere
def test_revert_restores_every_bit(kernels: str, package: Path) -> None:
    state = base_state()
    undo = apply_(state, package)
    assert not _same(state, base_state())
    undo.revert()
    assert _same(state, base_state())
    undo.revert()
    assert _same(state, base_state())


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_segment_that_fails_leaves_no_trace_of_the_others(
    large: tuple[State, Path], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The other segments of the tensor are being written by other threads when one of them is found
    damaged.
    """
    base, package = large
    state, honest = _copy(base), resolve_module.decode_delta

    def damaged(manifest: Any, record: Any, segment: Any, *rest: Any) -> Any:
        if record.name == "a" and segment.start == failing * SEGMENT:
            time.sleep(0.2)
            raise PackageError("a", expected="an intact frame", found="a damaged one")
        return honest(manifest, record, segment, *rest)

    monkeypatch.setattr(resolve_module, "decode_delta", damaged)
    monkeypatch.setattr("dare_train.parallel.threads.thread_count", lambda: 4)
    with pytest.raises(PackageError, match="a damaged one"):
        apply_(state, package)
    assert _same(state, base)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interruption_between_tensors_restores_what_was_changed(
    package: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    state, honest, seen = base_state(), inplace._apply_tensor, []

    def interrupted(name: str, *rest: Any) -> None:
        seen.append(name)
        honest(name, *rest)
        if name == "b.weight":
            raise error

    monkeypatch.setattr(inplace, "_apply_tensor", interrupted)
    with pytest.raises(error):
        apply_(state, package)
    assert seen == ["a.weight", "b.weight"]
    assert _same(state, base_state())


@everywhere
def test_a_result_that_is_not_the_recorded_one_restores_the_weights(
    kernels: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, honest = base_state(), resolve_module.Resolver.check_result_print

    def strict(self: Any, name: str, found: Any) -> None:
        honest(self, name, found.plus((1, 0)) if name == "b.weight" else found)

    monkeypatch.setattr(resolve_module.Resolver, "check_result_print", strict)
    with pytest.raises(ResultMismatch, match=r"b\.weight: expected fingerprint"):
        apply_(state, package)
    assert _same(state, base_state())


def test_a_wrong_base_is_found_before_the_first_weight_is_touched(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = base_state()
    state["c.count"][-1] += 1  # the last tensor by name
    before = _copy(state)
    monkeypatch.setattr(inplace, "_apply_tensor", lambda *_: pytest.fail("touched"))
    with pytest.raises(BaseMismatch, match=r"c\.count.*not the base the package was made from"):
        apply_(state, package)
    assert _same(state, before)


@everywhere
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("b.weight"), "b.weight: expected in model in memory, found missing"),
        (
            lambda state: state.update(x=torch.zeros(2)),
            "x: expected a tensor that the package knows, found extra in model in memory",
        ),
        (
            lambda state: state.update({"b.weight": torch.zeros(49).bfloat16()}),
            "b.weight: expected shape [50], found [49]",
        ),
    ],
)
def test_a_model_with_other_tensors_is_refused_untouched(
    kernels: str, package: Path, change: Any, text: str
) -> None:
    state = base_state()
    change(state)
    before = _copy(state)
    with pytest.raises(TensorMismatch) as caught:
        apply_(state, package)
    assert text in str(caught.value)
    assert _same(state, before)


@everywhere
@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_revert_after_training_went_on_is_refused_and_touches_nothing(
    kernels: str, package: Path, name: str
) -> None:
    state = base_state()
    undo = apply_(state, package)
    state[name].view(-1)[3] += 1
    before = _copy(state)
    with pytest.raises(BaseMismatch) as caught:
        undo.revert()
    assert f"{name}: expected the weights that apply_ left, found others; revert before training on" in str(
        caught.value
    )
    assert _same(state, before)
    state[name].view(-1)[3] = moved(base_state())[name].view(-1)[3]


@everywhere
def test_reverts_in_the_wrong_order_are_refused(kernels: str, package: Path, tmp_path: Path) -> None:
    state = base_state()
    first = apply_(state, package)
    middle = _copy(state)
    second = apply_(state, extract(middle, moved(middle), tmp_path / "second", p=0.5))
    with pytest.raises(BaseMismatch, match="the weights that apply_ left"):
        first.revert()
    second.revert()
    assert _same(state, middle)
    first.revert()
    assert _same(state, base_state())


def _inside(state: State, package: Path, body: Callable[[], object]) -> None:
    with applied(state, package):
        assert not _same(state, base_state())
        body()


@everywhere
def test_the_with_block_restores_the_weights_when_its_body_fails(kernels: str, package: Path) -> None:
    state = base_state()
    with pytest.raises(ZeroDivisionError):
        _inside(state, package, lambda: 1 / 0)
    assert _same(state, base_state())


@everywhere
def test_an_error_in_a_with_block_that_trained_is_not_hidden_by_the_failing_revert(
    kernels: str, package: Path
) -> None:
    state = base_state()
    with pytest.raises(BaseMismatch) as caught:
        _inside(state, package, lambda: [state["a.weight"].add_(1), 1 / 0])
    assert isinstance(caught.value.__context__, ZeroDivisionError)
