"""The processes that train one model or write one output together, and the few numbers that they tell each
other.

Whole weights never pass here: what is sent is JSON, counted, and a kilobyte or two for a snapshot of any
model.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DareError, RankError

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for another that has not answered before it gives up with an error."""
OFFLINE_PATIENCE = timedelta(days=1)
"""The same where nothing but one output is at stake, which may take hours. A rank that dies is noticed at
once anyway."""


def in_shares(work: Sequence[Item], count: int, *, size: Callable[[Item], int]) -> list[list[Item]]:
    """The same work, in order, in `count` lists of about the same size."""
    shares: list[list[Item]] = [[] for _ in range(count)]
    total = sum(map(size, work))
    before = 0
    for item in work:
        shares[min(before * count // max(total, 1), count - 1)].append(item)
        before += size(item)
    return shares


class Ranks:
    """This process among those that work together. All of them make the same calls in the same order.

    Attributes:
        rank: number of this process, from 0.
        world: how many processes there are.
        bytes_sent: what this process has told the others so far.
        lost: whether another did not answer; there is no use in talking to them then.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.world = world
        self._group = group
        self.bytes_sent = 0
        self.lost = False

    @classmethod
    def joined(cls, patience: timedelta = PATIENCE) -> Ranks:
        """All processes of `torch.distributed`, talking among themselves apart from training's own traffic;
        or this one alone.

        Raises:
            ConfigError: a launcher started several processes, but they do not know of each other.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            if launched_world() > 1:
                remedy = (
                    "each would write the same packages: initialise torch.distributed "
                    "first (accelerate: cpu=True without a GPU)"
                )
                raise ConfigError(
                    "WORLD_SIZE",
                    expected=f"{launched_world()} processes that work together",
                    found="each of them for itself",
                    remedy=remedy,
                )
            return cls()
        if dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=patience))

    def another(self) -> Ranks:
        """The same processes on a line of their own, so that a thread can use it while this one is in use."""
        return Ranks.joined() if self.world > 1 else Ranks()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what there is only one of."""
        return self.rank == 0

    @property
    def neighbours(self) -> int:
        """How many of them share this machine, this one included, as far as the launcher says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world > 1 else 1

    def share(self, work: Sequence[Item], *, size: Callable[[Item], int]) -> list[Item]:
        """What this process does of work that all of them know: consecutive items, about as much on each of
        them.
        """
        return in_shares(work, self.world, size=size)[self.rank]

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in the order of ranks. Items are what JSON can hold; tuples come back as lists.

        Raises:
            RankError: a rank is gone, or did not answer in time.
        """
        if self.world == 1:
            return [item]
        message = json.dumps(item, separators=(",", ":")).encode()
        self.bytes_sent += len(message)
        try:
            return [json.loads(answer) for answer in self._exchange(message)]
        except RuntimeError as error:
            self.lost = True
            reason = str(error).splitlines()[0]
            remedy = "see the logs of the other ranks"
            raise RankError(
                f"rank {self.rank}", expected=f"answers of {self.world} ranks", found=reason, remedy=remedy
            ) from error

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Do something on every rank; results in the order of ranks. If it fails on one, it fails on all.

        Raises:
            Whatever this rank's own work raised; RankError with the message of the rank that failed, on the
            others.
        """
        failure: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - kept until the others know
            failure = error
        answers = self.gather([result, _told(failure)])
        if failure is not None:
            raise failure
        for rank, (_, failed) in enumerate(answers):
            if failed is not None:
                raise RankError(f"rank {rank} failed: {failed[0]}", exit_code=failed[1])
        return [answer for answer, _ in answers]

    def each(self, work: Callable[[], Result]) -> Result:
        """Like `together` for results that are not told to the others. Returns this rank's own.

        Raises:
            As `together`.
        """
        results: list[Result] = []
        self.together(lambda: results.append(work()))
        return results[0]

    def sum_of(self, words: NDArray[Any]) -> NDArray[Any]:
        """Words of which each element comes from one rank, which the others fill with zeros."""
        if self.world == 1:
            return words
        import torch
        import torch.distributed as dist

        total = torch.from_numpy(words.view(np.uint8).copy())
        dist.all_reduce(total, group=self._group)
        return total.numpy().view(words.dtype)

    def _exchange(self, message: bytes) -> list[bytes]:
        import torch
        import torch.distributed as dist

        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(message)]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        answers = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(answers, padded, group=self._group)
        return [answer[: int(size)].numpy().tobytes() for answer, size in zip(answers, sizes, strict=True)]


class Roll:
    """Who takes part in something, told without waiting: a rank that does not know of it answers nothing.

    Args:
        what: by which it is told apart from others; the same on every rank. What is called the same happens
            one after another, in the same order on all ranks.
    """

    _checked: ClassVar[Counter[str]] = Counter()
    """How often it has happened in this process."""

    def __init__(self, what: str) -> None:
        self._what = what

    def _key(self, rank: int) -> str:
        return f"dare_train/{self._what}/{self._checked[self._what]}/{rank}"

    def sign(self) -> None:
        """Say that this process takes part, the next time; nothing where it is alone."""
        store, rank, _ = _store()
        if store is not None:
            store.set(self._key(rank), b"here")

    def check(self, patience: timedelta) -> None:
        """Wait until all processes have signed.

        Raises:
            ConfigError: naming those that have not.
        """
        store, _, world = _store()
        if store is None:
            return
        keys = {rank: self._key(rank) for rank in range(world)}
        self._checked[self._what] += 1
        try:
            store.wait(list(keys.values()), patience)
        except RuntimeError as error:
            missing = [str(rank) for rank, key in keys.items() if not store.check([key])]
            raise ConfigError(
                "DareCallback",
                expected=f"the same callback on all {world} processes",
                found=f"none on rank {', '.join(missing)}",
                remedy="give it to every process's Trainer, not to the main one's alone",
            ) from error


def _store() -> tuple[Any, int, int]:
    """Where processes of `torch.distributed` can leave word for one another, this one's rank, and how many
    they are; None for the place where it is alone.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None, 0, 1
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store(), dist.get_rank(), dist.get_world_size()


def _told(failure: Exception | None) -> tuple[str, int] | None:
    """Message and exit code."""
    if failure is None:
        return None
    return (
        (str(failure), failure.exit_code)
        if isinstance(failure, DareError)
        else (f"{type(failure).__name__}: {failure}", 1)
    )


def launched_world() -> int:
    """How many processes the launcher (`torchrun`, `accelerate launch`) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _can_join() -> bool:
    if find_spec("torch") is None:
        return False
    import torch.distributed as dist

    return dist.is_available()


@contextmanager
def launched() -> Iterator[Ranks]:
    """The processes that a launcher started, joined until the block ends; this one alone where there is none,
    or no torch.

    For a program that nobody else joins: where something trains, that has been done.

    Raises:
        RankError: they do not find one another.
    """
    if launched_world() == 1 or not _can_join():
        yield Ranks()
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        remedy = "start them with torchrun; or unset WORLD_SIZE, and this process works alone"
        expected = f"{launched_world()} processes, as WORLD_SIZE says"
        reason = str(error).splitlines()[0]
        raise RankError("launcher", expected=expected, found=reason, remedy=remedy) from error
    try:
        yield Ranks.joined(OFFLINE_PATIENCE)
    finally:
        dist.destroy_process_group()
