"""Tensors of files that are views of a model's: blocks found from where numbers go, cut where a process
holds less.
"""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch

from dare_train.errors import ConfigError
from dare_train.weights.live.layouts import Block, Place, blocks_of, widened
from dare_train.weights.live.sharding import Held, Piece
from dare_train.weights.live.views import held_in, numbered

SHAPES = {"a": (4, 6, 10), "b": (8, 10), "c": (5, 10)}


def views(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "as it is": a,
        "rows": b[2:6],
        "turned": a.transpose(1, 2),
        "turned and cut": a.transpose(1, 2)[1],
        "joined": torch.cat([c, b]),
        "joined along the second axis": torch.cat([a[:, :2], a[:, 4:]], 1),
        "joined, then turned": torch.cat([c, b]).T,
        "interleaved": b.reshape(4, 2, 10).transpose(0, 1).reshape(8, 10),
        "permuted in heads": b.reshape(2, 2, 2, 10).transpose(1, 2).reshape(8, 10),
        "of five axes": a.reshape(4, 6, 1, 5, 2),
        "columns": c[:, 3:7],
        "empty": a[:0],
        "one": a[1, 2, 3],
    }


@pytest.mark.parametrize("what", views(*(torch.zeros(shape) for shape in SHAPES.values())))
def test_blocks_say_where_each_element_lies(what: str) -> None:
    stand_ins, bounds = numbered(SHAPES)
    part = views(*stand_ins.values())[what]
    blocks = blocks_of(what, part.reshape(-1).numpy(), bounds)
    assert len(blocks) <= 20
    found = [bounds[block.source][0] + block.places(0, block.length) for block in blocks]
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *found]), part.reshape(-1).numpy())
    assert what != "empty" or blocks[0].length == 0
    assert [block.start for block in blocks] == np.cumsum([0, *(block.length for block in blocks)])[
        :-1
    ].tolist()


@pytest.mark.parametrize("what", views(*(torch.zeros(shape) for shape in SHAPES.values())))
@pytest.mark.parametrize(
    "edges", [(0, 240), (0, 57, 58, 113, 240), (0, 1, 120, 240), tuple(range(0, 241, 7)) + (240,)]
)
def test_pieces_are_views_however_a_model_is_cut(what: str, edges: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    stand_ins, bounds = numbered(SHAPES)
    index = views(*stand_ins.values())[what]
    place = Place(tuple(index.shape), blocks_of(what, index.reshape(-1).numpy(), bounds))
    held = {}
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        cuts = sorted({min(edge, flat.numel()) for edge in edges})
        pieces = tuple(Piece(s, e - s, flat[s:e]) for s, e in zip(cuts, cuts[1:], strict=False))
        held[name] = Held(tensor.shape, tensor.dtype, pieces)
    got = held_in(place, what, held)
    expected = views(*tensors.values())[what]
    assert got.shape == tuple(expected.shape)
    out = torch.full((expected.numel(),), torch.nan)
    for piece in got.pieces:
        assert torch.isnan(out[piece.start : piece.stop]).all()
        out[piece.start : piece.stop] = piece.flat()
        storage = piece.owner.reshape(-1)[torch.from_numpy(piece.places(np.arange(piece.length)))]
        assert torch.equal(storage, piece.flat())
    assert torch.equal(out, expected.reshape(-1))


def test_what_is_found_with_short_rows_is_so_with_long_ones() -> None:
    narrow, wide = {"a": (4, 6, 8), "b": (8, 8)}, {"a": (4, 6, 40), "b": (8, 40)}

    def cut(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        return [a[2], a[:, 3:], a.transpose(1, 2), torch.cat([b[4:], b[:1]])]

    stand_ins, bounds = numbered(narrow)
    real, real_bounds = numbered(wide)
    widths = {"a": (8, 40), "b": (8, 40)}
    for part, expected in zip(cut(*stand_ins.values()), cut(*real.values()), strict=True):
        blocks = widened(blocks_of("x", part.reshape(-1).numpy(), bounds), widths)
        assert blocks is not None
        found = [real_bounds[block.source][0] + block.places(0, block.length) for block in blocks]
        assert np.array_equal(np.concatenate(found), expected.reshape(-1).numpy())
    for part in (stand_ins["a"][..., :4], stand_ins["b"].reshape(8, 2, 4).transpose(1, 2)):
        assert widened(blocks_of("x", part.reshape(-1).numpy(), bounds), widths) is None


def test_an_order_without_any_is_refused() -> None:
    shuffled = np.random.default_rng(0).permutation(1 << 18)
    with pytest.raises(
        ConfigError, match="x: expected a tensor that files have cut, joined or turned, found one in"
    ):
        blocks_of("x", shuffled, {"a": (0, 1 << 18)})


def test_parts_of_one_tensor_have_one_dtype() -> None:
    held = {
        name: Held((2,), dtype, (Piece(0, 2, torch.zeros(2, dtype=dtype)),))
        for name, dtype in (("a", torch.float32), ("b", torch.bfloat16))
    }
    place = Place((4,), (Block(0, "a", 0, (2,), (1,)), Block(2, "b", 0, (2,), (1,))))
    with pytest.raises(ConfigError, match=r"ab: expected one dtype.* found torch.float32 and torch.bfloat16"):
        held_in(place, "ab", held)
    assert prod(place.shape) == 4
