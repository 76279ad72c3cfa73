"""Models of several modules, as sentence-transformers saves them: the later ones lie in sub-folders.

`modules.json` lists them. The files of the first, a transformer, lie beside it; those of a later one, such as
a `Dense`, lie in a folder of their own, and name its tensors as that module alone does. Here they go by the
names that the whole model has for them: `2.linear.weight`, where the module is called "2".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...reading.structures import json_in

MODULES = "modules.json"


def module_folders(folder: Path) -> dict[str, str]:
    """Sub-folders and the names of the modules in them, by `modules.json`; none where it cannot be read as a
    list of modules.
    """
    try:
        modules = json_in(folder / MODULES, list[dict[str, Any]])
        listed = {module["path"]: module.get("name", str(place)) for place, module in enumerate(modules)}
    except (CheckpointError, KeyError, TypeError):
        return {}
    return {path: str(name) for path, name in listed.items() if _is_sub_folder(path)}


def _is_sub_folder(path: object) -> bool:
    """The list may be a stranger's: nothing that it names lies outside, or is no name for a folder."""
    return (
        isinstance(path, str)
        and path not in ("", "..")
        and Path(path).name == path
        and path.isprintable()
        and len(path.encode()) <= 255
    )


def places_of(folder: Path) -> list[Path]:
    """The folders in which a model's files lie: its own, and those of its modules."""
    return [folder, *(folder / place for place in module_folders(folder))]
