"""Threads: results in order, and what is worked out once, whoever asks."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dare_train.parallel.ranks import Ranks
from dare_train.parallel.threads import once, ordered_map


class Slow:
    def __init__(self, gate: threading.Event | None = None) -> None:
        self.calls, self.gate = 0, gate

    @once
    def value(self) -> int:
        """A number."""
        self.calls += 1
        time.sleep(0.05)
        if self.gate is not None:
            assert self.gate.wait(10), "another object's property was not worked out meanwhile"
        return self.calls


def test_one_thread_works_it_out_and_the_others_wait() -> None:
    slow = Slow()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: slow.value, range(8))) == [1] * 8
    assert slow.calls == 1


def test_objects_do_not_wait_for_one_another() -> None:
    gate = threading.Event()
    waiting, other = Slow(gate), Slow()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: waiting.value)
        assert other.value == 1
        gate.set()
        assert first.result() == 1


def test_what_failed_is_tried_again() -> None:
    class Failing:
        calls = 0

        @once
        def value(self) -> int:
            self.calls += 1
            if self.calls == 1:
                raise OSError("not yet")
            return self.calls

    failing = Failing()
    with pytest.raises(OSError, match="not yet"):
        _ = failing.value
    assert failing.value == 2
    assert isinstance(Failing.value, once)


def test_ranks_meet_once_for_what_each_of_them_holds() -> None:
    """However many threads ask at a time: a second meeting would be with none."""
    torch = pytest.importorskip("torch", reason="ranks share the weights of a model, torch's")
    from dare_train.weights.live.live import LiveWeights

    meetings = []

    class Two(Ranks):
        def gather(self, item: Any) -> list[Any]:
            meetings.append(item)
            time.sleep(0.05)
            return [item, item]

    live = LiveWeights({"a": torch.zeros(10), "b": torch.zeros(3)}, ranks=Two(0, 2))
    owned = list(ordered_map(lambda name: live.owned[name], ["a", "b"] * 8, threads=8))
    assert len(meetings) == 1
    assert owned == [live.owned["a"], live.owned["b"]] * 8
