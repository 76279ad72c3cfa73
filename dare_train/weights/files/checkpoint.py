"""Checkpoints on disk: folders of safetensors files."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ...dtypes import Words
from ...errors import CheckpointError, brief
from ...hub.download import locate
from ...reading.plain_files import instead_of_file, is_text
from ...reading.structures import checked, json_in
from ..wrapper_names import without_wrappers, wrappers_in
from .config_file import CONFIG, read_config
from .headers import header_of
from .module_folders import module_folders
from .read_file import ReadFile

logger = logging.getLogger("dare_train")

MERGE_RECORD = "dare_merge.json"
"""What a merge writes beside its result: the recipe, and what became of each tensor."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
_OF_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""What `from_pretrained` loads where neither `SINGLE` nor `INDEX` is there, whatever else is."""
_SHARD = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.safetensors$")
WEIGHT_SUFFIXES = {
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
    """One file, open as long as this is used.

    `prefix` stands before the names that tensors have in the file.
    """

    def __init__(self, path: Path, *, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self._file = ReadFile(path)
        header = header_of(self._file)
        self.metadata = header.metadata
        self._offsets = {f"{prefix}{name}": offset for name, offset in header.offsets.items()}
        self.tensors = {f"{prefix}{name}": info for name, info in header.tensors.items()}

    def read(self, name: str, start: int, count: int) -> Words:
        """Words of a flat range."""
        dtype = self.tensors[name].dtype
        words = np.empty(count, dtype.word)
        self._file.read_into(words, self._offsets[name] + start * dtype.itemsize)
        return words

    def sha256(self) -> str:
        """Of the whole file."""
        return self._file.sha256()

    def changed(self) -> bool:
        """Whether somebody has written to it since it was opened."""
        return self._file.changed()


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
        if not path.is_dir():
            if found := instead_of_file(path):
                raise CheckpointError(str(path), expected="a folder or a file", found=found)
            if path.suffix != ".safetensors":
                raise _not_safetensors(path)
            single = path.name if path.name.startswith(DIFFUSERS) else SINGLE
            return cls([SafetensorsFile(path)], folder=path.parent, label=str(where), single=single)
        entry = _entry(path)
        if entry.suffix == ".json":
            indexed = _open_indexed(entry)
            if not _is_left_behind(entry, indexed):
                files = [*indexed, *_open_modules(path)]
                return cls(files, folder=path, label=str(where), index=entry.name)
            entry = path / SINGLE
            logger.warning("%s: read from %s, as from_pretrained does, without %s", where, SINGLE, INDEX)
        files = [SafetensorsFile(entry), *_open_modules(path)]
        return cls(files, folder=path, label=str(where), single=entry.name)


def _entry(folder: Path) -> Path:
    """The file with the weights, or the index that says which files there are."""
    found = next((found for pattern in _ENTRIES if (found := sorted(folder.glob(pattern)))), [])
    if len(found) > 1 and found[0].suffix == ".json":
        several = ", ".join(path.name for path in found[:3])
        remedy = "put the model that is meant into a folder of its own"
        raise CheckpointError(str(folder), expected="one index", found=several, remedy=remedy)
    if len(found) != 1:
        raise _not_safetensors(folder, found)
    _check_meant(found[0])
    return found[0]


def _is_left_behind(index: Path, listed: list[SafetensorsFile]) -> bool:
    """Whether an index and what it lists are an earlier model's, beside the one that libraries load."""
    named = {file.path.name for file in listed}
    return index.name == INDEX and SINGLE not in named and (index.parent / SINGLE).exists()


def _check_meant(entry: Path) -> None:
    """What was found in a folder is all of the model, and the one that libraries load.

    Raises:
        CheckpointError: it is one shard of several, or something else beside weights in `.bin` files.
    """
    folder = entry.parent
    shard = _SHARD.search(entry.name)
    if shard and int(shard[2]) > 1:
        expected = f"{INDEX}, and {int(shard[2])} files that it lists"
        raise CheckpointError(str(folder), expected=expected, found=entry.name, remedy=_FETCH_AGAIN)
    older = next((name for name in _OF_TORCH if (folder / name).exists()), None)
    if older and entry.name not in (SINGLE, INDEX, ADAPTER_WEIGHTS):
        found = f"{older}, which from_pretrained loads, and {entry.name}"
        remedy = f"give the file itself if it is meant: {entry}; else {_conversion(folder)}"
        raise CheckpointError(str(folder), expected=f"{SINGLE} or {INDEX}", found=found, remedy=remedy)


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
            if file.suffix in WEIGHT_SUFFIXES and not (path.exists() and file.parent == path.parent)
        )
        if others:
            remedy = "convert it: SentenceTransformer(folder).save_pretrained(new_folder) writes safetensors"
            found = str(others[0].relative_to(path.parent))
            raise CheckpointError(str(path.parent), expected=SINGLE, found=found, remedy=remedy)
    return files


def _read_index(index: Path) -> tuple[Mapping[str, str], list[str]]:
    """File name by tensor name, and the names of all files."""
    expected = 'an index with a "weight_map"'
    weight_map = json_in(index, expected=expected).get("weight_map")
    files = checked(weight_map, dict[str, str], where=f"{index}: weight_map", expected=expected)
    return files, sorted({*files.values()})


def _check_listed(name: str, index: Path) -> None:
    if not _names_a_file(name):
        raise CheckpointError(str(index), expected="names of files in this folder", found=brief(name))
    path = index.parent / name
    if not path.exists():
        expected = "a file, since the index lists it"
        raise CheckpointError(str(path), expected=expected, found="none", remedy=_FETCH_AGAIN)


def _names_a_file(name: str) -> bool:
    is_one = is_text(name) and "\0" not in name and Path(name).name == name
    return is_one and name.endswith(".safetensors") and len(name.encode()) <= 255


def _not_safetensors(path: Path, files: list[Path] | None = None) -> CheckpointError:
    if path.is_file():
        weights = [path]
    else:
        weights = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    convert = _conversion(path if path.is_dir() else path.parent)
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


def _conversion(folder: Path) -> str:
    """What to do with weights in other files. A model's `save_pretrained` writes no tokenizer."""
    convert = f"convert it: {_class_of(folder)}.from_pretrained(folder).save_pretrained(new_folder)"
    return f"{convert} writes safetensors; copy tokenizer and processor files there"


def _class_of(folder: Path) -> str:
    """The class whose weights these are: another one would leave a part of them out, such as a head."""
    names = read_config(folder / CONFIG).get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and name.isidentifier() else "the model's own class, CLASS"


def _folders_with_weights(folder: Path) -> list[str]:
    """Of a pipeline of several models, such as diffusers'."""
    inside = (path for path in sorted(folder.iterdir()) if path.is_dir())
    return [path.name for path in inside if any(file.suffix == ".safetensors" for file in path.iterdir())]
