"""`dare-train apply` to a 468 M bf16 base in the page cache, beside `cp` of the base's file in the same
minute.

The file system's speed is no merit of ours, so the target is relative to copying. The two alternate, and each
output is deleted before the next process starts: pages that a machine touches for the first time are slow,
for both alike.
"""

from __future__ import annotations

from pathlib import Path

from . import llama
from .common import WEIGHTS, remove, scratch
from .extract import ANONYMOUS_MB, extract
from .process import DARE_TRAIN, Measured, measure
from .report import Report, Row

FACTOR, SECONDS = 2.5, 1.0
"""Applying may take FACTOR × the time of copying, plus SECONDS."""


def run(runs: int) -> Report:
    """`runs` alternations after one that is not counted."""
    pair = llama.pair("468M")
    with scratch() as folder:
        extract(pair, folder / "package")
        rounds = [(copy(pair.base, folder / "out"), apply(pair.base, folder)) for _ in range(1 + runs)][1:]
        check(folder)
    return Report(
        title="dare-train apply: 468 M, bf16, page cache",
        rows=_rows(rounds),
        notes=["result verified against the record"],
    )


def _rows(rounds: list[tuple[Measured, Measured]]) -> list[Row]:
    allowed = [ours.seconds / (FACTOR * cp.seconds + SECONDS) for cp, ours in rounds]
    return [
        Row(what="cp of the base's file", values=[cp.seconds for cp, _ in rounds], unit="s"),
        Row(what="apply, wall time", values=[ours.seconds for _, ours in rounds], unit="s"),
        Row(what="apply / cp", values=[ours.seconds / cp.seconds for cp, ours in rounds], unit="×"),
        Row(what=f"apply / ({FACTOR} cp + {SECONDS:g} s)", values=allowed, unit="×", at_most=1),
        Row(
            what="peak anonymous memory",
            values=[ours.anonymous for _, ours in rounds],
            unit="MB",
            at_most=ANONYMOUS_MB,
        ),
        Row(
            what="peak resident set, mapped files included",
            values=[ours.resident for _, ours in rounds],
            unit="MB",
        ),
    ]


def copy(base: Path, out: Path) -> Measured:
    """One `cp` of the base's weights into an empty folder."""
    remove(out)
    out.mkdir()
    return measure(["cp", base / WEIGHTS, out / WEIGHTS])


def apply(base: Path, folder: Path) -> Measured:
    """One process that applies `folder`/package and writes `folder`/out anew."""
    remove(folder / "out")
    return measure([*DARE_TRAIN, "apply", base, folder / "package", "--out", folder / "out"])


def check(folder: Path) -> None:
    """Compute the result's fingerprint once more from the files that were written.

    Raises:
        RuntimeError: it is not the one that the package records.
    """
    from dare_train import DeltaPackage
    from dare_train.weights.files.checkpoint import Checkpoint
    from dare_train.weights.fingerprint import Fingerprint, model_fingerprint

    result = Checkpoint.open(folder / "out")
    prints = {name: Fingerprint.of(result.read(name, 0, info.numel)) for name, info in result.tensors.items()}
    found = model_fingerprint(
        (name, info.dtype.code, info.shape, prints[name]) for name, info in result.tensors.items()
    )
    recorded = DeltaPackage.open(folder / "package").manifest.result
    if found != recorded:
        raise RuntimeError(f"{folder / 'out'}: fingerprint {found}, the package records {recorded}")
