"""Packages as links: each beside others on one base, or continuing the one before."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ChainError, ConfigError
from ..package.reader import DeltaPackage

logger = logging.getLogger("dare_train")

Packages = Sequence["str | os.PathLike[str] | DeltaPackage"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """Packages that share a base, with their weights. A chain has several links of one package each."""

    packages: tuple[DeltaPackage, ...]
    weights: tuple[float, ...]


def listed(packages: Packages | str | os.PathLike[str] | DeltaPackage) -> Packages:
    """One package or several, as several."""
    return [packages] if isinstance(packages, (str, os.PathLike, DeltaPackage)) else packages


def open_chain(packages: Packages, weights: Sequence[float] | None, *, check: bool = True) -> list[Link]:
    """Open packages, check every byte of them, and find out whether they lie side by side or form a chain.

    Without `check` the caller does that: see `package.checking`.

    Raises:
        ConfigError: no package, or another number of weights.
        PackageError: a package is damaged.
        ChainError: neither all on one base nor each on the result of the one before.
    """
    opened = [DeltaPackage.open(package) for package in packages]
    if not opened:
        raise ConfigError("packages", expected="at least one", found="none")
    given = [1.0] * len(opened) if weights is None else _checked(weights, len(opened))
    for package in opened if check else ():
        package.check_integrity()
    if len({package.manifest.parent for package in opened}) == 1:
        _tell_twice(opened)
        return [Link(packages=tuple(opened), weights=tuple(given))]
    for before, after in zip(opened, opened[1:], strict=False):
        _check_follows(before, after)
    if any(weight != 1.0 for weight in given):
        expected = "1 for each package of a chain"
        remedy = "only packages side by side on one base can be weighted"
        raise ChainError("weights", expected=expected, found=repr(given), remedy=remedy)
    return [Link(packages=(package,), weights=(1.0,)) for package in opened]


def _tell_twice(packages: Sequence[DeltaPackage]) -> None:
    """One package twice is what it says, and rarely what is meant."""
    for number, package in enumerate(packages):
        if any(_is_same(package, earlier) for earlier in packages[:number]):
            logger.warning("%s: given twice, so that its delta counts twice", package.name)


def _is_same(one: DeltaPackage, other: DeltaPackage) -> bool:
    parts = [[record.sha256 for record in package.manifest.parts] for package in (one, other)]
    return one.manifest.result == other.manifest.result and parts[0] == parts[1]


def _checked(weights: Sequence[float], count: int) -> list[float]:
    if isinstance(weights, (str, bytes, Mapping)) or not hasattr(weights, "__iter__"):
        raise ConfigError("weights", expected="a list of numbers", found=repr(weights))
    given = list(weights)
    if not all(isinstance(weight, (int, float, np.floating, np.integer)) for weight in given):
        raise ConfigError("weights", expected="a list of numbers", found=repr(given))
    if len(given) != count:
        raise ConfigError("weights", expected=f"one for each of {count} packages", found=str(len(given)))
    if not all(np.isfinite(weight) for weight in given):
        raise ConfigError("weights", expected="finite numbers", found=repr(given))
    return given


def _check_follows(before: DeltaPackage, after: DeltaPackage) -> None:
    if before.manifest.result != after.manifest.parent:
        expected = "the same base as the others"
        if after.manifest.continues == "package":
            expected = f"a package on {after.manifest.parent[:12]}… before it"
        found = f"{before.name}, which gives {before.manifest.result[:12]}…"
        remedy = "give a chain in the order it was written, or packages of one base"
        raise ChainError(after.name, expected=expected, found=found, remedy=remedy)
