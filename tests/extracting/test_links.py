"""Links in a model's folder: what they lead to outside does not travel along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import save_weights

from dare_train import apply, extract, merge
from dare_train.errors import PackageError
from dare_train.package.reader import DeltaPackage
from dare_train.reading.links import leads_out

SECRET = '{"auths": "my token"}'


def model(folder: Path, by: float) -> Path:
    folder.mkdir(parents=True)
    save_weights({"w": np.full(5, by, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"by": {by}}}')
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model(tmp_path / "base", 0)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return model(tmp_path / "tuned", 1)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    path = tmp_path / "private" / "config.json"
    path.write_text(SECRET)
    return path


def holds(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_extract_leaves_out_and_names_what_a_link_leads_to(
    base: Path, tuned: Path, secret: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tuned / name).unlink(missing_ok=True)
    (tuned / name).symlink_to(secret)
    package = extract(base, tuned, tmp_path / "package", p=0)
    assert not holds(package.path, "my token")
    assert f"{tuned / name}: left out, since it is a link to {secret}" in caplog.text


def test_apply_and_merge_do_not_copy_it_either(base: Path, tuned: Path, secret: Path, tmp_path: Path) -> None:
    package = extract(base, tuned, tmp_path / "package", p=0)
    for folder in (base, tuned):
        (folder / "LICENSE").symlink_to(secret)
        (folder / "vocab.txt").symlink_to(secret)
    apply(base, package, tmp_path / "applied")
    merge(base, [tuned], tmp_path / "merged")
    assert not holds(tmp_path / "applied", "my token")
    assert not holds(tmp_path / "merged", "my token")
    assert (tmp_path / "applied" / "config.json").is_file()


def test_a_module_folder_that_is_a_link(base: Path, tuned: Path, secret: Path, tmp_path: Path) -> None:
    (tuned / "modules.json").write_text('[{"path": ""}, {"path": "1_Dense"}]')
    (tuned / "1_Dense").symlink_to(secret.parent)
    assert not holds(extract(base, tuned, tmp_path / "package", p=0).path, "my token")


def test_links_to_files_of_models_are_followed(base: Path, tuned: Path, tmp_path: Path) -> None:
    store = model(tmp_path / "store", 2)
    (tuned / "config.json").unlink()
    (tuned / "config.json").symlink_to(store / "config.json")
    (tuned / "notes.txt").symlink_to("config.json")
    assert holds(extract(base, tuned, tmp_path / "package", p=0).path, '"by": 2')


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    cached = tmp_path / "models--a--b"
    (cached / "blobs").mkdir(parents=True)
    (cached / "blobs" / "0123").write_text("{}")
    (cached / "snapshots" / "rev").mkdir(parents=True)
    (cached / "snapshots" / "rev" / "config.json").symlink_to("../../blobs/0123")
    assert not leads_out(cached / "snapshots" / "rev" / "config.json", cached / "snapshots" / "rev")


def test_a_push_takes_the_packages_own_files_alone(
    base: Path, tuned: Path, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = DeltaPackage.open(extract(base, tuned, tmp_path / "package", p=0).path)
    (package.path / "token.json").symlink_to(secret)
    given: dict[str, Path] = {}
    monkeypatch.setattr("dare_train.package.sharing.upload", lambda _, files, **__: given.update(files))
    package.push_to_hub("me/it")
    assert set(given) == {"dare_config.json", "README.md", "dare_delta.safetensors", "config.json"}
    with pytest.raises(PackageError):
        DeltaPackage.open(tmp_path / "nothing")
