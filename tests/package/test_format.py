"""docs/format.md is enough to read a package: `format_reader`, written from it alone, gives the bits that
`apply` gives.
"""

from __future__ import annotations

import ast
import sys
from math import prod
from pathlib import Path

import format_reader as reader
import numpy as np
import pytest
from bit_patterns import FLOATS, special_words, tuned_from, weights_like
from format_reader import Tensor

from dare_train import apply, extract
from dare_train.dtypes import DTYPES, from_float
from dare_train.package.manifest import Manifest, TensorRecord
from dare_train.weights.protocol import TensorInfo

VALUES = ("exact", "rounded", "int8", "int4", "sign")
BF16, F32 = DTYPES["BF16"], DTYPES["F32"]


def fresh(dtype, shape=(3, 3001), seed=0):
    """Weights of ordinary magnitude; by default 9,003 of them, a block of draws and a bit."""
    return Tensor(dtype.code, shape, weights_like(dtype, prod(shape), seed))


def numbers(dtype, values):
    """The tensor of these numbers, each of which is one of the dtype's."""
    values = np.asarray(values, dtype.compute)
    return Tensor(dtype.code, values.shape, from_float(values.reshape(-1), dtype))


def tune(tensor, seed=1):
    """What a few training steps make of a tensor: zeros stay, of the rest a half moves by some units in the
    last place.
    """
    words = tensor.words
    moved = tuned_from(words, seed)
    without_sign = words << words.dtype.type(1)
    return Tensor(tensor.dtype, tensor.shape, np.where(without_sign == 0, words, moved))


def stacked(*tensors):
    """One tensor with the rows of all."""
    rows = sum(tensor.shape[0] for tensor in tensors)
    words = np.concatenate([tensor.words for tensor in tensors])
    return Tensor(tensors[0].dtype, (rows, *tensors[0].shape[1:]), words)


def check_same(found: dict[str, Tensor], folder: Path) -> None:
    expected = reader.read_checkpoint(folder)
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert np.array_equal(tensor.words, expected[name].words), name


def check_agreement(base: Path, packages: list[Path], out: Path, weights: list[float]) -> dict[str, Tensor]:
    """Apply packages of one base in both ways and compare every bit. Returns what the reader found."""
    apply(base, packages, out, weights=weights)
    found = reader.apply_side_by_side(
        reader.read_checkpoint(base), [reader.read_package(p) for p in packages], weights
    )
    check_same(found, out)
    return found


@pytest.fixture
def agree(tmp_path, make_checkpoint):
    """Extract with the given options and check agreement. Returns what the reader found and its entries of
    the manifest by name.
    """

    def check(base, tuned, weight=1.0, **options):
        folder = make_checkpoint("base", base)
        extract(folder, make_checkpoint("tuned", tuned), tmp_path / "package", seed=7, **options)
        found = check_agreement(folder, [tmp_path / "package"], tmp_path / "result", [weight])
        manifest = reader.read_package(tmp_path / "package").manifest
        return found, {entry["name"]: entry for entry in manifest["tensors"]}

    return check


