"""Copies between the host and a device: through pinned memory, in which the device's copy engines work beside
everything else.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..parallel.threads import ordered_map

_PINNED_AT_ONCE = 16 << 20
"""Bytes."""
_THREADS = 4
"""Enough to copy from pinned memory as fast as a device copies to it."""


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Without waiting for what the device is doing."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def sent(words: NDArray[Any], device: torch.device) -> Tensor:
    """uint8: the bytes of a contiguous array, copied once on the host, and there not needed any more."""
    data = words.view(np.uint8)
    host = torch.empty(data.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(host.numpy(), data)
    return host.to(device, non_blocking=True)


def to_host(words: Tensor) -> NDArray[np.signedinteger]:
    """Through pinned memory; waits for this copy, and not for what other streams are doing."""
    if words.device.type != "cuda":
        return words.cpu().numpy()
    if words.nbytes > _PINNED_AT_ONCE:
        return in_pieces(words)
    host = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
    host.copy_(words, non_blocking=True)
    torch.cuda.current_stream(words.device).synchronize()
    return host.numpy()


def in_pieces(words: Tensor, nbytes: int = _PINNED_AT_ONCE) -> NDArray[np.signedinteger]:
    """The same of much: pieces of so many bytes go through a ring, since to pin gigabytes takes longer than
    to copy them.
    """
    flat = words.reshape(-1)
    each = max(1, nbytes // words.itemsize)
    out: NDArray[np.signedinteger] = torch.empty_like(flat, device="cpu").numpy()
    ring = Ring(words.device, slots=_THREADS + 1, nbytes=each * words.itemsize)

    def copy(begin: int) -> None:
        with ring.slot() as slot:
            out[begin : begin + each] = slot.fetch(flat[begin : begin + each])

    with closing(ring), closing(ordered_map(copy, range(0, flat.numel(), each), threads=_THREADS)) as done:
        deque(done, maxlen=0)
    return out.reshape(words.shape)


class Ring:
    """A few pinned buffers by turns. Threads fetch words of a device into one of them, decode there, and send
    the result back, each while the others decode and the device copies for them: both ways at once, on
    streams of the ring's own.

    What is sent is in its place for whatever the device is asked to do after `close`. Where there is nothing
    to pin, as in CPU memory, the same happens step by step.

    Args:
        device: where the tensors lie.
        slots: buffers, no fewer than threads; a few more let a thread go on while its last result is on the
            way.
        nbytes: size of each: of what is fetched and what is sent together.
    """

    def __init__(self, device: torch.device, *, slots: int, nbytes: int) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(slots):
            self._free.put(Slot(self, torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)))
        if self._pinned:
            self._down, self._up = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
            self._down.wait_stream(torch.cuda.current_stream(device))
            self._up.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """A buffer for one thread, when one is free and what was sent from it has arrived."""
        slot = self._free.get()
        try:
            slot.wait()
            yield slot
        finally:
            self._free.put(slot)

    def after(self, arrived: torch.cuda.Event | None) -> None:
        """Let what the device does from now on come after what was sent."""
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)

    def close(self) -> None:
        """Let what the device does from now on come after all copies."""
        if self._pinned:
            torch.cuda.current_stream(self._device).wait_stream(self._up)
            torch.cuda.current_stream(self._device).wait_stream(self._down)

    def on(self, way: str) -> AbstractContextManager[Any]:
        """The stream of one direction, `down` or `up`."""
        return torch.cuda.stream(self._down if way == "down" else self._up) if self._pinned else nullcontext()


class Slot:
    """A buffer of a ring, in the hands of one thread."""

    def __init__(self, ring: Ring, buffer: Tensor) -> None:
        self._ring = ring
        self._buffer = buffer
        self._used = 0
        self._arrived: torch.cuda.Event | None = None

    def fetch(self, words: Tensor) -> NDArray[np.signedinteger]:
        """The words, copied to the host; they stay until the buffer goes back."""
        with self._ring.on("down"):
            host = self._room(words.numel(), words.dtype)
            host.copy_(words, non_blocking=True)
            if words.is_cuda:
                torch.cuda.current_stream(words.device).synchronize()
        return host.numpy()

    def send(self, arrays: Sequence[NDArray[Any]], target: Tensor) -> torch.cuda.Event | None:
        """Make arrays, one after another, the words of `target`. They may be changed when this returns.

        Returns:
            What `Ring.after` waits for.
        """
        host = self._room(target.numel(), target.dtype)
        np.concatenate([array.view(host.numpy().dtype) for array in arrays], out=host.numpy())
        with self._ring.on("up"):
            target.copy_(host, non_blocking=True)
            self._arrived = (
                torch.cuda.current_stream(target.device).record_event() if target.is_cuda else None
            )
        return self._arrived

    def wait(self) -> None:
        """Until what was sent has arrived: then the buffer is free."""
        if self._arrived is not None:
            self._arrived.synchronize()
        self._used = 0
        self._arrived = None

    def _room(self, count: int, dtype: torch.dtype) -> Tensor:
        """So many words of the buffer that nobody used yet."""
        begin = -(-self._used // dtype.itemsize) * dtype.itemsize
        self._used = begin + count * dtype.itemsize
        return self._buffer[begin : self._used].view(dtype)
