"""Shapes and names that no library of tensors takes: refused as the manifest is read (docs/format.md 2.6)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from forge import Forgery, refused


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([1] * 65, "expected a shape of at most 64 dimensions, found 65"),
        ([1 << 61] * 300_000, "expected a shape of at most 64 dimensions, found 300,000"),
        ([1 << 61, 1 << 61, 0], "expected a shape, found a list of 3"),
        ([1 << 60, 4], "expected a shape, found a list of 2"),
        ([-1], "expected a shape, found a list of 1"),
        ([True], "expected a shape, found a list of 1"),
    ],
    ids=range(6),
)
def test_shapes(forgery: Forgery, base: Path, shape: list[int], text: str) -> None:
    forgery.tensor("head")["shape"] = shape
    forgery.write_manifest(derive=False)
    began = time.process_time()
    refused(forgery.folder, base, text)
    assert time.process_time() - began < 10


def test_names(forgery: Forgery, base: Path) -> None:
    forgery.tensor("head")["name"] = "a." * 4097
    forgery.write_manifest(derive=False)
    refused(forgery.folder, base, "expected the name of a tensor")
