"""Statistics of a model on its own data, on disk: what Fisher merging and RegMean need beside the weights.

One safetensors file for each kind, every tensor float32, by checkpoint name. Neither torch nor the data is
needed to read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError, ConfigError, brief
from ...parallel.staged_file import staged_file
from ...reading.structures import json_of
from ...weights.files.checkpoint import SafetensorsFile
from ...weights.protocol import TensorInfo

StatisticsKind = Literal["fisher", "gram"]
"""`fisher`: diagonal of the Fisher information, shaped as the tensors. `gram`: mean of x xᵀ of a linear
layer's inputs, [in, in]."""

Floats = NDArray[np.float32]

FORMAT = "dare_train statistics"
_FLOAT32 = ("float32", "torch.float32")


def statistics_path(model_folder: str | os.PathLike[str], kind: StatisticsKind) -> Path:
    """Where the statistics of a package or checkpoint lie unless the user says otherwise: beside its folder.

    Raises:
        ConfigError: `kind` is not known.
    """
    _check_kind(kind)
    folder = Path(model_folder)
    folder = folder if folder.name else folder.absolute()
    return folder.with_name(f"{folder.name}.{kind}.safetensors")


def save_statistics(
    path: str | os.PathLike[str],
    kind: StatisticsKind,
    tensors: Mapping[str, Any],
    *,
    examples: int,
    merge: str = "",
) -> Path:
    """Write statistics as one file, which appears complete or not at all, in place of an older one. Returns
    its path.

    Args:
        path: of the file; folders above it are made.
        kind: see `StatisticsKind`.
        tensors: float32 numpy arrays or torch tensors by checkpoint name; one at a time is copied, if at all.
            Its attribute `transposed`, if it has one, is kept: names of tensors that hold a layer as [in,
            out].
        examples: how many examples they are means over.
        merge: the merge whose layers the inputs came through, and the model's place in it, if it is not the
            model itself; see `regmean_plus_plus`.

    Raises:
        ConfigError: `kind` or `examples` is wrong, or a tensor is not float32.
        StorageError, OutputExists: the disk is full; something else than a file is there.
    """
    _check_kind(kind)
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise ConfigError("examples", expected="a positive number of examples", found=repr(examples))
    for name, tensor in tensors.items():
        if str(tensor.dtype) not in _FLOAT32:
            raise ConfigError(name, expected="float32", found=str(tensor.dtype), remedy="convert it first")
    path = Path(path)
    metadata = {"format": FORMAT, "kind": kind, "examples": str(examples)}
    if merge:
        metadata["merge"] = merge
    if transposed := sorted(getattr(tensors, "transposed", ())):
        metadata["transposed"] = json.dumps(transposed)
    with staged_file(path) as file:
        _write(file, tensors, metadata)
    return path


def _write(file: BinaryIO, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    names = sorted(tensors)
    offset = 0
    for name in names:
        shape = [int(size) for size in tensors[name].shape]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + 4 * prod(shape)]}
        offset += 4 * prod(shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(_as_array(tensors[name]).reshape(-1).view(np.uint8).data)


def _as_array(tensor: Any) -> Floats:
    """A numpy array or a torch tensor, wherever it lies, as an array in the order and the byte order of
    files.
    """
    array = tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().numpy()
    return np.ascontiguousarray(array, "<f4")


class StatisticsFile:
    """Statistics on disk, read through a memory map.

    Attributes:
        path: of the file.
        kind: see `StatisticsKind`.
        examples: how many examples the tensors are means over.
        merge: as for `save_statistics`.
        tensors: float32 and shape by checkpoint name.
    """

    def __init__(self, file: SafetensorsFile, kind: StatisticsKind, examples: int) -> None:
        self._file = file
        self.path = file.path
        self.kind = kind
        self.examples = examples
        self.merge = file.metadata.get("merge", "")
        self.tensors: Mapping[str, TensorInfo] = file.tensors
        self._transposed = _transposed(file)

    @classmethod
    def open(cls, path: str | os.PathLike[str], kind: StatisticsKind) -> StatisticsFile:
        """Open a file of that kind.

        Raises:
            ConfigError: `kind` is not known.
            CheckpointError: the file is not there, is damaged, is of another kind, or holds something else
                than float32.
        """
        _check_kind(kind)
        file = SafetensorsFile(Path(path))
        metadata = file.metadata
        if metadata.get("format") != FORMAT or metadata.get("kind") != kind:
            what = (
                f"{metadata.get('kind')} statistics"
                if metadata.get("format") == FORMAT
                else "a safetensors file of something else"
            )
            raise CheckpointError(
                str(path), expected=f"{kind} statistics", found=what, remedy="save_statistics writes them"
            )
        for name, info in file.tensors.items():
            _check_tensor(f"{file.path}: {name}", info, kind)
        return cls(file, kind, _examples(file))

    def transposed(self, name: str) -> bool:
        """Whether the tensor whose inputs these are holds its layer as [in, out] instead of [out, in]."""
        return name in self._transposed

    def read(self, name: str, start: int, count: int) -> Floats:
        """The elements with flat indices [start, start + count), shape (count,); not to be written to."""
        return self._file.read(name, start, count).view("<f4")

    def whole(self, name: str) -> Floats:
        """One tensor in its shape; not to be written to."""
        info = self.tensors[name]
        return self.read(name, 0, info.numel).reshape(info.shape)


def _check_kind(kind: object) -> None:
    if kind not in get_args(StatisticsKind):
        raise ConfigError("kind", expected=f"one of {', '.join(get_args(StatisticsKind))}", found=repr(kind))


def _check_tensor(label: str, info: TensorInfo, kind: StatisticsKind) -> None:
    if info.dtype.code != "F32":
        raise CheckpointError(label, expected="F32", found=info.dtype.code)
    if kind == "gram" and (len(info.shape) != 2 or info.shape[0] != info.shape[1]):
        raise CheckpointError(label, expected="a square matrix", found=f"shape {info.shape}")


def _examples(file: SafetensorsFile) -> int:
    text = file.metadata.get("examples", "")
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) > 0):
        raise CheckpointError(
            f"{file.path}: examples",
            expected="a positive number",
            found=brief(text),
            remedy="fetch the file again",
        )
    return int(text)


def _transposed(file: SafetensorsFile) -> frozenset[str]:
    text = file.metadata.get("transposed", "[]")
    where = f"{file.path}: transposed"
    return frozenset(json_of(text, list[str], where=where, expected="a list of tensor names"))
