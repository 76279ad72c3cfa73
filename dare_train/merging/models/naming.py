"""The models of a merge under one set of names: prefixes, old names, renamed parts, and what is one
tensor under several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Union

from ...applying.chain import open_chain
from ...errors import ChainError, CheckpointError
from ...hub.download import locate
from ...package.quantised_records import quantised_in
from ...package.reader import DeltaPackage
from ...weights.alignment import cast_to, with_prefix, without_prefix
from ...weights.files.full_precision import check_full_precision
from ...weights.live.declared_ties import Ties
from ...weights.lora.lora_checkpoint import AdapterWeights, merge_adapter
from ...weights.lora.opening import WeightsLike
from ...weights.lora.other_layouts import in_layout_of
from ...weights.lora.wrapped_files import without_wrapper
from ...weights.meeting import aligned_or_explained, put_name, renamed, renamed_names
from ...weights.protocol import TensorInfo, Weights, under
from ...weights.renaming import check_names_meet, respelt
from .inputs import CheckpointInput, Input, PackageInput
from .model_files import config_of, files_in, is_package, own_files
from .references import Adapted, OnBase, folder_of, open_reference, parts_of
from .ties import Reconciled, Tied, reconcile, said_ties, same_content, ties_by_name

ModelLike = Union[WeightsLike, DeltaPackage]
"""A package, or weights: a folder, file or Hub id of either, a module, a state dict, arrays by name."""

_PURPOSE = "since weights are added up"


class Opened:
    """A model before it is known what the result's names are."""

    def __init__(
        self, given: ModelLike, base: Weights, rename: Mapping[str, str], *, dequantize: bool = False
    ) -> None:
        self.package = package_of(given)
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
            _check_package(self.package)
            self.weights = None
            self.folder: Path | None = self.package.path
            self.label = self.package.name
            self.names = {name: name for name in self.package.records}
            self.prefix = self.package.manifest.prefix
        else:
            opened = open_model(given, base, dequantize=dequantize)  # type: ignore[arg-type]
            self.folder = folder_of(opened)
            self._is_adapter = isinstance(opened, OnBase)
            self._leaves_dtypes = isinstance(opened, (OnBase, Adapted))
            self.weights, rename = _as_cut_in(base, opened, rename)
            self.names = renamed_names(self.weights.tensors, rename)
            self.label = self.weights.label
            infos = {name: self.weights.tensors[given] for name, given in self.names.items()}
            _, self.prefix = aligned_or_explained(base, infos, label=self.label)
        self.plain = {name: _name_in_base(name, self.prefix, base.tensors) for name in self.names}
        """The base's name of each, or what it would be there."""
        self._given = given
        self._config = config_of(own_files(self.folder))
        self.says_tied = _says_tied(given, self._config)

    def names_in(self, base: Weights, prefix: str, apart: Collection[str]) -> dict[str, str]:
        """The model's own name of each of the result's tensors, which are the base's after `prefix`.

        `apart`: names that models with this prefix have, and that it does not stand before, such as a head's.
        """
        names: dict[str, str] = {}
        for name, name_in_model in self.names.items():
            plain = self.plain[name]
            as_it_is = plain not in base.tensors and (self.prefix == prefix or name in apart)
            put_name(names, name if as_it_is else f"{prefix}{plain}", name_in_model)
        return names

    def tied(self, names: Mapping[str, str], base: Weights, prefix: str, apart: Collection[str]) -> Tied:
        """What the model ties, by the result's names. A package without a configuration is as its base is.

        Args:
            names: what `names_in` gave; the others are its arguments.
        """
        said = None if self.package is not None and not self._config else said_ties(self._given, self._config)
        if said is None and self.says_tied is False:
            said = []
        ties = None if said is None else [self._in_result(group, base, prefix, apart) for group in said]
        return Tied(names={**names}, ties=ties, same=lambda first, other: self._same(names, first, other))

    def _in_result(
        self, group: Collection[str], base: Weights, prefix: str, apart: Collection[str]
    ) -> frozenset[str]:
        """A group of the model's names by the result's."""
        found = set()
        for name in group:
            plain = _name_in_base(name, self.prefix, base.tensors)
            as_it_is = plain not in base.tensors and (self.prefix == prefix or name in apart)
            found.add(name if as_it_is else f"{prefix}{plain}")
        return frozenset(found)

    def _same(self, names: Mapping[str, str], first: str, other: str) -> bool:
        if self.package is not None:
            one, two = (self.package.records[names[name]] for name in (first, other))
            return one.info == two.info and one.result == two.result
        assert self.weights is not None
        return same_content(self.weights, names[first], names[other])

    def check_apart(self, filled: Collection[str], base: Weights) -> None:
        """
        Raises:
            CheckpointError: it is a package, and has the difference from the base's embedding, not from its
                head.
        """
        for name in sorted(filled) if self.package is not None else ():
            if name in base.tensors:
                raise CheckpointError(
                    self.label,
                    expected=f"{name}, which the base has apart from its embedding",
                    found="a head that is tied to its embedding",
                    remedy="merge the model that dare-train apply makes of base and package",
                )

    def bases(self, names: Mapping[str, str]) -> dict[str, TensorInfo]:
        """What the base's tensors are where it has the model's dtypes. Adapters leave them as they are."""
        if self.package is not None:
            records = self.package.records
            return {name: records[packed_name].base_info for name, packed_name in names.items()}
        assert self.weights is not None
        tensors = {} if self._leaves_dtypes else self.weights.tensors
        shared = {name: name_in_model for name, name_in_model in names.items() if name_in_model in tensors}
        return {name: tensors[name_in_model] for name, name_in_model in shared.items()}

    def check_names(self, base: Weights, known: Callable[[str], bool]) -> None:
        """
        Args:
            known: whether the user has said of a tensor what becomes of it.

        Raises:
            TensorMismatch: many of the base's tensors lie in the model under other names.
        """
        if self.weights is None or self._is_adapter:
            return
        infos = {
            self.plain[name]: self.weights.tensors[given]
            for name, given in self.names.items()
            if not known(name) and not known(self.plain[name])
        }
        asked = {name: info for name, info in base.tensors.items() if not known(name)}
        check_names_meet(asked, infos, base_label=base.label, label=self.label)

    def as_input(
        self, names: Mapping[str, str], named_base: Weights, base: Weights, *, cast_base: bool
    ) -> Input:
        """The model under the result's names."""
        if self.package is not None:
            return PackageInput(self.package, base, names, cast_base=cast_base)
        assert self.weights is not None
        return CheckpointInput(self.weights, named_base, names, folder=self.folder)


