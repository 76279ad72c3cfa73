"""Segment tables and frames that contradict the manifest, the file or themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forge import PART, Forgery, compressed, refused

from dare_train import extract

TENSOR, START, LENGTH, KEPT, CHANGED, SIZE = range(6)

INSIDE = "elements within its tensor"
ELEMENTS = "1 to 1,048,576 elements"
COUNTS = "no more changed than kept elements, and no more kept ones than it has"
TENSORS = "one of the manifest's 6 tensors"
FILE = "bytes within its file's"
BYTES = "at least one byte"
BORDER = "elements on one side of where the base ends"

_IMPOSSIBLE = [
    ("dense", START, -1, INSIDE),
    ("dense", START, 1, INSIDE),
    ("dense", START, 2**62, INSIDE),
    ("dense", START, -(2**63), INSIDE),
    ("dense", LENGTH, 0, ELEMENTS),
    ("dense", LENGTH, -5, ELEMENTS),
    ("dense", LENGTH, 1321, INSIDE),
    ("dense", LENGTH, 2**20 + 1, ELEMENTS),
    ("dense", LENGTH, 2**63 - 1, ELEMENTS),
    ("dense", KEPT, -1, COUNTS),
    ("dense", KEPT, 2000, COUNTS),
    ("dense", CHANGED, -1, COUNTS),
    ("dense", CHANGED, 658, COUNTS),
    ("dense", SIZE, 0, BYTES),
    ("dense", SIZE, -1, BYTES),
    ("dense", SIZE, 2**40, FILE),
    ("dense", TENSOR, -1, TENSORS),
    ("dense", TENSOR, 6, TENSORS),
    ("dense", TENSOR, 2**40, TENSORS),
    ("embed", START, 90, INSIDE),
    ("embed", LENGTH, 97, BORDER),
    ("wide", LENGTH, 31, INSIDE),
]


@pytest.mark.parametrize(("name", "column", "value", "rule"), _IMPOSSIBLE)
def test_an_impossible_number_in_the_table_is_refused(
    forgery: Forgery, base: Path, name: str, column: int, value: int, rule: str
) -> None:
    place = forgery.segment(name)
    row = forgery.rows[place]
    row[column] = value
    forgery.seal()
    refused(forgery.folder, base, PART, f"a segment of {rule}", f"found row {place}, {tuple(row)}")


_CONTRADICTIONS = [(name, KEPT, by) for name in ("dense", "embed", "wide", "head", "steps") for by in (-1,)]
_CONTRADICTIONS += [(name, CHANGED, by) for name in ("dense", "embed", "head", "steps") for by in (-1,)] + [
    ("dense", CHANGED, 1)
]


@pytest.mark.parametrize(("name", "column", "by"), _CONTRADICTIONS)
def test_a_count_that_mask_or_frame_contradicts_is_refused(
    forgery: Forgery, base: Path, name: str, column: int, by: int
) -> None:
    row = forgery.rows[forgery.segment(name)]
    row[column] += by
    row[CHANGED] = min(row[CHANGED], row[KEPT])
    forgery.seal()
    refused(forgery.folder, base, PART if name in ("head", "steps") else name)


def test_a_wrong_size_is_refused(forgery: Forgery, base: Path) -> None:
    forgery.rows[0][SIZE] -= 1
    forgery.seal()
    refused(forgery.folder, base)


def test_bytes_that_no_segment_claims_are_refused(forgery: Forgery, base: Path) -> None:
    forgery.frames.append(b"spare")
    forgery.seal()
    total = sum(row[SIZE] for row in forgery.rows)
    refused(forgery.folder, base, PART, f"expected {total} bytes of frames", f"found {total + 5}")


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_overlapping_segments_are_refused(forgery: Forgery, base: Path, shift: int) -> None:
    """The tensor is cut into two segments that share 10 elements, or the same segment is given twice."""
    place = forgery.segment("head")
    row = forgery.rows[place]
    lengths = [(0, 50), (0, 50)] if not shift else [(0, 30), (20, 30)][::shift]
    forgery.rows[place : place + 1] = [
        [row[TENSOR], start, length, length, length, row[SIZE]] for start, length in lengths
    ]
    forgery.frames[place : place + 1] = [forgery.frames[place]] * 2
    forgery.seal()
    refused(forgery.folder, base, "head", "segments that do not overlap", "fetch the package again")


def test_a_segment_of_a_tensor_that_stays_as_in_the_base_is_refused(forgery: Forgery, base: Path) -> None:
    idle = forgery.tensor("idle")
    for field in ("mask", "p", "threshold", "values", "kept", "changed", "delta"):
        del idle[field]
    idle["kind"] = "base"
    forgery.rows.append([forgery.index("idle"), 0, 9, 9, 9, 1])
    forgery.frames.append(b"x")
    forgery.seal()
    refused(forgery.folder, base, PART, "a segment of a tensor that is not as in the base")


@pytest.mark.parametrize("name", ["head", "steps"])
def test_a_whole_tensor_that_no_segment_covers_is_refused(forgery: Forgery, base: Path, name: str) -> None:
    place = forgery.segment(name)
    del forgery.rows[place], forgery.frames[place]
    forgery.seal()
    refused(forgery.folder, base, name)


def test_a_whole_tensor_with_a_gap_is_refused(forgery: Forgery, base: Path) -> None:
    forgery.rows[forgery.segment("head")][LENGTH:SIZE] = [49, 49, 49]
    forgery.set_frame("head", compressed(bytes(98)))
    forgery.seal()
    refused(forgery.folder, base, "head")


def test_added_rows_that_no_segment_covers_are_refused(forgery: Forgery, base: Path) -> None:
    place = forgery.segment("embed", 1)
    del forgery.rows[place], forgery.frames[place]
    forgery.seal()
    refused(forgery.folder, base, "embed")


def test_a_delta_whose_segment_was_taken_out_is_refused(forgery: Forgery, base: Path) -> None:
    """The manifest promises 535 changed elements and the part holds none: weighted packages have no result on
    record to notice.
    """
    place = forgery.segment("dense")
    del forgery.rows[place], forgery.frames[place]
    forgery.seal()
    refused(forgery.folder, base, "dense")


def _tables() -> dict[str, dict[str, Any]]:
    rows, data = np.zeros((1, 6), np.int64), np.zeros(4, np.uint8)
    return {
        "five columns": {"segments": rows[:, :5].copy(), "data": data},
        "seven columns": {"segments": np.zeros((1, 7), np.int64), "data": data},
        "int32": {"segments": rows.astype(np.int32), "data": data},
        "uint64": {"segments": rows.astype(np.uint64), "data": data},
        "float64": {"segments": rows.astype(np.float64), "data": data},
        "flat": {"segments": rows.reshape(-1), "data": data},
        "cube": {"segments": rows.reshape(1, 1, 6), "data": data},
        "data as int8": {"segments": rows, "data": data.astype(np.int8)},
        "data as matrix": {"segments": rows, "data": data.reshape(2, 2)},
        "no table": {"data": data},
        "no data": {"segments": rows},
        "nothing": {},
        "an extra tensor": {"segments": rows, "data": data, "extra": data},
        "hundreds of tensors": {f"tensor {number}": data for number in range(500)},
    }


@pytest.mark.parametrize("which", list(_tables()))
def test_a_part_with_other_tensors_than_two_is_refused(forgery: Forgery, base: Path, which: str) -> None:
    forgery.write_part(_tables()[which])
    forgery.write_manifest()
    refused(
        forgery.folder,
        base,
        PART,
        "expected segments I64 [n, 6] and data U8 [bytes]",
        "fetch the package again",
    )


_FRAMES = {
    "empty content": compressed(b""),
    "no frame": b"not a zstd frame",
    "one byte": b"\x28",
    "magic number only": b"\x28\xb5\x2f\xfd",
    "skippable frame": b"\x50\x2a\x4d\x18\x04\x00\x00\x00junk",
    "content of another size": compressed(bytes(1000)),
    "no content size": compressed(bytes(100), write_content_size=False),
    "a terabyte": b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00",
    "all ones": b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + b"\x01\x00\x00",
    "a dictionary": b"\x28\xb5\x2f\xfd\x21\x07\x64\x01\x00\x00",
}


@pytest.mark.parametrize("name", ["dense", "embed", "head"])
@pytest.mark.parametrize("which", list(_FRAMES))
def test_a_frame_of_the_wrong_kind_or_size_is_refused(
    forgery: Forgery, base: Path, name: str, which: str
) -> None:
    forgery.set_frame(name, _FRAMES[which])
    forgery.seal()
    refused(forgery.folder, base, name, "frame", "fetch the package again")


@pytest.mark.parametrize("name", ["dense", "head"])
def test_a_frame_cut_short_anywhere_or_continued_is_refused(
    forgery: Forgery, base: Path, name: str, tmp_path: Path
) -> None:
    good = forgery.frames[forgery.segment(name)]
    wrong = [good[:length] for length in range(1, len(good), 23)] + [good + b"\0", good + good]
    assert len(wrong) > 5
    for number, frame in enumerate(wrong):
        forgery.set_frame(name, frame)
        forgery.folder = forgery.folder.rename(tmp_path / f"case-{number}" if number else tmp_path / "first")
        forgery.seal()
        refused(forgery.folder, base, name)
        (tmp_path / "results").rmdir()


@pytest.mark.parametrize("byte", [0x00, 0xFF])
@pytest.mark.parametrize("name", ["dense", "embed", "wide"])
def test_a_bitmap_with_another_number_of_ones_is_refused(
    forgery: Forgery, base: Path, name: str, byte: int
) -> None:
    kept = forgery.rows[forgery.segment(name)][KEPT]
    content = forgery.content(name)
    bitmap = bytes([byte]) * (-(-kept // 8) - 1)
    if content[: len(bitmap)] == bitmap:
        bitmap = bytes([byte ^ 0x0F]) * len(bitmap)
    forgery.set_frame(name, compressed(bitmap + content[len(bitmap) :]))
    forgery.seal()
    refused(forgery.folder, base, name, "changed elements", "fetch the package again")


def test_a_segment_of_nothing_changed_is_harmless_or_refused_but_no_crash(
    forgery: Forgery, base: Path
) -> None:
    forgery.rows.append([forgery.index("idle"), 0, 9, 6, 0, 0])
    forgery.frames.append(compressed(b"\0"))
    forgery.rows[-1][SIZE] = len(forgery.frames[-1])
    forgery.rows[forgery.segment("dense")][CHANGED] -= 1
    forgery.seal()
    refused(forgery.folder, base, "dense")


@pytest.mark.parametrize(("column", "by"), [(KEPT, -1), (CHANGED, -1), (KEPT, 1)])
def test_a_wrong_count_of_quantized_values_is_refused(
    quantized: Forgery, base: Path, column: int, by: int
) -> None:
    row = quantized.rows[quantized.segment("dense")]
    row[column] += by
    row[CHANGED] = min(row[CHANGED], row[KEPT])
    quantized.seal()
    refused(quantized.folder, base)


@pytest.mark.parametrize("scale", [0x7F80, 0x7FC0, 0xFF80])
def test_a_scale_that_is_infinite_or_no_number_is_refused(quantized: Forgery, base: Path, scale: int) -> None:
    content = quantized.content("dense")
    quantized.set_frame("dense", compressed(scale.to_bytes(2, "little") + content[2:]))
    quantized.seal()
    refused(quantized.folder, base, "dense")


@pytest.mark.parametrize("bits", [0, 255])
def test_a_stored_mask_with_another_number_of_ones_is_refused(
    models: tuple[Path, Path], base: Path, tmp_path: Path, bits: int
) -> None:
    extract(*models, tmp_path / "stored", masks={"dense": np.arange(1320).reshape(40, 33) % 3 == 0})
    forgery = Forgery(tmp_path / "stored", tmp_path / "package")
    forgery.set_frame("dense", compressed(bytes([bits]) * 165 + forgery.content("dense")[165:]))
    forgery.seal()
    refused(forgery.folder, base, "dense", "kept elements, as its mask says", "found 440")
