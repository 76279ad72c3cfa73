"""What holds for merging whatever the method: packages beside `apply`, rescale rules, methods of one's own,
dtypes, NaN, packages out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bit_patterns import special_words
from dense_merge import State, base_state, check_equal, result, shrink, tuned_from
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch_words import words_of

from dare_train import DeltaPackage, apply, extract, merge, register_merge_method, save_statistics
from dare_train.dtypes import DTYPES, FloatArray, cast, from_float, to_float
from dare_train.errors import CheckpointError, ConfigError, NonFiniteDelta, TensorMismatch
from dare_train.merging.methods.combinations import model_stock, nuslerp
from dare_train.merging.methods.dropping import rescale_q
from dare_train.merging.methods.registry import MERGE_METHODS
from dare_train.package.arithmetic import Term, combine
from dare_train.package.masks import Mask, key_of


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)
    monkeypatch.setattr("dare_train.parallel.threads.thread_count", lambda: 1)


BASE = base_state()
MODELS = tuned_from(BASE)


def on_disk(state: State, folder: Path) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_disk(BASE, tmp_path_factory.mktemp("base") / "base")


# Packages, as `apply` takes them.

ENCODINGS: list[dict[str, Any]] = [
    {"p": 0.9}, {"p": 0.5, "values": "exact"}, {"p": 0.0}, {"p": 0.3, "values": "int8"},
    {"p": 0.8, "values": "sign", "rescale": "none"},
]  # fmt: skip


@pytest.fixture(scope="module")
def packages(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[DeltaPackage]:
    folder = tmp_path_factory.mktemp("packages")
    return [
        extract(base, MODELS[n % 3], folder / str(n), seed=n, **options)
        for n, options in enumerate(ENCODINGS)
    ]


@pytest.mark.parametrize(
    "weights", [None, [1.0, 1.0, 1.0, 1.0, 1.0], [0.3, 1.0, -0.5, 0.2, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0]]
)
def test_task_arithmetic_of_packages_is_apply(
    base: Path, packages: list[DeltaPackage], weights: list[float] | None, tmp_path: Path
) -> None:
    found, report = result(base, packages, tmp_path / "merged", weights=weights)
    assert apply(base, packages, tmp_path / "applied", weights=weights) == report.fingerprint
    check_equal(found, load_file(tmp_path / "applied/model.safetensors"))


@pytest.mark.parametrize("number", range(len(ENCODINGS)))
def test_one_package_gives_its_own_result(
    base: Path, packages: list[DeltaPackage], number: int, tmp_path: Path
) -> None:
    _, report = result(base, [packages[number].path], tmp_path / "out")
    assert report.fingerprint == packages[number].manifest.result


def test_a_package_that_dropped_is_not_dropped_again(
    base: Path, packages: list[DeltaPackage], tmp_path: Path
) -> None:
    sparse = [packages[0], packages[1]]
    found, report = result(base, sparse, tmp_path / "again", p=0.9, seed=5)
    check_equal(found, result(base, sparse, tmp_path / "once")[0])
    assert len(report.notes) == 1
    assert report.notes[0].startswith("dropped in their packages already")
    assert all(package.name in report.notes[0] for package in sparse)


def test_a_package_of_all_elements_is_dropped_and_nothing_is_said(
    base: Path, packages: list[DeltaPackage], tmp_path: Path
) -> None:
    found, report = result(base, [packages[2]], tmp_path / "out", p=0.9, seed=5)
    assert report.notes == ()
    check_equal(found, result(BASE, [MODELS[2]], tmp_path / "model", p=0.9, seed=5)[0])


@pytest.mark.parametrize(("method", "same"), [("della", "ties"), ("della_linear", "task_arithmetic")])
def test_magprune_leaves_packages_that_dropped_alone(
    base: Path, packages: list[DeltaPackage], method: str, same: str, tmp_path: Path
) -> None:
    sparse, plain = [packages[0], packages[1]], {"density": 1.0} if same == "ties" else {}
    found, _ = result(base, sparse, tmp_path / "found", method=method)
    check_equal(found, result(base, sparse, tmp_path / "plain", method=same, **plain)[0])


@pytest.mark.parametrize("code", ["BF16", "F32"])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_where_one_checkpoint_moves_an_element_its_word_is_the_result(
    code: str, order: list[int], tmp_path: Path
) -> None:
    """Though sums of such numbers are rounded, and though what one model gives may equal what another
    would.
    """
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[code]
    step = {"BF16": 2.0**-7, "F32": 2.0**-23}[code]
    start = torch.tensor([1.0, 1, 256, 1e30, 5]).to(dtype)
    models = [
        torch.tensor([1000.0, 1, 1000, 1, 5]).to(dtype),
        torch.tensor([1 + step, 2, 258, 1e30, 6]).to(dtype),
    ]
    found, _ = result({"w": start}, [{"w": models[number]} for number in order], tmp_path / "out")
    last = 1000 + 2  # 1002 rounds to 1000 in bfloat16
    assert torch.equal(found["w"][[1, 3, 4]], torch.tensor([2.0, 1, 6]).to(dtype))
    assert torch.equal(found["w"][[0, 2]], torch.tensor([1000 + step, last]).to(dtype))


@pytest.mark.parametrize("code", ["BF16", "F32", "F16", "F64"])
def test_terms_of_all_elements_are_terms_of_every_position(code: str) -> None:
    dtype = DTYPES[code]
    special = special_words(dtype)
    base = np.tile(special, special.size)
    models = [np.repeat(special, special.size), np.roll(base, 5)]
    for factors in ([1.0, 1.0], [1.0, 0.5], [0.3, 1.0]):
        every, all_of = base.copy(), base.copy()
        combine(
            every,
            [Term(positions=None, factor=f, tuned=t) for f, t in zip(factors, models, strict=True)],
            dtype,
        )
        combine(
            all_of,
            [
                Term(positions=np.arange(base.size), factor=f, tuned=t)
                for f, t in zip(factors, models, strict=True)
            ],
            dtype,
        )
        assert np.array_equal(every, all_of)


# What multiplies the elements that are left.


def one_model() -> tuple[State, State]:
    """A base of zeros in float64, where a merged model is its factor times its delta; one tensor is empty,
    one does not move.
    """
    generator = torch.Generator().manual_seed(0)
    tuned = {
        "w": torch.randn(40, 60, generator=generator),
        "v": torch.randn(900, generator=generator),
        "e": torch.zeros(0, 4),
        "s": torch.zeros(9),
    }
    tuned = {name: tensor.double() for name, tensor in tuned.items()}
    return {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}, tuned


def factors_of(found: torch.Tensor, tuned: torch.Tensor) -> NDArray[np.float64]:
    """Of the elements that are left."""
    left = found.flatten() != 0
    return (found.flatten()[left] / tuned.flatten()[left]).numpy()


@pytest.mark.parametrize(
    ("rule", "factor"), [("paper", 65536 / (65536 - 45875)), ("none", 1.0), ("q", 1 / 0.4)]
)
def test_factors_of_random_drops(rule: str, factor: float, tmp_path: Path) -> None:
    zeros, tuned = one_model()
    options = {"q": 0.4} if rule == "q" else {}
    found, _ = result(zeros, [tuned], tmp_path / "out", p=0.7, seed=4, rescale=rule, **options)
    for name in ("w", "v"):
        kept = Mask(kind="seeded", key=key_of(4, name), threshold=45875).positions(0, tuned[name].numel())
        assert np.array_equal(np.flatnonzero(found[name].flatten()), kept)
        np.testing.assert_allclose(factors_of(found[name], tuned[name]), factor, rtol=1e-15)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {"p": 0.7}), ("magnitude", {"density": 0.2}),
        ("magnitude", {"density": 0.2, "p": 0.5}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.2}), ("della_linear", {"density": 0.4}),
    ],
)  # fmt: skip
def test_the_rule_norm_keeps_the_l1_norm(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    zeros, tuned = one_model()
    found, _ = result(zeros, [tuned], tmp_path / "out", method=method, rescale="norm", **options)
    for name in ("w", "v"):
        assert 0 < np.count_nonzero(found[name]) < tuned[name].numel()
        assert float(found[name].abs().sum()) == pytest.approx(float(tuned[name].abs().sum()), rel=1e-12)
        factors = factors_of(found[name], tuned[name])
        np.testing.assert_allclose(factors, factors[0], rtol=1e-12)
    assert not found["s"].any()


def test_magprune_multiplies_each_element_by_its_own_factor_or_none(tmp_path: Path) -> None:
    zeros, tuned = one_model()
    told: dict[str, Any] = dict(method="della_linear", density=0.5, epsilon=0.3, seed=2)
    found = {
        rule: result(zeros, [tuned], tmp_path / rule, rescale=rule, **told)[0]["w"]
        for rule in ("paper", "none")
    }
    assert np.array_equal(found["paper"] != 0, found["none"] != 0)
    assert set(factors_of(found["none"], tuned["w"])) == {1.0}
    factors = factors_of(found["paper"], tuned["w"])
    assert factors.min() == pytest.approx(1 / 0.8, abs=0.01)
    assert factors.max() == pytest.approx(1 / 0.2, abs=0.1)


def test_the_rule_q_is_worked_out_for_each_layer(tmp_path: Path) -> None:
    """Where there is no Gram matrix, it is the paper's, and the report says so."""
    zeros, tuned = one_model()
    tuned["w"] += 0.5
    x = 1 + 0.5 * torch.randn(200, 60, generator=torch.Generator().manual_seed(1)).double()
    gram = (x.T @ x / 200).float()
    file = save_statistics(tmp_path / "gram.safetensors", "gram", {"w": gram}, examples=200)
    found, report = result(zeros, [tuned], tmp_path / "out", p=0.75, rescale="q", gram=[file])
    factor = rescale_q(gram.numpy(), tuned["w"].numpy(), 0.75, transposed=False)
    assert 1 < factor < 4
    np.testing.assert_allclose(factors_of(found["w"], tuned["w"]), factor, rtol=1e-12)
    np.testing.assert_allclose(factors_of(found["v"], tuned["v"]), 4)
    assert any("rescaled by 1/(1 - p)" in note and "v" in note for note in report.notes)


