"""How kernels are compiled: on first use, once per machine, cached, and announced, since it takes a few seconds."""

from __future__ import annotations

import sys

from numba import njit
from numba.core import event

kernel = njit(nogil=True, cache=True)
"""A kernel that releases the GIL, so that threads run it side by side."""

inlined = njit(nogil=True, cache=True, forceinline=True)
"""A part of a kernel whose caller's loop must see through it to be vectorised."""


class _Announcer(event.Listener):  # type: ignore[misc]
    """Says once per process that kernels are being compiled, so that the first run's wait explains itself."""

    def __init__(self) -> None:
        self.told = False

    def on_start(self, _event: object) -> None:
        if not self.told:
            self.told = True
            print("dare_train: compiling CPU kernels, once on this machine (a few seconds) ...", file=sys.stderr)

    def on_end(self, _event: object) -> None:
        pass


event.register("numba:compile", _Announcer())
