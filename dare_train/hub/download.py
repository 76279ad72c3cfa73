"""Where something lies on this machine: a folder or file, or what was fetched from the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from .ids import HubId

_EXPECTED = "a folder or a Hub id"


def locate(
    where: str | os.PathLike[str], *, patterns: Sequence[str] | None = None, local_only: bool = False
) -> Path:
    """The local path of a folder, file or place on the Hub; with `local_only`, of one that the cache has.

    Raises:
        CheckpointError: neither a path that exists nor a repository that the Hub (or its cache) has.
    """
    path = here(where)
    if path is not None:
        return path
    name = os.fspath(where)
    place = on_hub(where)
    if place is None:
        deep = name.count("/") > 1 and not name.startswith((".", "/", "~"))
        remedy = "a folder of a repository is written as hf://user/name/folder" if deep else ""
        raise CheckpointError(name, expected=_EXPECTED, found="nothing at that path", remedy=remedy)
    return fetch(place, patterns=patterns, local_only=local_only) / place.folder


def on_hub(where: str | os.PathLike[str]) -> HubId | None:
    """The place on the Hub that is meant; None for what is on this machine, or nowhere.

    Raises:
        CheckpointError: a revision of what is on this machine.
    """
    name = os.fspath(where)
    if here(where) is not None:
        return None
    folder, at, _ = name.rpartition("@")
    if at and here(folder) is not None:
        remedy = f"give {folder} itself: revisions are the Hub's"
        raise CheckpointError(name, expected=_EXPECTED, found="a revision of a folder here", remedy=remedy)
    return HubId.parse(name)


def here(where: str | os.PathLike[str]) -> Path | None:
    """The path of what is on this machine."""
    try:
        path = Path(where).expanduser()
    except RuntimeError:  # there is no such user
        path = Path(where)
    # Unlike Path.exists, false for names that no file can have.
    return path if os.path.exists(path) else None  # noqa: PTH110


def fetch(place: HubId, *, patterns: Sequence[str] | None = None, local_only: bool = False) -> Path:
    """The cached copy of a repository at a revision, with what matches the patterns of it.

    Raises:
        CheckpointError: neither the Hub nor its cache has it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = None if patterns is None else list(patterns)
        found = snapshot_download(
            place.repo, revision=place.revision, allow_patterns=wanted, local_files_only=local_only
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, UnicodeEncodeError) as error:
        found = "no such folder here, and no such repository in the cache or on the Hub"
        if place.revision is not None:
            at = f"revision {place.revision!r} of {place.repo}"
            found = f"no folder here, and no {at} in the cache or on the Hub"
        remedy = "check the name and the network"
        raise CheckpointError(str(place), expected=_EXPECTED, found=found, remedy=remedy) from error
    return Path(found)