def test_drop_only_knows_no_rule(tmp_path: Path) -> None:
    zeros, tuned = one_model()
    plain, _ = result(zeros, [tuned], tmp_path / "none", method="drop_only", p=0.7, rescale="none")
    assert set(factors_of(plain["w"], tuned["w"])) == {1.0}
    for rule in ("paper", "norm"):
        check_equal(
            result(zeros, [tuned], tmp_path / rule, method="drop_only", p=0.7, rescale=rule)[0], plain
        )


# Methods of one's own.


@pytest.fixture
def own() -> Iterator[None]:
    """Registers for one test."""
    before = dict(MERGE_METHODS)
    yield
    MERGE_METHODS.clear()
    MERGE_METHODS.update(before)


def strongest(deltas: FloatArray, weights: FloatArray, *, limit: float, flip: bool) -> FloatArray:
    """Of each element the largest delta, at most the limit."""
    weighted = deltas * weights.reshape(-1, *[1] * (deltas.ndim - 1))
    chosen = np.take_along_axis(weighted, np.abs(weighted).argmax(axis=0)[None], axis=0)[0].clip(
        -limit, limit
    )
    return np.asarray(-chosen if flip else chosen)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("reach", ["elements", "tensor"])
@pytest.mark.parametrize("inputs", ["models", "packages"])
def test_a_registered_method(
    reach: Any, inputs: str, base: Path, packages: list[DeltaPackage], tmp_path: Path
) -> None:
    register_merge_method("strongest", strongest, reach=reach, parameters={"limit": 0.5, "flip": False})
    models: list[Any] = MODELS[:2] if inputs == "models" else [packages[1], packages[0]]
    found, _ = result(
        base,
        models,
        tmp_path / "out",
        method="strongest",
        weights=[1.0, 0.5],
        limit=0.25,
        flip=True,
        lambda_=0.5,
    )
    ends = [result(base, [one], tmp_path / "alone")[0] for one in models]
    for name, tensor in BASE.items():
        dtype = DTYPES[name.split(".")[0]]
        start = to_float(words_of(tensor), dtype)
        rows = np.stack([to_float(words_of(end[name]), dtype) - start for end in ends])
        delta = strongest(rows, np.array([1.0, 0.5], rows.dtype), limit=0.25, flip=True) * rows.dtype.type(
            0.5
        )
        wanted = np.where(delta == 0, words_of(tensor), from_float(start + delta, dtype))
        if inputs == "models":
            assert np.array_equal(words_of(found[name]), wanted), name
        else:  # whose results were rounded to the dtype on the way
            np.testing.assert_allclose(
                to_float(words_of(found[name]), dtype), to_float(wanted, dtype), atol=0.02, rtol=0.02
            )


