"""What the benchmarks share: the cache folder, a place for outputs, and a few facts about checkpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

WEIGHTS = "model.safetensors"
_console = Console(stderr=True, highlight=False)


class Pair(NamedTuple):
    """Folders of a base model and of what fine-tuning made of it."""

    base: Path
    tuned: Path


def say(text: str) -> None:
    _console.print(text)


def cache_folder() -> Path:
    folder = Path(os.environ.get("DARE_TRAIN_BENCH_DIR", "~/.cache/dare_train_bench")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(name: str, doing: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build` fills it the first time, and it appears only when complete."""
    folder = cache_folder() / name
    if not folder.exists():
        say(f"{doing}; kept in {folder}")
        partial = folder.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        began = time.perf_counter()
        build(partial)
        partial.rename(folder)
        say(f"done in {time.perf_counter() - began:.0f} s")
    return folder


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the cache's file system, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=cache_folder()) as folder:
        yield Path(folder)


def remove(path: Path) -> None:
    """Delete an output and settle the disk, so that the next run starts from the same state."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()


def size(folder: Path) -> int:
    """Bytes of every file in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parameters(folder: Path) -> int:
    """Elements of all tensors of a checkpoint."""
    from dare_train.weights.files.checkpoint import Checkpoint

    return sum(info.numel for info in Checkpoint.open(folder).tensors.values())


def bits_per_parameter(package: Path, pair: Pair) -> float:
    """8 × bytes of the whole package folder, manifest and card included, over the tuned model's
    parameters.
    """
    return 8 * size(package) / parameters(pair.tuned)
