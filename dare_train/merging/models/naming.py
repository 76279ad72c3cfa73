"""The models of a merge under one set of names: prefixes, old names, renamed parts, and heads that are tied
to embeddings.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Union

from ...applying.chain import open_chain
from ...dtypes import DTYPES
from ...errors import ChainError, CheckpointError, ConfigError
from ...package.reader import DeltaPackage
from ...weights.alignment import align, cast_to, with_prefix, without_prefix
from ...weights.checkpoint import Checkpoint, locate
from ...weights.lora_checkpoint import AdapterWeights, merge_adapter
from ...weights.low_rank import UNROUNDED
from ...weights.opening import WeightsLike, open_weights
from ...weights.protocol import Cast, TensorInfo, Weights, under
from .inputs import CheckpointInput, Input, PackageInput
from .model_files import config_of, files_in, is_package, own_files

ModelLike = Union[WeightsLike, DeltaPackage]
"""A package, or weights: a folder, file or Hub id of either, a module, a state dict, arrays by name."""

_ENDINGS = {".gamma": ".weight", ".beta": ".bias", ".weight": ".gamma", ".bias": ".beta"}
"""Of layer norms: what TensorFlow called them, today's, and the other way round."""
HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "output.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "shared.weight",
)


class Opened:
    """A model before it is known what the result's names are."""

    def __init__(self, given: ModelLike, base: Weights, rename: Mapping[str, str]) -> None:
        self.package = _package(given)
        if self.package is not None:
            open_chain([self.package], None)
            if self.package.manifest.continues == "package":
                remedy = "merge the model that dare-train apply makes of base and chain"
                raise ChainError(
                    self.package.name,
                    expected="a package on the base",
                    found="one that continues another",
                    remedy=remedy,
                )
            self.weights = None
            self.folder: Path | None = self.package.path
            self.label = self.package.name
            self.names = {name: name for name in self.package.records}
            self.prefix = self.package.manifest.prefix
        else:
            weights = merge_adapter(open_weights(given), base, unrounded=True)  # type: ignore[arg-type]
            self.folder = weights.folder if isinstance(weights, (Checkpoint, AdapterWeights)) else None
            self._is_adapter = isinstance(weights, AdapterWeights)
            self.weights = _in_single(weights) if isinstance(weights, AdapterWeights) else weights
            self.label = self.weights.label
            self.names = _renamed(self.weights.tensors, rename)
            _, self.prefix = align(base, self.names, model=self.label)
        self.plain = {name: _name_in_base(name, self.prefix, base.tensors) for name in self.names}
        """The base's name of each, or what it would be there."""
        self.says_tied = _says_tied(given, own_files(self.folder))

    def names_in(self, base: Weights, prefix: str, apart: Collection[str]) -> dict[str, str]:
        """The model's own name of each of the result's tensors, which are the base's after `prefix`.

        `apart`: names that models with this prefix have, and that it does not stand before, such as a head's.
        """
        names: dict[str, str] = {}
        for renamed, name_in_model in self.names.items():
            plain = self.plain[renamed]
            as_it_is = plain not in base.tensors and (self.prefix == prefix or renamed in apart)
            _put(names, renamed if as_it_is else f"{prefix}{plain}", name_in_model)
        return names

    def tied_heads(
        self,
        names: Mapping[str, str],
        base_heads: Collection[str],
        aliases: Collection[str],
        *,
        base_is_tied: bool,
    ) -> dict[str, str]:
        """The model's own name of each head that it lacks since it is tied.

        Args:
            base_heads, aliases: heads that the base has, and those that it has since its embedding stands for
                them.

        Raises:
            CheckpointError: such a model is a package, and the base has another tensor there.
        """
        is_tied = base_is_tied if self.says_tied is None else self.says_tied
        heads = tied(names, [*base_heads, *aliases], is_tied)
        if self.package is not None:
            for head in heads.keys() & base_heads if self.says_tied else ():
                raise CheckpointError(
                    self.label,
                    expected=f"{head}, which the base has apart from its embedding",
                    found="a head that is tied to its embedding",
                    remedy="merge the model that dare-train apply makes of base and package",
                )
            heads = {head: embedding for head, embedding in heads.items() if head in aliases}
        return {head: names[embedding] for head, embedding in heads.items()}

    def bases(self, names: Mapping[str, str]) -> dict[str, TensorInfo]:
        """What the base's tensors are where it has the model's dtypes. Adapters leave them as they are."""
        if self.package is not None:
            records = self.package.records
            return {name: records[packed_name].base_info for name, packed_name in names.items()}
        assert self.weights is not None
        tensors = {} if self._is_adapter else self.weights.tensors
        shared = {name: name_in_model for name, name_in_model in names.items() if name_in_model in tensors}
        return {name: tensors[name_in_model] for name, name_in_model in shared.items()}

    def as_input(
        self, names: Mapping[str, str], named_base: Weights, base: Weights, *, cast_base: bool
    ) -> Input:
        """The model under the result's names."""
        if self.package is not None:
            return PackageInput(self.package, base, names, cast_base=cast_base)
        assert self.weights is not None
        return CheckpointInput(self.weights, named_base, names, folder=self.folder)


