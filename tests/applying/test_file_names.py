"""A result has its base's file names: the library that loads the one looks for the same in the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import apply_refused, base_state, moved, refusal, save

from dare_train import apply, extract, merge, verify
from dare_train.errors import CheckpointError
from dare_train.weights.files.checkpoint import Checkpoint

UNET = "diffusion_pytorch_model"


def single(folder: Path, name: str) -> Path:
    save(base_state(), folder)
    (folder / "model.safetensors").rename(folder / name)
    return folder


def sharded(folder: Path, stem: str, index: str) -> Path:
    """Each tensor in a file of its own."""
    folder.mkdir()
    state = base_state()
    weight_map = {name: f"{stem}-0000{n}-of-00003.safetensors" for n, name in enumerate(state, 1)}
    for name, file in weight_map.items():
        save_file({name: state[name]}, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(other[name], state[name]) for name in state)


def round_trip(base: Path, place: Path) -> Path:
    """Extract, verify and apply; the result's folder, whose tensors are the tuned ones."""
    package = extract(base, moved(base_state()), place / "package", p=0)
    verify(package, base)
    assert apply(base, package, place / "result") == package.manifest.result
    assert same(tensors_in(place / "result"), moved(base_state()))
    return place / "result"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        f"{UNET}.safetensors",
        f"{UNET}.fp16.safetensors",
        "model.fp16.safetensors",
        "open_clip_model.safetensors",
    ],
)
def test_the_only_file_keeps_its_name(tmp_path: Path, name: str) -> None:
    base = single(tmp_path / "base", name)
    assert names_in(round_trip(base, tmp_path)) == {name}
    merge(base, [moved(base_state())], tmp_path / "merged", weights=[1.0])
    assert names_in(tmp_path / "merged") & {"model.safetensors", name} == {name}


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("model", "model.safetensors.index.json"),
        (UNET, f"{UNET}.safetensors.index.json"),
        (f"{UNET}.fp16", f"{UNET}.safetensors.index.fp16.json"),
    ],
)
def test_several_files_and_their_index_keep_their_names(tmp_path: Path, stem: str, index: str) -> None:
    base = sharded(tmp_path / "base", stem, index)
    result = round_trip(base, tmp_path)
    assert names_in(result) == names_in(base)
    weight_maps = [json.loads((folder / index).read_text())["weight_map"] for folder in (base, result)]
    assert weight_maps[0] == weight_maps[1]
    assert same(tensors_in(result), {n: load_file(result / f)[n] for n, f in weight_maps[1].items()})
    merge(base, [moved(base_state())], tmp_path / "merged", weights=[1.0])
    assert names_in(tmp_path / "merged") >= names_in(base)


def test_one_file_with_an_index_has_one_again(tmp_path: Path) -> None:
    base = single(tmp_path / "base", "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(base_state(), "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert names_in(round_trip(base, tmp_path)) == names_in(base)


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("tuned_by_me.safetensors", "model.safetensors"),
        (f"{UNET}.safetensors", f"{UNET}.safetensors"),
        (f"{UNET}.fp16.safetensors", f"{UNET}.fp16.safetensors"),
    ],
)
def test_a_base_given_as_a_file_gives_a_folder_that_loads(tmp_path: Path, name: str, result: str) -> None:
    base = single(tmp_path / "base", name)
    assert names_in(round_trip(base / name, tmp_path)) == {result}


def test_what_is_loaded_when_nobody_asks_for_a_variant_is_the_base(tmp_path: Path) -> None:
    base = single(tmp_path / "single", f"{UNET}.safetensors")
    save_file(moved(base_state()), base / f"{UNET}.fp16.safetensors")
    (base / f"{UNET}.safetensors.index.fp16.json").write_text("{}")
    assert same(tensors_in(round_trip(base, tmp_path / "one")), moved(base_state()))
    assert names_in(tmp_path / "one" / "result") == {f"{UNET}.safetensors"}
    several = sharded(tmp_path / "sharded", UNET, f"{UNET}.safetensors.index.json")
    (several / f"{UNET}.safetensors.index.fp16.json").write_text("{}")
    assert Checkpoint.open(several).index == f"{UNET}.safetensors.index.json"


def test_several_indexes_are_refused_by_name(tmp_path: Path) -> None:
    base = single(tmp_path / "base", "model.safetensors")
    package = extract(base, moved(base_state()), tmp_path / "package")
    folder = sharded(tmp_path / "two", UNET, f"{UNET}.safetensors.index.json")
    (folder / "other.safetensors.index.json").write_text("{}")
    names = f"found {UNET}.safetensors.index.json, other.safetensors.index.json"
    apply_refused(folder, package, CheckpointError, str(folder), "expected one index", names)
    (folder / f"{UNET}.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    refusal(caught.value, CheckpointError, "other.safetensors.index.json", "weight_map")