@pytest.mark.usefixtures("own")
def test_a_registered_method_sees_tensors_in_their_shapes_after_dropping(tmp_path: Path) -> None:
    seen: dict[tuple[int, ...], FloatArray] = {}

    def look(deltas: FloatArray, weights: FloatArray) -> FloatArray:
        seen[deltas.shape[1:]] = deltas.copy()
        assert weights.tolist() == [1.0, 3.0]
        return np.zeros_like(deltas[0])

    register_merge_method("look", look, drops="magnitude")
    names = ("F32.weight", "F32.stack", "F32.scalar", "F32.one")
    base, *models = ({name: one[name] for name in names} for one in (BASE, *MODELS[:2]))
    options: dict[str, Any] = {"density": [0.25, 1.0], "allow_unchanged": True}
    found, _ = result(base, models, tmp_path / "out", method="look", weights=[1, 3], **options)
    check_equal(found, base)
    assert seen.keys() == {(29, 60), (3, 11, 24), (), (1,)}
    for name in names[:2]:
        deltas, numel = seen[tuple(base[name].shape)], base[name].numel()
        assert 0 < np.count_nonzero(deltas[0]) <= numel // 4
        assert np.array_equal(deltas[1], (models[1][name] - base[name]).numpy())


@pytest.mark.usefixtures("own")
def test_random_drops_of_a_registered_method_are_those_of_dare(tmp_path: Path) -> None:
    register_merge_method("add", lambda deltas, weights: deltas.sum(axis=0), reach="elements", drops="random")
    found, _ = result(BASE, MODELS[:1], tmp_path / "own", method="add", seed=3)
    check_equal(found, result(BASE, MODELS[:1], tmp_path / "dare", method="dare_ties", seed=3)[0])


