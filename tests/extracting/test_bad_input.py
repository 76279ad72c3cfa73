"""What users get wrong about their models: refused in one line that says what, expected, found and what to
do.
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import apply_refused, base_state, extract_refused, moved, random_tensor, save

from dare_train import DeltaPackage, apply, apply_, extract, merge
from dare_train.errors import BaseMismatch, ConfigError, DtypeMismatch, NonFiniteDelta, TensorMismatch


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(base_state(), tmp_path / "base")


@pytest.fixture
def package(base: Path, tmp_path: Path) -> DeltaPackage:
    return extract(base, moved(base_state()), tmp_path / "package", p=0.5)


# The wrong base.


@pytest.mark.parametrize("name", ["a.weight", "b.weight", "c.count"])
def test_a_base_with_one_element_changed_is_named(package: DeltaPackage, tmp_path: Path, name: str) -> None:
    other = base_state()
    other[name].view(-1)[-1] += 1
    texts = (name, "expected fingerprint", "found", "this is not the base the package was made from")
    apply_refused(save(other, tmp_path / "other"), package, BaseMismatch, *texts)
    with pytest.raises(BaseMismatch, match=name):
        package.verify(tmp_path / "other")
    with pytest.raises(BaseMismatch, match=name):
        apply_(other, package)


def test_no_thread_goes_on_writing_once_the_error_is_out(base: Path, tmp_path: Path) -> None:
    """The output's descriptors are closed then: a late write would go wherever their numbers point by that
    time.
    """
    many = {f"w{number:02}": random_tensor(100, seed=number) for number in range(60)}
    package = extract(many, moved(many), tmp_path / "package")
    folder = save({**many, "w00": random_tensor(100, seed=99)}, tmp_path / "other")
    with pytest.raises(BaseMismatch, match="w00") as caught:
        apply(folder, package, tmp_path / "out")
    assert caught.value.__traceback__ is not None
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("dare-train")] == []


def test_the_same_base_in_another_dtype_is_recognised_where_it_is_not_to_be_rounded(
    package: DeltaPackage, tmp_path: Path
) -> None:
    wide = save(
        {name: t.float() if t.is_floating_point() else t for name, t in base_state().items()},
        tmp_path / "wide",
    )
    texts = (
        "a.weight",
        "expected BF16",
        "found F32 in",
        "it is the same base in another dtype",
        "cast_base=True (--cast-base)",
    )
    apply_refused(wide, package, DtypeMismatch, *texts, cast_base=False)
    assert apply(wide, package, tmp_path / "out", cast_base=True) == package.manifest.result


def test_another_base_in_another_dtype_is_not_mistaken_for_the_same(
    package: DeltaPackage, tmp_path: Path
) -> None:
    wide = save(
        {name: t.float() + 1 if t.is_floating_point() else t for name, t in base_state().items()},
        tmp_path / "wide",
    )
    texts = (
        "a.weight",
        "expected BF16",
        "found F32",
        "rounded to BF16 it differs too",
        "not the base the package was made from",
    )
    apply_refused(wide, package, DtypeMismatch, *texts, cast_base=False)
    rounded = ("a.weight", "after rounding it from F32 to BF16", "not the base the package was made from")
    for options in ({}, {"cast_base": True}):
        (tmp_path / "results").rmdir()
        apply_refused(wide, package, BaseMismatch, *rounded, **options)


def test_a_live_model_in_another_dtype_is_not_advised_an_option_that_apply_in_place_lacks(
    package: DeltaPackage,
) -> None:
    with pytest.raises(DtypeMismatch, match="same base in another dtype") as caught:
        apply_({name: t.float() if t.is_floating_point() else t for name, t in base_state().items()}, package)
    assert "cast_base" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda state: state.pop("b.weight"), ("b.weight", "expected in", "found missing")),
        (
            lambda state: state.update(d=random_tensor(3)),
            ("d: expected a tensor that the package knows", "found extra in"),
        ),
        (
            lambda state: state.update({"a.weight": random_tensor(30, 20)}),
            ("a.weight: expected shape [20, 30]", "found [30, 20] in"),
        ),
        (lambda state: state.clear() or state.update(x=random_tensor(1)), ("a.weight", "found missing")),
    ],
)
def test_a_base_with_other_tensors_is_refused(
    package: DeltaPackage, tmp_path: Path, change: Any, texts: tuple[str, ...]
) -> None:
    other = base_state()
    change(other)
    apply_refused(
        save(other, tmp_path / "other"),
        package,
        TensorMismatch,
        *texts,
        "not the base the package was made from",
    )


# Two models that do not belong together.


def test_models_without_a_name_in_common_are_refused(base: Path, tmp_path: Path) -> None:
    extract_refused(
        base,
        {"x": random_tensor(3)},
        tmp_path / "p",
        TensorMismatch,
        str(base),
        "found not one of them",
        "is this the base",
    )


@pytest.mark.parametrize("shape", [(30, 20), (20, 31), (19, 30), (600,), (20, 30, 1)])
def test_a_tuned_tensor_of_another_shape_is_refused(
    base: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    tuned = {**base_state(), "a.weight": random_tensor(*shape)}
    texts = (
        "a.weight: expected shape [20, 30], as in",
        f"found {list(shape)}",
        "whole=['a.weight'] (--whole)",
    )
    extract_refused(base, tuned, tmp_path / "p", TensorMismatch, *texts)


def test_a_tuned_model_in_another_dtype_is_refused_with_a_remedy(base: Path, tmp_path: Path) -> None:
    tuned = {name: t.float() if t.is_floating_point() else t for name, t in base_state().items()}
    texts = ("a.weight: expected F32", "found BF16 in", "cast_base=True (--cast-base) rounds the base first")
    for options in ({"dtype": "trained"}, {"p": 0.0}, {"values": "exact"}):
        extract_refused(base, tuned, tmp_path / "p", DtypeMismatch, *texts, **options)


# NaN and infinity.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"p": 0.0}, {"whole": ["a.weight"]}, {"values": "rounded"}, {"values": "int8"}]
)
def test_weights_that_are_not_finite_are_refused_by_name(
    base: Path, tmp_path: Path, value: float, options: dict[str, Any]
) -> None:
    tuned = moved(base_state())
    tuned["a.weight"].view(-1)[137] = value
    texts = (
        "a.weight: expected finite weights",
        "found NaN or infinity at flat index 137",
        "allow_nonfinite=True (--allow-nonfinite)",
    )
    extract_refused(base, tuned, tmp_path / "p", NonFiniteDelta, *texts, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0.5}, {"whole": ["a.weight"]}])
def test_allowed_weights_that_are_not_finite_are_carried(
    base: Path, tmp_path: Path, value: float, options: dict[str, Any]
) -> None:
    tuned = moved(base_state())
    tuned["a.weight"].fill_(value)
    package = extract(base, tuned, tmp_path / "package", allow_nonfinite=True, **options)
    apply(base, package, tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")["a.weight"]
    assert 0.4 < (~result.isfinite()).float().mean() <= 1
    (tmp_path / "package" / "dare_config.json").read_text().encode("ascii")
    json.loads((tmp_path / "package" / "dare_config.json").read_bytes(), parse_constant=pytest.fail)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [{"p": 0.0}, {"p": 0.5}, {"whole": ["bound"]}, {"values": "rounded"}, {"values": "int8", "p": 0.1}],
    ids=str,
)
def test_infinities_of_the_base_stay(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Bounds that bind nothing, as those of Gemma 4's audio layers, and masks."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(700, generator=generator).to(dtype), "bound": torch.tensor(math.inf).to(dtype)}
    base["w"][::9] = -math.inf
    tuned = {"w": base["w"] + torch.randn(700, generator=generator).to(dtype) / 8, "bound": base["bound"]}
    package = extract(base, tuned, tmp_path / "package", **options)
    for number in (1, 2):
        out = {name: tensor.clone() for name, tensor in base.items()}
        apply_(out, [package] * number, **({} if number == 1 else {"weights": [0.5, 0.25]}))
        assert torch.equal(out["w"].isinf(), base["w"].isinf())
        assert out["bound"].isinf()
        assert not out["w"].isnan().any()
        if options == {"p": 0.0} and number == 1:
            assert torch.equal(out["w"], tuned["w"])
    finer = {name: tensor.float() for name, tensor in tuned.items()}
    landed = extract(base, finer, tmp_path / "landed", dtype="base", p=0.5)
    apply_(base, landed)
    assert torch.equal(base["w"].isinf(), tuned["w"].isinf())
    assert not base["w"].isnan().any()


def test_infinities_of_the_base_stay_in_files_and_merges(tmp_path: Path, make_checkpoint: Any) -> None:
    state = {"w": torch.linspace(-1, 1, 700), "bound": torch.tensor(math.inf)}
    base = make_checkpoint("base", state)
    tuned = make_checkpoint("tuned", {**state, "w": state["w"] * 1.5})
    packages = [extract(base, tuned, tmp_path / f"package-{seed}", p=0.5, seed=seed) for seed in (0, 1)]
    apply(base, packages, tmp_path / "out", weights=[0.5, 0.5])
    merge(base, packages, tmp_path / "merged", method="average")
    for folder in ("out", "merged"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found["bound"] == math.inf
        assert found["w"].isfinite().all()


@pytest.mark.parametrize("values", ["rounded", "int8", "int4", "sign"])
def test_lossy_values_cannot_carry_infinity(base: Path, tmp_path: Path, values: str) -> None:
    tuned = moved(base_state())
    tuned["a.weight"].fill_(math.inf)
    place, options = tmp_path / "p", {"values": values, "p": 0.5, "allow_nonfinite": True}
    place.mkdir()
    with pytest.raises((ConfigError, NonFiniteDelta), match=f"{values}|a.weight"):
        extract(base, tuned, place / "out", **options)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("values", ["rounded", "int8", "int4", "sign"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_delta_beyond_what_its_encoding_holds_is_refused(
    tmp_path: Path, values: str, dtype: torch.dtype
) -> None:
    base, tuned = (
        {"w": torch.zeros(300, dtype=dtype)},
        {"w": torch.full((300,), 3.4e38 if dtype == torch.float32 else 1e300, dtype=dtype)},
    )
    extract_refused(base, tuned, tmp_path / "p", NonFiniteDelta, "w", values=values, p=0.5)


def test_a_large_float64_is_carried_exactly(tmp_path: Path) -> None:
    base, tuned = (
        {"w": torch.ones(300, dtype=torch.float64)},
        {"w": torch.full((300,), 1e300, dtype=torch.float64)},
    )
    package = extract(base, tuned, tmp_path / "package", p=0.0)
    apply_(base, package)
    assert torch.equal(base["w"], tuned["w"])


@pytest.mark.parametrize("values", ["auto", "rounded", "int8", "int4", "sign"])
@pytest.mark.parametrize("kernels", [None, "torch"])
def test_what_rescaling_makes_infinite_is_refused(tmp_path: Path, values: str, kernels: str | None) -> None:
    base = {"w": torch.full((3000,), 60000.0, dtype=torch.float16)}
    tuned = {"w": base["w"] + 1024}
    texts = ("w: expected rescaled deltas that fit F16", "found larger ones; a smaller p, or p=0 (--p 0)")
    options: dict[str, Any] = {"values": values, "kernels": kernels}
    extract_refused(base, tuned, tmp_path / "p", NonFiniteDelta, *texts, p=0.9, **options)
    package = extract(base, tuned, tmp_path / "kept", p=0, kernels=kernels)
    apply_(base, package)
    assert torch.equal(base["w"], tuned["w"])


def test_infinity_is_allowed_by_who_allows_it(tmp_path: Path) -> None:
    base = {"w": torch.full((3000,), 60000.0, dtype=torch.float16)}
    package = extract(base, {"w": base["w"] + 1024}, tmp_path / "package", p=0.9, allow_nonfinite=True)
    apply_(base, package)
    assert 0.05 < base["w"].isinf().float().mean() < 0.15


@pytest.mark.parametrize("p", [0.0, 0.9])
def test_a_base_that_does_not_fit_the_dtype_it_is_rounded_to_is_refused(p: float, tmp_path: Path) -> None:
    base = save({"w": torch.cat([torch.ones(600), torch.full((1,), 1e5)]).bfloat16()}, tmp_path / "base")
    tuned = save({"w": torch.ones(601, dtype=torch.float16)}, tmp_path / "tuned")
    texts = (
        "w: expected numbers in",
        "that fit F16, found a larger one at flat index 600",
        "give the fine-tuned weights in BF16",
    )
    extract_refused(base, tuned, tmp_path / "p", NonFiniteDelta, *texts, p=p, cast_base=True)
    for name in ("*", "excluded"):
        with pytest.raises(NonFiniteDelta, match="found a larger one at flat index 600"):
            merge(base, [tuned], tmp_path / name, cast_base=True, exclude=["w"] if name == "*" else [])
