"""What starting costs: `import dare_train` beyond bare Python, `dare-train --help`, and the first run's
compilation.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import llama
from .common import Pair, remove, scratch
from .process import DARE_TRAIN, measure
from .report import Report, Row

IMPORT_MS, HELP_MS, COMPILE_SECONDS = 50, 300, 10
ANNOUNCEMENT = "compiling"


def run(runs: int) -> Report:
    """Whole processes, all in the page cache. Compilation: a tiny bf16 model extracted and applied, without
    and with a kernel cache.
    """
    tiny = llama.pair("tiny")
    with scratch() as folder:
        compiling = [_first_run(tiny, folder) for _ in range(runs)]
    beyond = [1000 * (_seconds("import dare_train") - _seconds("pass")) for _ in range(1 + runs)][1:]
    helped = [1000 * measure([*DARE_TRAIN, "--help"]).seconds for _ in range(1 + runs)][1:]
    rows = [
        Row(what="import dare_train, beyond bare Python", values=beyond, unit="ms", at_most=IMPORT_MS),
        Row(what="dare-train --help", values=helped, unit="ms", at_most=HELP_MS),
        Row(
            what="first run ever: kernels compile",
            values=[seconds for seconds, _ in compiling],
            unit="s",
            at_most=COMPILE_SECONDS,
        ),
        Row(
            what="share of first runs that said so on stderr",
            values=[float(said) for _, said in compiling],
            at_least=1,
        ),
    ]
    return Report(title="Starting", rows=rows)


def _seconds(code: str) -> float:
    return measure([sys.executable, "-c", code]).seconds


def _first_run(pair: Pair, folder: Path) -> tuple[float, bool]:
    """Seconds that extract and apply take longer with an empty kernel cache than with the one they left;
    whether they said so.
    """
    kernels = folder / "kernels"
    remove(kernels)
    (first, stderr), (second, _) = (_extract_and_apply(pair, folder, kernels) for _ in range(2))
    return first - second, ANNOUNCEMENT in stderr


def _extract_and_apply(pair: Pair, folder: Path, kernels: Path) -> tuple[float, str]:
    commands: list[list[str | Path]] = [
        [*DARE_TRAIN, "extract", pair.base, pair.tuned, "--out", folder / "package"],
        [*DARE_TRAIN, "apply", pair.base, folder / "package", "--out", folder / "out"],
    ]
    for out in ("package", "out"):
        remove(folder / out)
    measured = [measure(command, env={"DARE_TRAIN_CACHE": str(kernels)}) for command in commands]
    return sum(one.seconds for one in measured), "".join(one.stderr for one in measured)
