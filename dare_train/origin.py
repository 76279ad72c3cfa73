"""What a training run's delta is relative to: found on disk, or kept there before the first step changes it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import SINGLE, Checkpoint, CheckpointWriter, locate
from .codec import SEGMENT
from .errors import BaseMismatch, CheckpointError, TensorMismatch
from .fingerprint import Fingerprint, model_fingerprint, total
from .parallel import ordered_map
from .plan import align, cast_to
from .publish import staged_folder
from .weights import TensorInfo, Weights, runs

_MAJORITY = 0.5


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A base on disk and how the run's weights began relative to it."""

    name: str
    """What packages call the base: a Hub id or a folder."""
    checkpoint: Checkpoint
    """The files, memory-mapped, under their own names."""
    weights: Weights
    """The same under the run's names, rounded to the run's dtypes."""
    prefix: str
    fresh: frozenset[str]
    """Tensors that began apart from the base, such as a random head: they are carried whole."""
    fingerprint: str
    """Of `weights`; on record in the Trainer's state, so that a resumed run notices another base."""

    def record(self) -> dict[str, Any]:
        """Plain data from which `recall` finds the origin again."""
        dtypes = {name: info.dtype.code for name, info in self.weights.tensors.items()}
        return {
            "name": self.name, "folder": str(self.checkpoint.folder.resolve()), "prefix": self.prefix, "fresh": sorted(self.fresh),
            "fingerprint": self.fingerprint, "dtypes": dtypes,
        }  # fmt: skip


def from_disk(live: Weights, where: str | os.PathLike[str], *, compare: bool) -> Origin | None:
    """The origin at a path or Hub id. With `compare`, the live weights are expected to be the base's.

    Tensors whose bits differ are `fresh`. Returns None when most of the shared weights differ: then the run began elsewhere.

    Raises:
        CheckpointError, TensorMismatch: it cannot be read, or has nothing to do with the model.
    """
    checkpoint = Checkpoint.open(locate(where, local_only=True))
    aligned, prefix = align(checkpoint, live.tensors.keys(), model=live.label)
    weights = cast_to(aligned, live.tensors)
    fresh: set[str] = set()
    if compare:
        fresh = {name for name, same in _comparison(live, weights) if not same}
        shared = sum(info.numel for name, info in live.tensors.items() if name in weights.tensors)
        differing = sum(live.tensors[name].numel for name in fresh)
        if differing > _MAJORITY * shared:
            return None
    return _origin(str(where), checkpoint, weights, prefix, fresh)


def from_live(live: Weights, folder: Path, companions: Mapping[str, str]) -> Origin:
    """Keep the live weights in `folder` as a checkpoint: the base of a run that has none on disk.

    `companions` maps file names to the text of further files, such as the model's configuration.
    """
    with staged_folder(folder, overwrite=True) as staging:
        with CheckpointWriter(staging, {SINGLE: dict(live.tensors)}) as writer:
            for name, info in live.tensors.items():
                for start, count in runs(info.numel, SEGMENT):
                    writer.write(name, start, live.read(name, start, count))
        for name, text in companions.items():
            (staging / name).write_text(text)
    checkpoint = Checkpoint.open(folder)
    return _origin(str(folder), checkpoint, checkpoint, "", set())


def recall(record: Mapping[str, Any], live: Weights) -> Origin:
    """The origin that an earlier part of the run put on record.

    Raises:
        BaseMismatch: it is gone, or no longer what it was.
    """
    remedy = "put it back where it was, or pass base= to the callback"
    try:
        checkpoint = Checkpoint.open(record["folder"])
    except CheckpointError as error:
        raise BaseMismatch("base of the resumed run", expected=record["folder"], found=str(error.found), remedy=remedy) from error
    aligned, prefix = align(checkpoint, live.tensors.keys(), model=live.label)
    origin = _origin(record["name"], checkpoint, cast_to(aligned, live.tensors), prefix, set(record["fresh"]))
    if origin.fingerprint != record["fingerprint"]:
        expected = f"fingerprint {record['fingerprint'][:12]}…, as at the start of the run"
        raise BaseMismatch(
            f"base of the resumed run: {record['folder']}", expected=expected, found=f"{origin.fingerprint[:12]}…", remedy=remedy
        )
    return origin


def _origin(name: str, checkpoint: Checkpoint, weights: Weights, prefix: str, fresh: set[str]) -> Origin:
    prints = ordered_map(lambda item: (item[0], item[1], _print(weights, *item)), weights.tensors.items())
    named = model_fingerprint((name, info.dtype.code, info.shape, print_) for name, info, print_ in prints)
    return Origin(name=name, checkpoint=checkpoint, weights=weights, prefix=prefix, fresh=frozenset(fresh), fingerprint=named)


def _print(weights: Weights, name: str, info: TensorInfo) -> Fingerprint:
    return total(Fingerprint.of(weights.read(name, start, count), start) for start, count in runs(info.numel, SEGMENT))


def _comparison(live: Weights, base: Weights) -> list[tuple[str, bool]]:
    """For each tensor that both have: whether the live one holds the base's bits, up to rows added at the end."""
    shared = [name for name in live.tensors if name in base.tensors]

    def same(name: str) -> tuple[str, bool]:
        own, other = live.tensors[name], base.tensors[name]
        grown = bool(own.shape) and own.shape[1:] == other.shape[1:] and own.shape[0] >= other.shape[0]
        if own.dtype != other.dtype or not (own.shape == other.shape or grown):
            return name, False
        return name, all(np.array_equal(live.read(name, s, n), base.read(name, s, n)) for s, n in runs(other.numel, SEGMENT))

    return list(ordered_map(same, shared))


def find(live: Weights, name_or_path: str | None) -> Origin | None:
    """The origin that `from_pretrained` loaded a model from, or None when there is none to be had on this machine.

    None too for weights that are not safetensors, or that have nothing in common with the model's.
    """
    if not name_or_path:
        return None
    try:
        return from_disk(live, name_or_path, compare=True)
    except (CheckpointError, TensorMismatch):
        return None
