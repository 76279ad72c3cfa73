"""Packages that are committed stay what they are, byte for byte. Only `scripts/golden` writes them."""

from __future__ import annotations

import hashlib
import re
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import format_reader as reader
import numpy as np
import pytest

from dare_train import __version__, apply
from dare_train.dtypes import DTYPES

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "package" / "golden"


def load_script():
    """`scripts/golden` as a module; it has no suffix, since people run it."""
    loader = SourceFileLoader("golden", str(ROOT / "scripts" / "golden"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


golden = load_script()
CASES = golden.cases()
each_case = pytest.mark.parametrize("name", CASES)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def resealed(manifest: bytes) -> bytes:
    """A manifest as this version would have written it: it names its writer, and its digest covers that."""
    digest = re.search(rb'"digest": "([0-9a-f]{64})"', manifest)[1]
    blank = manifest.replace(digest, b"0" * 64)
    blank = re.sub(rb'"written_by": "[^"]*"', b'"written_by": "dare_train %s"' % __version__.encode(), blank)
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode())


def check_package(found: Path, name: str) -> None:
    """Equal to the golden package in every byte but those of the card, which people may edit (§1)."""
    expected, new = files(GOLDEN / name / "package"), files(found)
    assert set(new) == set(expected) == {"README.md", "dare_config.json", "dare_delta.safetensors"}
    package, golden_package = reader.read_package(found), reader.read_package(GOLDEN / name / "package")
    assert contents(package) == contents(golden_package), "the content of a frame has changed"
    assert new["dare_delta.safetensors"] == expected["dare_delta.safetensors"], (
        "zstd compresses the same content otherwise"
    )
    assert new["dare_config.json"] == resealed(expected["dare_config.json"])


def contents(package: reader.Package) -> dict:
    """Tables and decompressed frames: what must stay even where another zstd is installed."""
    frames = {
        name: [(*row, reader.zstandard.decompress(frame)) for *row, frame in rows]
        for name, rows in package.frames.items()
    }
    assert sum(map(len, frames.values())) > 0
    return frames


def test_every_case_is_complete_and_all_of_them_are_small():
    found = files(GOLDEN)
    parts = {"base/model.safetensors", "tuned/model.safetensors", "result/model.safetensors"}
    parts |= {"package/README.md", "package/dare_config.json", "package/dare_delta.safetensors"}
    assert set(found) == {f"{name}/{part}" for name in CASES for part in parts}
    assert sum(map(len, found.values())) < 200_000


@each_case
def test_the_weights_are_those_of_the_script(name, tmp_path):
    CASES[name].write_inputs(tmp_path)
    for side in ("base", "tuned"):
        assert files(tmp_path / side) == files(GOLDEN / name / side)


@each_case
def test_extract_writes_the_golden_package(name, tmp_path):
    CASES[name].extract(GOLDEN / name / "base", GOLDEN / name / "tuned", tmp_path / "package")
    check_package(tmp_path / "package", name)


@each_case
def test_apply_writes_the_golden_result(name, tmp_path):
    apply(GOLDEN / name / "base", GOLDEN / name / "package", tmp_path / "result")
    assert files(tmp_path / "result") == files(GOLDEN / name / "result")


@each_case
def test_the_reader_of_the_document_finds_the_golden_result(name):
    package = reader.read_package(GOLDEN / name / "package")
    found = reader.apply_chain(reader.read_checkpoint(GOLDEN / name / "base"), [package])
    expected = reader.read_checkpoint(GOLDEN / name / "result")
    assert set(found) == set(expected)
    assert all(np.array_equal(found[key].words, expected[key].words) for key in expected)


def test_a_lossless_package_brings_back_the_tuned_weights():
    result, tuned = (reader.read_checkpoint(GOLDEN / "lossless_bf16" / side) for side in ("result", "tuned"))
    assert all(np.array_equal(result[key].words, tuned[key].words) for key in tuned)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_a_state_dict_does_not_matter(backwards, tmp_path):
    pytest.importorskip("torch", reason="a state dict is torch's")
    from torch_words import as_tensor

    case = CASES["exact_bf16"]
    sides = []
    for arrays in (case.base, case.tuned):
        tensors = {
            name: as_tensor(array.words, DTYPES[array.code]).reshape(array.shape)
            for name, array in arrays.items()
        }
        sides.append(dict(reversed(tensors.items())) if backwards else tensors)
    case.extract(*sides, tmp_path / "package")
    check_package(tmp_path / "package", "exact_bf16")


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_matter(threads, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("dare_train.parallel.threads.thread_count", lambda: asked.append(threads) or threads)
    monkeypatch.setattr(
        sys.modules["dare_train.extracting.assembly"], "SEGMENT", 1000
    )  # enough segments to be out of order
    case = CASES["exact_bf16"]
    case.extract(GOLDEN / "exact_bf16" / "base", GOLDEN / "exact_bf16" / "tuned", tmp_path / "package")
    assert asked
    monkeypatch.setattr("dare_train.parallel.threads.thread_count", lambda: 1)
    case.extract(GOLDEN / "exact_bf16" / "base", GOLDEN / "exact_bf16" / "tuned", tmp_path / "one")
    assert files(tmp_path / "package") == files(tmp_path / "one")
    assert len(contents(reader.read_package(tmp_path / "one"))["model.0.weight"]) == 10


def rows(text: str) -> list[list[str]]:
    """Cells of all tables, without back quotes."""
    return [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_document_shows_the_vectors():
    """docs/format.md §6 holds what `scripts/golden` prints."""
    assert golden.vectors() in (ROOT / "docs" / "format.md").read_text()


def test_the_reader_of_the_document_finds_the_vectors():
    seen = 0
    for seed, name, key, *draws in (row for row in rows(golden.vectors()) if row[0].isdigit()):
        assert f"{reader.key_of(int(seed), name):016x}" == key
        assert [f"{reader.draws(int(seed), name, place, 1)[0]:04x}" for place in golden.PLACES] == draws
        seen += 1
    assert seen == len(golden.NAMES)

    values = [
        value
        for what, value in (row for row in rows(golden.vectors()) if len(row) == 2)
        if what not in ("what", "---")
    ]
    base, tuned = (np.array([int(word, 16) for word in text.split()], np.uint16) for text in values[:2])
    print_, set_print, exact, rounded = values[2:]
    assert reader.fingerprint(base) == print_
    assert reader.fingerprint_of_set([("b", "BF16", [3, 3], print_), ("a", "BF16", [9], print_)]) == set_print
    changed = int(np.count_nonzero(base != tuned))
    assert np.array_equal(
        reader.exact_words(reader.symbols(bytes.fromhex(exact), 9, changed, 2), base, "BF16"), tuned
    )
    symbol = reader.symbols(bytes.fromhex(rounded), 9, changed, 2).astype(np.uint16)
    delta = reader.as_float((symbol >> np.uint16(1)) | (symbol << np.uint16(15)), "BF16")
    expected = reader.as_float(tuned, "BF16") - reader.as_float(base, "BF16")
    assert np.array_equal(delta, reader.as_float(reader.to_words(expected, "BF16"), "BF16"))


def test_philox_of_the_reader_gives_the_published_answers():
    """§6, so that the reader does not lean on the package for its draws."""
    answers = re.findall(r"`([0-9a-f]{8}(?: [0-9a-f]{8}){3})`", (ROOT / "docs" / "format.md").read_text())
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    for counter, key in (([0] * 4, [0] * 2), ([2**32 - 1] * 4, [2**32 - 1] * 2), pi):
        words = reader.philox([np.array([word]) for word in counter], key)
        assert " ".join(f"{int(word[0]):08x}" for word in words) in answers
