"""Adapters over a base that lies quantised in memory: what they update are the full-precision weights in its
files.

That is what people merge such an adapter into. What training does not change is read from the files, too, in
their dtypes, whatever rounding or widening loading it brought; the package is that of `extract` with the base
and the saved adapter.
"""

from __future__ import annotations

from collections.abc import Collection

from ...dtypes import Words, cast
from ...errors import ConfigError
from ..live.live import LiveWeights
from ..live.packed import is_packed_name
from ..live.sharding import Held
from ..protocol import TensorInfo, Weights

_FULL = "the full-precision model: the folder or Hub id that was quantised"


class AdaptersOnFiles(LiveWeights):
    """Live weights of which only some are read in memory. Implements `Weights`.

    Args:
        live: made with `but_packed`.
        files: of the base, under the model's names.
        apart: names of tensors that are not what the files have, such as a new head; with those in training,
            they are read in memory.

    Raises:
        ConfigError: the files do not have what is packed in memory, in full precision.
    """

    def __init__(self, live: LiveWeights, files: Weights, apart: Collection[str]) -> None:
        vars(self).update(vars(live))
        for worked_out in ("shares", "owned"):
            vars(self).pop(worked_out, None)
        check_full_precision(live, files)
        self._files = files
        in_memory = live.trained | live.trained_whole | set(apart)
        self._in_memory = {name: live.tensors[name] for name in sorted(in_memory)}
        self.tensors = {**files.tensors, **{name: self._as_in_files(name) for name in self._in_memory}}
        of_files = {name: info for name, info in files.tensors.items() if name not in self._in_memory}
        self.held = {name: ((0, info.numel),) if info.numel else () for name, info in of_files.items()}
        self.held |= {name: live.held[name] for name in self._in_memory}

    def _as_in_files(self, name: str) -> TensorInfo:
        """A tensor that is read in memory: of the files' dtype, where they have it."""
        info = self._in_memory[name]
        of_files = self._files.tensors.get(name)
        if of_files is None or not (of_files.dtype.can_be_delta and info.dtype.can_be_delta):
            return info
        return TensorInfo(of_files.dtype, info.shape)

    def read(self, name: str, start: int, count: int) -> Words:
        if name not in self._in_memory:
            return self._files.read(name, start, count)
        words = super().read(name, start, count)
        return cast(words, self._in_memory[name].dtype, self.tensors[name].dtype)

    def lying(self, name: str, start: int, count: int) -> None:
        """Nowhere: what is read is not what is in memory, bit for bit."""

    def holding(self, name: str) -> Held:
        """
        Raises:
            ConfigError: always, since a quantised model cannot be changed in place.
        """
        remedy = "apply the package to the full-precision base"
        raise ConfigError(
            self.label, expected="weights in full precision", found="packed ones", remedy=remedy
        )


def check_full_precision(live: LiveWeights, files: Weights) -> None:
    """
    Raises:
        ConfigError: files do not have in full precision what lies packed in memory.
    """
    for module, how in live.packed.items():
        of_module = {name: info for name, info in files.tensors.items() if name.startswith(f"{module}.")}
        packed = [
            name for name, info in of_module.items() if is_packed_name(name) or not info.dtype.can_be_delta
        ]
        if packed or not of_module:
            found = f"{packed[0]} {of_module[packed[0]]}" if packed else "none"
            remedy = f"in memory it is {how}; give base={_FULL}"
            where = f"base {files.label}: {module}"
            raise ConfigError(where, expected="weights in full precision", found=found, remedy=remedy)


def _is_packed(name: str, info: TensorInfo) -> bool:
    return is_packed_name(name) or not info.dtype.can_be_delta
