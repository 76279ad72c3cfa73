"""A base whose head is its embedding, for an adapter that was trained on the head alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .config_file import config_beside
from .declared_ties import declared_ties
from .heads import embeddings_in, heads_in
from .protocol import Mapped, Weights


class _Untied(Mapped):
    """The same weights, some of them under two names."""

    def __init__(self, base: Weights, copies: Mapping[str, str]) -> None:
        super().__init__(base, {**{name: name for name in base.tensors}, **copies})
        self.folder: Path | None = getattr(base, "folder", None)


def with_own_heads(base: Weights, wanted: Collection[str]) -> Weights:
    """The base, with those of the wanted tensors besides that it lacks since they are its embedding.

    What is trained on the one is not on the other, so the two are one no more.
    """
    lacking = heads_in({name for name in wanted if name not in base.tensors})
    embeddings = embeddings_in(base.tensors)
    if not lacking or len(embeddings) != 1:
        return base
    copies = {name: embeddings[0] for name in lacking if _is_tied(config_beside(base), name, embeddings[0])}
    return _Untied(base, copies) if copies else base


def _is_tied(config: Mapping[str, Any], head: str, embedding: str) -> bool:
    if config.get("tie_word_embeddings") is False:
        return False
    ties = declared_ties(config)
    if ties is None:
        return config.get("tie_word_embeddings") is True
    return any({head, embedding} <= group for group in ties)
