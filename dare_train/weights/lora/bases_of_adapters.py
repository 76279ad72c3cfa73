"""What a base has to be for an adapter: the one that it was trained on, with a head of its own if that was
trained.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..files.checkpoint import Checkpoint
from ..files.config_file import config_beside
from ..heads import embeddings_in, heads_in
from ..live.declared_ties import declared_ties
from ..protocol import Mapped, Weights

logger = logging.getLogger("dare_train")


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


def tell_other_base(adapter: Checkpoint, base: Weights, said: str) -> None:
    """An update of one model says little about another, though all shapes fit.

    Args:
        said: what the adapter was trained on, by its configuration; may be empty.
    """
    if not isinstance(base, Checkpoint) or not said:
        return
    origin = config_beside(base).get("_name_or_path")
    names = {_last_name(str(name)) for name in (base.label, base.folder.resolve(), origin) if name}
    if _last_name(said) not in names:
        logger.warning("%s: trained on %s, and merged into %s", adapter.label, said, base.label)


def _last_name(name: str) -> str:
    """What a folder or a repository is called, wherever it lies."""
    cached = next((part for part in Path(name).parts if part.startswith("models--")), "")
    return (cached.split("--")[-1] if cached else Path(name).name).lower()
