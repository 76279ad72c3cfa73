"""Live weights: a module or a state dict seen as flat words under checkpoint names, as far as this process
holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, Union

import numpy as np
import torch
from numpy.typing import NDArray

from ..dtypes import DTYPES, DType, Words
from ..errors import CheckpointError, ConfigError, TensorMismatch
from ..kernels.backends import checked
from ..kernels.launch_tables import INTEGERS
from ..parallel.ranks import Ranks
from ..parallel.threads import once
from . import live_lora as lora
from . import sharding as engines
from .checkpoint_names import as_in_files
from .low_rank import LowRank
from .ownership import Span, Spans, shares
from .protocol import TensorInfo
from .sharding import Held, Piece

Live = Union[torch.nn.Module, Mapping[str, torch.Tensor]]
Source = Literal["weights", "master"]
"""What is read where an engine trains fp32 masters beside 16-bit weights: the weights, or the masters."""

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class LiveWeights:
    """Implements `Weights` over tensors in memory. Words of contiguous CPU tensors are views: nothing is
    copied.

    Where an engine spreads the model over processes, `tensors` tells of all of it, and `read` gives what this
    process holds.

    Args:
        live: a module, wrapped by whatever trains it, or a state dict.
        label: what messages call it.
        source: see `Source`.
        ranks: the processes that hold the model together; they build their `LiveWeights` at the same time.
        kernels: those that work on it, "torch", "cpu" or "cuda"; by default what DARE_TRAIN_KERNELS
            names, or those of the devices that tensors lie on.

    Attributes:
        tensors: dtype and whole shape by checkpoint name.
        held: [start, stop) of the elements that lie in this process, by checkpoint name.
        adapted: whether it is a PEFT model. Then the tensors are the base model's under the adapters: see
            `updates`.
        trained_whole: names of tensors that an adapter trains a copy of (`modules_to_save`), which is what is
            read here.

    Raises:
        ConfigError: a tensor's layout is not known, or it has no storage anywhere; `source` names what the
            engine has not; there are no such kernels.
        CheckpointError: a tensor's dtype is not supported.
    """

    def __init__(
        self,
        live: Live,
        *,
        label: str = "model in memory",
        source: Source = "weights",
        ranks: Ranks | None = None,
        kernels: str | None = None,
    ) -> None:
        self.label, self.ranks, self.kernels = label, ranks or Ranks(), checked(kernels, "kernels")
        self._module = live if isinstance(live, torch.nn.Module) else None
        module: Any = self._module
        if module is not None:
            engines.reshard(module)
        self._parameters = dict(checkpoint_tensors(live))
        self.adapted, self.trained_whole = lora.is_adapted(live), frozenset[str]()
        if self.adapted:
            self._parameters, self.trained_whole = lora.base_tensors(live, self._parameters)
        held = engines.held(self._parameters.items(), module)
        if module is not None:
            held = as_in_files(module.get_base_model() if self.adapted else module, held)
        if source == "master":
            _check_masters(held)
            held = {name: _masters(name, one) for name, one in held.items()}
        self._held = held
        self.tensors = {name: TensorInfo(_dtype_of(name, one.dtype), one.shape) for name, one in held.items()}
        self.held: Spans = {
            name: tuple((piece.start, piece.stop) for piece in one.pieces) for name, one in held.items()
        }

    @once
    def shares(self) -> Mapping[str, tuple[tuple[Span, ...], ...]]:
        """What each rank speaks for of each tensor; over all ranks, each element once. All ranks ask for it
        together.
        """
        return shares(self.tensors, self.held, self.ranks)

    @once
    def owned(self) -> Spans:
        """[start, stop) of the elements that this process speaks for."""
        return {name: spans[self.ranks.rank] for name, spans in self.shares.items()}

    def renamed(self, names: Mapping[str, str]) -> LiveWeights:
        """The same weights under other names: `names` says which of the others each of them is. Those it
        leaves out are not seen.
        """
        view = copy(self)
        for worked_out in (name for name in ("shares", "owned") if name in vars(self)):
            del vars(view)[worked_out]
        view._held = {name: self._held[other] for name, other in names.items()}
        view.tensors = {name: self.tensors[other] for name, other in names.items()}
        view.held = {name: self.held[other] for name, other in names.items()}
        return view

    def holding(self, name: str) -> Held:
        """In which pieces this process holds a tensor, and its masters, if an engine keeps some."""
        return self._held[name]

    @property
    def whole(self) -> bool:
        """Whether every tensor lies in this process completely."""
        return all(
            self.held[name] == (((0, info.numel),) if info.numel else ())
            for name, info in self.tensors.items()
        )

    def updates(self) -> dict[str, list[LowRank]]:
        """What adapters do to the base, by tensor, copied. All ranks call it together."""
        return lora.updates(self._module) if self.adapted else {}

    def read(self, name: str, start: int, count: int) -> Words:
        pieces = self._within(self._held[name].pieces, start, start + count)
        if sum(piece.length for piece in pieces) != count:
            remedy = (
                "other ranks hold the rest: use the callback or a Snapshotter on all of "
                "them, or the saved checkpoint"
            )
            raise ConfigError(
                name,
                expected=f"elements [{start}, {start + count}) in this process",
                found="a part of them",
                remedy=remedy,
            )
        if len(pieces) == 1:
            return self._words(name, pieces[0])
        return np.concatenate(
            [np.empty(0, self.tensors[name].dtype.word), *(self._words(name, piece) for piece in pieces)]
        )

    def lying(self, name: str, start: int, count: int) -> tuple[torch.Tensor, int] | None:
        """Where elements [start, start + count) lie, if that is one place: words in memory, 1-D, and how many
        are before the first.
        """
        pieces = self._within(self._held[name].pieces, start, start + count)
        if len(pieces) != 1 or pieces[0].length != count or not pieces[0].tensor.is_contiguous():
            return None
        (piece,) = pieces
        return piece.tensor.detach().reshape(-1).view(INTEGERS[piece.tensor.itemsize]), piece.offset

    def devices(self) -> set[torch.device]:
        """Those that the weights lie on, as far as they lie in this process."""
        return {piece.tensor.device for held in self._held.values() for piece in held.pieces}

    def alone(self, name: str) -> bool:
        """Whether a tensor can be changed where it lies: no engine keeps masters of it, which would have to
        follow.
        """
        return self._held[name].masters is None

    def put(self, name: str, start: int, words: Words, log: Callable[[Change], object]) -> None:
        """Make `words` the elements from flat index `start` on, as far as they lie here. What they were goes
        to `log` first.

        Masters of the elements that change take their new values; call `settle` when all is put.
        """
        held = self._held[name]
        for piece in self._within(held.pieces, start, start + words.size):
            new = words[piece.start - start : piece.stop - start]
            changed = np.flatnonzero(new != self._words(name, piece))
            if changed.size:
                values = _as_tensor(new[changed], piece.tensor.dtype)
                _overwrite(piece, changed, values, log)
                for master in self._within(held.masters or (), piece.start, piece.stop):
                    inside = (changed >= master.start - piece.start) & (changed < master.stop - piece.start)
                    shift = master.start - piece.start
                    _overwrite(
                        master,
                        changed[inside] - shift,
                        values[torch.from_numpy(inside)].to(master.tensor.dtype),
                        log,
                    )

    def overwrite(self, name: str, start: int, words: Words) -> None:
        """Like `put` with no way back, for weights that are only looked at: masters do not follow."""
        for piece in self._within(self._held[name].pieces, start, start + words.size):
            new = _as_tensor(words[piece.start - start : piece.stop - start], piece.tensor.dtype)
            if piece.tensor.is_contiguous():
                piece.flat().copy_(new)
            else:
                places = torch.arange(piece.offset, piece.offset + piece.length, device=piece.tensor.device)
                _bits(piece.tensor).put_(places, _bits(new).to(places.device))

    def settle(self) -> None:
        """Let engines that keep a second copy of some weights make it anew from what was put or
        overwritten.
        """
        if self._module is not None:
            engines.reshard(self._module)
        parameter: Any
        for parameter in self._parameters.values():
            if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
                parameter.partition()

    def _within(self, pieces: Iterable[Piece], start: int, stop: int) -> list[Piece]:
        return [part for piece in pieces if (part := piece.within(start, stop)) is not None]

    def _words(self, name: str, piece: Piece) -> Words:
        return piece.flat().cpu().view(torch.uint8).numpy().view(self.tensors[name].dtype.word)


@dataclass(frozen=True)
class Change:
    """Elements of a tensor as they were before they were overwritten."""

    tensor: torch.Tensor
    places: torch.Tensor
    """int64, in the tensor's flat order."""
    bits: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.places.nbytes + self.bits.nbytes

    def undo(self) -> None:
        _bits(self.tensor).put_(self.places, self.bits)


