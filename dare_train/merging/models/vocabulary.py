"""Which row of an embedding belongs to which token, when models of one base are merged and some of them have
added tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ...errors import TensorMismatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The tokens of a merged model, and where each model that goes into it has them."""

    tokens: dict[str, int]
    """Token -> id: the base's as they are, then the added ones."""
    added: tuple[str, ...]
    """Tokens that the base lacks, by id."""
    rows: tuple[NDArray[np.int64], ...]
    """For each input, for each row of the result's embedding: the row of the input's, or -1 where the input
    has none for it."""
    embedding_rows: int
    """Rows of the result's embedding: all of the base's, and more when added tokens do not fit into those."""

    @property
    def size(self) -> int:
        """The largest id, plus one."""
        return max(self.tokens.values(), default=-1) + 1

    @property
    def moved(self) -> bool:
        """Whether a row of any input has another place in the result."""
        places = np.arange(self.embedding_rows)
        return any(bool(((rows >= 0) & (rows != places)).any()) for rows in self.rows)


def unite(
    base: Mapping[str, int],
    inputs: Sequence[Mapping[str, int] | None],
    *,
    labels: Sequence[str],
    base_rows: int,
    input_rows: Sequence[int],
) -> Vocabulary:
    """One vocabulary for the base and all that its fine-tunes added.

    An added token keeps its id where every input that has it agrees and no other token wants that id; the
    others get the next free ids after the base's, in the order of inputs and of ids in them. Rows that belong
    to no token (padding) stay where they are. A base token whose row an input has given to another token (a
    reserved token that was renamed) is one that this input lacks.

    Args:
        base: token -> id.
        inputs: token -> id of each; None stands for the base's.
        labels: what errors call the inputs.
        base_rows: rows of the base's embedding; may exceed its tokens.
        input_rows: rows of each input's embedding.

    Raises:
        TensorMismatch: a token of the base has another id in an input, or no model has a row for an added
            token.
    """
    for tokens, label in zip(inputs, labels, strict=True):
        _check_same_ids(base, tokens or {}, label)
    added = [{token: id for token, id in (tokens or {}).items() if token not in base} for tokens in inputs]
    ids = _placed(base, added)
    tokens = {**base, **ids}
    embedding_rows = max(base_rows, max(tokens.values(), default=-1) + 1)
    rows = tuple(
        _rows(base, base if input_tokens is None else input_tokens, ids, height, embedding_rows)
        for input_tokens, height in zip(inputs, input_rows, strict=True)
    )
    _check_sources(ids, rows, added, labels, input_rows)
    return Vocabulary(tokens=tokens, added=tuple(ids), rows=rows, embedding_rows=embedding_rows)


def _check_same_ids(base: Mapping[str, int], tokens: Mapping[str, int], label: str) -> None:
    moved = [token for token, id in base.items() if tokens.get(token, id) != id]
    if moved:
        token = min(moved, key=base.__getitem__)
        remedy = (
            "merge only models that kept the base's ids; this one's tokenizer was trained "
            "anew, or it is of another base"
        )
        expected = f"id {base[token]}, as in the base"
        raise TensorMismatch(
            f"{label}: token {token!r}", expected=expected, found=f"id {tokens[token]}", remedy=remedy
        )


def _placed(base: Mapping[str, int], added: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Token -> id in the result, by id, for all that the base lacks."""
    wanted: dict[str, set[int]] = {}
    for tokens in added:
        for token, id in sorted(tokens.items(), key=lambda item: item[1]):
            wanted.setdefault(token, set()).add(id)
    claims = Counter(id for ids in wanted.values() for id in ids) + Counter(base.values())
    placed = {token: min(ids) for token, ids in wanted.items() if len(ids) == 1 and claims[min(ids)] == 1}
    taken = set(placed.values())
    free = (id for id in count(max(base.values(), default=-1) + 1) if id not in taken)
    placed.update({token: next(free) for token in wanted if token not in placed})
    return dict(sorted(placed.items(), key=lambda item: item[1]))


def _rows(
    base: Mapping[str, int],
    tokens: Mapping[str, int],
    ids: Mapping[str, int],
    height: int,
    embedding_rows: int,
) -> NDArray[np.int64]:
    rows = np.arange(embedding_rows, dtype=np.int64)
    used = set(tokens.values())
    rows[[id for token, id in base.items() if token not in tokens and id in used]] = -1
    rows[list(ids.values())] = [tokens.get(token, -1) for token in ids]
    rows[rows >= height] = -1
    return rows


def _check_sources(
    ids: Mapping[str, int],
    rows: Sequence[NDArray[np.int64]],
    added: Sequence[Mapping[str, int]],
    labels: Sequence[str],
    input_rows: Sequence[int],
) -> None:
    """Every added token has a row somewhere. Tokenizers may know tokens for which the model was never
    resized.
    """
    for token, id in ids.items():
        if all(rows_of_input[id] < 0 for rows_of_input in rows):
            number = next(index for index, tokens in enumerate(added) if token in tokens)
            expected = f"a row of its embedding, of number {added[number][token]}"
            remedy = (
                "resize it: model.resize_token_embeddings(len(tokenizer)); or save it with "
                "a tokenizer that lacks the token"
            )
            raise TensorMismatch(
                f"{labels[number]}: token {token!r}",
                expected=expected,
                found=f"{input_rows[number]} rows",
                remedy=remedy,
            )
