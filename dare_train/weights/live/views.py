"""What a process holds of tensors of files that are views of a model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from ...errors import ConfigError
from .layouts import Block, Place
from .sharding import Held, Piece


def held_in(place: Place, name: str, held: Mapping[str, Held]) -> Held:
    """What is held of a tensor of the files, given what is held of the model's tensors.

    Raises:
        ConfigError: it is made of tensors that differ in dtype, or of which an engine keeps masters of some.
    """
    first, *others = [held[source] for source in sorted(place.sources)]
    if not others and place.is_whole(first.shape):
        return first
    for other in others:
        if other.dtype != first.dtype or (other.masters is None) != (first.masters is None):
            expected = "one dtype, and masters of all or of none, in what files hold as one tensor"
            found = f"{first.dtype} and {other.dtype}"
            remedy = "load the model in one dtype, and train all of it or nothing"
            raise ConfigError(name, expected=expected, found=found, remedy=remedy)
    masters = None
    if first.masters is not None:
        masters = _pieces(place, name, {source: held[source].masters or () for source in place.sources})
    pieces = _pieces(place, name, {source: held[source].pieces for source in place.sources})
    return Held(place.shape, first.dtype, pieces, masters)


def _pieces(place: Place, name: str, of: Mapping[str, Sequence[Piece]]) -> tuple[Piece, ...]:
    cut = [
        _view(name, part, piece)
        for block in place.blocks
        for piece in of[block.source]
        for part in block.within(piece.start, piece.stop)
    ]
    return tuple(sorted(cut, key=lambda piece: piece.start))


def _view(name: str, block: Block, piece: Piece) -> Piece:
    """A block that lies in a piece, as a piece of the file's tensor."""
    begin = piece.offset + block.offset - piece.start
    if block.is_run:
        return Piece(block.start, block.length, piece.tensor, begin, piece.parent)
    tensor = piece.tensor.detach()
    if not tensor.is_contiguous():
        expected = "a parameter that lies contiguously, since its files have it in another order"
        raise ConfigError(name, expected=expected, found=f"strides {tensor.stride()}")
    view = tensor.as_strided(block.shape, block.strides, tensor.storage_offset() + begin)
    return Piece(block.start, block.length, view, 0, piece.owner)


def numbered(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, int]]]:
    """A stand-in for each tensor, whose elements say where they lie, one tensor behind the other; and the
    bounds of each.
    """
    stand_ins = {}
    bounds = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + prod(shape)
        stand_ins[name] = torch.arange(begin, end).reshape(shape)
        bounds[name] = begin, end
        begin = end
    return stand_ins, bounds
