"""Which files of a folder are the model: those that `from_pretrained` loads, or none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import State, base_state, extract_refused, moved, save

from dare_train import apply, extract, merge
from dare_train.errors import CheckpointError
from dare_train.weights.files.checkpoint import Checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shards(state: State, folder: Path) -> None:
    """A model in two files, and their index."""
    names = sorted(state)
    places = {name: SHARDS[number > 0] for number, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: state[name] for name in names if places[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def test_one_file_counts_before_an_index_that_was_left_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = base_state(), moved(base_state())
    folders = {"base": save(base, tmp_path / "base"), "tuned": save(tuned, tmp_path / "tuned")}
    for folder in folders.values():
        shards(moved(base, 9.0), folder)
    with caplog.at_level(logging.WARNING, "dare_train"):
        package = extract(folders["base"], folders["tuned"], tmp_path / "package", p=0)
    assert f"read from {SINGLE}, as from_pretrained does, without {INDEX}" in caplog.text
    apply(folders["base"], package, tmp_path / "applied")
    merge(folders["base"], [folders["tuned"]], tmp_path / "merged")
    for out in ("applied", "merged"):
        found = load_file(tmp_path / out / SINGLE)
        assert all(torch.equal(found[name], tensor) for name, tensor in tuned.items())
        assert not (tmp_path / out / INDEX).exists()


@pytest.mark.parametrize("left", SHARDS)
def test_a_shard_without_its_index_is_no_model(left: str, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    folder.mkdir()
    shards(moved(base_state()), folder)
    for name in {*SHARDS, INDEX} - {left}:
        (folder / name).unlink()
    texts = (str(folder), f"expected {INDEX}, and 2 files that it lists", f"found {left}")
    extract_refused(base_state(), folder, tmp_path / "p", CheckpointError, *texts)
    extract_refused(folder, base_state(), tmp_path / "p", CheckpointError, *texts)
    assert Checkpoint.open(folder / left).tensors, "a file that is given is read"


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_another_file_beside_pickled_weights_is_not_taken_for_them(pickled: str, tmp_path: Path) -> None:
    folder = save(moved(base_state()), tmp_path / "tuned")
    (folder / SINGLE).rename(folder / "ema.safetensors")
    (folder / pickled).write_bytes(b"")
    texts = (f"found {pickled}, which from_pretrained loads, and ema.safetensors", "tuned/ema.safetensors")
    extract_refused(base_state(), folder, tmp_path / "p", CheckpointError, *texts)
    package = extract(base_state(), folder / "ema.safetensors", tmp_path / "package", p=0)
    assert package.stats["changed"], "the remedy works"
    (folder / "ema.safetensors").rename(folder / SINGLE)
    assert extract(base_state(), folder, tmp_path / "other", p=0).manifest.result == package.manifest.result