def open_model(given: WeightsLike, base: Weights, *, dequantize: bool = False) -> Weights:
    """A model's weights; of an adapter, what it makes of the base, without rounding.

    Raises:
        CheckpointError, TensorMismatch, ConfigError: it cannot be read, is quantised, or does not fit.
    """
    opened = open_reference(given, dequantize=dequantize)
    check_full_precision(opened, purpose=_PURPOSE)
    weights = merge_adapter(opened, base, unrounded=True)
    return OnBase(weights) if isinstance(weights, AdapterWeights) else weights


class Opening(NamedTuple):
    """What `open_models` found."""

    base: Weights
    """Under the result's names."""
    inputs: list[Input]
    prefix: str
    """What the result's names have before the base's."""
    untied: bool
    """Whether the result has apart what the base's configuration may say is one."""


def open_models(
    base: Weights,
    models: Sequence[ModelLike],
    *,
    rename: Mapping[str, str],
    cast_base: bool,
    dequantize: bool = False,
    known: Callable[[str], bool] = lambda name: False,
) -> Opening:
    """The base and the models under the result's names, and the prefix that these have before the base's.

    That is the prefix of the task models, where some are: the heads that they bring need it. Nothing of the
    base is left out.

    Args:
        known: whether the user has said of a tensor what becomes of it.

    Raises:
        CheckpointError, PackageError, ChainError, TensorMismatch, DtypeMismatch: a model cannot be read, or
        is not of this base.
    """
    opened = [Opened(model, base, rename, dequantize=dequantize) for model in models]
    for model in opened:
        model.check_names(base, known)
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
    found = _reconciled(base, named, prefix, opened, names, apart)
    if found.aliases:
        named = under(named, {**{name: name for name in named.tensors}, **found.aliases})
    for model, filled in zip(opened, found.filled, strict=True):
        model.check_apart(filled.keys() - found.aliases.keys(), named)
    names = [
        {name: of[filled.get(name, name)] for name in (*of, *filled) if name not in dropped}
        for of, filled, dropped in zip(names, found.filled, found.dropped, strict=True)
    ]
    if cast_base:
        wanted = [model.bases(names_of_model) for model, names_of_model in zip(opened, names, strict=True)]
        named = cast_to(named, {name: info for infos in reversed(wanted) for name, info in infos.items()})
    inputs = [
        model.as_input(names_of_model, named, base, cast_base=cast_base)
        for model, names_of_model in zip(opened, names, strict=True)
    ]
    return Opening(named, inputs, prefix, found.untied)


