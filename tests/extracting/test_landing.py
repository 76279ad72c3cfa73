"""Packages that land on the base's grid: the law of docs/format.md §5.7, and what a receiver gets."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import format_reader as reader
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import State, extract_refused, save

from dare_train import DeltaPackage, apply, apply_, extract, merge, verify
from dare_train.dtypes import DTYPES, to_float
from dare_train.errors import ConfigError, NonFiniteDelta
from dare_train.package.landing import Landing
from dare_train.package.masks import Mask, key_of

SEEDS = 256
GRIDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FINER = {"BF16": torch.float32, "F16": torch.float32, "F32": torch.float64}
ELEMENTS = 4096


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def pair(code: str, *, size: float = 2e-5) -> tuple[State, State]:
    """A base on a grid, and the same in finer numbers with a delta that is mostly below half a step of
    bf16."""
    base = {"w": normal(64, 64, seed=1, scale=0.02).to(GRIDS[code])}
    tuned = {"w": (base["w"].double() + normal(64, 64, seed=2, scale=size)).to(FINER[code])}
    return base, tuned


def landed(base: State, tuned: State, folder: Path, **options: object) -> DeltaPackage:
    return extract(base, tuned, folder, dtype="base", **options)


def received(base: State, package: DeltaPackage) -> State:
    result = {name: tensor.clone() for name, tensor in base.items()}
    apply_(result, package)
    return result


def words_after(code: str, p: float, seed: int, base: torch.Tensor, tuned: torch.Tensor) -> np.ndarray:
    """Of the result, by the law alone: as float64."""
    dtype, source = DTYPES[code], DTYPES[{"BF16": "F32", "F16": "F32", "F32": "F64"}[code]]
    threshold, key = round(p * 65536), key_of(seed, "w")
    law = Landing(source=source, factor=65536 / (65536 - threshold), rounding="stochastic", key=key)
    words = base.reshape(-1).view(torch.uint8).numpy().view(dtype.word)
    kind = "seeded" if threshold else "all"
    positions = Mask(kind=kind, key=key, threshold=threshold).positions(0, words.size)
    moved = tuned.reshape(-1).view(torch.uint8).numpy().view(source.word)[positions]
    result = words.copy()
    result[positions] = law.landed(words[positions], moved, dtype, 0, positions)
    return to_float(result, dtype).astype(np.float64)


@pytest.mark.parametrize("p", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("code", GRIDS)
def test_the_mean_over_seeds_is_what_was_trained(code: str, p: float) -> None:
    """E[result] = base + δ (arXiv 2311.03099, §3.1), on any grid: over elements and seeds together, and of
    each element within what chance allows in 4096 of them.
    """
    base, tuned = pair(code, size=2e-5 if code != "F32" else 3e-10)
    expected = tuned["w"].double().reshape(-1).numpy()
    delta = _delta(base, tuned)
    of_seeds = np.stack([words_after(code, p, seed, base["w"], tuned["w"]) for seed in range(SEEDS)])
    in_all = of_seeds.mean(1) - expected.mean()
    assert abs(in_all.mean()) <= 4 * in_all.std(ddof=1) / np.sqrt(SEEDS)
    along = (of_seeds - (expected - delta)) @ delta / (delta @ delta)
    assert abs(along.mean() - 1) <= 4 * along.std(ddof=1) / np.sqrt(SEEDS)
    if p == 0:
        step = 2.0 ** (np.floor(np.log2(np.abs(expected))) - DTYPES[code].mantissa_bits)
        above = np.abs(expected) % step
        chance = np.sqrt(above * (step - above) / SEEDS)
        assert (np.abs(of_seeds.mean(0) - expected) <= 4 * chance + step * 2**-32).mean() > 0.995


def _delta(base: State, tuned: State) -> np.ndarray:
    return (tuned["w"].double() - base["w"].double()).reshape(-1).numpy()


def test_rounding_before_rescaling_is_what_loses_the_delta(tmp_path: Path) -> None:
    """The reason for all of it: of a delta below half a step of bf16 nothing is left after rounding."""
    base, tuned = pair("BF16")
    delta = _delta(base, tuned)
    rounded = {"w": tuned["w"].bfloat16()}
    for package, least, most in (
        (extract(base, rounded, tmp_path / "before", p=0.9), 0.3, 0.9),
        (landed(base, tuned, tmp_path / "after", p=0.9), 0.9, 1.1),
    ):
        moved = (received(base, package)["w"].double() - base["w"].double()).reshape(-1).numpy()
        assert least < moved @ delta / (delta @ delta) < most


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("code", GRIDS)
def test_every_way_gives_the_bits_on_record(tmp_path: Path, code: str, rounding: str) -> None:
    base, tuned = pair(code)
    folder = save(base, tmp_path / "base")
    package = landed(folder, save(tuned, tmp_path / "tuned"), tmp_path / "package", rounding=rounding)
    verify(package, folder)
    in_memory = landed(base, tuned, tmp_path / "of memory", rounding=rounding)
    apply(folder, package, tmp_path / "received")
    result = received(base, in_memory)
    assert result["w"].dtype == GRIDS[code]
    assert torch.equal(load_file(tmp_path / "received/model.safetensors")["w"], result["w"])
    assert package.manifest.result == in_memory.manifest.result
    undone = {name: tensor.clone() for name, tensor in base.items()}
    apply_(undone, package).revert()
    assert torch.equal(undone["w"], base["w"])


def test_nearest_at_p_0_is_the_cast_that_everybody_does(tmp_path: Path) -> None:
    base, tuned = pair("BF16")
    result = received(base, landed(base, tuned, tmp_path / "package", p=0, rounding="nearest"))
    assert torch.equal(result["w"], tuned["w"].bfloat16())


def test_nearest_is_the_law_of_applying(tmp_path: Path) -> None:
    """At p = 0.5, where γ = 2: what the receiver of a package of fp32 words would round to."""
    base, tuned = pair("BF16")
    result = received(base, landed(base, tuned, tmp_path / "package", p=0.5, rounding="nearest"))
    kept = Mask(kind="seeded", key=key_of(0, "w"), threshold=1 << 15).positions(0, ELEMENTS)
    expected = base["w"].reshape(-1).clone()
    rescaled = base["w"].double() + 2 * (tuned["w"].double() - base["w"].double())
    expected[kept] = rescaled.reshape(-1)[kept].float().bfloat16()
    assert torch.equal(result["w"].reshape(-1), expected)


def test_masks_are_those_of_a_package_that_does_not_land(tmp_path: Path) -> None:
    base, tuned = pair("BF16", size=1e-2)
    landing = landed(base, tuned, tmp_path / "landed")
    plain = extract(base, tuned, tmp_path / "plain", cast_base=True)
    moved = [received(base, landing)["w"] != base["w"]]
    moved.append(received({"w": base["w"].float()}, plain)["w"] != base["w"].float())
    assert not bool((moved[0] & ~moved[1]).any())
    assert float(moved[0].sum()) > 0.95 * float(moved[1].sum())


def test_weights_other_than_one_and_sums_have_the_rescaled_delta(tmp_path: Path) -> None:
    base, tuned = pair("BF16", size=1e-3)
    package = landed(base, tuned, tmp_path / "package", p=0.5)
    once = received(base, package)["w"].double() - base["w"].double()
    halves = {"w": base["w"].clone()}
    apply_(halves, package, weights=[0.5])
    halved = halves["w"].double() - base["w"].double()
    assert float((halved - once / 2).abs().max()) <= float(base["w"].abs().max()) * 2**-8
    folder = save(base, tmp_path / "base")
    merge(folder, [package], tmp_path / "merged", method="task_arithmetic", weights=[1.0])
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")["w"], received(base, package)["w"])


def test_the_manifest_has_rounding_and_rescale_on_record(tmp_path: Path) -> None:
    base, tuned = pair("BF16")
    package = landed(base, tuned, tmp_path / "package")
    manifest = DeltaPackage.open(package.path).manifest
    assert manifest.landed == ("stochastic", "paper")
    assert manifest.rescale == "carried"
    (record,) = manifest.tensors
    assert (record.p, record.threshold, record.values) == (0.9, round(0.9 * 65536), "exact")


def test_tensors_of_the_bases_dtype_land_too_where_others_do(tmp_path: Path) -> None:
    base, tuned = pair("BF16")
    base["norm"] = torch.ones(ELEMENTS).bfloat16()
    tuned["norm"] = base["norm"] + torch.tensor(2**-7).bfloat16()
    result = received(base, landed(base, tuned, tmp_path / "package"))
    moved = result["norm"].double() - 1
    assert 0.9 < float(moved.mean()) / 2**-7 < 1.1


def test_nothing_lands_where_nothing_is_finer(tmp_path: Path) -> None:
    base, tuned = pair("BF16", size=1e-2)
    tuned = {"w": tuned["w"].bfloat16()}
    package = landed(base, tuned, tmp_path / "package")
    plain = extract(base, tuned, tmp_path / "plain")
    assert package.manifest.landed is None
    assert package.manifest.result == plain.manifest.result


def test_a_tensor_that_the_base_has_not_keeps_its_dtype(tmp_path: Path) -> None:
    base, tuned = pair("BF16")
    tuned["head"] = normal(8, seed=5).float()
    package = landed(base, tuned, tmp_path / "package")
    assert {record.name: record.info.dtype.code for record in package.manifest.tensors} == {
        "head": "F32",
        "w": "BF16",
    }


def test_what_travels_whole_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    base, tuned = pair("BF16")
    result = received(base, landed(base, tuned, tmp_path / "package", whole="w"))
    assert torch.equal(result["w"], tuned["w"].bfloat16())


def test_rows_beyond_the_bases_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    base, tuned = pair("BF16")
    added = normal(3, 64, seed=9, scale=0.02).float()
    grown = {"w": torch.cat([tuned["w"], added])}
    package = landed(base, grown, tmp_path / "package")
    apply(save(base, tmp_path / "base"), package, tmp_path / "received")
    result = load_file(tmp_path / "received/model.safetensors")["w"]
    assert torch.equal(result[64:], added.bfloat16())


def test_an_element_that_does_not_move_keeps_its_sign(tmp_path: Path) -> None:
    base = {"w": torch.full((ELEMENTS,), -0.0).bfloat16()}
    tuned = {"w": torch.full((ELEMENTS,), 1e-41)}
    result = received(base, landed(base, tuned, tmp_path / "package", p=0))["w"]
    still = result == 0
    assert bool(still.any())
    assert bool(torch.signbit(result[still]).all())


def test_weights_coarser_than_the_bases_are_refused(tmp_path: Path) -> None:
    base = {"w": normal(20, seed=1).float()}
    tuned = {"w": (base["w"] + 0.1).bfloat16()}
    extract_refused(base, tuned, tmp_path, ConfigError, "w", "BF16", "F32", "trained", dtype="base")


def test_a_rescaled_delta_beyond_the_grid_is_refused(tmp_path: Path) -> None:
    base = {"w": torch.zeros(ELEMENTS).half()}
    tuned = {"w": torch.full((ELEMENTS,), 4e4)}
    extract_refused(base, tuned, tmp_path, NonFiniteDelta, "w", "F16", "smaller p", dtype="base")


@pytest.mark.parametrize("values", ["rounded", "int8", "sign"])
def test_values_that_are_not_exact_are_refused(tmp_path: Path, values: str) -> None:
    base, tuned = pair("BF16")
    extract_refused(base, tuned, tmp_path, ConfigError, "values", "exact", values=values, dtype="base")


def test_one_of_two_roundings_is_refused(tmp_path: Path) -> None:
    base, tuned = pair("BF16")
    extract_refused(base, tuned, tmp_path, ConfigError, "cast_base", dtype="base", cast_base=True)
    extract_refused(base, tuned, tmp_path, ConfigError, "rounding", dtype="base", rounding="up")
    extract_refused(base, tuned, tmp_path, ConfigError, "dtype", dtype="bf16")


@pytest.mark.parametrize("code", ["I8", "F8_E4M3"])
def test_a_dtype_without_a_landing_is_refused_by_name(tmp_path: Path, code: str) -> None:
    base, tuned = pair("BF16")
    kinds = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
    base["packed"] = torch.ones(8).to(kinds[code])
    tuned["packed"] = torch.ones(8)
    with pytest.raises(Exception, match=r"packed.*precision"):
        landed(base, tuned, tmp_path / "package")


def landing_by_the_document(base: np.ndarray, tuned: np.ndarray, seed: int, threshold: int) -> np.ndarray:
    """bf16 words after landing, by docs/format.md §5.7 alone, with exact fractions."""
    result = base.copy()
    masks, high, low = (reader.draws(seed, "w", 0, base.size, domain) for domain in (0, 2, 3))
    factor = 65536 / (65536 - threshold)
    for i in np.flatnonzero(masks >= threshold):
        before = float(reader.as_float(base[i : i + 1], "BF16")[0])
        x = before + factor * (float(tuned[i]) - before)
        below = int(np.float32(x).view(np.uint32)) >> 16
        if abs(Fraction(_bf16(below))) > abs(Fraction(x)):
            below -= 1
        near, far = abs(Fraction(_bf16(below))), abs(Fraction(_bf16(below + 1)))
        share = (abs(Fraction(x)) - near) / (far - near)
        drawn = (int(high[i]) << 16) + int(low[i])
        word = below + (drawn < int(share * 2**32 + Fraction(1, 2)))
        result[i] = base[i] if _bf16(word) == before else word
    return result


def _bf16(word: int) -> float:
    return float(np.array([word << 16], np.uint32).view(np.float32)[0])


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_elements_land_where_the_document_says(tmp_path: Path, p: float) -> None:
    base, tuned = pair("BF16")
    package = landed(base, tuned, tmp_path / "package", p=p, seed=11)
    words = base["w"].reshape(-1).view(torch.int16).numpy().view(np.uint16)
    expected = landing_by_the_document(words, tuned["w"].reshape(-1).numpy(), 11, round(p * 65536))
    found = received(base, package)["w"].reshape(-1).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(found, expected)


def test_the_documents_reader_reads_what_landed(tmp_path: Path) -> None:
    base, tuned = pair("BF16")
    folder = save(base, tmp_path / "base")
    landed(folder, tuned, tmp_path / "package")
    result = reader.apply_chain(reader.read_checkpoint(folder), [reader.read_package(tmp_path / "package")])
    expected = received(base, DeltaPackage.open(tmp_path / "package"))
    assert np.array_equal(
        result["w"].words, expected["w"].reshape(-1).view(torch.int16).numpy().view(np.uint16)
    )
