"""What studies measured, kept in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Record:
    """What was measured, in a file for each figure or group of them: nothing is measured twice. A folder of
    another setup is refused.
    """

    def __init__(self, folder: Path, setup: Mapping[str, Any]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        told = self.once("setup", lambda: dict(setup))
        for name, value in setup.items():
            if told.get(name) != value:
                sys.exit(
                    f"{folder} was measured with {name} {told.get(name)}, not {value}: choose another --out"
                )

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What JSON can hold."""
        file = self._folder / f"{name}.json"
        if not file.exists():
            beside = file.with_suffix(".partial")
            beside.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
            beside.replace(file)
        return json.loads(file.read_text(encoding="utf-8"))
