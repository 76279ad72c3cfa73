"""Merging where tensors lie: the CPU's bits, whatever is merged and how, in torch's operations and with
Triton's kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bit_patterns import FLOATS, special_words
from device_states import base_state, to, tuned_state
from merging import files_of
from tiny import State, random_tensor, refusal, save
from torch_words import as_tensor

from dare_train import DeltaPackage, extract, merge
from dare_train.dtypes import DType
from dare_train.errors import ConfigError, DeviceMemoryError
from dare_train.merging import tensor_on_device as on_device
from dare_train.merging.methods.registry import MERGE_METHODS
from dare_train.weights.protocol import SEGMENT

pytestmark = pytest.mark.gpu

THERE = {
    "average", "task_arithmetic", "dare_linear", "drop_only", "magnitude", "breadcrumbs", "ties", "dare_ties",
    "breadcrumbs_ties",
    "consensus_ta", "consensus_ties", "nearswap", "ram", "emr",
}  # fmt: skip
"""Methods that a device works out."""


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Torch's kernels in place of a device's; of a test's own choice Triton's, in its interpreter where there
    is no GPU.
    """
    chosen = getattr(request, "param", "torch")
    monkeypatch.setenv("DARE_TRAIN_KERNELS", chosen)
    with np.errstate(all="ignore"):
        yield chosen


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are merged on a device."""
    seen: list[str] = []
    honest = on_device.DeviceTensor.merged

    def merged(self: Any, start: int, count: int) -> Any:
        seen.append(self._tensor.name)
        return honest(self, start, count)

    monkeypatch.setattr(on_device.DeviceTensor, "merged", merged)
    return seen


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    """Models of every kind, by name."""
    masks = {
        name: torch.rand(base_state()[name].shape, generator=torch.Generator().manual_seed(3)) < 0.3
        for name in ("bf16", "f32")
    }
    options: dict[str, dict[str, Any]] = {
        "exact": dict(p=0.5, seed=1),
        "everything": dict(p=0.0),
        "rounded": dict(p=0.8, seed=2, values="rounded"),
        "int8": dict(p=0.5, seed=3, values="int8"),
        "stored": dict(p=0.6, seed=4, masks=masks),
        "without": dict(p=0.5, seed=5, exclude="f16"),
    }
    made: dict[str, Any] = {"one": tuned_state(1), "other": tuned_state(2), "rough": strange(tuned_state(3))}
    for number, (name, own) in enumerate(options.items()):
        made[name] = extract(base_state(), tuned_state(10 + number), tmp_path / name, kernels="cpu", **own)
    return made


def strange(state: State) -> State:
    """With numbers that are none, and many deltas of one size."""
    for tensor in (state["bf16"], state["f32"], state["f16"], state["f64"]):
        flat = tensor.view(-1)
        flat[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
        flat[10:30] = 1000.0
    return state


def compare(
    place: Path,
    base: State,
    models: list[Any],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> None:
    """The same files from a base on the device as from one that the CPU works on, also where it has no finite
    numbers.
    """
    options = {"allow_nonfinite": True, **options}
    merge(
        to(base, device),
        [to(one, device) if isinstance(one, dict) else one for one in models],
        place / "there",
        **options,
    )
    with monkeypatch.context() as patched, np.errstate(all="ignore"):
        patched.setenv("DARE_TRAIN_KERNELS", "cpu")
        merge(base, models, place / "here", **options)
    assert files_of(place / "there") == files_of(place / "here")


def test_these_are_the_methods_that_devices_know() -> None:
    known = {
        name
        for name, one in MERGE_METHODS.items()
        if one.function in on_device.elements.ANYWHERE and one.drops != "magprune"
    }
    sums = {
        name
        for name, one in MERGE_METHODS.items()
        if one.reach == "coefficients" and not one.needs_gram and one.drops != "magprune"
    }
    assert known | sums == THERE


@pytest.mark.parametrize(
    "models",
    [["one", "other"], ["exact", "one", "rounded"], ["rough", "everything", "int8"], ["without", "stored"]],
)
@pytest.mark.parametrize("method", sorted(THERE))
def test_every_method_of_every_kind_of_model(
    method: str, models: list[str], kernels: str, there: list[str], inputs: dict[str, Any],
    device: torch.device, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if method == "average" and any(isinstance(inputs[name], DeltaPackage) for name in models):
        models = ["one", "everything", "other"]
    models = models[-(MERGE_METHODS[method].models[1] or len(models)) :]
    density = (
        {"density": 0.3} if any(one.name == "density" for one in MERGE_METHODS[method].parameters) else {}
    )
    p = {"p": 0.5} if method in ("dare_linear", "dare_ties", "drop_only") else {}
    compare(
        tmp_path,
        base_state(),
        [inputs[name] for name in models],
        device,
        monkeypatch,
        method=method,
        **density,
        **p,
    )
    assert set(there) - {"same"} == {"bf16", "bf16.2", "f32", "f16", "f64"}


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("options", [dict(method="dare_linear", p=0.5), dict(method="dare_ties", p=0.9)])
def test_tritons_kernels(
    options: dict[str, Any], kernels: str, there: list[str], inputs: dict[str, Any], device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compare(
        tmp_path,
        base_state(),
        [inputs["rough"], inputs["stored"], inputs["int8"]],
        device,
        monkeypatch,
        **options,
    )
    assert set(there) - {"same"} == {"bf16", "bf16.2", "f32", "f16", "f64"}


@pytest.mark.parametrize(
    "options",
    [
        dict(method="dare_ties", p=[0.5, 0.0, 0.9], weights=[0.3, -1.0, 2.0], lambda_=0.7, normalize=True),
        dict(method="task_arithmetic", weights=[0.3, 0.4, 0.3], normalize=True, p=0.5, rescale="none"),
        dict(method="task_arithmetic", weights=[0.0, 1.0, 0.0]),
        dict(method="average", weights=[0.3, 0.4, 0.1], normalize=False),
        dict(method="magnitude", density=[0.0, 1.0, 0.001], lambda_=-1.0),
        dict(method="breadcrumbs_ties", density=0.9, gamma=[0.0, 0.2, 0.05]),
        dict(method="consensus_ta", mask_threshold=0.3, agree=1, exclude="f16", p=0.3),
        dict(method="ties", out_dtype="BF16", exclude="f64"),
        dict(method="dare_linear", out_dtype="F32", exclude="f64", p=0.5, take={"bf16.2": 1}),
        dict(method="ties", cast_base=True, package=True),
    ],
    ids=lambda options: options["method"],
)
def test_options(
    options: dict[str, Any], kernels: str, there: list[str], inputs: dict[str, Any], device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compare(
        tmp_path,
        base_state(),
        [inputs["one"], inputs["other"], inputs["rough"]],
        device,
        monkeypatch,
        **options,
    )
    assert {"bf16", "f32"} <= set(there)


@pytest.mark.parametrize(
    ("options", "who"),
    [
        (dict(method="slerp"), {"one", "other"}),
        (dict(method="della"), {"one", "other"}),
        (dict(method="sce", select_topk=0.5), {"one", "other"}),
        (dict(method="dare_linear", rescale="norm"), {"one", "other"}),
        (
            dict(method="task_arithmetic", out_dtype="BF16", exclude=["f32", "f16", "bf16*", "same"]),
            {"one", "other"},
        ),
    ],
)
def test_what_has_no_one_order_is_the_cpus(
    options: dict[str, Any], who: set[str], kernels: str, there: list[str], inputs: dict[str, Any],
    device: torch.device, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compare(tmp_path, base_state(), [inputs[name] for name in sorted(who)], device, monkeypatch, **options)
    assert not there


def test_models_of_other_dtypes_and_names(
    kernels: str, there: list[str], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 over a bfloat16 base, and with a prefix before every name."""
    base = {"a.weight": random_tensor(30, 40, seed=1), "b.weight": random_tensor(999, seed=2)}
    wide = {f"model.{name}": tensor.float() * 1.1 for name, tensor in base.items()}
    compare(
        tmp_path,
        base,
        [wide, {name: tensor * 1.2 for name, tensor in base.items()}],
        device,
        monkeypatch,
        method="ties",
        density=0.5,
    )
    assert set(there) == {"model.a.weight", "model.b.weight"}


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.code)
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "consensus_ta"])
def test_words_that_nothing_moves_stay(
    dtype: DType,
    method: str,
    kernels: str,
    there: list[str],
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also zeros below zero and NaNs with a payload."""
    special = np.resize(special_words(dtype), 1000)
    models = [special.copy() for _ in range(3)]
    for number, one in enumerate(models):
        one[100 * number : 100 * number + 200] = special[::-1][100 * number : 100 * number + 200]
    compare(
        tmp_path,
        {"a": as_tensor(special, dtype)},
        [{"a": as_tensor(one, dtype)} for one in models],
        device,
        monkeypatch,
        method=method,
    )
    assert there == ["a"]


@pytest.mark.parametrize("method", ["magnitude", "breadcrumbs"])
def test_of_zeros_those_count_that_a_package_has(
    method: str,
    kernels: str,
    there: list[str],
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Deltas of zero that turn signs: which of them are among the largest depends on which there are."""
    base = {"a": torch.zeros(3000, dtype=torch.bfloat16)}
    tuned = {"a": torch.full_like(base["a"], -0.0)}
    tuned["a"][::10] = random_tensor(300)
    package = extract(base, tuned, tmp_path / "package", p=0.5, rescale="none")
    compare(tmp_path, base, [package], device, monkeypatch, method=method, density=0.2)
    assert there == ["a"]


@pytest.mark.parametrize("method", ["ties", "dare_linear", "breadcrumbs"])
def test_tensors_of_many_runs(
    method: str, there: list[str], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks among all elements, equal ones told apart over borders. With torch's kernels: too many elements
    for the interpreter.
    """
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "torch")
    monkeypatch.setattr(on_device, "_AT_ONCE", 2 * SEGMENT)
    base = {"a": random_tensor(3 * SEGMENT + 77)}
    steps = torch.randint(-3, 4, base["a"].shape, generator=torch.Generator().manual_seed(1)) * 0.25
    models: list[Any] = [{"a": base["a"] + steps.bfloat16()}, {"a": base["a"] * 1.5}]
    models.append(extract(base, {"a": base["a"] - 0.5}, tmp_path / "package", p=0.5))
    compare(tmp_path, base, models, device, monkeypatch, method=method)
    assert there == ["a"] * 2


def test_segments_that_runs_would_cut_are_the_cpus(
    there: list[str], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "torch")
    monkeypatch.setattr(on_device, "_AT_ONCE", SEGMENT // 2)
    base = {"a": random_tensor(SEGMENT + 77), "b": random_tensor(100)}
    package = extract(
        base, {name: tensor * 1.5 for name, tensor in base.items()}, tmp_path / "package", p=0.5
    )
    compare(tmp_path, base, [package], device, monkeypatch)
    assert there == ["b"]


# Which device


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a base and a model."""
    return save(base_state(), tmp_path / "base"), save(tuned_state(1), tmp_path / "tuned")


@pytest.mark.parametrize("kernels", ["torch", "cuda"], indirect=True)
def test_files_go_where_the_user_says(
    kernels: str, there: list[str], files: tuple[Path, Path], device: torch.device, tmp_path: Path
) -> None:
    base, tuned = files
    merge(base, [tuned], tmp_path / "here", method="ties", density=0.5)
    assert not there
    merge(base, [tuned], tmp_path / "there", method="ties", density=0.5, device=device)
    assert sorted(there) == ["bf16", "bf16.2", "f16", "f32", "f64", "same"]
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


def test_a_base_on_a_device_can_be_merged_on_the_cpu(
    there: list[str], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DARE_TRAIN_KERNELS", raising=False)
    merge(to(base_state(), device), [tuned_state(1)], tmp_path / "out", device="cpu")
    assert not there


@pytest.mark.parametrize("given", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(given: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        merge(files[0], [files[1]], tmp_path / "out", device=given)
    refusal(caught.value, ConfigError, "device: expected one that torch has here, such as cpu or cuda", given)
    assert not (tmp_path / "out").exists()


def test_devices_need_torch(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "dare_train.merging.devices")
    with pytest.raises(ConfigError) as caught:
        merge(files[0], [files[1]], tmp_path / "out", device="cuda")
    refusal(caught.value, ConfigError, "device: expected torch, which works there, found not installed")


def test_too_little_memory(
    files: tuple[Path, Path], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 MiB free. Process 1 has 3 GiB"
        )

    monkeypatch.setenv("DARE_TRAIN_KERNELS", "torch")
    monkeypatch.setattr(on_device, "combined", full)
    with pytest.raises(DeviceMemoryError) as caught:
        merge(files[0], [files[1]], tmp_path / "out", device=device)
    refusal(caught.value, DeviceMemoryError, "MB to merge", "CUDA out of memory", 'merge with device="cpu"')
    assert not (tmp_path / "out").exists()
