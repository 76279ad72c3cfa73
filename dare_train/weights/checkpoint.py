"""Checkpoints on disk: folders of safetensors files, read through memory maps."""

from __future__ import annotations

import json
import logging
import mmap
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..dtypes import Words, dtype_of
from ..errors import CheckpointError
from .config_file import CONFIG, read_config
from .module_folders import module_folders
from .protocol import TensorInfo
from .wrapper_names import without_wrappers, wrappers_in

logger = logging.getLogger("dare_train")

MERGE_RECORD = "dare_merge.json"
"""What a merge writes beside its result: the recipe, and what became of each tensor."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA = "__metadata__"
"""What no tensor is called: safetensors keeps other things under this name."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""With its configuration, the files of a PEFT adapter."""
DIFFUSERS = "diffusion_pytorch_model"
"""What diffusers calls the files of a model, where transformers says `model`."""
_ENTRIES = (
    INDEX,
    SINGLE,
    ADAPTER_WEIGHTS,
    "*.safetensors.index.json",
    f"{DIFFUSERS}.safetensors",
    "*.safetensors.index.*.json",
    "*.safetensors",
)
"""By which file a folder is read, the first that is there: one with all weights, or an index of several. A
variant, such as `fp16`, comes after what libraries load when nobody asks for one."""
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
    """One mapped file. Its header is checked by the safetensors library before this class looks at it.

    `prefix` stands before the names that tensors have in the file.
    """

    def __init__(self, path: Path, *, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
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
        self.metadata: dict[str, str] = header.pop(METADATA, {})
        self._offsets = {
            f"{prefix}{name}": 8 + header_size + entry["data_offsets"][0] for name, entry in header.items()
        }
        self.tensors = {
            f"{prefix}{name}": TensorInfo(
                dtype_of(entry["dtype"], tensor=f"{path.name}: {name}"), tuple(entry["shape"])
            )
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
    """A model on disk. Implements `Weights`; `files` maps each tensor's name to the file that holds it.

    Args:
        index: name of the file that says which tensor lies where, if there is one.
        single: name of the file that a result of one file gets.
    """

    def __init__(
        self,
        files: Iterable[SafetensorsFile],
        *,
        folder: Path,
        label: str,
        index: str | None = None,
        single: str = SINGLE,
    ) -> None:
        self.folder = folder
        self.label = label
        self.index = index
        self.single = single
        self.files: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self.files:
                    found = f"{self.files[name].path.name} and {file.path.name}"
                    raise CheckpointError(name, expected="one file that holds it", found=found)
                self.files[name] = file
        self._names_in_files = without_wrappers(self.files)
        if self._names_in_files.keys() != self.files.keys():
            logger.warning("%s: names without %s, as the model has them", label, wrappers_in(self.files))
        self.files = {name: self.files[given] for name, given in self._names_in_files.items()}
        self.tensors = {name: self.files[name].tensors[given] for name, given in self._names_in_files.items()}

    @property
    def beside(self) -> set[str]:
        """Tensors of modules behind the first: see `module_folders`."""
        return {name for name, file in self.files.items() if file.prefix}

    def read(self, name: str, start: int, count: int) -> Words:
        return self.files[name].read(self._names_in_files[name], start, count)

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> Checkpoint:
        """Open a folder, a single .safetensors file, or a Hub id (from the cache, or downloaded).

        Of a folder of sentence-transformers that is all modules, of a file that file alone.

        Raises:
            CheckpointError: nothing is there, weights are not safetensors, or a file is missing or damaged.
        """
        path = locate(where)
        if path.is_file():
            if path.suffix != ".safetensors":
                raise _not_safetensors(path)
            single = path.name if path.name.startswith(DIFFUSERS) else SINGLE
            return cls([SafetensorsFile(path)], folder=path.parent, label=str(where), single=single)
        entry = _entry(path)
        if entry.suffix == ".json":
            files = [*_open_indexed(entry), *_open_modules(path)]
            return cls(files, folder=path, label=str(where), index=entry.name)
        files = [SafetensorsFile(entry), *_open_modules(path)]
        return cls(files, folder=path, label=str(where), single=entry.name)


def locate(
    where: str | os.PathLike[str], *, patterns: list[str] | None = None, local_only: bool = False
) -> Path:
    """The local path of a folder, file or Hub id; with `local_only`, of a Hub id that the cache has. A Hub id
    may end in `@` and a branch, tag or commit.

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
    repository, at, revision = name.partition("@")
    if at and Path(repository).expanduser().exists():
        remedy = f"give {repository} itself"
        raise CheckpointError(name, expected=expected, found="a revision of a folder here", remedy=remedy)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=patterns, local_files_only=local_only
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        found = "no such folder here, and no such repository in the cache or on the Hub"
        if at:
            found = f"no folder here, and no revision {revision!r} of {repository} in the cache or on the Hub"
        remedy = "check the name and the network"
        raise CheckpointError(name, expected=expected, found=found, remedy=remedy) from error


def _entry(folder: Path) -> Path:
    """The file with the weights, or the index that says which files there are."""
    found = next((found for pattern in _ENTRIES if (found := sorted(folder.glob(pattern)))), [])
    if len(found) > 1 and found[0].suffix == ".json":
        several = ", ".join(path.name for path in found[:3])
        remedy = "put the model that is meant into a folder of its own"
        raise CheckpointError(str(folder), expected="one index", found=several, remedy=remedy)
    if len(found) != 1:
        raise _not_safetensors(folder, found)
    return found[0]


def _open_indexed(index: Path) -> list[SafetensorsFile]:
    weight_map, names = _read_index(index)
    for name in names:
        _check_listed(name, index)
    files = [SafetensorsFile(index.parent / name) for name in names]
    held = {name: file.path.name for file in files for name in file.tensors}
    wrong = sorted(name for name in weight_map.keys() | held.keys() if weight_map.get(name) != held.get(name))
    if wrong:
        expected = f"in {weight_map.get(wrong[0])}"
        found = f"in {held.get(wrong[0])}"
        raise CheckpointError(f"{index}: {wrong[0]}", expected=expected, found=found, remedy=_FETCH_AGAIN)
    return files


def _open_modules(folder: Path) -> list[SafetensorsFile]:
    """The weights of modules behind the first.

    Raises:
        CheckpointError: a module has weights in other files than `model.safetensors`.
    """
    files = []
    for place, name in module_folders(folder).items():
        path = folder / place / SINGLE
        if path.exists():
            files.append(SafetensorsFile(path, prefix=f"{name}."))
        others = sorted(
            file
            for file in path.parent.rglob("*")
            if file.suffix in _WEIGHT_SUFFIXES and not (path.exists() and file.parent == path.parent)
        )
        if others:
            remedy = "convert it: SentenceTransformer(folder).save_pretrained(new_folder) writes safetensors"
            found = str(others[0].relative_to(path.parent))
            raise CheckpointError(str(path.parent), expected=SINGLE, found=found, remedy=remedy)
    return files


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
    kind = _class_of(path if path.is_dir() else path.parent)
    convert = f"convert it: {kind}.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
    if weights and all(file.suffix == ".gguf" for file in weights):
        convert = f"dequantize it: dare-train dequantize {shlex.quote(str(weights[0]))} --out FOLDER"
    remedy = convert if weights and not files else ""
    if (path / ADAPTER_CONFIG).exists():
        remedy = "load the adapter with PEFT and save it again: that writes " + ADAPTER_WEIGHTS
    parts = [] if weights else _folders_with_weights(path)
    if parts:
        remedy = f"give one of the models in it: {', '.join(str(path / part) for part in parts[:4])}"
    inside = f", but in {', '.join(parts[:4])}" if parts else ""
    listed = ", ".join(file.name for file in weights[:3]) or f"no weights{inside}"
    return CheckpointError(str(path), expected=f"{SINGLE} or {INDEX}", found=listed, remedy=remedy)


def _class_of(folder: Path) -> str:
    """The class whose weights these are: another one would leave a part of them out, such as a head."""
    names = read_config(folder / CONFIG).get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and name.isidentifier() else "the model's own class, CLASS"


def _folders_with_weights(folder: Path) -> list[str]:
    """Of a pipeline of several models, such as diffusers'."""
    inside = (path for path in sorted(folder.iterdir()) if path.is_dir())
    return [path.name for path in inside if any(file.suffix == ".safetensors" for file in path.iterdir())]
