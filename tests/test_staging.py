"""The ring of buffers through which threads copy to and from a device: nothing is mixed up, nothing is lost, and it is bounded."""

from __future__ import annotations

import threading

import pytest
import torch

from dare_train.kernels.staging import Ring
from dare_train.parallel import ordered_map

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("target_dtype", [torch.int16, torch.float32, torch.float64])
def test_threads_send_what_they_made_of_what_they_fetched(target_dtype: torch.dtype, device: torch.device) -> None:
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
            slot.send([(3 * part).astype(target.cpu().numpy().dtype) for part in (words[:half], words[half:])], target[begin:end])
            with lock:
                held.remove(id(slot))

    for _ in ordered_map(one, list(zip(borders[:-1], borders[1:], strict=True)), threads=5):
        pass
    ring.close()
    assert torch.equal(target, (3 * source).to(target_dtype))
    assert most[0] <= 2


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
