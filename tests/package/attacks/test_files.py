"""A package must not reach outside its folder, nor put into the result what the checks never saw."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forge import PART, Forgery, refused, truth

from dare_train import apply

_OUTSIDE = [
    "../x",
    "/etc/hostname",
    "a/../../x",
    "..\\x",
    "C:\\x",
    "a\0b",
    "..",
    "",
    "./x",
    "a//b",
    "a/",
    "/",
]


@pytest.mark.parametrize("field", ["parts", "files"])
@pytest.mark.parametrize("name", _OUTSIDE)
def test_a_file_name_that_reaches_outside_is_refused(
    forgery: Forgery, base: Path, field: str, name: str
) -> None:
    (forgery.folder.parent / "x").write_bytes(b"secret")
    forgery.manifest[field].append(truth(forgery.folder.parent / "x", name))
    forgery.write_manifest()
    refused(
        forgery.folder, base, "names of files inside the package", repr(name), "do not trust this package"
    )


@pytest.mark.parametrize(
    "name", ["n" * 300, "deep/" * 2000 + "x", "\ud800"], ids=["long", "deep", "surrogate"]
)
def test_a_file_name_that_the_system_does_not_take_is_refused(
    forgery: Forgery, base: Path, name: str
) -> None:
    forgery.manifest["files"].append(truth(forgery.folder / "config.json", name))
    forgery.write_manifest()
    refused(forgery.folder, base)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "pytorch_model.bin",
        "modeling_evil.py",
        ".git/config",
        "dare_config.json",
    ],
)
def test_a_package_brings_no_weights_and_no_code_beside_its_parts(
    forgery: Forgery, base: Path, name: str
) -> None:
    """Files are copied into the result after it was checked: one named as the weights would take their
    place.
    """
    (forgery.folder / name).parent.mkdir(exist_ok=True)
    if name != "dare_config.json":
        (forgery.folder / name).write_bytes(b"{}")
    forgery.manifest["files"].append(truth(forgery.folder / name, name))
    forgery.write_manifest()
    refused(forgery.folder, base, name)


@pytest.mark.parametrize("field", ["parts", "files"])
def test_a_file_listed_twice_is_refused(forgery: Forgery, base: Path, field: str) -> None:
    forgery.manifest[field] *= 2
    forgery.write_manifest()
    refused(forgery.folder, base)


def test_a_file_whose_folder_is_a_file_of_the_base_is_refused(forgery: Forgery, base: Path) -> None:
    (forgery.folder / "config.json").unlink()
    (forgery.folder / "config.json").mkdir()
    (forgery.folder / "config.json" / "x.json").write_text("{}")
    forgery.manifest["files"] = [truth(forgery.folder / "config.json" / "x.json", "config.json/x.json")]
    forgery.write_manifest()
    refused(forgery.folder, base, "config.json/x.json")


def _link(forgery: Forgery, target: Path) -> None:
    (forgery.folder / PART).unlink()
    (forgery.folder / PART).symlink_to(target)


def test_links_as_in_the_hubs_cache_are_followed(forgery: Forgery, base: Path, tmp_path: Path) -> None:
    blob = (forgery.folder / PART).rename(tmp_path / "blob")
    (forgery.folder / PART).symlink_to(Path("..") / "blob")
    assert apply(base, forgery.folder, tmp_path / "out") == forgery.manifest["result"]
    assert blob.exists()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_link_to_other_bytes_is_refused(forgery: Forgery, base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * (forgery.folder / PART).stat().st_size)
    _link(forgery, tmp_path / "secret")
    refused(forgery.folder, base, PART, "SHA-256")


@pytest.mark.parametrize("target", ["nowhere", PART, "/dev/zero", ".."])
def test_a_link_to_nothing_to_itself_to_a_device_or_a_folder_is_refused(
    forgery: Forgery, base: Path, target: str
) -> None:
    _link(forgery, Path(target))
    refused(forgery.folder, base, PART, "found no such file")


def test_a_pipe_in_the_place_of_a_part_is_not_waited_for(forgery: Forgery, base: Path) -> None:
    (forgery.folder / PART).unlink()
    os.mkfifo(forgery.folder / PART)
    refused(forgery.folder, base, PART)
