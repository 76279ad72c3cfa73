"""What an adapter is made of: a base, and what was tuned from it, as weights and as modules."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from ..applying.apply import rehearse
from ..applying.chain import open_chain
from ..applying.resolver import Resolver
from ..dtypes import Words
from ..errors import CheckpointError, ConfigError
from ..hub.download import locate
from ..merging.statistics.statistics_file import StatisticsFile, statistics_path
from ..package.manifest import MANIFEST
from ..package.reader import DeltaPackage
from ..reading.structures import json_in
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.full_precision import check_full_precision
from ..weights.files.module_folders import places_of
from ..weights.lora.lora_checkpoint import merge_adapter
from ..weights.protocol import Weights

Place = Union[str, "os.PathLike[str]"]
Tuned = Union[Place, DeltaPackage]
_PURPOSE = "of which a delta has a rank"


def open_both(base: Place, tuned: Tuned | Sequence[Tuned]) -> tuple[Weights, Weights, Mapping[str, Any]]:
    """The base, what was tuned, and the configuration of that."""
    opened = Checkpoint.open(base)
    check_full_precision(opened, purpose=_PURPOSE, option=False)
    configs = [opened.folder]
    several = _several(tuned)
    packages = [given for given in several if isinstance(given, DeltaPackage) or _is_package(given)]
    end: Weights
    if packages:
        rehearse(opened, several, cast_base=False)
        end = _Received(Resolver(opened, open_chain(several, None), cast_base=False), several)
        configs.insert(0, DeltaPackage.open(several[-1]).path)
        return end.start, end, _config(configs)
    if len(several) != 1 or isinstance(several[0], DeltaPackage):
        expected = "one tuned model, or packages"
        raise ConfigError("tuned", expected=expected, found=f"{len(several)} models")
    checkpoint = Checkpoint.open(several[0])
    check_full_precision(checkpoint, purpose=_PURPOSE, option=False)
    configs.insert(0, checkpoint.folder)
    return opened, merge_adapter(checkpoint, opened, unrounded=True), _config(configs)


def places_read(base: Place, tuned: Tuned | Sequence[Tuned]) -> list[Path]:
    """Where what an adapter is made of lies: no output may take its place."""
    found = places_of(Checkpoint.open(base).folder)
    for given in _several(tuned):
        if isinstance(given, DeltaPackage) or _is_package(given):
            found += DeltaPackage.open(given).paths
        else:
            found += places_of(Checkpoint.open(given).folder)
    return found


def _several(tuned: Tuned | Sequence[Tuned]) -> list[Tuned]:
    return [tuned] if isinstance(tuned, (str, os.PathLike, DeltaPackage)) else [*tuned]


def _is_package(given: Place) -> bool:
    return (locate(given) / MANIFEST).is_file()


def _config(folders: Sequence[Path]) -> Mapping[str, Any]:
    """The first configuration that there is in the folders.

    Raises:
        CheckpointError: there is none, or the first is no JSON object.
    """
    for folder in folders:
        path = folder / "config.json"
        if path.is_file():
            found: dict[str, Any] = json_in(path)
            return found
    expected = "a config.json, which says what the modules are"
    raise CheckpointError(str(folders[0]), expected=expected, found="none there")


class _Received:
    """What packages make of a base. Implements `Weights`.

    Attributes:
        start: the base, by the same names.
    """

    def __init__(self, resolver: Resolver, packages: Sequence[Tuned]) -> None:
        self._resolver = resolver
        self.label = ", ".join(map(str, packages))
        self.start = resolver.base
        self.tensors = {name: record.info for name, record in resolver.tensors.items()}

    def read(self, name: str, start: int, count: int) -> Words:
        return self._resolver.resolve(name, start, count)


def gram_beside(given: Place | None, tuned: Tuned | Sequence[Tuned]) -> StatisticsFile | None:
    """Gram matrices of the layers' inputs: those that are given, or that lie beside one tuned model."""
    several = _several(tuned)
    if given is None and len(several) == 1 and isinstance(several[0], (str, os.PathLike)):
        beside = statistics_path(several[0], "gram")
        given = beside if beside.is_file() else None
    return None if given is None else StatisticsFile.open(given, "gram")
