"""Where tensors of a merge are worked out: which device, by which kernels, and how much at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..errors import ConfigError, DeviceMemoryError
from ..kernels.backends import kernels_for
from ..weights.protocol import Weights

_AT_A_TIME = 2
"""Runs on a device of its own: one is copied while another is worked out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Device:
    """Where arithmetic is done, by which kernels, and how many runs at a time."""

    place: torch.device
    kernels: ModuleType
    runs: int
    turns: threading.Semaphore

    @contextmanager
    def turn(self, what: str, nbytes: int) -> Iterator[None]:
        """For a run that takes about so much memory.

        Raises:
            DeviceMemoryError: there is less.
        """
        with self.turns:
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise DeviceMemoryError(
                    str(self.place),
                    expected=f"about {self.runs * nbytes / 1e6:,.1f} MB to merge {what}",
                    found=str(error).partition(". Process")[0],
                    remedy='free some memory, or merge with device="cpu" (--device cpu)',
                ) from error


class Devices:
    """Where each tensor of a merge is worked out: on the device that the user gave, or on the one where the
    base has it.

    Raises:
        ConfigError: there is no such device, or the kernels that were asked for cannot work there.
    """

    def __init__(self, given: str | torch.device | None, base: Weights) -> None:
        self._base = base
        self._given = _opened(given) if given is not None else None
        self._devices: dict[torch.device, Device | None] = {}
        self._lock = threading.Lock()
        if self._given is not None:
            self._at(self._given)

    def of(self, name: str) -> Device | None:
        """None: in the host's memory, by the CPU's kernels."""
        if self._given is not None:
            return self._at(self._given)
        words = lying(self._base, name, 0, self._base.tensors[name].numel)
        return self._at(words.device) if words is not None else None

    def _at(self, place: torch.device) -> Device | None:
        with self._lock:
            if place not in self._devices:
                kernels = kernels_for(place, getattr(self._base, "kernels", None))
                runs = 1 if place.type == "cpu" else _AT_A_TIME
                self._devices[place] = (
                    Device(place=place, kernels=kernels, runs=runs, turns=threading.Semaphore(runs))
                    if kernels is not None
                    else None
                )
            return self._devices[place]


def _opened(given: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=given).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # how torch was built decides
        problem = str(error).partition("\n")[0]
        raise ConfigError(
            "device", expected="one that torch has here, such as cpu or cuda", found=f"{given}: {problem}"
        ) from error


def lying(weights: Weights, name: str, start: int, count: int) -> Tensor | None:
    """Words where they lie, if that is in one piece, in memory that torch knows."""
    place = weights.lying(name, start, count) if hasattr(weights, "lying") else None
    if place is None:
        return None
    flat: Tensor = place[0]
    offset: int = place[1]
    return flat[offset : offset + count]
