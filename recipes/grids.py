"""How much of a small delta arrives on a base of few bits: rounded before it is rescaled, or after.

    python recipes/grids.py            # a simulation, some seconds: no model, no data
    python recipes/grids.py --elements 10000000 --masks 20

Weights are normal, and lie on the grid of bfloat16, float16 or float8 (E4M3). Each moves by a normal delta
whose standard deviation is a share of a step of the grid there. What arrives is the projection of the delta
that a receiver has on the trained one: 1 is what DARE promises.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from quickstart import console, say
from rich.markdown import Markdown

from dare_train import Chart, Curve, Study, Table, write_study
from dare_train.dtypes import DTYPES, DType
from dare_train.kernels.rounding import land
from dare_train.package.masks import Mask, generator_of

RATES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
GRIDS = {
    "bf16": ("BF16", torch.bfloat16, 0.02),
    "fp16": ("F16", torch.float16, 0.02),
    "fp8 E4M3": ("F8_E4M3", torch.float8_e4m3fn, 2.0),
}
"""Codes, types of torch, and the weights' standard deviation: fp8 weights come with a scale."""
WAYS = ("rounded first", "nearest", "stochastic")

Numbers = NDArray[np.float64]


def main() -> None:
    options, began = parse(), time.perf_counter()
    arrived = {grid: simulated(grid, options) for grid in GRIDS}
    table = as_table(arrived, options)
    found = study(arrived, table, options)
    console.print(Markdown(found.markdown()))
    say(f"everything is in {write_study(found, options.out)}; done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--elements", type=int, default=1 << 20, help="(default: %(default)s)")
    add("--masks", type=int, default=5, help="at each drop rate (default: %(default)s)")
    add("--size", type=float, default=0.2, help="of deltas, in steps of the grid (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/grids"), help="(default: %(default)s)")
    return parser.parse_args()


Arrived = dict[str, dict[float, list[float]]]
"""Of each way, what arrived at each drop rate with each mask."""


def simulated(grid: str, options: argparse.Namespace) -> Arrived:
    code, _, scale = GRIDS[grid]
    dtype = DTYPES[code]
    random = generator_of(0, grid)
    base = values(land(scale * random.standard_normal(options.elements), dtype), grid)
    delta = options.size * steps(base, dtype) * random.standard_normal(options.elements)
    found: Arrived = {way: {p: [] for p in RATES} for way in WAYS}
    for p in RATES:
        for mask in range(options.masks):
            threshold = round(p * 65536)
            kept = Mask(kind="seeded", key=mask, threshold=threshold).positions(0, options.elements)
            ways = received(base[kept], delta[kept], 65536 / (65536 - threshold), grid, random)
            for way, result in zip(WAYS, ways, strict=True):
                share = (result - base[kept]) @ delta[kept] / (delta @ delta)
                found[way][p].append(float(share))
    return found


def received(
    base: Numbers, delta: Numbers, factor: float, grid: str, random: np.random.Generator
) -> Iterator[Numbers]:
    """What a receiver has at the kept elements, by each of `WAYS`."""
    dtype = DTYPES[GRIDS[grid][0]]
    rounded = values(land(base + delta, dtype), grid)
    yield values(land(base + factor * (rounded - base), dtype), grid)
    yield values(land(base + factor * delta, dtype), grid)
    high, low = random.integers(0, 1 << 16, (2, base.size), dtype=np.uint16)
    yield values(land(base + factor * delta, dtype, (high, low)), grid)


def values(words: NDArray[np.unsignedinteger], grid: str) -> Numbers:
    signed = torch.from_numpy(words.view(f"i{words.itemsize}"))
    return signed.view(GRIDS[grid][1]).double().numpy()


def steps(base: Numbers, dtype: DType) -> Numbers:
    """From each number of the grid to the next."""
    least = 2 - (1 << (dtype.exponent_bits - 1))
    exponents = np.maximum(np.frexp(base)[1] - 1, least)
    return np.ldexp(1.0, exponents - dtype.mantissa_bits)


def as_table(arrived: dict[str, Arrived], options: argparse.Namespace) -> Table:
    rows = [
        (grid, way, *(float(np.mean(arrived[grid][way][p])) for p in RATES)) for grid in GRIDS for way in WAYS
    ]
    return Table(
        title=f"Share of deltas of {options.size:g} steps that arrives",
        columns=("grid", "rounding", *(f"p = {p:g}" for p in RATES)),
        rows=tuple(rows),
    )


def study(arrived: dict[str, Arrived], table: Table, options: argparse.Namespace) -> Study:
    names = {
        "rounded first": "rounded, then rescaled",
        "nearest": "rescaled, then rounded",
        "stochastic": "rescaled, then by draws",
    }
    curves = [
        Curve.over(f"{grid}: {names[way]}", {1 / (1 - p): some for p, some in arrived[grid][way].items()})
        for way in WAYS
        for grid in GRIDS
    ]
    chart = Chart(
        name="grids-landing",
        title="What arrives of a delta that is small against the base's grid",
        caption=f"Simulated: {options.elements:,} normal weights on each grid, normal deltas with a standard "
        f"deviation of {options.size:g} of a step, {options.masks} masks at each drop rate; bands are 95 % "
        "confidence intervals of the mean. 1 is what was trained.",
        x="rescale 1 / (1 - p)",
        y="share of the delta that arrives",
        curves=tuple(curves),
        log_x=True,
    )
    drawn = [np.mean(some) for of_grid in arrived.values() for some in of_grid["stochastic"].values()]
    worst = max(abs(float(share) - 1) for share in drawn)
    first = [float(np.mean(of_grid["rounded first"][0.9])) for of_grid in arrived.values()]
    return Study(
        name="grids",
        title="Landing on the base's grid",
        question="What arrives of deltas that are small against a step of the base's grid?",
        findings=(
            f"Rounded first, {min(first):.0%} to {max(first):.0%} arrive at p = 0.9, and no p brings more.",
            f"Rescaled first, then rounded by draws, all of it does, at every p (within {worst:.1%}).",
        ),
        setup={"elements": options.elements, "masks": options.masks, "size": options.size},
        data={"arrived": arrived},
        charts=(chart,),
        tables=(table,),
    )


if __name__ == "__main__":
    main()
