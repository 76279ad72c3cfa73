"""Packages to the Hub and back: pushed in one commit, pulled as they were, every byte of them checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError, PackageError
from ..hub.download import on_hub
from ..hub.ids import HubId
from ..hub.upload import CARD, upload
from ..parallel.staged_folder import staged_folder
from . import model_card
from .fetching import fetch_files, files_of, packages_in
from .reader import DeltaPackage


def push(
    packages: Sequence[str | os.PathLike[str] | DeltaPackage],
    repo: str,
    *,
    folder: str = "",
    revision: str | None = None,
    private: bool | None = None,
    tag: str | None = None,
    token: str | None = None,
    message: str = "",
) -> str:
    """Add packages to a model repository on the Hub, which is made if it is not there; one commit.

    Args:
        packages: one becomes the repository itself; several, such as a chain's, a folder each, of its name.
        repo: as `user/name`.
        folder: of the repository, for one package; or where the folders of several go.
        revision: the branch, which is made if it is not there; `main` by default.
        private: whether a repository that is made is private; the account's default otherwise.
        tag: a name for the commit.
        token: by default the one that this machine is logged in with.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        PackageError: a package is damaged.
        ConfigError: two packages have one name, or `repo` or `folder` is none.
        HubError: the Hub refused, or cannot be reached.
    """
    opened = [DeltaPackage.open(package) for package in packages]
    places = _places(opened, folder)
    for package in opened:
        package.check_integrity()
    files = {
        f"{place}/{name}".removeprefix("/"): package.path / name
        for place, package in zip(places, opened, strict=True)
        for name in [*files_of(package.manifest), CARD]
        if (package.path / name).is_file()
    }
    return upload(
        repo,
        files,
        message=message or f"Add {', '.join(filter(None, places)) or 'a delta package'}",
        card="" if places == [""] else model_card.of_folders(repo, opened[-1].manifest),
        revision=revision,
        private=private,
        tag=tag,
        token=token,
    )


def pull(
    where: str, out: str | os.PathLike[str], *, revision: str | None = None, overwrite: bool = False
) -> list[Path]:
    """Fetch a package from the Hub, or all of a repository's, as they were pushed.

    Args:
        where: `user/repo`, `user/repo@revision`, or one folder of it, `hf://user/repo/folder`.
        out: the folder to create: the package, or, of a repository with a folder for each, their folders.
        revision: a branch, tag or commit.
        overwrite: replace a folder that is already there.

    Returns:
        The packages' folders.

    Raises:
        PackageError: there is none, or one is damaged.
        OutputExists: `out` is taken.
    """
    place = on_hub(where)
    if place is None:
        found = "a folder here" if Path(where).exists() else repr(where)
        raise ConfigError("pull", expected="a place on the Hub", found=found)
    if revision is not None:
        if place.revision not in (None, revision):
            raise ConfigError("revision", expected=str(place.revision), found=revision)
        place = replace(place, revision=revision)
    packages = _inside(place)
    out = Path(out)
    with staged_folder(out, overwrite=overwrite) as staging:
        for name, package in packages.items():
            _copy(package, staging / name)
    return [out / name for name in packages]


def _places(packages: Sequence[DeltaPackage], folder: str) -> list[str]:
    """Where in the repository each of them goes."""
    folder = folder.strip("/")
    if any(part in ("", ".", "..") for part in folder.split("/")) and folder:
        raise ConfigError("folder", expected="a folder of the repository", found=repr(folder))
    if len(packages) == 1:
        return [folder]
    names = [package.path.resolve().name for package in packages]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not names:
        found = "none" if twice is None else f"two called {twice}"
        raise ConfigError("packages", expected="some, each of another name", found=found)
    return [f"{folder}/{name}".removeprefix("/") for name in names]


def _inside(place: HubId) -> dict[str, DeltaPackage]:
    """The package at the place itself, or all below it; each by its path below the place."""
    root, folders = packages_in(place)
    meant = [place.folder] if place.folder in folders else folders
    if not meant:
        raise PackageError(str(place), expected="packages", found="none in it")
    return {
        folder.removeprefix(place.folder).strip("/"): DeltaPackage.open(fetch_files(place, root, folder))
        for folder in meant
    }


def _copy(package: DeltaPackage, target: Path) -> None:
    """Files, where the cache has links."""
    for name in [*files_of(package.manifest), CARD]:
        if (package.path / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package.path / name, target / name)
    DeltaPackage.open(target).check_integrity()
