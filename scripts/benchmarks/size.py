"""Bits per parameter of packages of a real fine-tune (all-MiniLM-L6-v2, bf16), every file of the package
counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import finetune
from .common import Pair, bits_per_parameter, parameters, scratch, size
from .report import Report, Row

Values = Literal["exact", "rounded", "int8", "int4", "sign"]
ENCODINGS: tuple[Values, ...] = ("exact", "rounded", "int8", "int4", "sign")
UNIT = "bit/param"
NOTE = """entropy: order 0, of the kept ordered-bits distances given tensor and base exponent.
Only runs of unchanged weights (embedding rows that no text used) let a package be smaller than that."""


def run(runs: int) -> Report:
    """Packages are deterministic: each is made once, however many runs are asked for."""
    pair = finetune.pair()
    with scratch() as folder:
        rows = [
            _package(pair, folder, p=0.9, values="exact", at_most=0.32),
            *_smaller(pair, folder),
            _package(pair, folder, p=0.0, values="exact", at_most=2.95),
            *(Row(what=f"entropy, p = {p:g}", values=[entropy(pair, p)], unit=UNIT) for p in (0.9, 0.0)),
            *(_package(pair, folder, p=0.9, values=values) for values in ENCODINGS[1:]),
            *(_package(pair, folder, p=0.99, values=values) for values in ENCODINGS),
        ]
    return Report(title="Size of packages: all-MiniLM-L6-v2 fine-tune, 22.7 M, bf16", rows=rows, notes=[NOTE])


def _package(pair: Pair, folder: Path, *, p: float, values: Values, at_most: float | None = None) -> Row:
    from dare_train import extract

    out = folder / f"{values}-{p}"
    extract(pair.base, pair.tuned, out, p=p, values=values)
    return Row(
        what=f"{values}, p = {p:g}", values=[bits_per_parameter(out, pair)], unit=UNIT, at_most=at_most
    )


def _smaller(pair: Pair, folder: Path) -> list[Row]:
    """The first package beside the tuned model's folder."""
    return [
        Row(
            what="the same: times smaller than bf16",
            values=[size(pair.tuned) / size(folder / "exact-0.9")],
            unit="×",
        )
    ]


def entropy(pair: Pair, p: float) -> float:
    """Order-0 entropy, in bits per parameter, of the distances that are kept, given tensor and base
    exponent.
    """
    from dare_train.weights.files.checkpoint import Checkpoint

    base, tuned = Checkpoint.open(pair.base), Checkpoint.open(pair.tuned)
    generator = np.random.default_rng(0)
    bits = 0.0
    for name, info in tuned.tensors.items():
        kept = generator.random(info.numel) >= p
        bits += _conditional_bits(base.read(name, 0, info.numel)[kept], tuned.read(name, 0, info.numel)[kept])
    return bits / parameters(pair.tuned)


def _conditional_bits(base: NDArray[np.uint16], tuned: NDArray[np.uint16]) -> float:
    exponent = (base >> 7) & 0xFF
    return _bits(exponent.astype(np.int64) << 20 | (_ordered(tuned) - _ordered(base) + (1 << 17))) - _bits(
        exponent
    )


def _ordered(bf16: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Integers that are ordered as the numbers are."""
    bits = bf16.astype(np.int64)
    return np.where(bits & 0x8000, 0xFFFF - bits, bits | 0x8000)


def _bits(symbols: NDArray[np.integer]) -> float:
    """Entropy of the whole array of symbols, in bits."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / symbols.size)).sum())
