"""Triton's kernels, and torch's in their place, against the compiled ones of the CPU, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from bit_patterns import FLOATS, random_words, special_words, tuned_from
from numpy.typing import NDArray

from dare_train.dtypes import DTYPES, DType, Words
from dare_train.errors import DareError
from dare_train.kernels import backends as choice
from dare_train.kernels import cpu, cuda
from dare_train.kernels import cuda_in_torch as plain
from dare_train.kernels.launch_tables import ABSENT, BLOCK, INTEGERS, Masks, Row, Rows, Term, offsets_of
from dare_train.package import arithmetic as law

pytestmark = pytest.mark.gpu

BF16 = DTYPES["BF16"]
KEYS = [0, 1, 0x9E3779B97F4A7C15, 2**64 - 1, 2**63, 12345]
SHAPES = [
    (0, 1),
    (5, 0),
    (0, BLOCK),
    (BLOCK - 1, 2),
    (3 * BLOCK + 8, BLOCK + 16),
    (2**35 - 5, 77),
    (2**33 + 17, 2 * BLOCK + 3),
]
"""(flat start, elements): empty, odd, a block, across blocks, where Philox's counter needs its second
word."""
BY_WIDTH = [DTYPES[code] for code in ("F64", "F32", "BF16", "F8_E4M3")]
"""One dtype for each width of a word: kernels that only move or fingerprint words know nothing else of it."""
both = pytest.mark.parametrize("kernels", [cuda, plain], ids=["triton", "torch"])


def by_code(dtypes: list[DType]) -> Any:
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: dtype.code)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of what floats do."""
    with np.errstate(all="ignore"):
        yield


def on(device: torch.device, words: Words) -> torch.Tensor:
    signed = words.view(np.uint8 if words.itemsize == 1 else f"i{words.itemsize}")
    return torch.from_numpy(signed.copy()).to(device)


def back(tensor: torch.Tensor) -> Words:
    array = tensor.cpu().numpy()
    return array.view(f"u{array.itemsize}")


def any_words(dtype: DType, count: int, seed: int) -> Words:
    """Random bits, and of floats special ones among them."""
    if dtype.is_float:
        return random_words(dtype, count, seed)
    return np.frombuffer(np.random.default_rng(seed).bytes(count * dtype.itemsize), dtype.word)


def made(
    device: torch.device, dtype: DType, shapes: list[tuple[int, int]], offset: int = 0
) -> tuple[Rows, list[Words]]:
    """Rows one after another in one tensor, the first of them `offset` elements after its begin, and their
    words.
    """
    words = [any_words(dtype, count, seed) for seed, (_, count) in enumerate(shapes)]
    flat = on(device, np.concatenate([np.zeros(offset, dtype.word), *words, np.zeros(3, dtype.word)]))
    rows, at = [], offset
    for start, count in shapes:
        rows.append(Row(flat=flat, start=start, count=count, offset=at))
        at += count
    return Rows(dtype=dtype, rows=tuple(rows)), words


def seeded(count: int, *thresholds: int) -> Masks:
    return Masks(
        keys=[KEYS[n % len(KEYS)] for n in range(count)],
        thresholds=[thresholds[n % len(thresholds)] for n in range(count)],
    )


def positions(masks: Masks, shapes: list[tuple[int, int]], row: int) -> NDArray[np.int64]:
    bitmap, (start, count) = masks.bitmap(row), shapes[row]
    if bitmap is not None:
        return np.flatnonzero(np.unpackbits(back(bitmap), bitorder="little", count=count))
    if masks.thresholds[row] == ABSENT:
        return np.empty(0, np.int64)
    return cpu.kept_positions(masks.keys[row], start, count, masks.thresholds[row])


