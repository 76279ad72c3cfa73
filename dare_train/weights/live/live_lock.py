"""One at a time on a live model, whatever objects lead to it, and whether somebody else has changed it since.

A model is known by where its tensors lie: a module, what wraps it and its state dict are the same.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

Places = frozenset[tuple[str, int]]
"""Device and address of each storage."""

_REMEMBERED = 1 << 16
"""Storages whose last change is known."""
_free = threading.Condition()
_busy: dict[tuple[str, int], int] = {}
"""The thread that works on a storage."""
_changes: OrderedDict[tuple[str, int], int] = OrderedDict()
"""The number of a storage's last change."""
_numbers = itertools.count(1)


@contextmanager
def alone_on(places: Places) -> Iterator[None]:
    """Wait until no other thread works on any of the storages, and keep them until the block ends. A thread
    that has them already goes on.
    """
    me = threading.get_ident()
    with _free:
        _free.wait_for(lambda: all(_busy.get(place, me) == me for place in places))
        taken = [place for place in places if place not in _busy]
        _busy.update(dict.fromkeys(taken, me))
    try:
        yield
    finally:
        with _free:
            for place in taken:
                del _busy[place]
            _free.notify_all()


def last_change(places: Places) -> int:
    """The number of the last change to any of the storages by `apply_` or a `PackageCache`."""
    with _free:
        return max((_changes.get(place, 0) for place in places), default=0)


def note_change(places: Places) -> int:
    """The storages have changed; returns the number of the change."""
    with _free:
        number = next(_numbers)
        _note(places, number)
        return number


def note_as_before(places: Places, number: int) -> None:
    """The storages have the bits again that they had after the change of that number."""
    with _free:
        _note(places, number)


def _note(places: Collection[tuple[str, int]], number: int) -> None:
    for place in places:
        _changes[place] = number
        _changes.move_to_end(place)
    while len(_changes) > _REMEMBERED:
        _changes.popitem(last=False)
