"""The configuration that lies beside weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...reading.structures import json_in

CONFIG = "config.json"


def config_beside(weights: object) -> Mapping[str, Any]:
    """What the `config.json` of weights in a folder says; nothing where there is none that can be read."""
    folder = getattr(weights, "folder", None)
    return read_config(folder / CONFIG) if isinstance(folder, Path) else {}


def read_config(path: Path) -> Mapping[str, Any]:
    """A file's fields; nothing where it is not there, or no JSON object."""
    try:
        fields: Mapping[str, Any] = json_in(path)
    except CheckpointError:
        return {}
    return fields
