"""Checkpoints that cannot be read, and places that cannot be written to."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import apply_refused, base_state, extract_refused, moved, refusal, save

from dare_train import DeltaPackage, apply, extract
from dare_train.errors import CheckpointError, ConfigError, DareError, OutputExists

INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(base_state(), tmp_path / "base")


@pytest.fixture
def package(base: Path, tmp_path: Path) -> DeltaPackage:
    return extract(base, moved(base_state()), tmp_path / "package", p=0.5)


def test_a_pickled_checkpoint_is_refused_with_a_remedy(package: DeltaPackage, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(base_state(), folder / "pytorch_model.bin")
    remedy = "CLASS.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
    texts = ("expected model.safetensors or model.safetensors.index.json", "found pytorch_model.bin", remedy)
    apply_refused(folder, package, CheckpointError, str(folder), *texts)
    extract_refused(folder, base_state(), tmp_path / "p", CheckpointError, str(folder), *texts)
    extract_refused(folder / "pytorch_model.bin", base_state(), tmp_path / "p", CheckpointError, remedy)


def test_a_folder_without_weights_is_refused(package: DeltaPackage, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    apply_refused(tmp_path / "empty", package, CheckpointError, str(tmp_path / "empty"), "found no weights")


def test_several_files_without_an_index_are_refused(package: DeltaPackage, tmp_path: Path) -> None:
    folder = save(base_state(), tmp_path / "several")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    apply_refused(
        folder,
        package,
        CheckpointError,
        f"expected model.safetensors or {INDEX}",
        "found one.safetensors, two.safetensors",
    )


@pytest.mark.parametrize(
    "where",
    ["/nowhere/at/all", "./nothing", "nobody/nothing", "n" * 300, "a\0b"],
    ids=lambda where: where[:20],
)
def test_a_place_where_nothing_is_is_refused(package: DeltaPackage, tmp_path: Path, where: str) -> None:
    (tmp_path / "results").mkdir()
    with pytest.raises(CheckpointError) as caught:
        apply(where, package, tmp_path / "results" / "out")
    refusal(caught.value, CheckpointError, where.split("\0")[0][:20], "expected a folder or a Hub id")


def test_a_pipe_is_refused_and_not_waited_for(package: DeltaPackage, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    apply_refused(
        tmp_path / "pipe", package, CheckpointError, "pipe: expected a folder or a file, found a pipe"
    )


def test_kernels_that_do_not_exist_are_refused_of_weights_without_torch_too(tmp_path: Path) -> None:
    arrays = {"a": np.ones(3, np.float32)}
    with pytest.raises(ConfigError, match="kernels: expected one of torch, cpu, cuda, found 'trition'"):
        extract(arrays, arrays, tmp_path / "package", kernels="trition")


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_checkpoint_cut_short_is_refused(package: DeltaPackage, tmp_path: Path, size: int) -> None:
    folder = save(base_state(), tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    apply_refused(
        folder, package, CheckpointError, str(path), "expected a safetensors file", "fetch it again"
    )


_INDEXES: list[tuple[Any, str]] = [
    ({"a.weight": "../base/model.safetensors"}, "found '../base/model.safetensors'"),
    ({"a.weight": "/etc/hostname"}, "found '/etc/hostname'"),
    ({"a.weight": "sub/x.safetensors"}, "found 'sub/x.safetensors'"),
    ({"a.weight": ".."}, ".."),
    ({"a.weight": ""}, ""),
    (
        {"a.weight": "model-00009.safetensors"},
        "model-00009.safetensors: expected a file, since the index lists it, found none",
    ),
    ({"a.weight": "n" * 300}, "nnn"),
    ({"a.weight": 5}, "expected str, found int"),
    ({"a.weight": None}, "expected str, found null"),
    ({"a.weight": ["x"]}, INDEX),
    ({"a.weight": "model.safetensors"}, "b.weight: expected in None, found in model.safetensors"),
    (
        dict.fromkeys(("a.weight", "b.weight", "c.count", "d"), "model.safetensors"),
        "d: expected in model.safetensors, found in None",
    ),
    ([], 'expected an index with a "weight_map"'),
    ("x", 'expected an index with a "weight_map"'),
    (None, 'expected an index with a "weight_map"'),
]


@pytest.mark.parametrize(
    ("weight_map", "text"), _INDEXES, ids=[repr(weight_map)[:50] for weight_map, _ in _INDEXES]
)
def test_an_index_that_does_not_fit_its_folder_is_refused(
    package: DeltaPackage, tmp_path: Path, weight_map: Any, text: str
) -> None:
    folder = save(base_state(), tmp_path / "sharded")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    apply_refused(folder, package, CheckpointError, str(folder), text)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b"\xff", b"5", b"[" * 100_000])
def test_an_index_that_is_no_index_is_refused(package: DeltaPackage, tmp_path: Path, raw: bytes) -> None:
    folder = save(base_state(), tmp_path / "sharded")
    (folder / INDEX).write_bytes(raw)
    apply_refused(
        folder, package, CheckpointError, str(folder / INDEX), 'expected an index with a "weight_map"'
    )


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, np.complex64),
        np.array(["x"]),
        np.array([b"x"]),
        np.array([None]),
        np.zeros(3, "V2"),
        np.zeros(3, "M8[s]"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_of_types_that_no_checkpoint_holds_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    extract_refused(
        {"w": array}, {"w": array}, tmp_path / "p", CheckpointError, "w", "expected one of", str(array.dtype)
    )


def test_big_endian_arrays_mean_the_same_numbers(tmp_path: Path) -> None:
    native = {"w": np.linspace(0, 1, 50, dtype=np.float32)}
    swapped = {"w": native["w"].astype(">f4")}
    for number, pair in enumerate([(native, {"w": native["w"] + 1}), (swapped, {"w": swapped["w"] + 1})]):
        extract(*pair, tmp_path / f"{number}", p=0.5)
    assert (
        DeltaPackage.open(tmp_path / "0").manifest.parent == DeltaPackage.open(tmp_path / "1").manifest.parent
    )


@pytest.mark.parametrize("what", [5, None, {"w": [1.0]}, {"w": None}, [torch.zeros(3)], {}], ids=repr)
def test_what_holds_no_weights_is_refused(base: Path, tmp_path: Path, what: Any) -> None:
    place = tmp_path / "p"
    place.mkdir()
    for pair in ((what, base), (base, what)):
        with pytest.raises(DareError, match="expected"):
            extract(*pair, place / "out")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{'a': 1}", b"[" * 100_000])
def test_a_companion_that_is_not_json_is_carried_as_it_is(base: Path, tmp_path: Path, content: bytes) -> None:
    tuned = save(moved(base_state()), tmp_path / "tuned")
    (base / "config.json").write_bytes(b'{"a": 1}')
    (tuned / "config.json").write_bytes(content)
    apply(base, extract(base, tuned, tmp_path / "package"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == content


def test_a_base_that_is_called_like_a_blank_digest_does_no_harm(tmp_path: Path) -> None:
    package = extract(base_state(), moved(base_state()), tmp_path / "package", base_model="0" * 64)
    assert DeltaPackage.open(tmp_path / "package").manifest == package.manifest


# Places to write to.


@pytest.mark.parametrize(
    "out", ["file/x", "file/x/y", "n" * 300, "a\0b", "", ".", "/", ".."], ids=lambda out: out[:10] or "empty"
)
def test_a_place_that_cannot_be_created_is_refused_by_name(
    base: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    Path("file").write_text("kept")
    with pytest.raises(DareError) as caught:
        extract(base, moved(base_state()), out)
    assert out.strip("./").split("\0")[0][:20] in caught.value.name
    assert sorted(path.name for path in (tmp_path / "work").rglob("*")) == ["deep", "file"]


def test_a_file_in_the_place_of_the_output_is_not_lost(base: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "out").write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match="out"):
            extract(base, moved(base_state()), place / "out", overwrite=overwrite)
    assert [path.name for path in place.iterdir()] == ["out"]
    assert (place / "out").read_text() == "kept"


@pytest.mark.parametrize("target", ["old", "missing"])
def test_a_link_in_the_place_of_the_output_is_replaced_or_refused(
    base: Path, tmp_path: Path, target: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    extract(base, moved(base_state(), 1), place / "old")
    (place / "out").symlink_to(target)
    with contextlib.suppress(DareError):
        extract(base, moved(base_state()), place / "out", overwrite=True).verify(base)
    DeltaPackage.open(place / "old").verify(base)
    assert sorted(path.name for path in place.iterdir()) == ["old", "out"]


@pytest.mark.parametrize("which", ["base", "tuned", "package"])
def test_what_is_read_is_not_overwritten(
    base: Path, package: DeltaPackage, tmp_path: Path, which: str
) -> None:
    """`out` is also an input: replacing it would lose weights that cannot be made again."""
    tuned = save(moved(base_state()), tmp_path / "tuned")
    place = {"base": base, "tuned": tuned, "package": package.path}[which]
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(ConfigError, match="out"):
        apply(base, package, place, overwrite=True) if which == "package" else extract(
            base, tuned, place, overwrite=True
        )
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
