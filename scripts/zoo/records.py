"""A file for each architecture that was tried, which appears whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from .trial import Outcome, Record


def write(folder: Path, record: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.name}.json"
    begun = path.with_suffix(f".{os.getpid()}")
    begun.write_text(json.dumps(asdict(record), indent=1) + "\n")
    begun.replace(path)


def read(folder: Path, name: str) -> Record | None:
    """The record of a class; None where it was not tried."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    fields = json.loads(path.read_text())
    steps = {step: Outcome(*outcome) for step, outcome in fields.pop("steps").items()}
    return Record(**fields, steps=steps)
