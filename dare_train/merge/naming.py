"""The models of a merge under one set of names: prefixes, old names, renamed parts, and heads that are tied to embeddings."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from ..adapters import AdapterWeights, merge_adapter
from ..checkpoint import Checkpoint, locate
from ..errors import CheckpointError, ConfigError
from ..manifest import MANIFEST
from ..package import DeltaPackage
from ..plan import WeightsLike, align, cast_to, open_weights, with_prefix, without_prefix
from ..resolve import open_chain
from ..weights import Mapped, TensorInfo, Weights
from .inputs import CheckpointInput, Input, PackageInput

ModelLike = Union[WeightsLike, DeltaPackage]
"""A package, or weights: a folder, file or Hub id of either, a module, a state dict, arrays by name."""

_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}
HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight", "shared.weight")


class Opened:
    """A model before it is known what the result's names are."""

    def __init__(self, given: ModelLike, base: Weights, rename: Mapping[str, str]) -> None:
        self.package = _package(given)
        if self.package is not None:
            open_chain([self.package], None)
            self.weights = None
            self.folder: Path | None = self.package.path
            self.label, own = self.package.name, list(self.package.records)
            self.names = {name: name for name in own}
            self.prefix = self.package.manifest.prefix
            return
        self.weights = merge_adapter(open_weights(given), base)  # type: ignore[arg-type]
        self.folder = self.weights.folder if isinstance(self.weights, (Checkpoint, AdapterWeights)) else None
        self.label = self.weights.label
        self.names = _renamed(self.weights.tensors, base.tensors, rename)
        _, self.prefix = align(base, self.names, model=self.label)

    def names_in(self, named_base: Weights, *, common: bool) -> dict[str, str]:
        """The model's own name of each of the result's tensors. `common`: these have every model's prefix; else the base's names."""
        names = self.names if common else {without_prefix(name, self.prefix): own for name, own in self.names.items()}
        return {**names, **{head: names[embedding] for head, embedding in tied(names, named_base.tensors, self.folder).items()}}

    def bases(self, names: Mapping[str, str]) -> dict[str, TensorInfo]:
        """What the base's tensors are where it has the model's dtypes."""
        if self.package is not None:
            return {name: self.package.records[own].base_info for name, own in names.items()}
        assert self.weights is not None
        return {name: self.weights.tensors[own] for name, own in names.items()}

    def as_input(self, names: Mapping[str, str], named_base: Weights, base: Weights, *, cast_base: bool) -> Input:
        """The model under the result's names."""
        if self.package is not None:
            return PackageInput(self.package, base, names, cast_base=cast_base)
        assert self.weights is not None
        return CheckpointInput(self.weights, named_base, names, folder=self.folder)


def open_models(
    base: Weights, models: Sequence[ModelLike], *, rename: Mapping[str, str], cast_base: bool
) -> tuple[Weights, list[Input], str]:
    """The base and the models under the result's names, and the prefix that these have before the base's.

    Raises:
        CheckpointError, PackageError, ChainError, TensorMismatch, DtypeMismatch: a model cannot be read, or is not of this base.
    """
    opened = [Opened(model, base, rename) for model in models]
    prefixes = {one.prefix for one in opened}
    common = len(prefixes) == 1
    prefix = prefixes.pop() if common else ""
    named = with_prefix(base, prefix)
    folder = base.folder if isinstance(base, Checkpoint) else None
    heads = {name for one in opened for name in one.names if name.endswith(HEADS)}
    aliases = tied(named.tensors, heads, folder)
    if aliases:
        named = Mapped(named, {**{name: name for name in named.tensors}, **aliases})
    names = [one.names_in(named, common=common) for one in opened]
    if cast_base:
        wanted = [one.bases(own) for one, own in zip(opened, names, strict=True)]
        named = cast_to(named, {name: info for infos in reversed(wanted) for name, info in infos.items()})
    return named, [one.as_input(own, named, base, cast_base=cast_base) for one, own in zip(opened, names, strict=True)], prefix


def tied(names: Collection[str], wanted: Iterable[str], folder: Path | None) -> dict[str, str]:
    """Heads that others have and these names lack, since they are tied: each with the embedding that it is."""
    found = {}
    for head in wanted:
        embeddings = [name for name in names if name.endswith(EMBEDDINGS)]
        if head.endswith(HEADS) and head not in names and len(embeddings) == 1 and config_of(folder).get("tie_word_embeddings", True):
            found[head] = embeddings[0]
    return found


def config_of(folder: Path | None) -> dict[str, Any]:
    """A model's config.json; nothing where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / "config.json" if folder is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(str(path), expected="a JSON object", found=str(error)) from error
    return content if isinstance(content, dict) else {}


def _package(given: object) -> DeltaPackage | None:
    if isinstance(given, DeltaPackage):
        return given
    if not isinstance(given, (str, os.PathLike)):
        return None
    path = locate(given)
    return DeltaPackage.open(given) if path.is_dir() and (path / MANIFEST).is_file() else None


def _renamed(names: Iterable[str], base: Collection[str], rename: Mapping[str, str]) -> dict[str, str]:
    """The model's names after `rename`, and with today's endings where the base has these; each with the name it had."""
    result: dict[str, str] = {}
    for own in names:
        name = own
        for old, new in rename.items():
            name = name.replace(old, new)
        for old, new in _OLD_ENDINGS.items():
            modern = f"{name.removesuffix(old)}{new}"
            name = modern if name.endswith(old) and name not in base and any(other.endswith(modern) for other in base) else name
        if name in result:
            raise ConfigError("rename", expected="different names for all tensors", found=f"{result[name]} and {own} as {name}")
        result[name] = own
    return result
