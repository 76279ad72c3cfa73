"""Who takes part with which elements, when the ranks tell each other what they hold."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare_train.dtypes import DTYPES
from dare_train.errors import ConfigError
from dare_train.parallel.ranks import Ranks
from dare_train.weights.live import ownership
from dare_train.weights.live.ownership import shares
from dare_train.weights.protocol import TensorInfo


class Told(Ranks):
    """Ranks without processes: what the others answer is known."""

    def __init__(self, rank: int, answers: list[Any]) -> None:
        super().__init__(rank, len(answers))
        self.answers = answers

    def gather(self, item: Any) -> list[Any]:
        return self.answers


def shares_of(numel: int, holdings: list[list[tuple[int, int]]]) -> list[tuple[tuple[int, int], ...]]:
    """The shares of one tensor when each rank holds the spans given for it."""
    tensors = {"t": TensorInfo(DTYPES["F32"], (numel,))}
    answers = [[ownership._digest(tensors), {"0": spans}] for spans in holdings]
    found = [
        shares(tensors, {"t": tuple(holdings[rank])}, Told(rank, answers))["t"]
        for rank in range(len(holdings))
    ]
    assert all(each == found[0] for each in found)
    return list(found[0])


@given(
    numel=st.integers(0, 50_000), cuts=st.lists(st.integers(0, 50_000), max_size=3), copies=st.integers(1, 3)
)
def test_shares_tile_what_is_held(numel: int, cuts: list[int], copies: int) -> None:
    edges = [0, *sorted(min(cut, numel) for cut in cuts), numel]
    spans = [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]
    holdings = [[span] for span in spans for _ in range(copies)] or [[]]
    found = shares_of(numel, holdings)
    for own, held in zip(found, holdings, strict=True):
        assert all(a <= start < stop <= b for start, stop in own for a, b in held)
    tiles = sorted(span for own in found for span in own)
    assert [start for start, _ in tiles] == [0, *(stop for _, stop in tiles)][: len(tiles)]
    assert sum(stop - start for start, stop in tiles) == numel


def test_what_several_hold_is_shared_between_them() -> None:
    assert shares_of(100_000, [[(0, 100_000)]] * 3) == [((0, 40960),), ((40960, 73728),), ((73728, 100_000),)]
    assert shares_of(5, [[(0, 5)]] * 2) == [((0, 5),), ()] or shares_of(5, [[(0, 5)]] * 2) == [(), ((0, 5),)]


@pytest.mark.parametrize(
    ("holdings", "found"),
    [
        ([[(0, 4)], [(5, 9)]], r"\[4, 5\) on none"),
        ([[(0, 4)], [(4, 8)]], r"\[8, 9\) on none"),
        ([[(0, 5)], [(4, 9)]], r"\[4, 5\) cut in two ways"),
        ([[], []], r"\[0, 9\) on none"),
    ],
)
def test_an_element_that_nobody_or_two_hold_is_an_error(
    holdings: list[list[tuple[int, int]]], found: str
) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"t: expected its 9 elements on the ranks that take part, each once, found {found}",
    ):
        shares_of(9, holdings)


def test_other_models_on_other_ranks_are_an_error() -> None:
    tensors = {"t": TensorInfo(DTYPES["F32"], (9,))}
    with pytest.raises(ConfigError, match="rank 1: expected the tensors that rank 0 has, found others"):
        shares(tensors, {"t": ((0, 9),)}, Told(0, [["one", {}], ["another", {}]]))
