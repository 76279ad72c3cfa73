"""Work spread over threads, results in order, never more in flight than the window allows."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

from ..dtypes import Words
from .ranks import Ranks

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def thread_share(ranks: Ranks) -> int:
    """The same for one of several ranks: those on one machine share its processors."""
    return max(1, thread_count() // ranks.neighbours)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None
) -> Generator[Result, None, None]:
    """`map(function, items)` on threads. At most four results per thread wait unread, so memory stays
    bounded.

    An exception in `function` surfaces at its own place in the order; work not yet begun is then abandoned. A
    caller that may stop early closes the generator (`contextlib.closing`), which waits for the work that has
    begun.
    """
    threads = threads or thread_count()
    window: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="dare-train")
    try:
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) >= 4 * threads:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class once(Generic[Result]):
    """A property that is worked out once for each object: by one thread, while others that want it wait.

    `functools.cached_property` lets several threads do the work since Python 3.12, which is a waste, and
    wrong where ranks meet in it.
    """

    def __init__(self, function: Callable[[Any], Result]) -> None:
        self._function = function
        self._guard = threading.Lock()
        self._name = function.__name__
        self._lock = f"{function.__name__} lock"

    def __get__(self, instance: object, owner: type | None = None) -> Result:
        if instance is None:
            return self  # type: ignore[return-value]
        values = vars(instance)
        if self._name not in values:
            with self._guard:
                lock = values.setdefault(self._lock, threading.RLock())
            with lock:
                if self._name not in values:
                    values[self._name] = self._function(instance)
        value: Result = values[self._name]
        return value


class ScratchWords(threading.local):
    """A buffer that each thread uses again and again: fresh pages cost more than the work done in them."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def like(self, words: Words) -> Words:
        """Room for as many words of the same type, valid until the same thread asks for the next."""
        if self._bytes.size < words.nbytes:
            self._bytes = np.empty(words.nbytes, np.uint8)
        return self._bytes[: words.nbytes].view(words.dtype)
