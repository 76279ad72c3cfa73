"""Packages applied where the weights lie: the bits of the CPU's kernels, every encoding, alone, together and
in chains.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_states import base_state, same, to, tuned_state
from merging import files_of
from safetensors.torch import load_file, save_file
from tiny import State, random_tensor, refusal

from dare_train import PackageCache, applied, apply, apply_, extract
from dare_train.applying import device_decoding as decoding
from dare_train.applying import device_packages as on_devices
from dare_train.errors import ConfigError, DeviceMemoryError, PackageError
from dare_train.extracting import device_encoding as gather
from dare_train.package import reader as packages
from dare_train.package.segments import Opened
from dare_train.weights.live.live import LiveWeights
from dare_train.weights.protocol import SEGMENT

pytestmark = pytest.mark.gpu
ENCODINGS = ["exact", "rounded", "int8", "int4", "sign"]


@pytest.fixture(params=["torch", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Torch's kernels in place of a device's, and Triton's, in its interpreter where there is no GPU: there
    they take most of these tests' time, so those with both have the combinations in which Triton's kernels
    differ.
    """
    monkeypatch.setenv("DARE_TRAIN_KERNELS", request.param)
    with np.errstate(all="ignore"):
        yield request.param


def on_cpu(packages: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> State:
    """What the CPU's kernels make of the base."""
    with monkeypatch.context() as patched:
        patched.setenv("DARE_TRAIN_KERNELS", "cpu")
        state = base_state()
        apply_(state, packages, **options)
    return state


def check(packages: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Applied on the device it gives the same bits, in the same storage, and the way back too."""
    state = to(base_state(), device)
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    with monkeypatch.context() as patched:
        patched.setattr(LiveWeights, "put", lambda *_: pytest.fail("went over the CPU"))
        undo = apply_(state, packages, **options)
    assert same(state, on_cpu(packages, monkeypatch, **options))
    assert undo.nbytes > 0
    undo.revert()
    assert same(state, base_state())
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == places
    return undo


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        (dict(p=0.9), "torch"),
        (dict(p=0.0), "torch"),
        (dict(p={"bf16": 0.9, "*": 0.0}), "torch"),
        (dict(p={"bf16": 0.9, "*": 0.0}), "cuda"),
        (dict(p=0.5, rescale="none"), "torch"),
        (dict(p=0.5, rescale="none"), "cuda"),
        (dict(p=0.5, exclude="f*"), "torch"),
        (dict(p=0.5, exclude="f*"), "cuda"),
    ],
    indirect=["kernels"],
)
def test_one_package(
    options: dict[str, Any],
    kernels: str,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(extract(base_state(), tuned_state(1), tmp_path / "package", **options), device, monkeypatch)


def test_kernels_that_are_asked_for_go_before_the_environment(
    kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one call: of a model and of a package, and the bytes are the same."""
    base, tuned = to(base_state(), device), to(tuned_state(1), device)
    seen: list[str] = []
    for module, name in ((on_devices, "residents"), (gather, "gathered_pairs")):
        honest = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *rest, honest=honest, name=name: (seen.append(name), honest(*rest))[1]
        )
    found = extract(base, tuned, tmp_path / "there", p=0.5)
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "cpu")
    assert files_of(extract(base, tuned, tmp_path / "asked", p=0.5, kernels=kernels).path) == files_of(
        found.path
    )
    with applied(base, found, kernels=kernels):
        assert same(base, on_cpu(found, monkeypatch))
    assert seen.count("gathered_pairs") == 2
    assert seen.count("residents") > 3
    before = len(seen)
    monkeypatch.setenv("DARE_TRAIN_KERNELS", kernels)
    with applied(base, found, kernels="cpu"):
        assert same(base, on_cpu(found, monkeypatch))
    assert len(seen) == before
    with pytest.raises(ConfigError, match="kernels: expected one of torch, cpu, cuda, found 'gpu'"):
        apply_(base, found, kernels="gpu")