def test_the_reader_knows_nothing_of_the_package():
    nodes = [
        node
        for node in ast.walk(ast.parse(Path(reader.__file__).read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert imported == {
        "__future__",
        "dataclasses",
        "hashlib",
        "json",
        "math",
        "numpy",
        "pathlib",
        "typing",
        "zstandard",
    }


@pytest.mark.parametrize("weight", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("p", [0.0, 0.9])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.code)
def test_encodings_dtypes_and_weights(agree, dtype, values, p, weight):
    """§4.3, §4.4, §5.1 to §5.3."""
    base = fresh(dtype)
    _, entries = agree({"w": base}, {"w": tune(base)}, weight, values=values, p=p)
    assert (entries["w"]["dtype"], entries["w"]["values"], entries["w"]["mask"]) == (
        dtype.code,
        values,
        "seeded" if p else "all",
    )


@pytest.mark.parametrize("values", VALUES)
def test_stored_masks(agree, values):
    """§4.3: a bitmap before the content; §5.2: no rescale."""
    base = fresh(BF16)
    tuned, mask = tune(base), np.random.default_rng(3).random((3, 3001)) < 0.2
    found, entries = agree({"w": base}, {"w": tuned}, values=values, masks={"w": mask})
    assert entries["w"]["mask"] == "stored"
    if values == "exact":
        assert np.array_equal(found["w"].words, np.where(mask.reshape(-1), tuned.words, base.words))


@pytest.mark.parametrize("rescale", ["paper", "none"])
def test_rescale(agree, rescale):
    """§5.2."""
    base = fresh(BF16)
    agree({"w": base}, {"w": tune(base)}, rescale=rescale, p=0.6)


@pytest.mark.parametrize(
    ("mask", "rescale", "factor"),
    [("seeded", "paper", 4.0), ("seeded", "none", 1.0), ("stored", "paper", 1.0)],
)
def test_only_seeded_masks_are_rescaled(mask, rescale, factor):
    """§5.2, whatever threshold a tensor names."""
    record = TensorRecord(name="w", info=TensorInfo(BF16, (4,)), kind="delta", mask=mask, threshold=3 << 14)
    assert (
        Manifest(base_model="b", continues="base", seed=0, rescale=rescale, tensors=(record,)).factor(record)
        == factor
    )


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.code)
def test_infinities_nans_and_signed_zeros(agree, dtype, p):
    """§5.1, §5.3."""
    special = special_words(dtype)
    size = (special.size**2,)
    base = Tensor(dtype.code, size, np.repeat(special, special.size))
    tuned = Tensor(dtype.code, size, np.tile(special, special.size))
    agree({"w": base}, {"w": tuned}, values="exact", p=p, allow_nonfinite=True)


@pytest.mark.parametrize("values", ["exact", "rounded", "int8"])
def test_several_segments(agree, values):
    """§4.1: a tensor of more than 2²⁰ elements; scales count from the first group that a segment touches."""
    base = fresh(BF16, (1031, 1021))
    agree({"w": base}, {"w": tune(base)}, values=values, p=0.99)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=lambda dtype: dtype.code)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("p", [0.0, 0.9])
def test_short_segments(agree, monkeypatch, dtype, values, p):
    """§4.1: segments have any length up to 2²⁰ and begin anywhere, groups of scales may lie across; the
    result is the same.

    The tuned weights have nothing to do with the base's, so that base + (tuned - base) is rarely the tuned
    weight itself (§5.3).
    """
    monkeypatch.setattr(sys.modules["dare_train.extracting.assembly"], "SEGMENT", 1000)
    agree({"w": fresh(dtype)}, {"w": fresh(dtype, seed=9)}, values=values, p=p)


@pytest.mark.parametrize(("of_base", "of_tuned"), [("x.w", "bert.x.w"), ("bert.x.w", "x.w")])
def test_prefixes(agree, tmp_path, of_base, of_tuned):
    """§2 `prefix`, in either direction. A head that the base lacks travels whole; one that the result lacks
    is left out.
    """
    base = fresh(BF16)
    head = numbers(BF16, np.arange(6))
    found, entries = agree({of_base: base, "pooler": head}, {of_tuned: tune(base), "classifier": head})
    assert set(found) == {of_tuned, "classifier"}
    assert entries["classifier"]["kind"] == "whole"
    assert reader.read_package(tmp_path / "package").manifest["prefix"] == (
        "bert." if of_base == "x.w" else "-bert."
    )


@pytest.mark.parametrize("values", VALUES)
def test_resized_embeddings(agree, values):
    """§2 `base_rows`, §4.1, §4.2: the rows that the base has not are carried whole."""
    base = fresh(BF16, (64, 50))
    found, entries = agree(
        {"e": base},
        {"e": stacked(tune(base), numbers(BF16, np.full((3, 50), 7.0)))},
        values=values,
    )
    assert entries["e"]["base_rows"] == 64
    assert found["e"].words[64 * 50 :].tolist() == [0x40E0] * 150


def test_whole_tensors(agree):
    """§2.5, §4.4: heads, other dtypes that changed, and whatever was asked for; empty tensors and scalars are
    no exception.
    """
    base = fresh(BF16)
    ids = np.arange(30).reshape(5, 6)
    float8 = Tensor("F8_E4M3", (40,), np.arange(40, dtype=np.uint8))
    reversed8 = Tensor("F8_E4M3", (40,), np.arange(40, 0, -1, dtype=np.uint8))
    same = {
        "scalar": np.full((), 2.5, np.float32),
        "empty": np.empty((0, 4), np.float32),
        "ids_same": ids,
        "f8_same": float8,
    }
    before = {"w": base, "asked": base, "ids": ids, "f8": float8, "step": np.ones((), np.float32), **same}
    after = {
        **same,
        "w": tune(base),
        "asked": tune(base),
        "ids": ids + 2**40,
        "f8": reversed8,
        "step": np.full((), 2, np.float32),
        "new": base,
        "flag": Tensor("BOOL", (2,), np.array([1, 0], np.uint8)),
    }
    _, entries = agree(before, after, whole=["asked"])
    assert {name for name, entry in entries.items() if entry["kind"] == "whole"} == {
        "asked",
        "ids",
        "f8",
        "new",
        "flag",
    }
    assert {"ids_same", "f8_same"} <= {name for name, entry in entries.items() if entry["kind"] == "base"}


def test_the_digest_is_the_only_thing_blanked(agree):
    """§2.1: other fields may hold 64 zeros too."""
    base = fresh(BF16)
    agree({"w": base}, {"w": tune(base)}, base_model="0" * 64)


def test_tensors_that_are_not_covered(agree):
    base = fresh(BF16)
    _, entries = agree({"a": base, "b": base}, {"a": tune(base), "b": tune(base)}, exclude=["b"])
    assert [entry["kind"] for entry in entries.values()] == ["delta", "base"]


@pytest.fixture
def family(tmp_path, make_checkpoint):
    """A base and `child(name, *changed, of=…, **options)`: a package in which the named tensors have been
    tuned.
    """
    base = {"a": fresh(BF16), "b": fresh(F32, seed=1), "c": fresh(F32, seed=2)}
    base["a"].words[:50] = 0x8000  # minus zero
    folder = make_checkpoint("base", base)

    def child(name, *changed, of=folder, **options):
        tensors = reader.read_checkpoint(of)
        seed = sum(name.encode())
        tuned = make_checkpoint(
            f"{name}_tuned",
            {key: tune(tensor, seed) if key in changed else tensor for key, tensor in tensors.items()},
        )
        extract(of, tuned, tmp_path / name, seed=seed, **options)
        return tmp_path / name

    return folder, child


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 0.0)])
@pytest.mark.parametrize("p", [0.0, 0.7])
def test_side_by_side(tmp_path, family, p, weights):
    """§5.4, with tensors and elements that all of the packages move, or one alone, or none."""
    base, child = family
    packages = [
        child("x", "a", "b", p=p),
        child("y", "a", "c", p=p, values="exact"),
        child("z", "a", "b", p=p, values="int8"),
    ]
    check_agreement(base, packages, tmp_path / "result", list(weights))


