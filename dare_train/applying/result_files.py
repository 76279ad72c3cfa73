"""What a result of `apply` has beside its weights: the base's files, what packages bring, and a configuration
that says what the weights are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..package.companion_files import copy_carried, copy_companions, copy_unchanged_modules
from ..package.model_config import Facts, settle_config, vocabulary_sizes
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.dequantise import Dequantised
from ..weights.fingerprint import Fingerprint
from ..weights.heads import embeddings_in, heads_in
from .chain import Link
from .resolver import Resolver

logger = logging.getLogger("dare_train")


def write_files(
    base: Checkpoint, resolver: Resolver, prints: Mapping[str, Fingerprint], staging: Path
) -> None:
    """Put them into a folder.

    Args:
        prints: of the result's tensors.
    """
    _copy(base.folder, resolver.links, staging)
    tensors = {name: record.info for name, record in resolver.tensors.items()}
    facts = Facts(
        tensors=tensors,
        sizes=vocabulary_sizes(base.tensors),
        untied=_is_untied(resolver, prints),
        dequantised=isinstance(base, Dequantised),
    )
    for note in settle_config(staging, facts):
        logger.warning("%s: %s", base.label, note)


def _copy(base: Path, links: Sequence[Link], staging: Path) -> None:
    """The base's, then what packages carry."""
    copy_companions(base, staging)
    for link in links:
        for package in link.packages:
            copy_carried(package, staging)
    copy_unchanged_modules(base, staging)


def _is_untied(resolver: Resolver, prints: Mapping[str, Fingerprint]) -> bool:
    """Whether the result has a head apart from its embedding, where the base has one tensor for both."""
    embeddings = embeddings_in(resolver.tensors)
    if len(embeddings) != 1:
        return False
    (embedding,) = embeddings
    for head in heads_in(resolver.tensors):
        same = resolver.tensors[head].info.shape == resolver.tensors[embedding].info.shape
        if same and prints[head] != prints[embedding] and _base_ties(resolver, head, embedding):
            return True
    return False


def _base_ties(resolver: Resolver, head: str, embedding: str) -> bool:
    source = resolver.source
    if head not in source or source[head].base is None:
        return embedding in source and source[embedding].base is not None
    return embedding in source and source[head].base == source[embedding].base