def open_models(
    base: Weights, models: Sequence[ModelLike], *, rename: Mapping[str, str], cast_base: bool
) -> tuple[Weights, list[Input], str]:
    """The base and the models under the result's names, and the prefix that these have before the base's.

    That is the prefix of the task models, where some are: the heads that they bring need it. Nothing of the
    base is left out.

    Raises:
        CheckpointError, PackageError, ChainError, TensorMismatch, DtypeMismatch: a model cannot be read, or
        is not of this base.
    """
    opened = [Opened(model, base, rename) for model in models]
    prefixes = {model.prefix for model in opened if model.prefix and not model.prefix.startswith("-")}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    apart = {
        name
        for model in opened
        if model.prefix == prefix
        for name in model.names
        if model.plain[name] not in base.tensors
    }
    names = [model.names_in(base, prefix, apart) for model in opened]
    named = with_prefix(base, prefix)
    base_heads = [name for name in named.tensors if name.endswith(HEADS)]
    base_is_tied = (
        _says_tied(base, files_in(base.folder if isinstance(base, Checkpoint) else None)) is not False
    )
    aliases = tied(named.tensors, {name for names_of_model in names for name in names_of_model}, base_is_tied)
    if aliases:
        named = under(named, {**{name: name for name in named.tensors}, **aliases})
    names = [
        {
            **names_of_model,
            **model.tied_heads(names_of_model, base_heads, aliases, base_is_tied=base_is_tied),
        }
        for model, names_of_model in zip(opened, names, strict=True)
    ]
    if cast_base:
        wanted = [model.bases(names_of_model) for model, names_of_model in zip(opened, names, strict=True)]
        named = cast_to(named, {name: info for infos in reversed(wanted) for name, info in infos.items()})
    inputs = [
        model.as_input(names_of_model, named, base, cast_base=cast_base)
        for model, names_of_model in zip(opened, names, strict=True)
    ]
    return named, inputs, prefix


def tied(names: Collection[str], wanted: Iterable[str], is_tied: bool) -> dict[str, str]:
    """Heads that others have and these names lack, since they are tied: each with the embedding that it
    is.
    """
    embeddings = [name for name in names if name.endswith(EMBEDDINGS)] if is_tied else []
    return {
        head: embeddings[0]
        for head in wanted
        if head.endswith(HEADS) and head not in names and len(embeddings) == 1
    }


def _says_tied(given: object, files: Mapping[str, Path]) -> bool | None:
    """Whether a model's head is its embedding, as its configuration says; None where that says nothing."""
    said = config_of(files).get("tie_word_embeddings")
    live = getattr(getattr(given, "config", None), "tie_word_embeddings", None)
    return next((bool(answer) for answer in (said, live) if answer is not None), None)


def _package(given: object) -> DeltaPackage | None:
    if isinstance(given, DeltaPackage):
        return given
    if not isinstance(given, (str, os.PathLike)):
        return None
    path = locate(given)
    return DeltaPackage.open(given) if is_package(path) else None


def _renamed(names: Iterable[str], rename: Mapping[str, str]) -> dict[str, str]:
    """The model's names after `rename`, each with the name it had."""
    result: dict[str, str] = {}
    for name_in_model in names:
        name = name_in_model
        for old, new in rename.items():
            name = name.replace(old, new)
        _put(result, name, name_in_model)
    return result


def _in_single(adapted: AdapterWeights) -> Weights:
    """What an adapter makes of a base in float32, in which deltas are worked out."""
    wide = [name for name, info in adapted.tensors.items() if info.dtype == UNROUNDED]
    return Cast(adapted, dict.fromkeys(wide, DTYPES["F32"]))


def _put(names: dict[str, str], name: str, name_in_model: str) -> None:
    if name in names:
        raise ConfigError(
            "rename",
            expected="different names for all tensors",
            found=f"{names[name]} and {name_in_model} as {name}",
        )
    names[name] = name_in_model


def _name_in_base(name: str, prefix: str, base: Collection[str]) -> str:
    """The base's name of a model's tensor, given the prefix that `align` found, in whichever spelling the
    base has.
    """
    plain = without_prefix(name, prefix)
    if prefix.startswith("-") and name in base and plain not in base:
        plain = name
    ending = f".{plain.rpartition('.')[2]}"
    respelt = plain.removesuffix(ending) + _ENDINGS.get(ending, ending)
    return respelt if plain not in base and respelt in base else plain