def _overwrite(
    piece: Piece, positions: NDArray[np.int64], values: torch.Tensor, log: Callable[[Change], object]
) -> None:
    places = torch.from_numpy(positions + piece.offset).to(piece.tensor.device)
    bits = _bits(piece.tensor)
    log(Change(piece.tensor, places, bits.take(places)))
    bits.put_(places, _bits(values).to(bits.device))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as integers: what can be moved without being interpreted."""
    return tensor.detach().view(INTEGERS[tensor.dtype.itemsize])


def _as_tensor(words: Words, dtype: torch.dtype) -> torch.Tensor:
    bits = words.view(f"i{words.itemsize}" if words.itemsize > 1 else "u1")
    return torch.from_numpy(bits if bits.flags.writeable else bits.copy()).view(dtype)


def checkpoint_tensors(live: Live) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, tensor) as `save_pretrained` writes them: tied tensors once, persistent buffers
    included.
    """
    if isinstance(live, Mapping):
        for name, tensor in live.items():
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(str(name), expected="a tensor", found=f"a {type(tensor).__name__}")
            yield name, tensor
        return
    tied = set(getattr(live, "all_tied_weights_keys", None) or ())
    seen: set[tuple[object, ...]] = set()
    for name, tensor in sorted(dict(engines.named_tensors(live)).items(), key=lambda item: item[0] in tied):
        place = _place(tensor)
        if place not in seen:
            seen.add(place)
            yield name, tensor


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for tensors that share their elements."""
    if engines.is_dtensor(tensor) or hasattr(tensor, "ds_tensor") or not tensor.numel() or tensor.is_meta:
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _masters(name: str, held: Held) -> Held:
    """The same with its masters for weights."""
    return held if held.masters is None else Held(held.shape, torch.float32, held.masters)


def _check_masters(held: Mapping[str, Held]) -> None:
    without = [
        name
        for name, one in held.items()
        if one.masters is None and one.dtype in (torch.bfloat16, torch.float16)
    ]
    if without and all(one.masters is None for one in held.values()):
        remedy = 'use source="weights"; or train with DeepSpeed ZeRO, which keeps masters'
        expected = "an engine that keeps fp32 masters of 16-bit weights"
        raise ConfigError("source", expected=expected, found=f"none of {without[0]}", remedy=remedy)


def _dtype_of(name: str, dtype: torch.dtype) -> DType:
    if dtype not in _CODES:
        raise CheckpointError(name, expected=f"one of {', '.join(_CODES.values())}", found=str(dtype))
    return DTYPES[_CODES[dtype]]


def check_same_tensors(
    found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], *, what: str, remedy: str
) -> None:
    """Both hold the same names and shapes.

    Raises:
        TensorMismatch: naming the first tensor that is missing, extra or of another shape.
    """
    for name, info in expected.items():
        if name not in found:
            raise TensorMismatch(name, expected=f"in {what}", found="missing", remedy=remedy)
        if found[name].shape != info.shape:
            raise TensorMismatch(
                name, expected=f"shape {info.shape}", found=f"{found[name].shape} in {what}", remedy=remedy
            )
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise TensorMismatch(extra[0], expected=f"not in {what}", found="extra", remedy=remedy)
