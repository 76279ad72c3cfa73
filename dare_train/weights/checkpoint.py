"""Checkpoints on disk: folders of safetensors files, read through memory maps and written at known
offsets.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..dtypes import Words, dtype_of
from ..errors import CheckpointError
from .protocol import TensorInfo

MERGE_RECORD = "dare_merge.json"
"""What a merge writes beside its result: the recipe, and what became of each tensor."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a PEFT adapter."""
_WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".npz",
    ".tflite",
}


class SafetensorsFile:
    """One mapped file. Its header is checked by the safetensors library before this class looks at it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                str(path), expected="a safetensors file", found=str(error), remedy="fetch it again"
            ) from error
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._offsets = {name: 8 + header_size + entry["data_offsets"][0] for name, entry in header.items()}
        self.tensors = {
            name: TensorInfo(dtype_of(entry["dtype"], tensor=f"{path.name}: {name}"), tuple(entry["shape"]))
            for name, entry in header.items()
        }

    def read(self, name: str, start: int, count: int) -> Words:
        """Words of a flat range, as a read-only view of the map."""
        dtype = self.tensors[name].dtype
        offset = self._offsets[name] + start * dtype.itemsize
        view = np.frombuffer(self._map, dtype.word, count, offset)
        return view if view.flags.aligned else view.copy()

    def bytes_of(self, name: str) -> memoryview:
        offset = self._offsets[name]
        return memoryview(self._map)[offset : offset + self.tensors[name].nbytes]


class Checkpoint:
    """A model on disk. Implements `Weights`; `files` maps each tensor's name to the file that holds it."""

    def __init__(self, files: Iterable[SafetensorsFile], *, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        self.files: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self.files:
                    raise CheckpointError(
                        name,
                        expected="one file that holds it",
                        found=f"{self.files[name].path.name} and {file.path.name}",
                    )
                self.files[name] = file
        self.tensors = {name: file.tensors[name] for name, file in self.files.items()}

    def read(self, name: str, start: int, count: int) -> Words:
        return self.files[name].read(name, start, count)

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> Checkpoint:
        """Open a folder, a single .safetensors file, or a Hub id (from the cache, or downloaded).

        Raises:
            CheckpointError: nothing is there, the weights are not safetensors, or a file is missing or
                damaged.
        """
        path = locate(where)
        if path.is_file():
            if path.suffix != ".safetensors":
                raise _not_safetensors(path)
            return cls([SafetensorsFile(path)], folder=path.parent, label=str(where))
        return cls(_open_folder(path), folder=path, label=str(where))


def locate(
    where: str | os.PathLike[str], *, patterns: list[str] | None = None, local_only: bool = False
) -> Path:
    """The local path of a folder, file or Hub id. With `local_only`, a Hub id is looked up in the cache and
    nowhere else.

    Raises:
        CheckpointError: neither a path that exists nor a repository that the Hub (or its cache) has.
    """
    path = Path(where).expanduser()
    name = os.fspath(where)
    if os.path.exists(path):  # noqa: PTH110 - unlike Path.exists, false for names that no file can have
        return path
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(name, expected="a folder or a Hub id", found="nothing at that path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_only))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        found = "no such folder here, and no such repository in the cache or on the Hub"
        raise CheckpointError(
            name, expected="a folder or a Hub id", found=found, remedy="check the name and the network"
        ) from error


def _open_folder(folder: Path) -> list[SafetensorsFile]:
    index = folder / INDEX
    if not index.exists():
        named = [folder / name for name in (SINGLE, ADAPTER_WEIGHTS) if (folder / name).exists()]
        found = named[:1] or sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise _not_safetensors(folder, found)
        return [SafetensorsFile(found[0])]
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            str(index), expected='an index with a "weight_map"', found=repr(error)[:200]
        ) from error
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
            or len(name.encode()) > 255
        ):
            raise CheckpointError(str(index), expected="names of files in this folder", found=repr(name))
        if not (folder / name).exists():
            raise CheckpointError(
                str(folder / name),
                expected="a file, since the index lists it",
                found="none",
                remedy="fetch the checkpoint again",
            )
    files = [SafetensorsFile(folder / name) for name in names]
    held = {name: file.path.name for file in files for name in file.tensors}
    wrong = sorted(name for name in weight_map.keys() | held.keys() if weight_map.get(name) != held.get(name))
    if wrong:
        raise CheckpointError(
            f"{index}: {wrong[0]}",
            expected=f"in {weight_map.get(wrong[0])}",
            found=f"in {held.get(wrong[0])}",
            remedy="fetch the checkpoint again",
        )
    return files


def _not_safetensors(path: Path, found: list[Path] | None = None) -> CheckpointError:
    others = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    remedy = (
        "convert it: AutoModel.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        if others and not found
        else ""
    )
    if (path / ADAPTER_CONFIG).exists():
        remedy = "load the adapter with PEFT and save it again: that writes " + ADAPTER_WEIGHTS
    listed = ", ".join(p.name for p in others[:3]) or "no weights"
    return CheckpointError(str(path), expected=f"{SINGLE} or {INDEX}", found=listed, remedy=remedy)
