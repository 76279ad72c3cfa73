"""What a merge has finished, so that one that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from ..parallel.staged_file import write_whole
from ..weights.files.checkpoint import Checkpoint
from ..weights.fingerprint import Fingerprint, fingerprints
from ..weights.protocol import TensorInfo

_STEM = "merge-journal"
_DONE = f"{_STEM}.begun"
_LARGEST_HEADER = 100_000_000
"""That the safetensors library reads."""


class Journal:
    """Names of finished tensors in a staging folder, a file for each rank. What it says is checked against
    the files' content.

    Args:
        identity: of the merge: its recipe and all that it reads.
    """

    def __init__(self, staging: Path, identity: str, rank: int) -> None:
        self._staging = staging
        self._identity = identity
        self._path = staging / f"{_STEM}.{rank}"

    def begun(self) -> bool:
        """Whether the folder holds files of this merge, with their headers."""
        return _begun_as(self._staging, self._identity)

    def begin(self) -> None:
        """The files of the result are there, empty."""
        write_whole(self._staging / _DONE, _seal(self._staging, self._identity).encode())

    def finished(self, name: str, print_: Fingerprint) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{print_.hex} {name}\n")

    def finished_before(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Fingerprint]:
        """Tensors that were finished before, each with its fingerprint: those whose words in the folder have
        it still.
        """
        written = [
            line.partition(" ")
            for path in sorted(self._staging.glob(f"{_STEM}.[0-9]*"))
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        ]
        if not written:
            return {}
        try:
            checkpoint = Checkpoint.open(self._staging)
        except CheckpointError:
            return {}
        whole = [
            name for _, _, name in written if checkpoint.tensors.get(name) == tensors.get(name) is not None
        ]
        prints = fingerprints(checkpoint, {name: ((0, tensors[name].numel),) for name in whole})
        return {
            name: prints[name] for said, _, name in written if name in prints and prints[name].hex == said
        }

    def remove(self) -> None:
        for path in self._staging.glob(f"{_STEM}.*"):
            path.unlink()


def resumable(staging: Path, identity: str) -> bool:
    """Whether a folder that a killed process left holds a part of this merge."""
    return _begun_as(staging, identity)


def _begun_as(staging: Path, identity: str) -> bool:
    """Nothing in the place of a journal is read, or written to, that is no file."""
    if not all(stat.S_ISREG(path.lstat().st_mode) for path in staging.glob(f"{_STEM}.*")):
        return False
    path = staging / _DONE
    return path.is_file() and path.read_bytes() == _seal(staging, identity).encode()


def _seal(staging: Path, identity: str) -> str:
    """What stays as it is from the first tensor to the last: the merge's identity, the files, their sizes and
    headers.
    """
    digest = hashlib.sha256(identity.encode())
    for path in sorted(
        path for path in staging.iterdir() if path.is_file() and not path.name.startswith(_STEM)
    ):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            size = file.read(8)
            header = (
                min(int.from_bytes(size, "little"), _LARGEST_HEADER) if path.suffix == ".safetensors" else -1
            )
            digest.update(size + file.read(header))
    return digest.hexdigest()
