"""What every holder of weights offers, on disk or in memory, and other ways to look at one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from ..dtypes import DTYPES, DType, Words, cast
from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from ..parallel.ranks import Ranks

MOST_DIMENSIONS = 64
"""Of a tensor, as in numpy and torch."""
LONGEST_NAME = 8_192
"""Characters of a tensor's name."""
SEGMENT = 1 << 20
"""Elements of one segment: segments begin at multiples of it, whoever writes them."""


@dataclass(frozen=True)
class TensorInfo:
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.code} {list(self.shape)}"


class Weights(Protocol):
    """Named tensors, read as flat words."""

    @property
    def label(self) -> str:
        """What to call these weights in a message: a folder, a Hub id, or "model in memory"."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, start: int, count: int) -> Words:
        """Words of elements [start, start + count) in flat order, shape (count,). They may be written to
        only if the array owns its memory: then nobody else has it.
        """


@runtime_checkable
class Shared(Weights, Protocol):
    """Weights that may lie on several ranks, each of which speaks for a part of them."""

    @property
    def ranks(self) -> Ranks: ...

    @property
    def owned(self) -> Mapping[str, tuple[tuple[int, int], ...]]:
        """[start, stop) of the elements that this process speaks for; over all ranks, each element once."""


@runtime_checkable
class Renamable(Weights, Protocol):
    """Weights that stay what they are, whatever that is, under other names."""

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """As `Mapped`."""


@runtime_checkable
class InMemory(Weights, Protocol):
    """Weights that can say where their words lie."""

    @property
    def kernels(self) -> str | None:
        """The kernels that were asked for by name."""

    def lying(self, name: str, start: int, count: int) -> tuple[torch.Tensor, int] | None:
        """The tensor that holds the run, flat, and at which of its elements the run begins; None where no
        tensor here holds all of it.
        """

    def devices(self) -> set[torch.device]:
        """Those that the weights lie on, as far as they lie in this process."""


class Mapped:
    """The same weights under other names.

    `names` says which of the weights each of them is. Those it leaves out are not seen.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights = weights
        self._names = names
        self.label = weights.label
        self.tensors = {name: weights.tensors[source] for name, source in names.items()}

    def read(self, name: str, start: int, count: int) -> Words:
        return self._weights.read(self._names[name], start, count)


class Chosen:
    """Weights of which some tensors are read elsewhere: `instead` says where, by name."""

    def __init__(self, weights: Weights, instead: Mapping[str, Weights]) -> None:
        self.label = weights.label
        elsewhere = {name: other.tensors[name] for name, other in instead.items()}
        self.tensors = {**weights.tensors, **elsewhere}
        self._weights = weights
        self._instead = instead

    def read(self, name: str, start: int, count: int) -> Words:
        return self._instead.get(name, self._weights).read(name, start, count)


def under(weights: Weights, names: Mapping[str, str]) -> Weights:
    """The same weights under other names, as `Mapped`; where they can say where they lie, they still can."""
    return weights.renamed(names) if isinstance(weights, Renamable) else Mapped(weights, names)


def only(weights: Weights, names: Iterable[str]) -> Weights:
    """Some of the weights, under their own names."""
    return under(weights, {name: name for name in names})


class Cast:
    """The same weights, floating-point tensors rounded to the dtypes given by name; others unchanged."""

    def __init__(self, weights: Weights, dtypes: Mapping[str, DType]) -> None:
        self._weights = weights
        self.label = weights.label
        self.tensors = {
            name: TensorInfo(_target(info.dtype, dtypes.get(name)), info.shape)
            for name, info in weights.tensors.items()
        }

    def read(self, name: str, start: int, count: int) -> Words:
        words = self._weights.read(name, start, count)
        return cast(words, self._weights.tensors[name].dtype, self.tensors[name].dtype)


def _target(dtype: DType, wanted: DType | None) -> DType:
    if wanted is not None and dtype.can_be_delta and wanted.can_be_delta:
        return wanted
    return dtype


class ArrayWeights:
    """Weights in a mapping from names to numpy arrays."""

    def __init__(self, arrays: Mapping[str, np.ndarray], *, label: str = "arrays in memory") -> None:
        self.label = label
        self._arrays = {
            name: np.ascontiguousarray(array, array.dtype.newbyteorder("=")) for name, array in arrays.items()
        }
        self.tensors = {
            name: TensorInfo(DTYPES[_numpy_code(array.dtype, name)], array.shape)
            for name, array in self._arrays.items()
        }

    def read(self, name: str, start: int, count: int) -> Words:
        return self._arrays[name].reshape(-1).view(self.tensors[name].dtype.word)[start : start + count]


class HeldWords:
    """Words in memory, by the names of tensors that are described elsewhere."""

    def __init__(self, label: str, tensors: Mapping[str, TensorInfo], words: Mapping[str, Words]) -> None:
        self.label = label
        self.tensors = tensors
        self._words = words

    def read(self, name: str, start: int, count: int) -> Words:
        return self._words[name][start : start + count]


def _numpy_code(dtype: np.dtype[np.generic], name: str) -> str:
    code = "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{dtype.itemsize * 8}"
    if dtype.kind not in "biuf" or code not in DTYPES:
        raise CheckpointError(name, expected=f"one of {', '.join(DTYPES)}", found=f"dtype {dtype}")
    return code


def runs(numel: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, count) of consecutive runs that tile [0, numel)."""
    for start in range(0, numel, length):
        yield start, min(length, numel - start)
