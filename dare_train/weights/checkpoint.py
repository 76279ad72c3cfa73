"""Checkpoints on disk: folders of safetensors files, read through memory maps."""

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
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""With its configuration, the files of a PEFT adapter."""
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


_FETCH_AGAIN = "fetch the checkpoint again"


class SafetensorsFile:
    """One mapped file. Its header is checked by the safetensors library before this class looks at it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            expected = "a safetensors file"
            remedy = "fetch it again"
            raise CheckpointError(str(path), expected=expected, found=str(error), remedy=remedy) from error
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
        self.folder = folder
        self.label = label
        self.files: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self.files:
                    found = f"{self.files[name].path.name} and {file.path.name}"
                    raise CheckpointError(name, expected="one file that holds it", found=found)
                self.files[name] = file
        self.tensors = {name: file.tensors[name] for name, file in self.files.items()}

    def read(self, name: str, start: int, count: int) -> Words:
        return self.files[name].read(name, start, count)

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> Checkpoint:
        """Open a folder, a single .safetensors file, or a Hub id (from the cache, or downloaded).

        Raises:
            CheckpointError: nothing is there, weights are not safetensors, or a file is missing or damaged.
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
    """The local path of a folder, file or Hub id; with `local_only`, of a Hub id that the cache has.

    Raises:
        CheckpointError: neither a path that exists nor a repository that the Hub (or its cache) has.
    """
    path = Path(where).expanduser()
    name = os.fspath(where)
    if os.path.exists(path):  # noqa: PTH110 - unlike Path.exists, false for names that no file can have
        return path
    expected = "a folder or a Hub id"
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(name, expected=expected, found="nothing at that path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_only))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        found = "no such folder here, and no such repository in the cache or on the Hub"
        remedy = "check the name and the network"
        raise CheckpointError(name, expected=expected, found=found, remedy=remedy) from error


def _open_folder(folder: Path) -> list[SafetensorsFile]:
    index = folder / INDEX
    if not index.exists():
        return [SafetensorsFile(_only_file(folder))]
    weight_map, names = _read_index(index)
    for name in names:
        _check_listed(name, index)
    files = [SafetensorsFile(folder / name) for name in names]
    held = {name: file.path.name for file in files for name in file.tensors}
    wrong = sorted(name for name in weight_map.keys() | held.keys() if weight_map.get(name) != held.get(name))
    if wrong:
        expected = f"in {weight_map.get(wrong[0])}"
        found = f"in {held.get(wrong[0])}"
        raise CheckpointError(f"{index}: {wrong[0]}", expected=expected, found=found, remedy=_FETCH_AGAIN)
    return files


def _only_file(folder: Path) -> Path:
    """The file with the weights, where no index says which there are."""
    named = [folder / name for name in (SINGLE, ADAPTER_WEIGHTS) if (folder / name).exists()]
    files = named[:1] or sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise _not_safetensors(folder, files)
    return files[0]


def _read_index(index: Path) -> tuple[Mapping[str, str], list[str]]:
    """File name by tensor name, and the names of all files."""
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        return weight_map, sorted(set(weight_map.values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = 'an index with a "weight_map"'
        raise CheckpointError(str(index), expected=expected, found=repr(error)[:200]) from error


def _check_listed(name: object, index: Path) -> None:
    if not isinstance(name, str) or not _names_a_file(name):
        raise CheckpointError(str(index), expected="names of files in this folder", found=repr(name))
    path = index.parent / name
    if not path.exists():
        expected = "a file, since the index lists it"
        raise CheckpointError(str(path), expected=expected, found="none", remedy=_FETCH_AGAIN)


def _names_a_file(name: str) -> bool:
    return Path(name).name == name and name.endswith(".safetensors") and len(name.encode()) <= 255


def _not_safetensors(path: Path, files: list[Path] | None = None) -> CheckpointError:
    if path.is_file():
        weights = [path]
    else:
        weights = sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    convert = "convert it: AutoModel.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
    remedy = convert if weights and not files else ""
    if (path / ADAPTER_CONFIG).exists():
        remedy = "load the adapter with PEFT and save it again: that writes " + ADAPTER_WEIGHTS
    listed = ", ".join(file.name for file in weights[:3]) or "no weights"
    return CheckpointError(str(path), expected=f"{SINGLE} or {INDEX}", found=listed, remedy=remedy)
