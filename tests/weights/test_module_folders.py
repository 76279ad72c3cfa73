"""Models whose later modules lie in sub-folders: their weights are weights like any others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import adapt
from safetensors.torch import load_file, save_file
from tiny import State, apply_refused, base_state, extract_refused, moved, random_tensor, save

from dare_train import apply, extract, merge
from dare_train.errors import BaseMismatch, CheckpointError, StorageError, TensorMismatch
from dare_train.package.companion_files import companions
from dare_train.weights.files.checkpoint import Checkpoint
from dare_train.weights.files.module_folders import module_folders

PLAIN = [{"path": "", "name": "0"}, {"path": "1_Pooling", "name": "1"}]
DENSE = [*PLAIN, {"path": "2_Dense", "name": "2"}]
FILE = "2_Dense/model.safetensors"


def dense_state() -> State:
    return {"linear.weight": random_tensor(4, 5, seed=5), "linear.bias": random_tensor(4, seed=6)}


def model(folder: Path, state: State, dense: State | None = None, modules: Any = None) -> Path:
    save(state, folder)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps(modules or (PLAIN if dense is None else DENSE)))
    if dense is not None:
        (folder / FILE).parent.mkdir()
        (folder / "2_Dense/config.json").write_text("{}")
        save_file(dense, folder / FILE)
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def same(path: Path, state: State) -> bool:
    held = load_file(path)
    return held.keys() == state.keys() and all(torch.equal(held[name], state[name]) for name in state)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model(tmp_path / "base", base_state(), dense_state())


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return model(tmp_path / "tuned", moved(base_state()), moved(dense_state()))


def test_tensors_go_by_the_names_of_the_whole_model(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    assert set(checkpoint.tensors) == {*base_state(), "2.linear.weight", "2.linear.bias"}
    assert checkpoint.beside == {"2.linear.weight", "2.linear.bias"}
    words = checkpoint.read("2.linear.bias", 1, 2)
    assert words.tolist() == dense_state()["linear.bias"][1:3].view(torch.uint16).tolist()
    alone = Checkpoint.open(base / "model.safetensors")
    assert set(alone.tensors) == set(base_state())


def test_a_trained_module_comes_back_into_its_folder(base: Path, tuned: Path, tmp_path: Path) -> None:
    package = extract(base, tuned, tmp_path / "package", p=0)
    assert package.records["2.linear.weight"].kind == "delta"
    apply(base, package, tmp_path / "result")
    assert files_in(tmp_path / "result") == files_in(base)
    assert same(tmp_path / "result/model.safetensors", moved(base_state()))
    assert same(tmp_path / "result" / FILE, moved(dense_state()))


def test_a_module_counts_for_the_base(base: Path, tuned: Path, tmp_path: Path) -> None:
    package = extract(base, tuned, tmp_path / "package")
    other = model(tmp_path / "other", base_state(), moved(dense_state()))
    apply_refused(other, package, BaseMismatch, "2.linear.bias", "not the base")


def test_the_index_lists_the_first_module_alone(base: Path, tuned: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": dict.fromkeys(base_state(), "model-00001-of-00001.safetensors")})
    )
    apply(base, extract(base, tuned, tmp_path / "package", p=0), tmp_path / "result")
    weight_map = json.loads((tmp_path / "result" / index.name).read_text())["weight_map"]
    assert weight_map == json.loads(index.read_text())["weight_map"]
    assert same(tmp_path / "result" / FILE, moved(dense_state()))


def test_a_module_that_the_base_has_not_gets_its_folder(tuned: Path, tmp_path: Path) -> None:
    plain = model(tmp_path / "plain", base_state())
    package = extract(plain, tuned, tmp_path / "package", p=0)
    assert package.records["2.linear.weight"].kind == "whole"
    apply(plain, package, tmp_path / "result")
    assert files_in(tmp_path / "result") == files_in(tuned)
    assert same(tmp_path / "result" / FILE, moved(dense_state()))


def test_a_module_that_the_tuned_model_has_not_stays_away(base: Path, tmp_path: Path) -> None:
    plain = model(tmp_path / "plain", moved(base_state()))
    package = extract(base, plain, tmp_path / "package", p=0)
    apply(base, package, tmp_path / "result")
    assert FILE not in files_in(tmp_path / "result")


@pytest.mark.parametrize("knowing", [True, False])
def test_a_package_of_the_first_module_alone_leaves_the_others_as_they_are(
    base: Path, tmp_path: Path, knowing: bool
) -> None:
    """Made beside the whole base, or from the part of it that the Hub's cache had."""
    source = base if knowing else save(base_state(), tmp_path / "part")
    package = extract(source, moved(base_state()), tmp_path / "package", p=0)
    package.verify(base)
    apply(base, package, tmp_path / "result")
    assert files_in(tmp_path / "result") == files_in(base)
    assert same(tmp_path / "result/model.safetensors", moved(base_state()))
    assert (tmp_path / "result" / FILE).read_bytes() == (base / FILE).read_bytes()


