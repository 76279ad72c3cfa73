"""The ring of buffers through which threads copy to and from a device: nothing is mixed up, nothing is lost,
and it is bounded.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch

from dare_train.kernels import transfers as staging
from dare_train.kernels.transfers import Ring, in_pieces
from dare_train.parallel.threads import ordered_map

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("target_dtype", [torch.int16, torch.float32, torch.float64])
def test_threads_send_what_they_made_of_what_they_fetched(
    target_dtype: torch.dtype, device: torch.device
) -> None:
    """In pieces of odd lengths, so that what is sent would not lie at a multiple of its size by itself."""
    source = torch.arange(10_000, dtype=torch.int16, device=device)
    target = torch.zeros(10_000, dtype=target_dtype, device=device)
    borders = [*range(0, 10_000, 37), 10_000]
    ring = Ring(device, slots=2, nbytes=37 * (2 + target.itemsize) + target.itemsize)
    held, most = set[int](), [0]
    lock = threading.Lock()

    def one(piece: tuple[int, int]) -> None:
        begin, end = piece
        with ring.slot() as slot:
            with lock:
                held.add(id(slot))
                most[0] = max(most[0], len(held))
            words = slot.fetch(source[begin:end])
            half = (end - begin) // 2
            slot.send(
                [(3 * part).astype(target.cpu().numpy().dtype) for part in (words[:half], words[half:])],
                target[begin:end],
            )
            with lock:
                held.remove(id(slot))

    for _ in ordered_map(one, list(zip(borders[:-1], borders[1:], strict=True)), threads=5):
        pass
    ring.close()
    assert torch.equal(target, (3 * source).to(target_dtype))
    assert most[0] <= 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (1,), (4096,), (67, 151)])
def test_much_comes_to_the_host_in_pieces(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    words = (torch.arange(math.prod(shape)) % 251).to(dtype).reshape(shape).to(device)
    for nbytes in (1, 100, 8192, 1 << 20):
        found = in_pieces(words, nbytes)
        assert found.dtype == words.cpu().numpy().dtype
        assert np.array_equal(found, words.cpu().numpy())


def test_few_pinned_bytes_will_do(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is copied."""
    pinned, honest = list[int](), staging.torch.empty

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        made = honest(*size, **options)
        pinned.append(made.nbytes if options.get("pin_memory") is not None else 0)
        return made

    words = torch.zeros(1 << 20, dtype=torch.int16, device=device)
    monkeypatch.setattr(staging.torch, "empty", empty)
    in_pieces(words, 1 << 10)
    assert 0 < sum(pinned) <= 1 << 13


def test_a_buffer_comes_back_from_a_thread_that_failed(device: torch.device) -> None:
    ring = Ring(device, slots=1, nbytes=8)

    def fail() -> None:
        with ring.slot():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with ring.slot() as slot:
        assert slot.fetch(torch.arange(4, dtype=torch.int16, device=device)).tolist() == [0, 1, 2, 3]
    ring.close()
