"""What a GPU's kernels compute for each element, counted in their machine code for Hopper: bf16, whole
blocks, seeded masks. No GPU needed.

A block's instructions are one after another, without loops; all but no-ops are counted, also those that are
not executed because their predicate is false. Beside them what a memory that moves 4 TB/s leaves time for: 30
T instructions a second are issued at most.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dare_train.kernels import cuda
from dare_train.kernels.cuda_blocks import THREADS, at_address, place
from dare_train.kernels.cuda_fingerprints import print_of_whole
from dare_train.kernels.launch_tables import BLOCK

from .report import Report, Row

HOPPER = 90
KEPT = 0.1
ISSUED, MOVED = 30e12, 4e12
"""Instructions of threads, and bytes, that an H200 can issue and move in a second."""

_WORD = tl.constexpr(tl.int16)


@triton.jit
def _fingerprint(table, row_of_block, factors, lanes):
    row, block, _, words, low, high = place(table, row_of_block, _WORD, True)
    first, second = print_of_whole(words, block, factors, 2)
    tl.atomic_add(lanes + 2 * row, first.to(tl.int64, bitcast=True) + (high - low), sem="relaxed")
    tl.atomic_add(lanes + 2 * row + 1, second.to(tl.int64, bitcast=True) + (high - low), sem="relaxed")


@triton.jit
def _counts(table, row_of_block, masks, numbers, counts):
    _, block, before, _, low, high = place(table, row_of_block, tl.int8, False)
    cuda._count_block(counts, masks, numbers, block, before, low, high, False, True)


@triton.jit
def _move(table, row_of_block, masks, numbers, offsets, values, PUT: tl.constexpr):
    _, block, before, words, low, high = place(table, row_of_block, _WORD, True)
    cuda._move_block(words, offsets, values, masks, numbers, block, before, low, high, False, True, PUT)


@triton.jit
def _take_both(table, row_of_block, masks, numbers, addresses, offsets, own, new, strange):
    row, block, before, base, low, high = place(table, row_of_block, _WORD, True)
    tuned = at_address(tl.load(addresses + row), before, _WORD, True)
    largest = cuda._take_both_block(
        base, tuned, offsets, own, new, masks, numbers, block, before, low, high, _WORD, 0x7F80, False, True
    )  # fmt: skip
    tl.atomic_max(strange + row, 1, mask=largest == 0x7F80, sem="relaxed")


@triton.jit
def _add(table, row_of_block, masks, numbers, factors, offsets, values, rows, blocks, TERMS: tl.constexpr):
    _, block, before, words, low, high = place(table, row_of_block, _WORD, True)
    cuda._add_block(
        words,
        offsets,
        values,
        factors,
        masks,
        numbers,
        block,
        before,
        low,
        high,
        rows,
        blocks,
        TERMS,
        0,
        0,
        _WORD,
        "BF16",
        True,
    )


_TABLE = {"table": "*i64", "row_of_block": "*i32"}
_MASKS = {**_TABLE, "masks": "*i64", "numbers": "*i16"}
_VALUES = {**_MASKS, "offsets": "*i64", "values": "*i16"}
_BOTH = {**_MASKS, "addresses": "*i64", "offsets": "*i64", "own": "*i16", "new": "*i16", "strange": "*i32"}
_SUMS = {**_MASKS, "factors": "*fp32", "offsets": "*i64", "values": "*i64", "rows": "i32", "blocks": "i32"}

KERNELS: list[tuple[str, float, Any, Mapping[str, str], dict[str, Any]]] = [
    ("fingerprint", 2, _fingerprint, {**_TABLE, "factors": "*i32", "lanes": "*i64"}, {}),
    ("counts of kept words", 0, _counts, {**_MASKS, "counts": "*i64"}, {}),
    ("gather kept words", 2 + 2 * KEPT, _move, _VALUES, {"PUT": False}),
    ("gather kept words of base and tuned", 4 + 4 * KEPT, _take_both, _BOTH, {}),
    ("put values into place", 4 + 2 * KEPT, _move, _VALUES, {"PUT": True}),
    ("one package by the arithmetic law", 4 + 2 * KEPT, _add, _SUMS, {"TERMS": 1}),
    ("three packages in one pass", 4 + 6 * KEPT, _add, _SUMS, {"TERMS": 3}),
]
"""Name, bytes to be moved for each element, kernel, types of its arguments, constants."""


def run(_: int) -> Report:
    rows = []
    for name, moved, kernel, types, constants in KERNELS:
        cubin = _compiled(kernel, types, constants)
        count, (registers, spilled) = _instructions(cubin) * THREADS / BLOCK, _resources(cubin)
        rows.append(Row(what=f"{name}, instructions of a thread", values=[count], unit="per element"))
        if moved:
            rows.append(
                Row(
                    what=f"  time to issue them / to move {moved:.3g} bytes",
                    values=[(count / ISSUED) / (moved / MOVED)],
                    unit="×",
                )
            )
        rows.append(Row(what="  registers of a thread", values=[registers]))
        if spilled:
            rows.append(Row(what="  bytes of a thread that spill", values=[spilled]))
    return Report(title="Machine code for Hopper (sm_90)", rows=rows, notes=[f"triton {triton.__version__}"])


def _compiled(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> bytes:
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(types.values())
        if kind.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    cubin: bytes = triton.compile(
        source, target=GPUTarget("cuda", HOPPER, 32), options=dict(cuda._LAUNCH)
    ).asm["cubin"]
    return cubin


def _instructions(cubin: bytes) -> int:
    found = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", _tool("nvdisasm", cubin, "-c"), re.MULTILINE
    )
    return sum(name != "NOP" for name in found)


def _resources(cubin: bytes) -> tuple[int, int]:
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", cubin, "-res-usage"))
    if found is None:
        raise ValueError("cuobjdump tells no registers")
    return int(found[1]), int(found[2])


def _tool(name: str, cubin: bytes, option: str) -> str:
    """What one of the tools that Triton brings says of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