def test_a_base_without_a_module_is_refused(base: Path, tuned: Path, tmp_path: Path) -> None:
    package = extract(base, tuned, tmp_path / "package")
    (base / FILE).unlink()
    apply_refused(base, package, TensorMismatch, "2.linear.bias", "found missing")


def test_a_merge_writes_modules_too(base: Path, tuned: Path, tmp_path: Path) -> None:
    merge(base, [tuned], tmp_path / "merged", weights=[1.0])
    assert same(tmp_path / "merged" / FILE, moved(dense_state()))
    plain = model(tmp_path / "plain", base_state())
    packages = [extract(plain, tuned, tmp_path / "package", p=0)]
    for number, models in enumerate(([tuned], packages)):
        merge(plain, models, tmp_path / f"{number}", weights=[1.0])
        assert files_in(tmp_path / f"{number}") >= files_in(tuned)
        assert same(tmp_path / f"{number}" / FILE, moved(dense_state()))
        assert same(tmp_path / f"{number}/model.safetensors", moved(base_state()))


def test_an_adapter_brings_the_modules_that_were_trained_beside_it(base: Path, tmp_path: Path) -> None:
    encoder = torch.nn.Module()
    encoder.a = torch.nn.Linear(30, 20, bias=False)
    adapt(encoder, tmp_path / "adapter", target_modules=["a"])
    (tmp_path / "adapter/modules.json").write_text(json.dumps(DENSE))
    (tmp_path / "adapter/2_Dense").mkdir()
    save_file(moved(dense_state()), tmp_path / "adapter" / FILE)
    apply(base, extract(base, tmp_path / "adapter", tmp_path / "package", p=0), tmp_path / "result")
    assert same(tmp_path / "result" / FILE, moved(dense_state()))
    assert not same(tmp_path / "result/model.safetensors", base_state())


def test_weights_of_another_kind_are_refused_by_their_folder(base: Path, tuned: Path, tmp_path: Path) -> None:
    package = extract(base, tuned, tmp_path / "package")
    torch.save(dense_state(), base / "2_Dense/pytorch_model.bin")
    extract(base, tuned, tmp_path / "both")
    (base / FILE).unlink()
    remedy = "SentenceTransformer(folder).save_pretrained(new_folder) writes safetensors"
    texts = (f"{base / '2_Dense'}: expected model.safetensors", "found pytorch_model.bin", remedy)
    apply_refused(base, package, CheckpointError, *texts)
    extract_refused(base, tuned, tmp_path / "p", CheckpointError, *texts)
    extract_refused(tuned, base, tmp_path / "q", CheckpointError, *texts)
    (base / "2_Dense/inner").mkdir()
    (base / "2_Dense/pytorch_model.bin").rename(base / "2_Dense/inner/model.safetensors")
    with pytest.raises(CheckpointError, match=r"found inner/model\.safetensors"):
        Checkpoint.open(base)


def test_a_module_whose_names_are_taken_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "base", {"2.linear.bias": random_tensor(3)}, dense_state())
    with pytest.raises(CheckpointError, match=r"2\.linear\.bias: expected one file that holds it"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "path", ["..", "../x", "/etc", ".", "", "a/b", "a\0b", "n" * 300, "\ud800", 5, None, [1]]
)
def test_a_list_that_leads_elsewhere_leads_nowhere(tmp_path: Path, path: Any) -> None:
    (tmp_path / "secret.json").write_text("{}")
    folder = model(tmp_path / "base", base_state(), modules=[*PLAIN, {"path": path, "name": "2"}])
    assert module_folders(folder).get("1_Pooling", "1") == "1"
    assert path not in (module_folders(folder) if isinstance(path, str) else ())
    assert all(".." not in relative.parts for relative in companions(folder))
    assert set(Checkpoint.open(folder).tensors) == set(base_state())


@pytest.mark.parametrize(
    "text", ["", "{}", "5", "[5]", '["x"]', '{"a": 1}', "[" * 100_000, '[{"name": "1"}]']
)
def test_a_list_that_is_none_names_no_modules(tmp_path: Path, text: str) -> None:
    folder = save(base_state(), tmp_path / "base")
    (folder / "modules.json").write_text(text)
    assert module_folders(folder) == {}
    assert set(Checkpoint.open(folder).tensors) == set(base_state())


@pytest.mark.parametrize("place", ["model.safetensors", "config.json"])
def test_a_package_whose_modules_take_the_place_of_files_leaves_nothing(tmp_path: Path, place: str) -> None:
    base = model(tmp_path / "base", base_state())
    modules = [*PLAIN, {"path": place, "name": "2"}]
    state = {**base_state(), "2.linear.bias": random_tensor(4)}
    package = extract(base, model(tmp_path / "tuned", state, modules=modules), tmp_path / "package")
    assert [record.file for record in package.manifest.files] == ["modules.json"]
    apply_refused(base, package, StorageError, str(tmp_path / "results/out"), "nothing was left behind")
