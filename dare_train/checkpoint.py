"""Checkpoints on disk: folders of safetensors files, read through memory maps and written at known offsets."""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from .dtypes import Words, dtype_of
from .errors import CheckpointError
from .weights import TensorInfo

MERGE_RECORD = "dare_merge.json"
"""What a merge writes beside its result: the recipe, and what became of each tensor."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a PEFT adapter."""
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".tflite"}
_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_OTHER_FILES = {"trainer_state.json", "dare_config.json", "requirements.txt", ADAPTER_CONFIG}
_COMPANION_NAMES = {"LICENSE", "LICENCE", "NOTICE"}


class SafetensorsFile:
    """One mapped file. Its header is checked by the safetensors library before this class looks at it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(path), expected="a safetensors file", found=str(error), remedy="fetch it again") from error
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
                        name, expected="one file that holds it", found=f"{self.files[name].path.name} and {file.path.name}"
                    )
                self.files[name] = file
        self.tensors = {name: file.tensors[name] for name, file in self.files.items()}

    def read(self, name: str, start: int, count: int) -> Words:
        return self.files[name].read(name, start, count)

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> Checkpoint:
        """Open a folder, a single .safetensors file, or a Hub id (from the cache, or downloaded).

        Raises:
            CheckpointError: nothing is there, the weights are not safetensors, or a file is missing or damaged.
        """
        path = locate(where)
        if path.is_file():
            if path.suffix != ".safetensors":
                raise _not_safetensors(path)
            return cls([SafetensorsFile(path)], folder=path.parent, label=str(where))
        return cls(_open_folder(path), folder=path, label=str(where))


def locate(where: str | os.PathLike[str], *, patterns: list[str] | None = None, local_only: bool = False) -> Path:
    """The local path of a folder, file or Hub id. With `local_only`, a Hub id is looked up in the cache and nowhere else.

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
        raise CheckpointError(name, expected="a folder or a Hub id", found=found, remedy="check the name and the network") from error


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
        raise CheckpointError(str(index), expected='an index with a "weight_map"', found=repr(error)[:200]) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors") or len(name.encode()) > 255:
            raise CheckpointError(str(index), expected="names of files in this folder", found=repr(name))
        if not (folder / name).exists():
            raise CheckpointError(
                str(folder / name), expected="a file, since the index lists it", found="none", remedy="fetch the checkpoint again"
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
    remedy = "convert it: AutoModel.from_pretrained(folder).save_pretrained(new_folder) writes safetensors" if others and not found else ""
    if (path / ADAPTER_CONFIG).exists():
        remedy = "load the adapter with PEFT and save it again: that writes " + ADAPTER_WEIGHTS
    listed = ", ".join(p.name for p in others[:3]) or "no weights"
    return CheckpointError(str(path), expected=f"{SINGLE} or {INDEX}", found=listed, remedy=remedy)


def companions(folder: Path) -> list[Path]:
    """Files that belong to a model beside its weights: configuration, tokenizer, generation settings, licence. Relative, sorted.

    Of subfolders only those count that a sentence-transformers `modules.json` names; others hold other things, such as a
    run's checkpoints.
    """
    places = [folder, *(folder / name for name in _module_folders(folder / "modules.json"))]
    found = [path for place in places if place.is_dir() for path in place.iterdir() if path.is_file() and _is_companion(path)]
    return sorted({path.relative_to(folder) for path in found})


def _is_companion(path: Path) -> bool:
    wanted = path.suffix in _COMPANION_SUFFIXES or path.stem.upper() in _COMPANION_NAMES
    of_something_else = path.name in _OTHER_FILES or path.name.endswith("_results.json")
    return wanted and not (of_something_else or path.name.startswith(".") or path.name.endswith(".index.json"))


def _module_folders(listing: Path) -> list[str]:
    """Names of subfolders in a sentence-transformers `modules.json`; none when there is none that can be read as one."""
    try:
        paths = [module["path"] for module in json.loads(listing.read_text())]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [path for path in paths if isinstance(path, str) and path and Path(path).name == path]


Layout = Mapping[str, Mapping[str, TensorInfo]]
"""File name -> tensor name -> what it holds."""


def layout_like(base: Checkpoint | None, tensors: Mapping[str, TensorInfo], base_name: Callable[[str], str]) -> Layout:
    """The base's distribution of tensors over files; tensors it does not have go to the last file.

    Args:
        tensors: of the result.
        base_name: the base's name of a tensor of the result.
    """
    files = {name: file.path.name for name, file in base.files.items()} if base is not None else {}
    names = sorted(set(files.values())) if len(set(files.values())) > 1 else [SINGLE]
    layout: dict[str, dict[str, TensorInfo]] = {name: {} for name in names}
    for name, info in tensors.items():
        own = files.get(base_name(name), names[-1])
        layout[own if own in layout else names[-1]][name] = info
    return {file: held for file, held in layout.items() if held}


class CheckpointWriter:
    """Writes tensors into safetensors files piece by piece, from any thread, in any order; headers come first.

    Several processes may write to the same files: one makes them, the others open theirs with `join=True`.
    """

    def __init__(self, folder: Path, layout: Layout, *, join: bool = False) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._writing = threading.Lock()  # the kernel locks a file that is written to; waiting for that burns a processor
        self._descriptors: list[int] = []
        for file, tensors in layout.items():
            self._create(folder / file, tensors, join)
        if not join and (len(layout) > 1 or SINGLE not in layout):
            _write_index(folder / INDEX, layout)

    def _create(self, path: Path, tensors: Mapping[str, TensorInfo], join: bool) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset, ordered = 0, sorted(tensors.items(), key=lambda item: (-item[1].dtype.bits, item[0]))
        for name, info in ordered:
            header[name] = {"dtype": info.dtype.code, "shape": list(info.shape), "data_offsets": [offset, offset + info.nbytes]}
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_RDWR if join else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        if not join:
            _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
            os.ftruncate(descriptor, 8 + len(text) + offset)
        for name, _ in ordered:
            begin: int = header[name]["data_offsets"][0]  # type: ignore[index]
            self._places[name] = (descriptor, 8 + len(text) + begin)

    def write(self, name: str, start: int, words: Words) -> None:
        """Put words at flat index `start` of a tensor."""
        descriptor, offset = self._places[name]
        with self._writing:
            _write_all(descriptor, memoryview(words.data).cast("B"), offset + start * words.itemsize)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_all(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _write_index(path: Path, layout: Layout) -> None:
    total = sum(info.nbytes for tensors in layout.values() for info in tensors.values())
    weight_map = {name: file for file, tensors in layout.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")
