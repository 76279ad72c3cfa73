"""Packages on the Hub: which folder of a repository is meant, and fetching its files and no others."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError, PackageError
from ..hub.download import fetch, locate, on_hub
from ..hub.ids import HubId
from .manifest import MANIFEST, Manifest
from .manifest_reader import load

FINAL = "final"
"""The folder of a training's last package."""
_CARD = "README.md"
_COMMIT = re.compile("[0-9a-f]{40}")


def fetched(where: str | os.PathLike[str]) -> Path:
    """The local folder of a package, or of one on the Hub, from the cache if it has that.

    Raises:
        PackageError: there is none; or the repository has several, and none is called `final`.
    """
    try:
        place = on_hub(where)
        return locate(where) if place is None else _fetch_package(place)
    except CheckpointError as error:
        expected = "a package folder or a Hub id"
        raise PackageError(error.name, expected=expected, found=error.found, remedy=error.remedy) from error


def packages_in(place: HubId) -> tuple[Path, list[str]]:
    """The cached copy of a repository, and its folders that are packages, "" for itself: those in the place's
    folder, of which only the manifests have been fetched.
    """
    inside = f"{glob.escape(place.folder)}/" if place.folder else ""
    root = fetch(place, patterns=[f"{inside}{MANIFEST}", f"{inside}*/{MANIFEST}"])
    manifests = sorted((root / place.folder).rglob(MANIFEST))
    return root, [str(file.parent.relative_to(root)).removeprefix(".") for file in manifests]


def fetch_files(place: HubId, root: Path, folder: str) -> Path:
    """The files of one of `packages_in(place)`, in the same revision."""
    within = root / folder
    inside = f"{folder}/" if folder else ""
    names = [f"{inside}{name}" for name in [*files_of(load(within / MANIFEST)), _CARD]]
    revision = root.name if _COMMIT.fullmatch(root.name) else place.revision
    fetch(replace(place, revision=revision), patterns=[glob.escape(name) for name in names])
    return within


def files_of(manifest: Manifest) -> list[str]:
    """What belongs to a package, but for its card."""
    return [MANIFEST, *(record.file for record in (*manifest.parts, *manifest.files))]


def _fetch_package(place: HubId) -> Path:
    root, folders = packages_in(place)
    last = f"{place.folder}/{FINAL}".removeprefix("/")
    meant = next((folder for folder in (place.folder, last) if folder in folders), None)
    if meant is None and len(folders) == 1:
        meant = folders[0]
    if meant is None:
        found = ", ".join(folders[:8]) or "none"
        remedy = f"say which: hf://{place.repo}/{folders[0]}" if folders else ""
        raise PackageError(str(place), expected="a package", found=found, remedy=remedy)
    return fetch_files(place, root, meant)
