"""What was measured in long runs, kept after each measurement, so that a run that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ._version import __version__
from .errors import CheckpointError


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
            if found["setup"] != told:
                differing = next(name for name in told if found["setup"].get(name) != told[name])
                expected, seen = f"{differing} {found['setup'].get(differing)}", str(told[differing])
                raise CheckpointError(str(path), expected=expected, found=seen, remedy="choose another folder")
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
