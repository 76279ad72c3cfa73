"""Live weights: a module or a state dict as flat words by checkpoint name, as far as they lie here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from ...dtypes import DTYPES, DType, Words
from ...errors import CheckpointError, ConfigError, TensorMismatch
from ...kernels.backends import checked
from ...kernels.launch_tables import INTEGERS
from ...parallel.ranks import Ranks
from ...parallel.threads import once
from ..low_rank import Update
from ..protocol import TensorInfo
from . import lora_updates
from . import sharding as engines
from .layouts import Place
from .live_lock import Places
from .live_lora import MERGE
from .named_tensors import Live, NamedTensors, tied
from .ownership import Span, Spans, shares
from .sharding import Held, Piece
from .viewed_updates import in_files
from .views import held_in

Reading = Literal["weights", "master", "finest"]
"""What is read where an engine trains fp32 masters beside 16-bit weights (`config.Source`); `finest` are
masters where there are some."""

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
    """Implements `Weights` over tensors in memory. Words of contiguous CPU tensors are views, not copies.

    Where an engine spreads the model over processes, `tensors` tells of all of it, and `read` gives what lies
    in this process.

    Args:
        live: a module, wrapped by whatever trains it, or a state dict.
        label: what messages call it.
        source: see `Reading`.
        ranks: the processes that hold the model together; they build their `LiveWeights` at the same time.
        kernels: those that work on it, "torch", "cpu" or "cuda"; by default what DARE_TRAIN_KERNELS
            names, or those of the devices that tensors lie on.
        but_packed: leave out what lies quantised in memory, under adapters, instead of refusing it.

    Attributes:
        tensors: dtype and whole shape by checkpoint name.
        held: [start, stop) of the elements that lie in this process, by checkpoint name.
        adapted: whether it has adapters. Then the tensors are those of the model under them, for whose
            updates see `updates`.
        trained_whole: names of tensors whose copies an adapter trains (`modules_to_save`): those are read.
        trained: names of tensors that are parameters in training themselves, not by adapters.
        packed: names of modules that were left out, and how each is quantised.

    Raises:
        ConfigError: a tensor's layout is not known, or it has no storage anywhere, or is quantised; what an
            adapter does has no tensor of its own in a checkpoint; `source` names what the engine has not;
            there are no such kernels.
        CheckpointError: a tensor's dtype is not supported.
    """

    def __init__(
        self,
        live: Live,
        *,
        label: str = "model in memory",
        source: Reading = "weights",
        ranks: Ranks | None = None,
        kernels: str | None = None,
        but_packed: bool = False,
    ) -> None:
        self.label = label
        self.ranks = ranks or Ranks()
        self.kernels = checked(kernels, "kernels")
        self._module = live if isinstance(live, torch.nn.Module) else None
        if self._module is not None:
            engines.reshard(self._module)
        named = NamedTensors(live)
        self.adapted = named.adapted
        self.packed = dict(named.packed)
        if self.packed and not (but_packed and self.adapted):
            _refuse_packed(self.packed)
        self._parameters = named.tensors
        held = engines.held(named.tensors.items(), self._module)
        self._places = named.places(held)
        self._shapes = {name: tensor.shape for name, tensor in held.items()}
        held = {file: held_in(place, file, held) for file, place in self._places.items()}
        if source == "master":
            _check_masters(held)
        if source != "weights":
            held = {name: _masters(tensor) for name, tensor in held.items()}
        self._held = held
        self._inner = named.inner
        self.trained_whole = self._in_files(named.trained_whole)
        training = {name for name, tensor in named.tensors.items() if tensor.requires_grad}
        self.trained = self._in_files(training)
        self.tensors = {
            name: TensorInfo(_dtype_of(name, tensor.dtype), tensor.shape) for name, tensor in held.items()
        }
        self.held: Spans = {name: _spans(tensor) for name, tensor in held.items()}

    def _in_files(self, names: Collection[str]) -> frozenset[str]:
        """What checkpoints call tensors that the model calls so."""
        names = frozenset(names)
        return frozenset(file for file, place in self._places.items() if place.sources & names)

    @once
    def shares(self) -> Mapping[str, tuple[tuple[Span, ...], ...]]:
        """What each rank speaks for of each tensor; over all ranks, each element once.

        All ranks ask for it together.
        """
        return shares(self.tensors, self.held, self.ranks)

    @once
    def owned(self) -> Spans:
        """[start, stop) of the elements that this process speaks for."""
        return {name: spans[self.ranks.rank] for name, spans in self.shares.items()}

    def renamed(self, names: Mapping[str, str]) -> LiveWeights:
        """The same weights under other names.

        `names` says which of the weights each of them is. Those it leaves out are not seen.
        """
        view = copy(self)
        for worked_out in ("shares", "owned"):
            vars(view).pop(worked_out, None)
        view._held = {name: self._held[source] for name, source in names.items()}
        view.tensors = {name: self.tensors[source] for name, source in names.items()}
        view.held = {name: self.held[source] for name, source in names.items()}
        return view

    def holding(self, name: str) -> Held:
        """In which pieces this process holds a tensor, and its masters, if an engine keeps some."""
        return self._held[name]

    @property
    def whole(self) -> bool:
        """Whether every tensor lies in this process completely."""
        return all(map(self._is_here, self.tensors))

    def check_whole(self) -> None:
        """Raises ConfigError, naming the first tensor that does not lie in this process completely."""
        for name, info in self.tensors.items():
            if not self._is_here(name):
                raise _elsewhere(name, 0, info.numel)

    def _is_here(self, name: str) -> bool:
        numel = self.tensors[name].numel
        return self.held[name] == (((0, numel),) if numel else ())

    def updates(self) -> dict[str, list[Update]]:
        """What adapters do to the base, by tensor, copied. All ranks call it together.

        Raises:
            ConfigError: an adapter is of a kind that merging cannot express, or updates what has no tensor of
                its own in a checkpoint.
        """
        if not self.adapted:
            return {}
        aliases = tied(self._inner.model)
        found = lora_updates.updates(self._module, self._inner.path)
        once = lora_updates.once_where_tied(found, aliases)
        lora_updates.check_tied(self._module, self._inner.path, aliases)
        of_packed = {name for name in once if name.rpartition(".")[0] in self.packed}
        places = {**self._places, **{name: Place.whole(name, ()) for name in of_packed}}
        known = {source for place in places.values() for source in place.sources}
        for name in once:
            if name not in known:
                raise _no_tensor_for(name)
        return in_files(once, places, self._shapes)

    def read(self, name: str, start: int, count: int) -> Words:
        pieces = self._within(self._held[name].pieces, start, start + count)
        if sum(piece.length for piece in pieces) != count:
            raise _elsewhere(name, start, count)
        if len(pieces) == 1:
            return self._words(name, pieces[0])
        nothing = np.empty(0, self.tensors[name].dtype.word)
        return np.concatenate([nothing, *(self._words(name, piece) for piece in pieces)])

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

    def places(self) -> Places:
        """Where the weights lie in this process: the same for all that leads to the same model."""
        tensors = [piece.tensor for held in self._held.values() for piece in held.pieces]
        storages = [(str(tensor.device), tensor.untyped_storage().data_ptr()) for tensor in tensors]
        return frozenset(place for place in storages if place[1])

    def alone(self, name: str) -> bool:
        """Whether a tensor can be changed where it lies: no engine keeps masters that have to follow."""
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
                    shift = master.start - piece.start
                    inside = (changed >= shift) & (changed < master.stop - piece.start)
                    master_values = values[torch.from_numpy(inside)].to(master.tensor.dtype)
                    _overwrite(master, changed[inside] - shift, master_values, log)

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
        """Let engines that keep second copies of weights make them anew from what was put or overwritten."""
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


def _spans(held: Held) -> tuple[Span, ...]:
    """[start, stop) of the pieces, or of all of it: other ranks are to see the same cuts where it is not
    whole.
    """
    spans = tuple((piece.start, piece.stop) for piece in held.pieces)
    whole = ((0, prod(held.shape)),)
    return whole if len(spans) > 1 and sum(stop - start for start, stop in spans) == whole[0][1] else spans


def _elsewhere(name: str, start: int, count: int) -> ConfigError:
    """Why a run of a tensor cannot be read in this process alone."""
    remedy = (
        "other ranks hold the rest: use the callback or a Snapshotter on all of them, or the saved checkpoint"
    )
    expected = f"elements [{start}, {start + count}) in this process"
    return ConfigError(name, expected=expected, found="a part of them", remedy=remedy)


def _no_tensor_for(name: str) -> ConfigError:
    """Why an adapter's update of a tensor would be lost."""
    expected = "a tensor of its own, which an adapter updates"
    if name.endswith(".bias"):
        remedy = "set lora_bias=False, or leave this module out of target_modules"
        return ConfigError(name, expected=expected, found="a module without bias", remedy=remedy)
    return ConfigError(name, expected=expected, found="none in a checkpoint", remedy=MERGE)


def _refuse_packed(packed: Mapping[str, str]) -> NoReturn:
    name, how = next(iter(packed.items()))
    remedy = (
        "train LoRA adapters on it, and give the full-precision model as base=; or load the model in full "
        "precision"
    )
    raise ConfigError(name, expected="weights in full precision", found=how, remedy=remedy)


def _masters(held: Held) -> Held:
    """The same with its masters for weights."""
    return held if held.masters is None else Held(held.shape, torch.float32, held.masters)


def _check_masters(held: Mapping[str, Held]) -> None:
    half = (torch.bfloat16, torch.float16)
    without = [name for name, tensor in held.items() if tensor.masters is None and tensor.dtype in half]
    if without and all(tensor.masters is None for tensor in held.values()):
        expected = "an engine that keeps fp32 masters of 16-bit weights"
        remedy = 'use source="weights"; or train with DeepSpeed ZeRO, which keeps masters'
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
            found_shape = f"{found[name].shape} in {what}"
            raise TensorMismatch(name, expected=f"shape {info.shape}", found=found_shape, remedy=remedy)
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise TensorMismatch(extra[0], expected=f"not in {what}", found="extra", remedy=remedy)