@pytest.mark.usefixtures("own")
def test_a_result_of_another_shape_is_refused(tmp_path: Path) -> None:
    register_merge_method("wrong", lambda deltas, weights: deltas)
    with pytest.raises(
        ConfigError, match=r"method wrong on w: expected a delta of shape \[2, 3\], found \[1, 2, 3\]"
    ):
        merge({"w": torch.zeros(2, 3)}, [{"w": torch.ones(2, 3)}], tmp_path / "out", method="wrong")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("ties", {}, "name: expected one that is not taken, found 'ties'"),
        ("mine", {"reach": "matrix"}, "reach: expected elements or tensor, found 'matrix'"),
        (
            "mine",
            {"drops": "some"},
            "drops: expected one of none, random, magnitude, outliers, magprune, found 'some'",
        ),
    ],
)
def test_what_cannot_be_registered(name: str, options: dict[str, Any], text: str) -> None:
    before = dict(MERGE_METHODS)
    with pytest.raises(ConfigError, match=text):
        register_merge_method(name, strongest, **options)
    assert before == MERGE_METHODS


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"limit": "much"}, "limit: expected a finite number, found 'much'"),
        ({"flip": 3}, "flip: expected true or false, found 3"),
        ({"weights": [1.0]}, "weights: expected one for each of 2 models, found 1"),
    ],
)
def test_parameters_of_a_registered_method_are_checked(
    options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    register_merge_method("strongest", strongest, parameters={"limit": 0.5, "flip": False})
    with pytest.raises(ConfigError, match=text):
        merge(BASE, MODELS[:2], tmp_path / "out", method="strongest", **options)


# Dtypes of the result.


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "karcher"])
def test_a_result_of_another_dtype_is_rounded_once(method: str, code: str, tmp_path: Path) -> None:
    """From the sums in float32 (float64 of float64): what is merged in float64 and rounded there has lost
    nothing before.
    """
    out = DTYPES[code]
    base = {**BASE, "steps": torch.arange(3)}
    models = [{**one, "steps": torch.arange(3)} for one in MODELS]
    weights = [0.5, 0.3, 0.7]
    options: dict[str, Any] = {"weights": weights, "allow_nonfinite": True}
    found, _ = result(base, models, tmp_path / "out", method=method, out_dtype=code, **options)
    widest, _ = result(base, models, tmp_path / "wide", method=method, out_dtype="F64", **options)
    assert found["steps"].dtype == torch.int64
    for name, tensor in BASE.items():
        own = DTYPES[name.split(".")[0]]
        assert (
            found[name].dtype
            == {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[
                code
            ]
        )
        sums = widest[name].numpy().reshape(-1)
        sums = sums if own.code == "F64" else sums.astype(np.float32)
        untouched = np.all([words_of(one[name]) == words_of(tensor) for one in MODELS], axis=0) & (
            method != "karcher"
        )
        wanted = np.where(untouched, cast(words_of(tensor), own, out), from_float(sums, out))
        if own == out:  # where nothing but one model moved, and the like: the same rules as without
            plain, _ = result(
                {name: tensor},
                [{name: one[name]} for one in MODELS],
                tmp_path / "own",
                method=method,
                **options,
            )
            wanted = words_of(plain[name])
        assert np.array_equal(words_of(found[name]), wanted), name


# Numbers that are none.


@pytest.mark.parametrize("code", ["BF16", "F32"])
@pytest.mark.parametrize("method", MERGE_METHODS)
def test_a_nan_in_a_model_is_one_in_the_result(method: str, code: str, tmp_path: Path) -> None:
    """Whatever the method drops: a model that diverged must not look as if it had not."""
    names = [f"{code}.weight", f"{code}.bias"]
    base = {name: BASE[name] for name in names}
    models = [
        {name: one[name].clone() for name in names} for one in MODELS[: MERGE_METHODS[method].models[1] or 3]
    ]
    for name in names:
        models[min(1, len(models) - 1)][name].view(-1)[700] = torch.nan
    options: dict[str, Any] = (
        {} if not any(one.name == "p" for one in MERGE_METHODS[method].parameters) else {"p": 0.0}
    )
    if method in ("fisher", "regmean"):
        kind: Any = MERGE_METHODS[method].needs
        ones = {
            name: np.ones(tuple(base[name].shape), np.float32)
            if kind == "fisher"
            else np.eye(60, dtype=np.float32)
            for name in names[:1]
        }
        options[kind] = [save_statistics(tmp_path / str(n), kind, ones, examples=1) for n in range(3)]
    if MERGE_METHODS[method].drops == "magprune":
        options |= {"density": 0.6, "epsilon": 0.3, "seed": kept_seed(names)}
    with pytest.raises(NonFiniteDelta, match=f"{code}.*: expected finite {code}.*found NaN or infinity"):
        result(base, models, tmp_path / "refused", method=method, **options)
    assert not (tmp_path / "refused").exists()
    found, _ = result(base, models, tmp_path / "out", method=method, allow_nonfinite=True, **options)
    for name in names:
        assert torch.isnan(found[name].view(-1)[700]), name


def kept_seed(names: list[str]) -> int:
    """With which MAGPRUNE keeps the element: draws decide, as with DARE."""
    return next(
        seed
        for seed in range(1000)
        if all(
            700 in Mask(kind="seeded", key=key_of(seed + 1, name), threshold=46000).positions(0, 1301)
            for name in names
        )
    )


@pytest.mark.parametrize("code", ["BF16", "F32", "F16", "F64"])
@pytest.mark.parametrize(
    "method",
    ["average", "task_arithmetic", "ties", "dare_ties", "breadcrumbs_ties", "della", "consensus_ta", "sce"],
)
def test_words_that_no_model_moved_stay(method: str, code: str, tmp_path: Path) -> None:
    """Zeros of both signs, infinities and NaNs with payloads: a mask of -inf is no reason for NaN."""
    special = torch.from_numpy(special_words(DTYPES[code]).view(np.dtype(f"i{DTYPES[code].itemsize}"))).view(
        BASE[f"{code}.bias"].dtype
    )
    start = torch.cat([special, BASE[f"{code}.bias"]])
    models = [{"w": torch.cat([special, one[f"{code}.bias"]])} for one in MODELS]
    found, _ = result({"w": start}, models, tmp_path / "out", method=method, allow_nonfinite=True)
    assert np.array_equal(words_of(found["w"])[: special.numel()], words_of(special))
    assert torch.isfinite(found["w"][special.numel() :]).all()


def with_infinity(method: str, out: Path, **options: Any) -> torch.Tensor:
    base, tuned = (
        {"w": BASE["F32.bias"]},
        [{"w": one["F32.bias"].clone()} for one in MODELS[: MERGE_METHODS[method].models[1] or 3]],
    )
    tuned[0]["w"][9] = torch.inf
    return result(base, tuned, out, method=method, allow_nonfinite=True, **options)[0]["w"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs", "consensus_ties", "della"])
def test_infinity_in_a_model_breaks_nothing_else(method: str, tmp_path: Path) -> None:
    options = {} if method in ("task_arithmetic", "della") else {"density": 0.5}
    assert torch.isfinite(with_infinity(method, tmp_path / "out", **options)[10:]).all()


@pytest.mark.parametrize("method", ["sce", "karcher", "slerp", "model_stock"])
def test_where_a_whole_tensor_counts_infinity_in_a_model_shows(method: str, tmp_path: Path) -> None:
    """Its variance is a NaN with a sign: not to be counted among magnitudes as it is."""
    found = with_infinity(method, tmp_path / "out", **({"select_topk": 0.5} if method == "sce" else {}))
    assert not torch.isfinite(found[9])


# Into a package.


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_a_merged_package_applied_is_the_merged_checkpoint(method: str, tmp_path: Path) -> None:
    names = ["BF16.weight", "F32.bias", "F32.scalar"]
    start = on_disk({name: BASE[name] for name in names}, tmp_path / "base")
    models = [{name: one[name] for name in names} for one in MODELS[: MERGE_METHODS[method].models[1] or 3]]
    options: dict[str, Any] = {"method": method, "seed": 3}
    if method in ("fisher", "regmean"):
        kind: Any = MERGE_METHODS[method].needs
        one = {names[0]: np.ones((29, 60), np.float32) if kind == "fisher" else np.eye(60, dtype=np.float32)}
        options[kind] = [
            save_statistics(tmp_path / str(n), kind, one, examples=1) for n in range(len(models))
        ]
    found, report = result(start, models, tmp_path / "checkpoint", **options)
    packed = merge(start, models, tmp_path / "package", package=True, **options)
    assert (
        packed.fingerprint == report.fingerprint == apply(start, tmp_path / "package", tmp_path / "applied")
    )
    check_equal(load_file(tmp_path / "applied/model.safetensors"), found)


# What only some models have.


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "model_stock"])
@pytest.mark.parametrize("options", [{}, {"nuslerp_flatten": False}, {"filter_wise": True}], ids=str)
def test_a_tensor_that_one_model_has_is_that_models(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    known = {one.name for one in MERGE_METHODS[method].parameters}
    if not options.keys() <= known:
        return
    base = {name: BASE[name] for name in ("BF16.weight", "F32.bias")}
    models = [{name: MODELS[0][name] for name in base}, {"F32.bias": MODELS[1]["F32.bias"]}]
    found, report = result(base, models, tmp_path / "out", method=method, **options)
    assert torch.equal(found["BF16.weight"], MODELS[0]["BF16.weight"])
    assert [fate.note for fate in report.tensors] == ["not in model in memory", ""]


# Ratios and angles for each row.


def rows_of(name: str, axis: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A base and models of it in float64, [models, rows, elements], where a row is all that shares one
    index.
    """
    start, tuned = BASE[name].double().numpy(), np.stack([one[name].double().numpy() for one in MODELS])
    shape = start.shape or (1,)
    vectors = np.moveaxis(tuned.reshape(-1, *shape), 1 if axis == 0 else -1, -1)
    own = np.moveaxis(start.reshape(shape), axis, -1)
    return own.reshape(-1, shape[axis]), vectors.reshape(len(MODELS), -1, shape[axis])


def check_rows(found: torch.Tensor, wanted: NDArray[np.float64], name: str, axis: int) -> None:
    shape = found.shape or (1,)
    back = np.moveaxis(found.double().numpy().reshape(shape), axis, -1).reshape(wanted.shape)
    close = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 1e-6, "F64": 1e-12}[name.split(".")[0]]
    np.testing.assert_allclose(back, wanted, rtol=2 * close, atol=close)


PARTS = ["BF16.weight", "F16.bias", "F32.stack", "F32.scalar", "F32.one", "F64.weight"]


@pytest.mark.parametrize("name", PARTS)
def test_model_stock_by_filters(name: str, tmp_path: Path) -> None:
    found, _ = result(
        {name: BASE[name]},
        [{name: one[name]} for one in MODELS],
        tmp_path / "out",
        method="model_stock",
        filter_wise=True,
    )
    start, vectors = rows_of(name, -1)
    deltas = vectors - start
    factors = model_stock(np.einsum("irk,jrk->rij", deltas, deltas), np.ones(3))
    check_rows(found[name], start + np.einsum("ri,irk->rk", factors, deltas), name, -1)


@pytest.mark.parametrize("of", ["deltas", "weights"])
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("name", PARTS)
def test_nuslerp_by_rows_and_columns(name: str, axis: int, of: str, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        method="nuslerp", weights=[1.0, 3.0], nuslerp_flatten=False, nuslerp_row_wise=axis == 0, of=of
    )
    found, _ = result(
        {name: BASE[name]}, [{name: one[name]} for one in MODELS[:2]], tmp_path / "out", **options
    )
    start, vectors = rows_of(name, axis)
    vectors = (vectors if of == "weights" else vectors - start)[:2]
    factors = nuslerp(np.einsum("irk,jrk->rij", vectors, vectors), np.array([1.0, 3.0]))
    merged = np.einsum("ri,irk->rk", factors, vectors)
    check_rows(found[name], merged if of == "weights" else start + merged, name, axis)


def test_what_nuslerp_interpolates_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of: expected deltas or weights, found 'weight'"):
        merge(BASE, MODELS[:2], tmp_path / "out", method="nuslerp", of="weight")


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("ties", {"density": 1.5}, r"density: expected a number in \[0, 1\], found 1.5"),
        ("ties", {"density": [0.5, -0.1]}, r"density.*: expected a number in \[0, 1\], found -0.1"),
        ("breadcrumbs", {"gamma": -0.5}, r"gamma: expected a number in \[0, 1\], found -0.5"),
        ("sce", {"select_topk": 2}, r"select_topk: expected a number in \[0, 1\], found 2"),
        ("dare_ties", {"q": -1}, r"q: expected a number in \[0, 1\], found -1"),
        ("karcher", {"max_iter": -1}, "max_iter: expected at least 0, found -1"),
        ("regmean", {"ridge": -1e-6}, "ridge: expected at least 0, found -1e-06"),
        ("fisher", {"floor": -1.0}, "floor: expected at least 0, found -1.0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    method: str, options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        merge(BASE, MODELS[:2], tmp_path / "out", method=method, **options)
    assert list(tmp_path.iterdir()) == []


# Statistics that are about something else.


def statistics(folder: Path, kind: Any, *files: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """As an argument of `merge`: files with these names and shapes."""
    made = [{name: np.ones(shape, np.float32) for name, shape in one.items()} for one in files]
    return {
        kind: [
            save_statistics(folder / f"{n}.safetensors", kind, one, examples=1) for n, one in enumerate(made)
        ]
    }


@pytest.mark.parametrize(
    ("method", "kind", "shapes", "text"),
    [
        (
            "fisher",
            "fisher",
            {"w": (2, 4)},
            r"1.safetensors: w: expected statistics for shape \[2, 3\], found \[2, 4\]",
        ),
        ("fisher", "fisher", {"w": (1, 3)}, r"w: expected statistics for shape \[2, 3\], found \[1, 3\]"),
        ("regmean", "gram", {"w": (2, 2)}, r"w: expected statistics for shape \[2, 3\], found \[2, 2\]"),
        ("regmean", "gram", {"v": (3, 3)}, r"v: expected statistics for shape \[3\], found \[3, 3\]"),
        (
            "fisher",
            "fisher",
            {"x.w": (2, 3)},
            r"1.safetensors: expected statistics of tensors that .* has, found x.w; are they another",
        ),
    ],
)
def test_statistics_must_fit(
    method: str, kind: Any, shapes: dict[str, tuple[int, ...]], text: str, tmp_path: Path
) -> None:
    base = {"w": torch.zeros(2, 3), "v": torch.zeros(3)}
    right = {"w": (2, 3)} if kind == "fisher" else {"w": (3, 3)}
    with pytest.raises(CheckpointError, match=text):
        merge(
            base, [base, base], tmp_path / "out", method=method, **statistics(tmp_path, kind, right, shapes)
        )


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("holders", [[0], [1], []])
def test_a_tensor_without_everyones_statistics_is_averaged(
    method: str, holders: list[int], tmp_path: Path
) -> None:
    base = {"w": torch.zeros(2, 3), "v": torch.zeros(3, 3)}
    models = [
        {"w": torch.ones(2, 3), "v": torch.ones(3, 3)},
        {"w": 2 * torch.ones(2, 3), "v": 3 * torch.ones(3, 3)},
    ]
    kind, shape = MERGE_METHODS[method].needs, (3, 3)
    files = [
        {"w": (2, 3) if kind == "fisher" else shape, **({"v": shape} if n in holders else {})}
        for n in range(2)
    ]
    found, report = result(
        base,
        models,
        tmp_path / "out",
        method=method,
        weights=[1.0, 3.0],
        lambda_=0.5,
        **statistics(tmp_path, kind, *files),
    )
    assert torch.allclose(found["v"], torch.full((3, 3), 0.5 * 2.5))
    assert report.notes == (f"averaged, since not every model has {kind} statistics of them: v",)


def test_infinities_of_the_base_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """A mask of -inf that no model moves."""
    base = {"w": torch.tensor([-torch.inf, 1.0, 2.0])}
    found, _ = result(base, [{"w": torch.tensor([-torch.inf, 1.5, 2.0])}], tmp_path / "out")
    assert found["w"].tolist() == [-torch.inf, 1.5, 2.0]


def test_sums_that_overflow_are_refused(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4, dtype=torch.float16)}
    models = [{"w": torch.tensor([0.0, 60000.0, 0.0, 1.0]).half()} for _ in range(2)]
    with pytest.raises(NonFiniteDelta, match=r"w: expected finite F16 of .*flat index 1"):
        merge(base, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(base, models, tmp_path / "wide", out_dtype="F32")


def test_a_result_that_equals_the_base_is_refused(tmp_path: Path) -> None:
    base = {"w": torch.ones(3), "v": torch.ones(2)}
    with pytest.raises(TensorMismatch, match=r"expected a result that differs from .*allow_unchanged"):
        merge(base, [base], tmp_path / "out")
    with pytest.raises(TensorMismatch, match="expected a result that differs from"):
        merge(base, [base], tmp_path / "package", package=True)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "package").exists()
    report = merge(base, [base], tmp_path / "out", allow_unchanged=True)
    assert report.summary == "0 of 2 tensors merged, 0 carried, 2 copied unchanged"


def test_models_that_have_nearly_nothing_of_the_base_are_refused(tmp_path: Path) -> None:
    base = {"big": torch.ones(100), "small": torch.ones(1)}
    model = {"small": torch.zeros(1)}
    with pytest.raises(TensorMismatch, match="1 of its 2 tensors in none of them, such as big"):
        merge(base, [model], tmp_path / "out")
    report = merge(base, [model], tmp_path / "out", allow_unchanged=True)
    assert report.summary == "1 of 2 tensors merged, 0 carried, 1 copied unchanged"
