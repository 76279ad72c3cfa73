"""The vocabulary that a merge is told to have: one of the tokenizers, tokens besides, and a row for each in
every model before they are merged. Whose row it is where a model lacks it is mergekit's rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from ...errors import CheckpointError, ConfigError
from ...hub.download import locate
from ...weights.heads import biases_in, embeddings_in, heads_in
from ...weights.protocol import Weights
from .references import folder_of, parts_of
from .revocabulated import Revocabulated, Source
from .token_rows import TokenRow
from .tokenizer_files import SAVE_AGAIN, TOKENIZER, read_tokens

BASE, UNION = "base", "union"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a vocabulary."""

    source: str
    """`base`, `union`, or a model whose tokenizer the result gets."""
    tokens: Mapping[str, TokenRow]
    pad_to_multiple_of: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """The base or a model, as far as tokens are concerned."""

    name: str
    """As the recipe calls it."""
    weights: Weights
    tokens: Mapping[str, int]

    @property
    def axis(self) -> set[str]:
        """Its tensors with a row for each token."""
        tensors = self.weights.tensors
        embeddings = embeddings_in(tensors)
        heights = {tensors[name].shape[0] for name in embeddings}
        known = (*embeddings, *heads_in(tensors), *biases_in(tensors))
        return {name for name in known if tensors[name].shape and tensors[name].shape[0] in heights}

    @property
    def height(self) -> int:
        return max((self.weights.tensors[name].shape[0] for name in self.axis), default=0)

    def row(self, token: str) -> int:
        """Its own row of a token, or -1: tokenizers may know tokens for which there is none."""
        id = self.tokens.get(token, -1)
        return id if id < self.height else -1


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenVocabulary:
    """The base and the models with one vocabulary.

    Attributes:
        tokens: of the result, by token.
        folder: whose tokenizer it is, before tokens are added.
        sizes: rows that the embeddings had.
        notes: sentences on rows that nobody has.
    """

    base: Weights
    models: tuple[Weights, ...]
    tokens: Mapping[str, int]
    folder: Path
    sizes: frozenset[int]
    notes: tuple[str, ...]


def on_one_vocabulary(
    wanted: Wanted, base: tuple[str, Weights], models: Sequence[tuple[str, Weights]]
) -> ChosenVocabulary:
    """Give the base and all models, each with what the recipe calls it, the rows of one vocabulary.

    Raises:
        ConfigError: a source is none of the models, or has no such token.
        CheckpointError: there is no tokenizer where one is needed.
    """
    first = _member(*base, None)
    members = [first if named[0] == first.name else _member(*named, first) for named in models]
    tokens, folder = _tokens(wanted, first, members)
    everyone = list({each.name: each for each in (first, *members)}.values())
    size = max(tokens.values(), default=-1) + 1
    multiple = wanted.pad_to_multiple_of or 1
    others = _others(wanted.tokens, tokens, everyone, first if len(everyone) > len(members) else None)
    views = {each.name: _view(each, wanted, tokens, size, others, -size % multiple) for each in everyone}
    return ChosenVocabulary(
        base=views[first.name],
        models=tuple(views[name] for name, _ in models),
        tokens=tokens,
        folder=folder,
        sizes=frozenset(each.height for each in everyone),
        notes=tuple(_notes(wanted, tokens, others)),
    )


def _notes(
    wanted: Wanted, tokens: Mapping[str, int], others: Mapping[int, Sequence[Source]]
) -> Iterator[str]:
    zeros = [token for token, id in tokens.items() if others.get(id) == [] and token not in wanted.tokens]
    if zeros:
        more = f" and {len(zeros) - 3} more" if len(zeros) > 3 else ""
        yield f"rows of zeros, since no model has these tokens: {', '.join(map(repr, zeros[:3]))}{more}"


