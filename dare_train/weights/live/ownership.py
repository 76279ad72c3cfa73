"""Who writes what: every element of a model belongs to exactly one of the ranks that hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import pairwise

from ...errors import ConfigError
from ...parallel.ranks import Ranks
from ..protocol import TensorInfo

Span = tuple[int, int]
"""[start, stop) of flat indices."""
Spans = Mapping[str, tuple[Span, ...]]
"""By tensor name, ascending."""

ALIGNMENT = 8192
"""Where tensors that several ranks hold are cut: between blocks that share Philox counters."""


def shares(
    tensors: Mapping[str, TensorInfo], held: Spans, ranks: Ranks
) -> dict[str, tuple[tuple[Span, ...], ...]]:
    """What each rank owns of each tensor, so that the ranks' shares tile it. All ranks call it together.

    Args:
        tensors: names, dtypes and whole shapes; the same on every rank.
        held: what this rank holds.

    Returns:
        By name, a tuple of spans for each rank.

    Raises:
        ConfigError: ranks see different models, or not every element is held by a rank.
    """
    names = sorted(tensors)
    if ranks.world == 1:
        return {name: _shares(name, tensors[name].numel, [held[name]]) for name in names}
    partial = {
        str(index): list(held[name])
        for index, name in enumerate(names)
        if held[name] != _whole(tensors[name])
    }
    answers = ranks.gather([_digest(tensors), partial])
    for rank, (digest, _) in enumerate(answers):
        if digest != answers[0][0]:
            expected = "the tensors that rank 0 has"
            remedy = "load the same model on every rank"
            raise ConfigError(f"rank {rank}", expected=expected, found="others", remedy=remedy)
    result = {}
    for index, name in enumerate(names):
        whole = _whole(tensors[name])
        holdings = [
            tuple((start, stop) for start, stop in partials.get(str(index), whole)) for _, partials in answers
        ]
        result[name] = _shares(name, tensors[name].numel, holdings)
    return result


def _whole(info: TensorInfo) -> tuple[Span, ...]:
    return ((0, info.numel),) if info.numel else ()


def _digest(tensors: Mapping[str, TensorInfo]) -> str:
    lines = "\n".join(f"{name} {tensors[name]}" for name in sorted(tensors))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _shares(name: str, numel: int, holdings: list[tuple[Span, ...]]) -> tuple[tuple[Span, ...], ...]:
    """Of one tensor: what each rank alone holds, and its part of what others hold as well."""
    holders: dict[Span, list[int]] = {}
    for holder, spans in enumerate(holdings):
        for span in spans:
            holders.setdefault(span, []).append(holder)
    _check_tiling(name, numel, sorted(holders))
    owned: list[list[Span]] = [[] for _ in holdings]
    for span, among in sorted(holders.items()):
        for number, holder in enumerate(among):
            owned[holder] += _part(span, number, len(among))
    return tuple(tuple(spans) for spans in owned)


def _check_tiling(name: str, numel: int, spans: list[Span]) -> None:
    edges = [(0, 0), *spans, (numel, numel)]
    for (_, stop), (start, _) in pairwise(edges):
        if start != stop:
            expected = f"its {numel} elements on the ranks that take part, each once"
            found = f"[{start}, {stop}) cut in two ways"
            if start > stop:
                found = f"[{stop}, {start}) on none of them"
            remedy = "is it on the meta device, or do other ranks that hold a part of it not take part?"
            raise ConfigError(name, expected=expected, found=found, remedy=remedy)


def _part(span: Span, number: int, count: int) -> Iterator[Span]:
    """The part of a span that falls to one of `count` holders; nothing, where it is too short for all."""
    begin = _border(span, number, count)
    end = _border(span, number + 1, count)
    if begin < end:
        yield begin, end


def _border(span: Span, number: int, count: int) -> int:
    """Where the part of holder `number` begins, and that of the one before ends."""
    start, stop = span
    border = start + (stop - start) * number // count
    if border in span:
        return border
    return max(start, min(stop, -(-border // ALIGNMENT) * ALIGNMENT))
