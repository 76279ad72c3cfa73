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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from option_types import count, positive
from quickstart import console, say
from rich.markdown import Markdown

from dare_train import Cell, Chart, Curve, Study, Table, write_study

RATES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
WAYS = {
    "rounded first": "rounded, then rescaled",
    "nearest": "rescaled, then rounded",
    "stochastic": "rescaled, then by draws",
}
Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers of a floating-point type, as far as they are not too large."""

    mantissa: int
    """Bits of the fraction."""
    least: int
    """Exponent of the smallest normal number."""
    scale: float
    """Standard deviation of the weights."""

    def steps(self, x: Numbers) -> Numbers:
        """From each number to the next larger one of the grid."""
        exponents = np.maximum(np.frexp(x)[1] - 1, self.least)
        return np.ldexp(1.0, exponents - self.mantissa)

    def nearest(self, x: Numbers) -> Numbers:
        steps = self.steps(x)
        return steps * np.rint(x / steps)

    def stochastic(self, x: Numbers, random: np.random.Generator) -> Numbers:
        """One of the two neighbours, so that the mean is x."""
        steps = self.steps(x)
        return steps * np.floor(x / steps + random.random(x.size))


GRIDS = {
    "bf16": Grid(mantissa=7, least=-126, scale=0.02),
    "fp16": Grid(mantissa=10, least=-14, scale=0.02),
    "fp8 E4M3": Grid(mantissa=3, least=-6, scale=2.0),
}

Arrived = dict[str, dict[float, list[float]]]
"""Of each way, what arrived at each drop rate with each mask."""


def main() -> None:
    options, began = parse(), time.perf_counter()
    arrived = {name: simulated(name, options) for name in GRIDS}
    found = study(arrived, options)
    console.print(Markdown(found.markdown()))
    say(f"everything is in {write_study(found, options.out)}; done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--elements", type=count, default=1 << 20, help="(default: %(default)s)")
    add("--masks", type=count, default=20, help="at each drop rate (default: %(default)s)")
    add("--size", type=positive, default=0.2, help="of deltas, in steps of the grid (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/grids"), help="(default: %(default)s)")
    return parser.parse_args()


def simulated(name: str, options: argparse.Namespace) -> Arrived:
    grid, random = GRIDS[name], np.random.default_rng([*name.encode()])
    base = grid.nearest(grid.scale * random.standard_normal(options.elements))
    delta = options.size * grid.steps(base) * random.standard_normal(options.elements)
    found: Arrived = {way: {p: [] for p in RATES} for way in WAYS}
    for p in RATES:
        for _ in range(options.masks):
            kept = random.random(options.elements) >= p
            results = received(base[kept], delta[kept], 1 / (1 - p), grid, random)
            for way, result in zip(WAYS, results, strict=True):
                found[way][p].append(float((result - base[kept]) @ delta[kept] / (delta @ delta)))
    return found


def received(
    base: Numbers, delta: Numbers, factor: float, grid: Grid, random: np.random.Generator
) -> Iterator[Numbers]:
    """What a receiver has at the kept elements, by each of `WAYS`."""
    rounded = grid.nearest(base + delta)
    yield grid.nearest(base + factor * (rounded - base))
    yield grid.nearest(base + factor * delta)
    yield grid.stochastic(base + factor * delta, random)


def study(arrived: dict[str, Arrived], options: argparse.Namespace) -> Study:
    means = {
        (grid, way): [float(np.mean(some)) for some in arrived[grid][way].values()]
        for way in WAYS
        for grid in GRIDS
    }
    rows: list[tuple[Cell, ...]] = [(grid, way, *shares) for (grid, way), shares in means.items()]
    curves = [
        Curve.over(f"{grid}: {WAYS[way]}", {1 / (1 - p): some for p, some in arrived[grid][way].items()})
        for grid, way in means
    ]
    first = [means[grid, "rounded first"][RATES.index(0.9)] for grid in GRIDS]
    worst = max(abs(share - 1) for grid in GRIDS for share in means[grid, "stochastic"])
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
        charts=(
            Chart(
                name="grids-landing",
                title="What arrives of a delta that is small against the base's grid",
                caption=f"Simulated: {options.elements:,} normal weights on each grid, normal deltas with a "
                f"standard deviation of {options.size:g} of a step, {options.masks} masks at each drop rate; "
                "bands are 95 % confidence intervals of the mean. 1 is what was trained.",
                x="rescale 1 / (1 - p)",
                y="share of the delta that arrives",
                curves=tuple(curves),
                log_x=True,
            ),
        ),
        tables=(
            Table(
                title=f"Share of deltas of {options.size:g} steps that arrives",
                columns=("grid", "rounding", *(f"p = {p:g}" for p in RATES)),
                rows=tuple(rows),
            ),
        ),
    )


if __name__ == "__main__":
    main()
