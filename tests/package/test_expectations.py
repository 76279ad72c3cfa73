"""What DARE promises about expectations, measured (arXiv 2311.03099, eq. 1-2).

Every draw is a function of (seed, name, index), so a test that passes once passes always; the bounds say how
unlikely it is that a *correct* generator would have failed when the test was written. A bound of 5 standard
deviations on one statistic that is normal to good approximation: 6e-7.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from dare_train import extract
from dare_train.config import DRAW_RANGE, threshold_of
from dare_train.kernels import cpu
from dare_train.package.codec import dequantize, group_length, groups_of, quantize, round_delta
from dare_train.package.masks import DITHER_DOMAIN, MASK_DOMAIN, Mask, key_of

SIGMA = 5
MILLION = 1 << 20
ELEMENTS = 500
SEEDS = 2000
DELTA = np.random.default_rng(0).normal(0, 1e-3, ELEMENTS).astype(np.float32)


def dare(values: str, p: float, seed: int) -> np.ndarray:
    """δ̂ of `DELTA` as a package with these settings holds it, γ included; zeros where dropped."""
    threshold, key = threshold_of(p), key_of(seed, "weight")
    positions = Mask(kind="seeded", key=key, threshold=threshold).positions(0, ELEMENTS)
    kept = DELTA[positions]
    if values == "rounded":
        kept = round_delta(kept)
    elif values != "exact":
        group, groups = groups_of(positions, 0, ELEMENTS, group_length(threshold))
        kept = dequantize(*quantize(kept, group, groups, positions, 0, key, values), group, values)
    out = np.zeros(ELEMENTS)
    out[positions] = kept.astype(np.float64) * DRAW_RANGE / (DRAW_RANGE - threshold)
    return out


def samples(values: str, p: float) -> np.ndarray:
    """δ̂ for many seeds, shape (SEEDS, ELEMENTS)."""
    return np.stack([dare(values, p, seed) for seed in range(SEEDS)])


def beyond_chance(found: np.ndarray, expected: np.ndarray, reach: np.ndarray) -> float:
    """How far the elements' means over the seeds lie from what is expected, at most, in units of what chance
    allows.

    The unit is the empirical Bernstein bound (Maurer and Pontil 2009, theorem 4, two-sided), which supposes
    nothing but that each sample lies in an interval of length `reach`. Chance exceeds it in one element with
    a probability below 1e-9.
    """
    log = np.log(4 / 1e-9)
    allowed = found.std(0, ddof=1) * np.sqrt(2 * log / SEEDS) + reach * 7 * log / (3 * (SEEDS - 1))
    return float((np.abs(found.mean(0) - expected) / allowed).max())


QUANTUM = {"exact": 0.0, "rounded": 0.0, "int8": 1 / 127, "int4": 1 / 7, "sign": 2.0}
"""Distance of two codes in units of the largest delta of the group."""


def reach(values: str, p: float) -> np.ndarray:
    """From a dropped element to the largest that its survivor can become; 1.01 for the scale's own
    rounding.
    """
    return 1.01 * (np.abs(DELTA) + QUANTUM[values] * np.abs(DELTA).max()) / (1 - p)


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("values", ["exact", "rounded", "int8", "int4", "sign"])
def test_the_expected_delta_is_the_delta(values, p):
    """E[δ̂] = δ for each of 500 elements (all within chance: 1 - 5e-7), and for their sum within 5 standard
    errors.

    Rounding to bfloat16 is not random: what it promises is the rounded delta.
    """
    expected = (round_delta(DELTA) if values == "rounded" else DELTA).astype(np.float64)
    found = samples(values, p)
    assert beyond_chance(found, expected, reach(values, p)) < 1
    total = (found - expected) @ np.sign(expected)
    assert abs(total.mean()) <= SIGMA * total.std() / sqrt(SEEDS) + 1e-9


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_rounding_to_nearest_would_have_been_noticed(values):
    """The same statistic sees the bias of a quantizer without dither."""
    step = np.abs(DELTA).max() * QUANTUM[values]
    nearest = np.stack([np.round(DELTA / step) * step] * SEEDS)
    assert beyond_chance(nearest, DELTA, np.full(ELEMENTS, step)) > 2


def test_a_wrong_rescale_would_have_been_noticed():
    expected = DELTA.astype(np.float64)
    assert beyond_chance(samples("exact", 0.5) * 1.5, expected, reach("exact", 0.5)) > 1
    total = (samples("exact", 0.9) * 1.05 - expected) @ np.sign(expected)
    assert abs(total.mean()) > SIGMA * total.std() / sqrt(SEEDS)


@pytest.mark.parametrize("p", [0.3, 0.9, 0.99])
def test_the_variance_is_that_of_the_paper(p):
    """Var[δ̂] = p/(1-p) δ². In units of δ the squared deviation is 1 (dropped) or (γ-1)², whose spread gives
    the 5 sigma.
    """
    used = threshold_of(p) / DRAW_RANGE
    squares = np.square(samples("exact", p) / DELTA - 1)
    spread = sqrt(used * (1 - used)) * abs((used / (1 - used)) ** 2 - 1)
    assert abs(squares.mean() - used / (1 - used)) < SIGMA * spread / sqrt(squares.size)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.99, 1 - 1 / DRAW_RANGE])
def test_the_drop_rate_is_the_threshold(p):
    """Kept of a million, within 5 standard deviations of the binomial (for 16 expected: within 20 of
    them).
    """
    threshold = threshold_of(p)
    density = 1 - threshold / DRAW_RANGE
    kept = cpu.kept_positions(key_of(0, "weight"), 0, MILLION, threshold).size
    assert abs(kept - MILLION * density) < SIGMA * sqrt(MILLION * density * (1 - density))


def test_the_manifest_records_the_measured_density(tmp_path):
    base = {"weight": np.arange(1 << 17, dtype=np.float32)}
    stats = extract(base, {"weight": base["weight"] + 1}, tmp_path / "package", p=0.75, seed=3).stats
    assert stats["kept"] == cpu.kept_positions(key_of(3, "weight"), 0, 1 << 17, 3 << 14).size
    assert abs(stats["density"] - 0.25) < SIGMA * sqrt(0.25 * 0.75 / (1 << 17))


def test_every_draw_is_equally_likely():
    """χ² of the high and of the low byte of two million draws; 255 degrees of freedom, mean 255, spread 22.6;
    below 6 of it.
    """
    draws = np.concatenate([cpu.draws(key_of(seed, "weight"), 0, MILLION, MASK_DOMAIN) for seed in (0, 1)])
    for byte in (draws >> 8, draws & 255):
        counts, expected = np.bincount(byte, minlength=256), draws.size / 256
        assert abs((np.square(counts - expected) / expected).sum() - 255) < 6 * sqrt(2 * 255)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1])


UNCORRELATED = SIGMA / sqrt(MILLION)
"""Of n independent pairs the correlation has the standard deviation 1/√n: 0.005 is 5 of them."""


@pytest.mark.parametrize("lag", [1, 2, 1023, 1024, 2048, 4096, 8191, 8192, 8193])
def test_neighbours_are_independent(lag):
    """1024: the other half of the same word; 2048: another word of the same counter; 8192: the next block."""
    draws = cpu.draws(key_of(0, "weight"), 0, MILLION + lag, MASK_DOMAIN)
    assert abs(correlation(draws[lag:], draws[:-lag])) < UNCORRELATED
    kept = draws >= threshold_of(0.9)
    assert abs(correlation(kept[lag:], kept[:-lag])) < UNCORRELATED


@pytest.mark.parametrize(
    "other",
    [(1, "a.weight"), (1 << 32, "a.weight"), (1 << 63, "a.weight"), (0, "b.weight"), (0, "a.weight ")],
)
def test_tensors_and_seeds_are_independent(other):
    first = cpu.draws(key_of(0, "a.weight"), 0, MILLION, MASK_DOMAIN)
    assert abs(correlation(first, cpu.draws(key_of(*other), 0, MILLION, MASK_DOMAIN))) < UNCORRELATED


def test_rounding_is_independent_of_the_mask():
    """They share a key. Were the draws the same, survivors of p = 0.9 would all be rounded up."""
    key = key_of(0, "weight")
    assert (
        abs(correlation(cpu.draws(key, 0, MILLION, MASK_DOMAIN), cpu.draws(key, 0, MILLION, DITHER_DOMAIN)))
        < UNCORRELATED
    )


def test_correlation_would_have_been_noticed():
    draws = cpu.draws(key_of(0, "weight"), 0, MILLION, MASK_DOMAIN)
    mixed = np.where(
        np.arange(MILLION) % 100 == 0, draws, cpu.draws(key_of(1, "weight"), 0, MILLION, MASK_DOMAIN)
    )
    assert abs(correlation(draws, mixed)) > UNCORRELATED