@pytest.mark.parametrize(
    ("kernels", "values", "weights"),
    [
        *(("torch", values, weights) for values in ENCODINGS for weights in (None, [-0.5])),
        ("cuda", "exact", None),
        ("cuda", "exact", [-0.5]),
        ("cuda", "rounded", [-0.5]),
        ("cuda", "int8", None),
        ("cuda", "int4", [-0.5]),
        ("cuda", "sign", None),
    ],
    indirect=["kernels"],
)
def test_every_encoding_alone_and_weighted(
    values: str,
    weights: list[float] | None,
    kernels: str,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What encodings become is torch's work; where a package is alone, Triton's kernels get words."""
    package = extract(base_state(), tuned_state(1), tmp_path / "package", p=0.8, values=values)  # type: ignore[arg-type]
    check(package, device, monkeypatch, weights=weights)


def test_masks_that_are_stored(
    kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = {
        name: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3)) < 0.3
        for name, tensor in base_state().items()
    }
    masks = {name: mask for name, mask in masks.items() if name.startswith(("bf16", "f32"))}
    check(
        extract(base_state(), tuned_state(1), tmp_path / "package", p=0.8, masks=masks), device, monkeypatch
    )


@pytest.mark.parametrize("weights", [None, [1.0, 0.3, -2.0]])
def test_several_packages_add_up(
    weights: list[float] | None,
    kernels: str,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of different rates and encodings; elements that one alone moves, that two do, and that nobody does."""
    options: list[dict[str, Any]] = [
        dict(p=0.5, seed=1),
        dict(p=0.9, seed=2, values="int8"),
        dict(p=0.3, seed=3, values="exact", exclude="bf16.2"),
    ]
    packages = [
        extract(base_state(), tuned_state(n), tmp_path / f"{n}", **own) for n, own in enumerate(options)
    ]
    check(packages, device, monkeypatch, weights=weights)


def test_a_chain(kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = extract(base_state(), tuned_state(1), tmp_path / "first", p=0.5)
    middle = on_cpu(first, monkeypatch)
    second = extract(middle, tuned_state(2, middle), tmp_path / "second", p=0.9)
    check([first, second], device, monkeypatch)


def test_values_are_decoded_by_several_threads(
    kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_AT_ONCE", 100)
    check(extract(base_state(), tuned_state(1), tmp_path / "package", p=0.5), device, monkeypatch)


def test_segments_that_did_not_change_are_not_there(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's kernels: a million elements are too many for the interpreter."""
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "torch")
    base = {"a": random_tensor(3 * SEGMENT + 5)}
    tuned = {"a": base["a"].clone()}
    tuned["a"][:99] += 1
    tuned["a"][-5:] *= 2
    package = extract(base, tuned, tmp_path / "package", p=0.0)
    assert len(list(package.frames("a", 0, base["a"].numel()))) == 2
    state = to(base, device)
    undo = apply_(state, package)
    assert same(state, tuned)
    undo.revert()
    assert same(state, base)


def test_tensors_carried_whole(
    kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = {
        **tuned_state(1),
        "count": torch.tensor([5, 6, 7, 8]),
        "flags": torch.arange(9) > 4,
        "bytes": torch.arange(200, 209).byte(),
    }
    check(
        extract(base_state(), tuned, tmp_path / "package", p=0.5, whole=["f16", "bf16.2"]),
        device,
        monkeypatch,
    )


def test_tensors_that_are_not_contiguous_go_over_the_cpu(
    kernels: str, device: torch.device, tmp_path: Path
) -> None:
    """Beside others that do not: among them one with rows that were added."""
    base, tuned = base_state(), tuned_state(1)
    tuned["f32"] = torch.cat([tuned["f32"], torch.ones(2, 70)])
    package = extract(base, tuned, tmp_path / "package", p=0.5, whole="f16")
    grown = to({**base, "f32": torch.cat([base["f32"], torch.zeros(2, 70)])}, device)
    grown["bf16"] = grown["bf16"].T.contiguous().T
    assert not grown["bf16"].is_contiguous()
    before = to(grown, device)
    undo = apply_(grown, package)
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base/model.safetensors")
    apply(tmp_path / "base", package, tmp_path / "out")
    assert same(
        {name: tensor.contiguous() for name, tensor in grown.items()},
        load_file(tmp_path / "out/model.safetensors"),
    )
    undo.revert()
    assert same(
        {name: tensor.contiguous() for name, tensor in grown.items()},
        {name: t.contiguous() for name, t in before.items()},
    )


def test_modules_keep_their_parameters(kernels: str, device: torch.device, tmp_path: Path) -> None:
    """Swapped by `applied`, with tied weights, as captured graphs and compiled modules need it."""
    model = torch.nn.ModuleDict(
        {
            "one": torch.nn.Linear(30, 40, dtype=torch.bfloat16),
            "two": torch.nn.Linear(30, 40, dtype=torch.bfloat16),
        }
    )
    model["two"].weight = model["one"].weight
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "two.weight"}
    package = extract(
        base, {name: tensor * 1.5 for name, tensor in base.items()}, tmp_path / "package", p=0.5
    )
    model.to(device)
    inputs, parameters = torch.ones(3, 30, dtype=torch.bfloat16, device=device), [*model.parameters()]
    before = model["two"](inputs)
    with applied(model, package):
        assert not torch.equal(model["two"](inputs), before)
        assert model["two"].weight is model["one"].weight
    assert torch.equal(model["two"](inputs), before)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def prepared(model: torch.nn.Module, inputs: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """Ways to run a model that look at it once, and then rely on where its weights lie."""
    ways: list[Callable[[], torch.Tensor]] = [
        partial(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    ]
    if inputs.is_cuda:
        graph = torch.cuda.CUDAGraph()
        model(inputs)
        with torch.cuda.graph(graph):
            outputs = model(inputs)
        ways.append(lambda: (graph.replay(), outputs.clone())[1])
    return ways


def test_what_was_compiled_or_captured_sees_the_swap(
    kernels: str, device: torch.device, tmp_path: Path
) -> None:
    model = (
        torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.ReLU(), torch.nn.Linear(40, 5))
        .to(device)
        .requires_grad_(False)
    )
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packages = [
        extract(base, {name: f * t for name, t in base.items()}, tmp_path / f"{f}", p=0.5)
        for f in (1.5, -2.0)
    ]
    inputs = torch.linspace(-1, 1, 90, device=device).reshape(3, 30)
    before = model(inputs)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for run in prepared(model, inputs):
        assert torch.equal(run(), before)
        cache = PackageCache(model)
        for package in (*packages, packages[0]):
            cache.use(package)
            assert torch.equal(run(), model(inputs))
            assert not torch.equal(run(), before)
        cache.revert()
        with applied(model, packages):
            assert torch.equal(run(), model(inputs))
        assert torch.equal(run(), before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_device_without_memory_leaves_the_model_and_says_what_was_needed(
    kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = extract(base_state(), tuned_state(1), tmp_path / "package", p=0.5)
    state, honest, asked = to(base_state(), device), torch.empty_like, []

    def full(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(arguments)
        if len(asked) == 3:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full. Process 1 has too much"
            )
        return honest(*arguments, **options)

    monkeypatch.setattr("dare_train.applying.device_packages.torch.empty_like", full)
    with pytest.raises(DeviceMemoryError) as caught:
        apply_(state, package)
    refusal(
        caught.value,
        DeviceMemoryError,
        f"{state['f32'].device}: expected",
        "MB for",
        "kept values",
        "Tried to allocate 2.00 GiB",
        "as it was",
    )
    assert "Process" not in str(caught.value)
    assert same(state, base_state())


def test_a_table_that_contradicts_the_mask_is_found_before_a_weight_changes(
    kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, honest = extract(base_state(), tuned_state(1), tmp_path / "package", p=0.5), decoding.check_kept
    monkeypatch.setattr(
        decoding,
        "check_kept",
        lambda record, segment, kept: honest(record, segment, kept + (record.name == "f64")),
    )
    state = to(base_state(), device)
    with pytest.raises(PackageError, match=r"f64: expected \d+ kept elements, as its mask says"):
        apply_(state, package)
    assert same(state, base_state())


def test_a_bitmap_that_contradicts_the_table_is_found_before_a_weight_changes(
    kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says of all values where they are: with one more, some would be read from behind the last."""
    package, honest = extract(base_state(), tuned_state(1), tmp_path / "package", p=0.5), Opened.of

    def damaged(*segment: Any) -> Opened:
        opened = honest(*segment)
        if opened.record.name != "bf16":
            return opened
        return replace(opened, data=memoryview(b"\xff" * len(opened.data)))

    monkeypatch.setattr(Opened, "of", damaged)
    state = to(base_state(), device)
    with pytest.raises(
        PackageError, match=r"bf16: expected \d+ changed elements, found \d+; fetch the package again"
    ):
        apply_(state, package)
    assert same(state, base_state())


@pytest.mark.parametrize(
    "use", [apply_, lambda model, package: PackageCache(model).use(package)], ids=["apply_", "cache"]
)
def test_files_are_checked_beside_decoding_and_before_a_weight_changes(
    use: Callable[..., object], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is wrong: damage to a file is what is said."""
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "torch")
    package = extract(base_state(), tuned_state(1), tmp_path / "package", p=0.5)
    begun, honest, sums = threading.Event(), on_devices.residents, packages.sha256_of

    def beside(path: Path) -> str:
        assert begun.wait(60), "decoding waits for the checksum"
        time.sleep(0.2)
        return sums(path)

    def decoded(*rest: Any) -> Any:
        begun.set()
        return honest(*rest)

    def damaged(*rest: Any) -> Any:
        begun.set()
        raise PackageError("a frame", expected="a frame", found="none")

    state = to(base_state(), device)
    monkeypatch.setattr(packages, "sha256_of", beside)
    monkeypatch.setattr(on_devices, "residents", decoded)
    monkeypatch.setattr(on_devices.Resident, "apply", lambda self: pytest.fail("a weight changes"))
    part = package.path / "dare_delta.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    with pytest.raises(PackageError, match="SHA-256"):
        use(state, package)
    monkeypatch.setattr(on_devices, "residents", damaged)
    begun.clear()
    with pytest.raises(PackageError, match="SHA-256"):
        use(state, package)
    assert same(state, base_state())


def test_an_interruption_between_two_dtypes_restores_what_was_changed(
    kernels: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = extract(base_state(), tuned_state(1), tmp_path / "package", p=0.5)
    state, honest, done = to(base_state(), device), on_devices.Resident.apply, []

    def interrupted(self: Any) -> None:
        honest(self)
        done.append(self)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(on_devices.Resident, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_(state, package)
    assert same(state, base_state())
