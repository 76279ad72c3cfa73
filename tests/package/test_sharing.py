"""Packages on the Hub: pushed and pulled to the same bytes, by the command, against a Hub of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import save_weights
from hub_server import LFS_FROM, HubServer

from dare_train import DeltaPackage, extract
from dare_train.errors import ConfigError
from dare_train.hub.ids import HubId

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def command(hub: HubServer, tmp_path: Path) -> Command:
    """`dare-train WORDS`, in an empty folder, with this Hub."""

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        told = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "cache"), **environment}
        line = [sys.executable, "-m", "dare_train", *map(str, words)]
        return subprocess.run(line, env=told, cwd=tmp_path, text=True, capture_output=True, check=False)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def weights(folder: Path, *, seed: int, elements: int = 64) -> Path:
    folder.mkdir(exist_ok=True)
    values = np.random.default_rng(seed).standard_normal(elements).astype(np.float32)
    save_weights({"a.weight": values}, folder / "model.safetensors")
    return folder


def made(out: Path, *, base: str = "base", seed: int = 1, elements: int = 64) -> Path:
    """A package on the weights of seed 0."""
    base_folder = weights(out.parent / ".base", seed=0, elements=elements)
    tuned = weights(out.parent / ".tuned", seed=seed, elements=elements)
    extract(base_folder, tuned, out, p=0.5, base_model=base)
    return out


def test_a_package_comes_back_to_the_byte(hub: HubServer, command: Command, tmp_path: Path) -> None:
    package = made(tmp_path / "package", elements=4 * LFS_FROM)
    pushed = command("push", package, "me/delta")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip().startswith(f"me/delta: {hub.address}/me/delta/commit/")
    assert hub.files("me/delta") == contents(package)
    assert any(request.startswith("PUT /lfs/") for request in hub.requests), "the part went by LFS"
    pulled = command("pull", "me/delta", "--out", "back")
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout == "back: intact\n"
    assert contents(tmp_path / "back") == contents(package)
    assert not [path for path in (tmp_path / "back").rglob("*") if path.is_symlink()]


def test_packages_of_a_chain_share_a_repository(hub: HubServer, command: Command, tmp_path: Path) -> None:
    packages = [made(tmp_path / f"step-{n}", base="user/base", seed=n) for n in (2, 4)]
    assert command("push", *packages, "me/chain").returncode == 0
    files = hub.files("me/chain")
    assert {name.split("/")[0] for name in files} == {"README.md", "step-2", "step-4"}
    card = files["README.md"].decode()
    assert "base_model: user/base\nbase_model_relation: adapter\n" in card
    assert "dare-train apply user/base hf://me/chain/FOLDER --out model" in card
    assert hub.repositories["me/chain"].messages == ["initial commit", "Add step-2, step-4"]
    assert command("pull", "me/chain", "--out", "back").stdout == "back/step-2: intact\nback/step-4: intact\n"
    for package in packages:
        assert contents(tmp_path / "back" / package.name) == contents(package)
    one = command("pull", "hf://me/chain/step-2", "--out", "one")
    assert one.returncode == 0, one.stderr
    assert contents(tmp_path / "one") == contents(packages[0])


def test_a_folder_of_a_repository_is_a_package_to_every_command(
    hub: HubServer, command: Command, tmp_path: Path
) -> None:
    weights(tmp_path / "base", seed=0)
    for name in ("step-2", "final"):
        made(tmp_path / name)
    assert command("push", tmp_path / "step-2", tmp_path / "final", "me/run").returncode == 0
    for where in ("hf://me/run/step-2", "me/run", "me/run@main", "hf://me/run@main/final"):
        applied = command("apply", "base", where, "--out", "model", "--overwrite")
        assert applied.returncode == 0, applied.stderr
        assert "as on record" in applied.stdout
    (tmp_path / "cache").rename(tmp_path / "cached")
    hub.requests.clear()
    assert command("inspect", "hf://me/run/step-2").returncode == 0
    fetched = [request.rpartition("/resolve/")[2] for request in hub.requests if "/resolve/" in request]
    assert not [name for name in fetched if "final" in name and not name.endswith("dare_config.json")]


def test_without_a_final_package_one_has_to_be_named(command: Command, tmp_path: Path) -> None:
    packages = [made(tmp_path / name) for name in ("one", "two")]
    assert command("push", *packages, "me/two").returncode == 0
    told = command("inspect", "me/two").stderr
    assert told == ("dare-train: me/two: expected a package, found one, two; say which: hf://me/two/one\n"), (
        told
    )


def test_branches_tags_and_privacy(hub: HubServer, command: Command, tmp_path: Path) -> None:
    first, second = made(tmp_path / "one"), made(tmp_path / "two", seed=2)
    options = ["--private", "--revision", "trial", "--tag", "v1", "--message", "The first"]
    assert command("push", first, "me/delta", *options).returncode == 0
    assert hub.repositories["me/delta"].private is True
    assert hub.repositories["me/delta"].messages[-1] == "The first"
    assert hub.files("me/delta") == {}
    assert command("push", second, "me/delta", "--revision", "trial").returncode == 0
    for words, package in (
        (["me/delta@v1"], first),
        (["me/delta", "--revision", "v1"], first),
        (["me/delta@trial"], second),
    ):
        assert command("pull", *words, "--out", "back", "--overwrite").returncode == 0
        assert contents(tmp_path / "back") == contents(package)
    taken = command("push", second, "me/delta", "--tag", "v1")
    assert taken.returncode == 1
    assert "409" in taken.stderr


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "hf auth login"), (403, "hf auth login"), (500, "check the name and the network")],
)
def test_a_hub_that_refuses(
    hub: HubServer, command: Command, tmp_path: Path, status: int, remedy: str
) -> None:
    package = made(tmp_path / "package")
    hub.refuses = lambda method, path: status if "/preupload/" in path or "create" in path else None
    done = command("push", package, "me/delta", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("dare-train: me/delta: expected a repository that takes the upload, found")
    assert str(status) in line
    assert remedy in line


def test_a_hub_that_is_not_there(command: Command, tmp_path: Path) -> None:
    package = made(tmp_path / "package")
    for words in (["push", package, "me/delta"], ["pull", "me/delta", "--out", "back"]):
        done = command(*words, HF_ENDPOINT="http://127.0.0.1:9")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "check the name and the network" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "back").exists()


def test_what_was_damaged_on_its_way_is_not_kept(hub: HubServer, command: Command, tmp_path: Path) -> None:
    assert command("push", made(tmp_path / "package"), "me/delta").returncode == 0
    files = hub.files("me/delta")
    part = files["dare_delta.safetensors"]
    files["dare_delta.safetensors"] = part[:-1] + bytes([part[-1] ^ 1])
    done = command("pull", "me/delta", "--out", "back")
    assert done.returncode == 1
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "back").exists()


def test_a_damaged_package_is_not_pushed(hub: HubServer, command: Command, tmp_path: Path) -> None:
    package = made(tmp_path / "package")
    part = package / "dare_delta.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    assert command("push", package, "me/delta").returncode == 1
    assert hub.requests == []


def test_a_card_of_somebodys_own_stays(hub: HubServer, command: Command, tmp_path: Path) -> None:
    package = made(tmp_path / "package")
    assert command("push", package, "me/delta", "--folder", "one").returncode == 0
    hub.files("me/delta")["README.md"] = b"mine"
    assert command("push", package, "me/delta", "--folder", "two").returncode == 0
    assert hub.files("me/delta")["README.md"] == b"mine"


@pytest.mark.parametrize(
    "words",
    [
        ["push", "me/delta"],
        ["push", "package", "package", "me/delta"],
        ["push", "package", "me/../delta"],
        ["push", "package", "me/delta", "--folder", "../up"],
        ["pull", "./me/delta", "--out", "back"],
        ["pull", "package", "--out", "back"],
        ["pull", "me/delta@a", "--revision", "b", "--out", "back"],
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(
    hub: HubServer, command: Command, tmp_path: Path, words: list[str]
) -> None:
    made(tmp_path / "package")
    done = command(*words)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert hub.requests == []


def test_places_on_the_hub() -> None:
    assert HubId.parse("user/repo") == HubId(repo="user/repo")
    assert HubId.parse("gpt2") == HubId(repo="gpt2")
    assert HubId.parse("user/repo@v1") == HubId(repo="user/repo", revision="v1")
    pull_request = HubId.parse("user/repo@refs/pr/1")
    assert pull_request == HubId(repo="user/repo", revision="refs/pr/1")
    place = HubId.parse("hf://user/repo@v1/runs/step-2")
    assert place == HubId(repo="user/repo", revision="v1", folder="runs/step-2")
    assert str(place) == "hf://user/repo@v1/runs/step-2"
    for other in ("user/repo/folder", "./user/repo", "/user/repo", "hf://user/repo/../x", "", "user/repo@"):
        assert HubId.parse(other) is None, other


def test_what_follows_an_at_is_a_revision_of_the_hubs(tmp_path: Path, command: Command) -> None:
    made(tmp_path / "package")
    assert "found a revision of a folder here; give package itself" in command("inspect", "package@v1").stderr
    told = command("inspect", "me/none@v1").stderr
    assert "found no folder here, and no revision 'v1' of me/none in the cache or on the Hub" in told
    told = command("inspect", "me/none@\udcff").stderr
    assert "no revision '\\udcff' of me/none in the cache" in told


def test_push_from_python(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = DeltaPackage.open(made(tmp_path / "package"))
    with pytest.raises(ConfigError, match="expected the id of one on the Hub"):
        package.push_to_hub("no repository")