def test_an_element_that_one_package_moves_does_not_depend_on_what_the_other_does_elsewhere(
    tmp_path, make_checkpoint
):
    """§5.4 beside §5.3: 1 + (1e-30 - 1) is 0, so it matters whether an element counts as one package's or as
    a sum.
    """
    ones = np.ones(8, np.float32)
    tiny = np.full(4, 1e-30, np.float32)
    base = make_checkpoint("base", {"w": ones})
    extract(base, make_checkpoint("left", {"w": np.concatenate([tiny, ones[4:]])}), tmp_path / "p1", p=0.0)
    extract(base, make_checkpoint("right", {"w": np.concatenate([ones[4:], tiny])}), tmp_path / "p2", p=0.0)
    extract(base, make_checkpoint("nothing", {"w": ones}), tmp_path / "p3", p=0.9)
    results = []
    for number, package in enumerate(("p2", "p3")):
        found = check_agreement(
            base, [tmp_path / "p1", tmp_path / package], tmp_path / f"result{number}", [1.0, 1.0]
        )
        results.append(found["w"].words[:4].tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("p", [0.0, 0.9])
def test_chains(tmp_path, family, p):
    """§5.5: each package continues the result of the one before."""
    base, child = family
    packages, at = [], base
    for number, changed in enumerate(("ab", "bc", "a")):
        packages.append(child(f"step{number}", *changed, of=at, p=p))
        apply(base, packages, tmp_path / f"result{number}")
        at = tmp_path / f"result{number}"
    found = reader.apply_chain(
        reader.read_checkpoint(base), [reader.read_package(package) for package in packages]
    )
    check_same(found, at)


def test_a_chain_whose_first_step_grows_rows_and_adds_a_prefix(tmp_path, make_checkpoint):
    """§2 `prefix`, §2 `base_rows`, §5.5: the second package is relative to the first one's names and
    shapes.
    """
    base = make_checkpoint("base", {"e": fresh(BF16, (20, 8)), "w": fresh(BF16)})
    first = reader.read_checkpoint(base)
    grown = {
        "m.e": stacked(tune(first["e"]), numbers(BF16, np.ones((2, 8)))),
        "m.w": tune(first["w"]),
    }
    extract(base, make_checkpoint("grown", grown), tmp_path / "p1", p=0.0)
    extract(
        tmp_path / "grown",
        make_checkpoint("later", {name: tune(t, 9) for name, t in grown.items()}),
        tmp_path / "p2",
        p=0.5,
    )
    packages = [tmp_path / "p1", tmp_path / "p2"]
    apply(base, packages, tmp_path / "result")
    check_same(
        reader.apply_chain(reader.read_checkpoint(base), [reader.read_package(p) for p in packages]),
        tmp_path / "result",
    )
