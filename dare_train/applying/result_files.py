"""What a result of `apply` has beside its weights: the base's files, what packages bring, and a configuration
that says what the weights are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..dtypes import DTYPE_NAMES
from ..package.companion_files import copy_carried, copy_companions, copy_unchanged_modules
from ..package.model_config import Facts, said_dtype, settle_config, vocabulary_sizes
from ..package.reader import DeltaPackage
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.config_file import CONFIG, config_beside, read_config
from ..weights.files.dequantise import Dequantised
from ..weights.fingerprint import Fingerprint
from ..weights.heads import embeddings_in, heads_in
from ..weights.protocol import TensorInfo
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
        dtype=_moved_dtype(base, tensors, staging),
        dequantised=isinstance(base, Dequantised),
    )
    for note in settle_config(staging, facts):
        logger.warning("%s: %s", base.label, note)


def _copy(base: Path, links: Sequence[Link], staging: Path) -> None:
    """The base's, then what packages carry."""
    copy_companions(base, staging)
    for link in links:
        for package in _by_claim(link.packages):
            copy_carried(package, staging)
    copy_unchanged_modules(base, staging)


def _by_claim(packages: Sequence[DeltaPackage]) -> list[DeltaPackage]:
    """Packages side by side in the order in which they are heard on files: those last that bring tensors of
    their own, such as a head, which their configuration describes. Where they contradict one another, that is
    told.
    """
    ordered = sorted(
        packages, key=lambda package: any(record.base is None for record in package.records.values())
    )
    last: dict[str, tuple[DeltaPackage, str]] = {}
    for package in ordered:
        for record in package.manifest.files:
            before = last.get(record.file)
            if before is not None and before[1] != record.sha256:
                told = "%s: that of %s counts, and that of %s does not, which is another"
                logger.warning(told, record.file, package.name, before[0].name)
            last[record.file] = package, record.sha256
    return ordered


def _moved_dtype(base: Checkpoint, tensors: Mapping[str, TensorInfo], folder: Path) -> str | None:
    """The one dtype of a result, where the configuration that lies in a folder speaks of another; None where
    it does not, or where the base's own is no better.
    """
    codes, before = (
        {info.dtype.code for info in of.values() if info.dtype.can_be_delta} for of in (tensors, base.tensors)
    )
    said, said_before = (said_dtype(of) for of in (read_config(folder / CONFIG), config_beside(base)))
    if len(codes) != 1 or said in (None, *codes) or (said == said_before and codes == before):
        return None
    return DTYPE_NAMES[codes.pop()]


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
