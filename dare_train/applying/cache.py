"""Swapping among many fine-tunes of one base with neither disk nor host: packages are decoded only once.

They are kept where the weights lie.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Union

from ..errors import ConfigError, DeviceMemoryError
from ..package.reader import DeltaPackage, checking
from ..weights.fingerprint import Fingerprint
from ..weights.live import LiveWeights
from ..weights.named_tensors import Live
from . import device_packages as device
from .chain import Link, open_chain
from .in_place import check_fits
from .resolver import Resolver

PackageLike = Union[str, "os.PathLike[str]", DeltaPackage]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    residents: list[device.Resident]

    @property
    def nbytes(self) -> int:
        return sum(resident.nbytes for resident in self.residents)


class PackageCache:
    """Packages of one base, beside a model on one or more devices.

        cache = PackageCache(model, memory=8 << 30)
        cache.use("math-package")       # at first: read, decoded, compared with base and recorded result
        cache.use("chat-package")
        cache.use("math-package")       # from now on two launches: back to the base, and there
        cache.revert()                  # the base, to the bit

    A package takes two words for each element that it keeps: the value, and what it replaces. While packages
    are used, nobody else may change the weights; storage never moves, so that CUDA graphs and compiled
    modules stay as they are.

    Args:
        model: the base: a module, or a state dict of tensors, each whole and contiguous where it lies.
        memory: bytes that packages may take on the devices together. Those longest not used go first.
        kernels: "cuda" or "torch": see `apply_`.

    Raises:
        ConfigError: a tensor lies where no kernels work on it, or only in part.
    """

    def __init__(self, model: Live, *, memory: int = 4 << 30, kernels: str | None = None) -> None:
        if not isinstance(memory, int) or isinstance(memory, bool) or memory <= 0:
            raise ConfigError("memory", expected="a number of bytes above 0", found=repr(memory))
        self.memory = memory
        self._live = LiveWeights(model, kernels=kernels)
        everything = {name: ((0, info.numel),) for name, info in self._live.tensors.items() if info.numel}
        alone = {name: spans for name, spans in everything.items() if self._live.alone(name)}
        self._groups = device.groups(self._live, alone)
        self._entries: OrderedDict[tuple[str, float], _Entry] = OrderedDict()
        self._active: tuple[str, float] | None = None
        left = sorted(everything.keys() - {name for group in self._groups for name in group.rows})
        if left:
            remedy = (
                "move the model to a GPU whole; apply_ works anywhere, and "
                'kernels="torch" keeps packages on any device'
            )
            expected = "a whole, contiguous tensor where kernels of a device work"
            raise ConfigError(left[0], expected=expected, found="another", remedy=remedy)

    @property
    def active(self) -> str | None:
        """The package that the model has on it, or None: then it is the base."""
        return self._active[0] if self._active is not None else None

    @property
    def packages(self) -> list[str]:
        """Those that are kept, the one that was used last at the end."""
        return [name for name, _ in self._entries]

    @property
    def nbytes(self) -> int:
        """Memory that they take on devices."""
        return sum(entry.nbytes for entry in self._entries.values())

    def use(self, package: PackageLike, *, weight: float = 1.0) -> None:
        """Make the model what a package makes of the base.

        Args:
            package: a folder, a Hub id, or an open package. By the same name it is not read again.
            weight: factor w of its deltas.

        Raises:
            DeviceMemoryError: it takes more than `memory`, or than there is; the model is the base then.
            BaseMismatch, ResultMismatch, and what else `apply_` raises; the model is the base then.
        """
        key = (str(package.path if isinstance(package, DeltaPackage) else os.fspath(package)), float(weight))
        if key == self._active:
            return
        self.revert()
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            self._put(key, entry)
        else:
            self._load(key, package)

    def revert(self) -> None:
        """Make the model the base again."""
        if self._active is not None:
            for resident in self._entries[self._active].residents:
                resident.before.undo()
            self._active = None

    @contextmanager
    def applied(self, package: PackageLike, *, weight: float = 1.0) -> Iterator[None]:
        """`use` for the length of a `with` block: the model is the base afterwards."""
        self.use(package, weight=weight)
        try:
            yield
        finally:
            self.revert()

    def drop(self, package: PackageLike) -> None:
        """Forget a package, with whatever weights; the model is the base then if it was active."""
        name = str(package.path if isinstance(package, DeltaPackage) else os.fspath(package))
        if self.active == name:
            self.revert()
        for key in [key for key in self._entries if key[0] == name]:
            del self._entries[key]

    def _put(self, key: tuple[str, float], entry: _Entry) -> None:
        self._active = key  # before the first weight changes: whatever happens, revert finds the way back
        for resident in entry.residents:
            resident.apply()

    def _load(self, key: tuple[str, float], package: PackageLike) -> None:
        (link,) = open_chain([package], [key[1]], check=False)
        resolver = Resolver(self._live, [link], live=True)
        check_fits(self._live, resolver)
        with checking(link.packages):
            of_base = {name: resolver.base_numel(name) for name in resolver.source}
            for name, fingerprint in self._prints(of_base).items():
                resolver.check_base_print(name, fingerprint)
            entry = self._decoded(link)
        self._entries[key] = entry
        self._put(key, entry)
        try:
            of_result = {name: self._live.tensors[name].numel for name in resolver.expected}
            for name, fingerprint in self._prints(of_result).items():
                resolver.check_result_print(name, fingerprint)
        except BaseException:
            self.drop(package)
            raise

    def _prints(self, leading: Mapping[str, int]) -> dict[str, Fingerprint]:
        """Of so many leading elements of each tensor."""
        spans = {name: ((0, count),) for name, count in leading.items() if count}
        return device.fingerprints(self._live, spans)

    def _decoded(self, link: Link) -> _Entry:
        self._make_room(device.bytes_needed(self._groups, link))
        while True:
            try:
                residents = [resident for group in self._groups for resident in device.residents(group, link)]
                return _Entry(residents=residents)
            except DeviceMemoryError:
                if not self._entries:
                    raise
                self._entries.popitem(last=False)

    def _make_room(self, needed: int) -> None:
        if needed > self.memory:
            expected = f"packages of at most {self.memory:,} bytes"
            found = f"one that takes {needed:,}"
            raise DeviceMemoryError("PackageCache", expected=expected, found=found, remedy="raise memory=")
        while self._entries and self.nbytes + needed > self.memory:
            self._entries.popitem(last=False)
