"""Swapping among many fine-tunes of one base with neither disk nor host: packages are decoded only once.

They are kept where the weights lie.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from ..errors import BaseMismatch, ConfigError, DeviceMemoryError
from ..package.manifest import MANIFEST, sha256_of
from ..package.reader import DeltaPackage, checking
from ..weights.fingerprint import Fingerprint
from ..weights.live.live import LiveWeights
from ..weights.live.live_lock import alone_on, last_change, note_as_before, note_change
from ..weights.live.named_tensors import Live
from . import device_packages as device
from .chain import Link, open_chain
from .in_place import check_fits
from .resolver import Resolver

PackageLike = Union[str, "os.PathLike[str]", DeltaPackage]
_Key = tuple[str, float]
"""The digest in a package's manifest, and the weight of its deltas."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
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
    are used, nobody else may change the weights: what `apply_` or another cache changes is found, and
    refused. Threads may share a cache: they have the model one after another. Storage never moves, so that
    CUDA graphs and compiled modules stay as they are.

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
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._active: _Key | None = None
        self._digests: dict[str, str] = {}
        """Of manifests that were looked at, by their files' SHA-256 and by the names of packages."""
        self._places = self._live.places()
        self._as_base = self._change = last_change(self._places)
        """Number of the last change to the model when this left it."""
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
        """The package that the model has on it, as it was named, or None: then it is the base."""
        return self._entries[self._active].name if self._active is not None else None

    @property
    def packages(self) -> list[str]:
        """Those that are kept, as they were named, the one that was used last at the end."""
        return [entry.name for entry in self._entries.values()]

    @property
    def nbytes(self) -> int:
        """Memory that they take on devices."""
        return sum(entry.nbytes for entry in self._entries.values())

    def use(self, package: PackageLike, *, weight: float = 1.0) -> None:
        """Make the model what a package makes of the base.

        Args:
            package: a folder, a Hub id, or an open package. One whose manifest has the same digest as that of
                one that is kept is not read again.
            weight: factor w of its deltas.

        Raises:
            DeviceMemoryError: it takes more than `memory`, or than there is; the model is the base then.
            BaseMismatch: somebody else has changed the weights, and they are not the base any more.
            BaseMismatch, ResultMismatch, and what else `apply_` raises; the model is the base then.
        """
        with alone_on(self._places):
            self._use(package, float(weight))

    def revert(self) -> None:
        """Make the model the base again.

        Raises:
            BaseMismatch: somebody else has changed the weights since. Nothing is touched.
        """
        with alone_on(self._places):
            self._revert()

    @contextmanager
    def applied(self, package: PackageLike, *, weight: float = 1.0) -> Iterator[None]:
        """`use` for the length of a `with` block: the model is the base afterwards. Other threads that want
        the model wait until then.
        """
        with alone_on(self._places):
            self._use(package, float(weight))
            try:
                yield
            finally:
                self._revert()

    def drop(self, package: PackageLike) -> None:
        """Forget a package, with whatever weights; the model is the base then if it was active."""
        with alone_on(self._places):
            name = _name_of(package)
            digests = {key[0] for key, entry in self._entries.items() if entry.name == name}
            if isinstance(package, DeltaPackage):
                digests.add(package.manifest.digest)
            for key in [key for key in self._entries if key[0] in digests]:
                self._forget(key)

    def _use(self, package: PackageLike, weight: float) -> None:
        known = self._known(package)
        opened = DeltaPackage.open(package) if known is None else None
        digest = known if opened is None else opened.manifest.digest
        assert digest is not None, "what is not known was opened"
        key = digest, weight
        if key == self._active:
            self._check_mine()
            return
        self._revert()
        self._check_mine()
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            self._put(key, entry)
        else:
            self._load(key, DeltaPackage.open(package) if opened is None else opened, _name_of(package))

    def _known(self, package: PackageLike) -> str | None:
        """The digest in a package's manifest, if that was looked at before and is what it was."""
        if isinstance(package, DeltaPackage):
            return package.manifest.digest
        manifest = Path(package).expanduser() / MANIFEST
        if manifest.is_file():
            return self._digests.get(sha256_of(manifest))
        return self._digests.get(str(Path(package).absolute())) or self._digests.get(_name_of(package))

    def _remember(self, package: DeltaPackage, name: str) -> None:
        """A folder by the manifest that lies in it, and by its place should it be removed; what else was
        named (a Hub id) by the name.
        """
        digest = package.manifest.digest
        self._digests[str(Path(name).absolute()) if Path(name).exists() else name] = digest
        if (package.path / MANIFEST).is_file():
            self._digests[sha256_of(package.path / MANIFEST)] = digest

    def _revert(self) -> None:
        if self._active is not None:
            self._check_mine()
            for resident in self._entries[self._active].residents:
                resident.before.undo()
            self._active = None
            self._change = self._as_base
            note_as_before(self._places, self._as_base)

    def _check_mine(self) -> None:
        if last_change(self._places) != self._change:
            expected = "the weights that PackageCache left"
            remedy = "revert what was applied beside it, in the opposite order"
            raise BaseMismatch(self._live.label, expected=expected, found="others", remedy=remedy)

    def _forget(self, key: _Key) -> None:
        if self._active == key:
            self._revert()
        del self._entries[key]

    def _put(self, key: _Key, entry: _Entry) -> None:
        self._active = key  # before the first weight changes: whatever happens, revert finds the way back
        self._change = note_change(self._places)
        for resident in entry.residents:
            resident.apply()

    def _load(self, key: _Key, package: DeltaPackage, name: str) -> None:
        (link,) = open_chain([package], [key[1]], check=False)
        resolver = Resolver(self._live, [link], live=True)
        check_fits(self._live, resolver)
        with checking(link.packages):
            of_base = {tensor: resolver.base_numel(tensor) for tensor in resolver.source}
            for tensor, fingerprint in self._prints(of_base).items():
                resolver.check_base_print(tensor, fingerprint)
            residents = self._decoded(link)
        self._entries[key] = _Entry(name=name, residents=residents)
        self._put(key, self._entries[key])
        try:
            of_result = {tensor: self._live.tensors[tensor].numel for tensor in resolver.expected}
            for tensor, fingerprint in self._prints(of_result).items():
                resolver.check_result_print(tensor, fingerprint)
        except BaseException:
            self._forget(key)
            raise
        self._remember(package, name)

    def _prints(self, leading: Mapping[str, int]) -> dict[str, Fingerprint]:
        """Of so many leading elements of each tensor."""
        spans = {name: ((0, count),) for name, count in leading.items() if count}
        return device.fingerprints(self._live, spans)

    def _decoded(self, link: Link) -> list[device.Resident]:
        self._make_room(device.bytes_needed(self._groups, link))
        while True:
            try:
                return [resident for group in self._groups for resident in device.residents(group, link)]
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


def _name_of(package: PackageLike) -> str:
    return str(package.path if isinstance(package, DeltaPackage) else os.fspath(package))
