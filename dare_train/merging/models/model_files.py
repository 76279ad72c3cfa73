"""Files of a model beside its weights: which of those in its folder are its own, and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...package.manifest import MANIFEST
from ...package.reader import DeltaPackage
from ...reading.links import staying_inside
from ...reading.structures import json_in


def files_in(folder: Path | None) -> dict[str, Path]:
    """Files that lie directly in a folder, by name; none where it is none. Configurations and tokenizers that
    are links out of it are not followed, and named in a warning.
    """
    if folder is None or not folder.is_dir():
        return {}
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    copied = [path for path in files if path.suffix != ".safetensors"]
    left_out = {*copied} - {*staying_inside(copied, folder)}
    return {path.name: path for path in files if path not in left_out}


def own_files(folder: Path | None) -> dict[str, Path]:
    """Those of a model's folder that are the model's: of a package what its manifest lists, whatever lies
    beside it.
    """
    if folder is None or not is_package(folder):
        return files_in(folder)
    listed = sorted(record.file for record in DeltaPackage.open(folder).manifest.files)
    return {name: folder / name for name in listed if "/" not in name}


def is_package(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def config_of(files: Mapping[str, Path]) -> dict[str, Any]:
    """What a model's config.json says; nothing where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = files.get("config.json")
    if path is None:
        return {}
    content: dict[str, Any] = json_in(path)
    return content