def stored(device: torch.device, masks: Masks, shapes: list[tuple[int, int]], every: int = 2) -> Masks:
    """The same, but a bitmap in every second row."""
    rng = np.random.default_rng(7)
    bitmaps = [np.packbits(rng.random(count) < 0.3, bitorder="little") for _, count in shapes]
    return Masks(
        keys=masks.keys,
        thresholds=masks.thresholds,
        bitmaps=[on(device, one) if n % every else None for n, one in enumerate(bitmaps)],
    )


def test_each_width_has_its_dtype() -> None:
    assert sorted(dtype.itemsize for dtype in BY_WIDTH) == sorted(INTEGERS)
    assert {dtype.itemsize for dtype in DTYPES.values()} == set(INTEGERS)


@both
@by_code(BY_WIDTH)
def test_fingerprints(kernels: ModuleType, dtype: DType, device: torch.device) -> None:
    """Rows that begin anywhere: the second lies one element after the first."""
    rows, words = made(device, dtype, SHAPES)
    assert not rows.aligned
    found = back(kernels.fingerprint(rows)).tolist()
    assert found == [list(cpu.fingerprint(one, start)) for one, (start, _) in zip(words, SHAPES, strict=True)]


@both
@by_code(BY_WIDTH)
def test_fingerprints_of_blocks_that_are_read_as_units(
    kernels: ModuleType, dtype: DType, device: torch.device
) -> None:
    shapes = [(0, BLOCK), (16, 2 * BLOCK), (2**33 + 32, 2 * BLOCK + 3)]
    rows, words = made(device, dtype, shapes)
    assert rows.aligned
    found = back(kernels.fingerprint(rows)).tolist()
    assert found == [list(cpu.fingerprint(one, start)) for one, (start, _) in zip(words, shapes, strict=True)]


def test_bytes_that_begin_at_an_odd_eight_are_not_read_as_units(device: torch.device) -> None:
    for code, aligned in (("F8_E4M3", False), ("BF16", True)):
        rows, _ = made(device, DTYPES[code], [(8, BLOCK)])
        assert rows.aligned == aligned


