"""What was measured in long runs, kept after each measurement, so that a run that was killed goes on, and another does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ._version import __version__
from .errors import CheckpointError


def check_setup(path: Path, kept: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Refuse to go on with measurements that depend on something else: `kept` is what a file's depend on, as JSON has it.

    Raises:
        CheckpointError: they differ; it names the first difference.
    """
    for name, found, expected in _differences(kept, told):
        measured = f"with {name} {found}" if found is not None else f"without {name}"
        wanted = f"measurements with {name} {expected}" if expected is not None else f"measurements without {name}"
        raise CheckpointError(str(path), expected=wanted, found=f"some {measured}", remedy="choose another folder")


def _differences(kept: Mapping[str, Any], told: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Full names of entries that differ, and both of their values."""
    for name in dict.fromkeys((*told, *kept)):
        one, other = kept.get(name), told.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{within}{name}.")
        elif one != other:
            yield f"{within}{name}", one, other


class Record:
    """A JSON file of measurements by name, below what they depend on.

    Raises:
        CheckpointError: when made, for a file of another setup.
    """

    def __init__(self, path: Path, setup: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        told = json.loads(json.dumps(setup))
        self._kept: dict[str, Any] = {"written_by": f"dare_train {__version__}", "setup": told, "measured": {}}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            check_setup(path, found["setup"], told)
            self._kept = found

    @property
    def all(self) -> Mapping[str, Any]:
        """In the order in which they were measured."""
        measured: dict[str, Any] = self._kept["measured"]
        return measured

    def measured(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> Any:
        """What was measured by that name, as JSON has it: now, unless it was before."""
        if name not in self.all:
            self._kept["measured"][name] = json.loads(json.dumps(measure()))
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._kept, indent=1) + "\n", encoding="utf-8")
            partial.replace(self._path)
        return self.all[name]
