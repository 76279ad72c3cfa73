"""The configuration that lies beside weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"


def config_beside(weights: object) -> Mapping[str, Any]:
    """What the `config.json` of weights in a folder says; nothing where there is none that can be read."""
    folder = getattr(weights, "folder", None)
    return read_config(folder / CONFIG) if isinstance(folder, Path) else {}


def read_config(path: Path) -> Mapping[str, Any]:
    """A file's fields; nothing where it is not there, or no JSON object."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