@both
@pytest.mark.parametrize("with_bitmaps", [False, True])
def test_counts_of_planes(kernels: ModuleType, with_bitmaps: bool, device: torch.device) -> None:
    rows, _ = made(device, BF16, SHAPES)
    masks = seeded(len(SHAPES), 58982, 0, 32768, ABSENT, 65535)
    masks = stored(device, masks, SHAPES) if with_bitmaps else masks
    counts = kernels.counts(rows, masks)
    expected = []
    for row, (start, count) in enumerate(SHAPES):
        places = start % BLOCK + positions(masks, SHAPES, row)
        planes = 8 * (rows.first_blocks[row + 1] - rows.first_blocks[row])
        expected.append(np.bincount(places // 1024, minlength=planes)[:planes].reshape(-1, 8))
        assert count or not planes
    assert np.array_equal(counts.cpu().numpy(), np.concatenate(expected))
    assert rows.per_row(counts) == [positions(masks, SHAPES, row).size for row in range(len(SHAPES))]


@both
@by_code(BY_WIDTH[:3])
@pytest.mark.parametrize(("offset", "with_bitmaps"), [(0, False), (3, True)])
def test_what_is_taken_comes_back(
    kernels: ModuleType, dtype: DType, offset: int, with_bitmaps: bool, device: torch.device
) -> None:
    """`take` gathers kept words in order, `put` replaces them and nothing else; rows begin anywhere. Whole
    blocks and parts of them are drawn, or in every second row have bitmaps.
    """
    shapes = [(0, BLOCK), (2**33 + 17, 2 * BLOCK + 3), (5, 0), (2**35 - 5, 77), (BLOCK - 1, 2), (0, 1)]
    rows, words = made(device, dtype, shapes, offset)
    assert not rows.aligned
    masks = seeded(len(shapes), 58982, 30000, 0)
    masks = stored(device, masks, shapes) if with_bitmaps else masks
    offsets = offsets_of(kernels.counts(rows, masks))
    where = [positions(masks, shapes, row) for row in range(len(shapes))]
    expected = np.concatenate([one[at] for one, at in zip(words, where, strict=True)])
    taken = torch.empty(expected.size, dtype=INTEGERS[dtype.itemsize], device=device)
    kernels.take(rows, masks, offsets, taken)
    assert np.array_equal(back(taken), expected)
    whole = back(rows.rows[0].flat).copy()
    new = random_words(dtype, expected.size, 99)
    kernels.put(rows, masks, offsets, on(device, new))
    parts = np.split(new, np.cumsum([at.size for at in where])[:-1])
    for row, at, values in zip(rows.rows, where, parts, strict=True):
        whole[row.offset + at] = values
    assert np.array_equal(back(rows.rows[0].flat), whole)


@both
@by_code(FLOATS)
@pytest.mark.parametrize(("offset", "with_bitmaps"), [(0, False), (3, True)])
def test_two_models_are_taken_from_at_once(
    kernels: ModuleType, dtype: DType, offset: int, with_bitmaps: bool, device: torch.device
) -> None:
    """What `take` gives of each, and which rows of the second are not finite, wherever in them."""
    shapes = [(0, BLOCK), (3 * BLOCK + 8, BLOCK + 16), (5, 0), (BLOCK - 1, 2), (0, 900)]
    base, _ = made(device, dtype, shapes, offset)
    tuned, _ = made(device, dtype, shapes)
    masks = seeded(len(shapes), 58982, 0, ABSENT, 30000)
    masks = stored(device, masks, shapes) if with_bitmaps else masks
    finite = (
        torch.ones(4, dtype=torch.int16, device=device).view(torch.uint8)[: dtype.itemsize].view(tuned.word)
    )
    tuned.rows[0].flat.copy_(finite.expand_as(tuned.rows[0].flat))
    tuned.rows[0].words[BLOCK - 1] = tuned.rows[4].words[77] = dtype.exponent_mask
    offsets = offsets_of(kernels.counts(base, masks))
    own, new, expected = (
        torch.zeros(int(offsets[-1, -1]) + 900, dtype=base.word, device=device) for _ in range(3)
    )
    assert kernels.take_both(base, tuned, masks, offsets, own, new).tolist() == [1, 0, 0, 0, 1]
    for rows, found in ((base, own), (tuned, new)):
        plain.take(rows, masks, offsets, expected.zero_())
        assert torch.equal(found, expected)


def expected_sum(words: Words, terms: list[law.Term], dtype: DType) -> Words:
    result = words.copy()
    law.combine(result, terms, dtype)
    return result


def term_pair(
    kernels: ModuleType,
    rows: Rows,
    words: list[Words],
    masks: Masks,
    shapes: list[tuple[int, int]],
    factors: list[float],
    deltas: bool,
    seed: int,
) -> tuple[Term, list[law.Term]]:
    """A term for kernels of a device, and row by row the same for the CPU's."""
    dtype, device = rows.dtype, rows.device
    offsets = offsets_of(kernels.counts(rows, masks))
    where = [positions(masks, shapes, row) for row in range(len(shapes))]
    rng = np.random.default_rng(seed)
    if deltas:
        values: list[Any] = [
            np.where(rng.random(at.size) < 0.3, 0, rng.normal(0, 1, at.size)).astype(dtype.compute)
            for at in where
        ]
        host = [
            law.Term(positions=at, factor=f, delta=v) for at, f, v in zip(where, factors, values, strict=True)
        ]
        flat = torch.from_numpy(np.concatenate(values)).to(device)
    else:
        values = [
            np.where(rng.random(at.size) < 0.5, tuned_from(own[at], seed), random_words(dtype, at.size, seed))
            for own, at in zip(words, where, strict=True)
        ]
        host = [
            law.Term(positions=at, factor=f, tuned=v.astype(dtype.word))
            for at, f, v in zip(where, factors, values, strict=True)
        ]
        flat = on(device, np.concatenate(values).astype(dtype.word))
    return Term(masks=masks, offsets=offsets, values=flat, factors=factors, deltas=deltas), host


@both
@by_code(FLOATS)
@pytest.mark.parametrize(
    "terms",
    [
        [(58982, 65536 / 6554, False)],
        [(0, 1.0, False)],
        [(32768, -0.5, True)],
        [(58982, 1.0, False), (58982, 1.0, False)],
        [(30000, 1.0, False), (58982, 10.0, False), (20000, 0.3, True)],
        [(0, 3e38, False), (ABSENT, 1.0, False), (40000, 1.0, True), (50000, 1.0, False)],
    ],
)
def test_the_law(
    kernels: ModuleType, dtype: DType, terms: list[tuple[int, float, bool]], device: torch.device
) -> None:
    """One package or several, exact or not: what `law.combine` makes of the same words."""
    shapes = [(0, 999), (5, 0), (3 * BLOCK + 8, BLOCK + 16)]
    rows, words = made(device, dtype, shapes)
    pairs = []
    for number, (threshold, factor, deltas) in enumerate(terms):
        masks = Masks(
            keys=[KEYS[(number + n) % len(KEYS)] for n in range(len(shapes))],
            thresholds=[threshold] * len(shapes),
        )
        masks = stored(device, masks, shapes) if number == 2 else masks
        pairs.append(term_pair(kernels, rows, words, masks, shapes, [factor] * len(shapes), deltas, number))
    kernels.add(rows, [term for term, _ in pairs])
    for row, own in enumerate(words):
        expected = expected_sum(own, [host[row] for _, host in pairs], dtype)
        assert np.array_equal(back(rows.rows[row].words), expected)


@both
@by_code(FLOATS)
@pytest.mark.parametrize("factor", [1.0, 1 + 2**-40, 10.0, -1.0, 0.0])
def test_the_law_on_special_numbers(
    kernels: ModuleType, dtype: DType, factor: float, device: torch.device
) -> None:
    special = special_words(dtype)
    base, tuned = np.repeat(special, special.size), np.tile(special, special.size)
    row = Row(flat=on(device, base), start=0, count=base.size)
    rows, masks = Rows(dtype=dtype, rows=(row,)), Masks(keys=[1], thresholds=[0])
    offsets = offsets_of(kernels.counts(rows, masks))
    kernels.add(rows, [Term(masks=masks, offsets=offsets, values=on(device, tuned), factors=[factor])])
    everywhere = np.arange(base.size)
    assert np.array_equal(
        back(row.words),
        expected_sum(base, [law.Term(positions=everywhere, factor=factor, tuned=tuned)], dtype),
    )


def test_rows_beside_those_that_are_written_stay(device: torch.device) -> None:
    flat = on(device, random_words(BF16, 3 * BLOCK, 1))
    before = flat.clone()
    rows = Rows(dtype=BF16, rows=(Row(flat=flat, start=100, count=777, offset=BLOCK + 1),))
    masks = Masks(keys=[1], thresholds=[0])
    cuda.put(
        rows,
        masks,
        offsets_of(cuda.counts(rows, masks)),
        torch.full((777,), 5, dtype=torch.int16, device=device),
    )
    assert (flat[BLOCK + 1 : BLOCK + 778] == 5).all()
    before[BLOCK + 1 : BLOCK + 778] = 5
    assert torch.equal(flat, before)


# Which kernels


def test_tensors_of_the_cpu_are_numbas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    assert choice.kernels_for(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("asked", "expected"), [("cpu", None), ("torch", plain), ("reference", plain), ("cuda", cuda)]
)
def test_the_user_decides(
    asked: str, expected: ModuleType | None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setenv(choice.VARIABLE, asked)
    assert choice.kernels_for(device) is expected
    monkeypatch.delenv(choice.VARIABLE)
    assert choice.kernels_for(device, asked) is expected


def test_an_older_name_means_the_same() -> None:
    """`reference` chose torch's operations, never kernels/reference.py."""
    assert choice.checked("reference", "kernels") == choice.checked("torch", "kernels") == "torch"


@pytest.fixture
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user's process that has said nothing yet."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice._say.cache_clear()


@pytest.mark.usefixtures("without_interpreter")
def test_a_device_without_kernels_gets_torchs_with_one_notice(capsys: pytest.CaptureFixture[str]) -> None:
    assert [choice.kernels_for(torch.device("meta")) for _ in range(2)] == [plain, plain]
    notice = "Triton has no kernels for meta: torch's own operations are used on meta, which is slower"
    assert capsys.readouterr().err == f"dare_train: {notice}\n"


@pytest.mark.usefixtures("without_interpreter")
def test_triton_that_is_missing_gets_torchs_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert choice.kernels_for(torch.device("cuda")) is plain
    assert capsys.readouterr().err.startswith(
        "dare_train: Triton is not installed: torch's own operations are used on cuda"
    )


@pytest.mark.usefixtures("without_interpreter")
@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("cuda", "kernels: expected Triton for tensors on cpu, found Triton has no kernels for cpu"),
        ("numba", "DARE_TRAIN_KERNELS: expected one of torch, cpu, cuda, found 'numba'"),
    ],
)
def test_kernels_that_cannot_run_are_refused(asked: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, asked)
    with pytest.raises(DareError) as caught:
        choice.kernels_for(torch.device("cpu"))
    assert str(caught.value).startswith(text)


# Machine code


COMPILED = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dare_train.kernels import cuda
from dare_train.kernels.cuda_fingerprints import fingerprint_kernel

def ptx(kernel, signature, constants, capability):
    pointers = [place for place, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in pointers}
    types = {**signature, **{name: "constexpr" for name in constants}}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {name: value for name, value in cuda._LAUNCH.items()}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(made.asm["cubin"]) > 1000
    return made.asm["ptx"]

table = {"table": "*i64", "row_of_block": "*i32"}
masked = {**table, "masks": "*i64", "numbers": "*i16"}
moves = {**masked, "offsets": "*i64", "values": "*i16"}
outputs = {"base_out": "*i16", "tuned_out": "*i16", "strange": "*i32"}
pairs = {**masked, "addresses": "*i64", "offsets": "*i64", **outputs}
prints = {**table, "factors": "*i32", "lanes": "*i64"}
units = {"WORD": tl.int16, "WIDTH": 2, "UNSIGNED": tl.uint16}
common = {"STORED": False, "ALIGNED": True, "WORD": tl.int16}
counts = {"rows": "i32", "blocks": "i32"}
signature = {**masked, "factors": "*fp32", "offsets": "*i64", "values": "*i64", **counts}
constants = {"TERMS": 2, "DELTAS": 2, "STORED": 1, "WORD": tl.int16, "CODE": "BF16", "ALIGNED": True}
for capability in (80, 90):
    moved = [ptx(cuda._move, moves, {**common, "PUT": True}, capability)]
    added = ptx(cuda._add, signature, constants, capability)
    if capability == 90:
        moved += [
            ptx(fingerprint_kernel, prints, {**units, "ALIGNED": True}, capability),
            ptx(cuda._move, moves, {**common, "PUT": False}, capability),
            ptx(cuda._take_both, pairs, {**common, "EXPONENT": 0x7F80}, capability),
        ]
        ptx(cuda._count, {**masked, "counts": "*i64"}, {"STORED": True}, capability)
    assert "mul.rn.f32" in added or "mul.f32" in added
    assert "fma" not in added, "a product and a sum were rounded together"
    assert "ftz" not in added, "the smallest numbers become zero"
    for text in [*moved, added]:
        assert "ld.global.v4.b32" in text, "words are not read by sixteen bytes"
    print(capability, "compiled")
"""


def test_kernels_compile_for_gpus() -> None:
    """All for Hopper, some for Ampere, with no GPU: wide reads, no fused multiplication and addition, nothing
    flushed to zero.
    """
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "80 compiled\n90 compiled\n"