def _reconciled(
    base: Weights,
    named: Weights,
    prefix: str,
    opened: Sequence[Opened],
    names: Sequence[Mapping[str, str]],
    apart: Collection[str],
) -> Reconciled:
    """What of base and models is tied: asked where they do not have the same names, or do not say the
    same.
    """
    config = config_of(files_in(folder_of(base)))
    says = _says_tied(base, config)
    same_names = all(of.keys() == named.tensors.keys() for of in names)
    if same_names and all(model.says_tied in (None, says) for model in opened):
        return Reconciled(aliases={}, filled=[{} for _ in opened], dropped=[() for _ in opened], untied=False)
    models = [model.tied(of, base, prefix, apart) for model, of in zip(opened, names, strict=True)]
    said = said_ties(base, config)
    ties: Ties
    if said is not None:
        in_base = [{f"{prefix}{name}" if name in base.tensors else name for name in group} for group in said]
        ties = [frozenset(group) for group in in_base]
    else:
        known = {*named.tensors, *(name for of in names for name in of)}
        ties = [] if says is False else ties_by_name([*named.tensors], known)
    itself = {name: name for name in named.tensors}
    return reconcile(
        Tied(names=itself, ties=ties, same=lambda one, other: same_content(named, one, other)), models
    )


def _says_tied(given: object, config: Mapping[str, object]) -> bool | None:
    """Whether a model's head is its embedding, as its configuration says; None where that says nothing."""
    said = config.get("tie_word_embeddings")
    live = getattr(getattr(given, "config", None), "tie_word_embeddings", None)
    return next((bool(answer) for answer in (said, live) if answer is not None), None)


def package_of(given: object) -> DeltaPackage | None:
    """The package that is meant, if it is one."""
    if isinstance(given, DeltaPackage):
        return given
    if not isinstance(given, (str, os.PathLike)):
        return None
    if len(parts_of(given)) > 1:
        return None
    return DeltaPackage.open(given) if is_package(locate(given)) else None


def _check_package(package: DeltaPackage) -> None:
    """
    Raises:
        CheckpointError: it is of a quantised model.
    """
    quantised = quantised_in(package)
    if quantised:
        remedy = "merge the models in full precision"
        found = f"a package of quantised weights: {quantised}"
        raise CheckpointError(
            package.name, expected=f"full precision, {_PURPOSE}", found=found, remedy=remedy
        )


def _as_cut_in(
    base: Weights, weights: Weights, rename: Mapping[str, str]
) -> tuple[Weights, Mapping[str, str]]:
    """A model in the base's layout, and what is still to be renamed in it."""
    if isinstance(weights, OnBase):
        return weights, rename
    given = renamed(weights, rename)
    found = in_layout_of(base, without_wrapper(base, given))
    return (weights, rename) if found is given else (found, {})


def _name_in_base(name: str, prefix: str, base: Collection[str]) -> str:
    """The base's name of a model's tensor, given the prefix that `align` found, in whichever spelling the
    base has.
    """
    plain = without_prefix(name, prefix)
    if prefix.startswith("-") and name in base and plain not in base:
        plain = name
    other = respelt(plain)
    return other if plain not in base and other in base else plain