def _member(name: str, weights: Weights, base: Member | None) -> Member:
    """A model without a tokenizer has the base's, if it has as many rows."""
    folder = folder_of(weights)
    tokens = read_tokens(folder) if folder is not None else None
    member = Member(name=name, weights=weights, tokens=tokens or {})
    if tokens is not None:
        return member
    if base is None or member.height != base.height:
        expected = f"{TOKENIZER}, by which rows are told"
        raise CheckpointError(str(folder or name), expected=expected, found="none", remedy=SAVE_AGAIN)
    return Member(name=name, weights=weights, tokens=base.tokens)


def _tokens(wanted: Wanted, base: Member, members: Sequence[Member]) -> tuple[dict[str, int], Path]:
    """Token -> id of the result, and the folder of the tokenizer that has most of them."""
    folder: Path | None = folder_of(base.weights)
    tokens = dict(base.tokens)
    if wanted.source == UNION:
        for each in members:
            _append(tokens, sorted(each.tokens, key=each.tokens.__getitem__))
    elif wanted.source not in (BASE, base.name):
        given = next((each for each in members if each.name == wanted.source), None)
        folder = folder_of(given.weights) if given is not None else locate(parts_of(wanted.source)[0])
        found = read_tokens(folder) if folder is not None else None
        if found is None:
            expected = "base, union, or a model with a tokenizer"
            raise ConfigError("tokenizer", expected=expected, found=repr(wanted.source), remedy=SAVE_AGAIN)
        tokens = dict(found)
    assert folder is not None  # where tokens were read, there is one
    _append(tokens, wanted.tokens)
    return tokens, folder


def _append(tokens: dict[str, int], further: Iterable[str]) -> None:
    """Give those that are new the next free ids."""
    free = count(max(tokens.values(), default=-1) + 1)
    for token in further:
        if token not in tokens:
            tokens[token] = next(free)


def _others(
    said: Mapping[str, TokenRow], tokens: Mapping[str, int], everyone: Sequence[Member], base: Member | None
) -> dict[int, list[Source]]:
    """By row of the result, the rows that stand for it in models that lack it: what is said; the one
    model's that has it; the base's; or the mean of those that have it.
    """
    found: dict[int, list[Source]] = {}
    for token, id in tokens.items():
        if token in said:
            found[id] = _said(said[token], token, everyone)
            continue
        having = [(each.weights, each.row(token)) for each in everyone if each.row(token) >= 0]
        if len(having) < len(everyone):
            of_base = base is not None and len(having) > 1 and base.row(token) >= 0
            found[id] = [(base.weights, base.row(token))] if base is not None and of_base else having
    return found


def _said(row: TokenRow, token: str, everyone: Sequence[Member]) -> list[Source]:
    if not row.model:
        return []
    where = f"tokenizer.tokens[{token!r}]"
    model = next((each for each in everyone if each.name == row.model), None)
    if model is None:
        names = ", ".join(each.name for each in everyone)
        raise ConfigError(where, expected=f"a source among {names}", found=repr(row.model))
    own = model.row(row.token or token) if row.id is None else row.id
    if not 0 <= own < model.height:
        asked = f"id {row.id}" if row.id is not None else repr(row.token or token)
        expected = f"a row of {row.model} for {asked}"
        raise ConfigError(where, expected=expected, found="none", remedy="name a model that has it")
    return [(model.weights, own)]


def _view(
    member: Member,
    wanted: Wanted,
    tokens: Mapping[str, int],
    size: int,
    others: Mapping[int, Sequence[Source]],
    padding: int,
) -> Revocabulated:
    """Rows of no token stay where they are."""
    rows = np.arange(size)
    rows[rows >= member.height] = -1
    rows[[*tokens.values()]] = [
        -1 if token in wanted.tokens and wanted.tokens[token].force else member.row(token) for token in tokens
    ]
    return Revocabulated(
        member.weights, member.axis, rows, others, folder=folder_of(member.weights), padding=padding
    )
