"""What a base has to be for an adapter: the one that it was trained on, with a head of its own if that was
trained.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files.checkpoint import ADAPTER_CONFIG, Checkpoint
from ..files.config_file import config_beside
from ..heads import embeddings_in, heads_in
from ..live.declared_ties import declared_ties
from ..protocol import SEGMENT, Mapped, Weights, runs
from .lora_config import AdapterConfig

logger = logging.getLogger("dare_train")


class _Untied(Mapped):
    """The same weights, some of them under two names."""

    def __init__(self, base: Weights, copies: Mapping[str, str]) -> None:
        super().__init__(base, {**{name: name for name in base.tensors}, **copies})
        self.folder: Path | None = getattr(base, "folder", None)


def with_own_heads(base: Weights, wanted: Collection[str], alone: Collection[str]) -> Weights:
    """The base, with those heads besides that it lacks since they are its embedding, where an adapter trains
    one of the two: what is trained on the one is not on the other, so they are one no more.

    Args:
        wanted: tensors that an adapter has factors for.
        alone: embeddings that it has in full, without what is tied to them.
    """
    embeddings = embeddings_in(base.tensors)
    if len(embeddings) != 1:
        return base
    config = config_beside(base)
    lacking = heads_in({name for name in wanted if name not in base.tensors})
    heads = [name for name in lacking if _is_tied(config, name, embeddings[0])]
    if embeddings[0] in alone:
        heads += heads_in([name for name in _tied_to(config, embeddings[0]) if name not in base.tensors])
    copies = dict.fromkeys(heads, embeddings[0])
    return _Untied(base, copies) if copies else base


def _tied_to(config: Mapping[str, Any], embedding: str) -> list[str]:
    """What a configuration's class ties to an embedding; nothing where the class is not known here."""
    if config.get("tie_word_embeddings") is False:
        return []
    groups = [group for group in declared_ties(config) or [] if embedding in group]
    return [name for group in groups for name in sorted(group - {embedding})]


def _is_tied(config: Mapping[str, Any], head: str, embedding: str) -> bool:
    if config.get("tie_word_embeddings") is False:
        return False
    ties = declared_ties(config)
    if ties is None:
        return config.get("tie_word_embeddings") is True
    return any({head, embedding} <= group for group in ties)


def tell_tied_head(adapter: Checkpoint, base: Weights, adapted: Collection[str]) -> None:
    """Factors of an embedding are merged into it, whatever is tied to it, as PEFT merges them; before that,
    they do nothing to the head.
    """
    embeddings = embeddings_in(base.tensors)
    if len(embeddings) != 1 or embeddings[0] not in adapted:
        return
    heads = heads_in(
        [name for name in _tied_to(config_beside(base), embeddings[0]) if name not in base.tensors]
    )
    if heads:
        told = "%s: merged into %s, and so into %s, which is tied to it, as merge_and_unload does"
        logger.warning(told, adapter.label, embeddings[0], heads[0])


def saved_alone(full: Mapping[str, str], adapter: Checkpoint, config: AdapterConfig) -> set[str]:
    """Embeddings that were trained in full, and of which the adapter has no second copy, as of tied ones.

    Args:
        full: keys of tensors trained in full, by their names in a checkpoint.
    """
    return {
        name
        for name in embeddings_in(full)
        if config.adds(name)
        and not any(same_in(adapter, full[name], key) for other, key in full.items() if other != name)
    }


def same_in(adapter: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors of an adapter are equal to the bit."""
    info = adapter.tensors[first]
    return info == adapter.tensors[second] and all(
        np.array_equal(adapter.read(first, start, count), adapter.read(second, start, count))
        for start, count in runs(info.numel, SEGMENT)
    )


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


def tell_adapter_beside(base: Weights) -> None:
    """A base is the model in its folder, where `from_pretrained` would load the adapter and what that goes
    on.
    """
    if not isinstance(base, Checkpoint) or base.folder in _told or Path(base.label).is_file():
        return
    if (base.folder / ADAPTER_CONFIG).exists():
        _told.add(base.folder)
        logger.warning("%s: the base is the model there, without the adapter beside it", base.label)


_told: set[Path] = set()


def _last_name(name: str) -> str:
    """What a folder or a repository is called, wherever it lies."""
    cached = next((part for part in Path(name).parts if part.startswith("models--")), "")
    return (cached.split("--")[-1] if cached else Path(name).name).lower()
