"""What `dare-train run` tells the processes of its command, and what they tell it: an environment variable,
and a file to which each of them adds lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

VARIABLE = "DARE_TRAIN_RUN"
"""The environment variable that holds a `RunOrder`."""

Event = Literal["made", "own", "began", "ended"]
"""A Trainer was made, and has a callback of ours; it has one of its own; it began to train; it ended."""


@dataclass(frozen=True)
class Note:
    """One line of the journal."""

    event: Event
    trainer: str
    """Name of its class."""
    packages: int = 0
    """When it ended: how many there were."""
    failures: int = 0
    """When it ended: how many snapshots failed."""


@dataclass(frozen=True)
class RunOrder:
    """What is to be added to Trainers, and where to say that it was."""

    options: Mapping[str, Any]
    """Arguments of `DareCallback`, checked."""
    journal: str
    """Path of a file."""

    @classmethod
    def of_this_process(cls) -> RunOrder:
        """The order under which `dare-train run` started it."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def written(self) -> str:
        """As the variable holds it."""
        return json.dumps(asdict(self))

    def note(self, note: Note) -> None:
        """Add a line, whole, whoever else adds one at the same time."""
        line = json.dumps(asdict(note)) + "\n"
        with open(self.journal, "ab", buffering=0) as journal:  # noqa: PTH123
            journal.write(line.encode())

    def notes(self) -> list[Note]:
        """All lines so far, of all processes."""
        path = Path(self.journal)
        lines = path.read_text().splitlines() if path.exists() else []
        return [Note(**json.loads(line)) for line in lines]
