"""What a training run's delta is relative to: found on disk, or kept there before the first step changes
it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import BaseMismatch, CheckpointError, TensorMismatch
from ..parallel.ranks import Ranks
from ..parallel.staged_folder import shared_staging
from ..parallel.threads import ordered_map
from ..weights.alignment import align, cast_to
from ..weights.checkpoint import SINGLE, Checkpoint, locate
from ..weights.checkpoint_names import unwrapped
from ..weights.checkpoint_writer import CheckpointWriter, Layout
from ..weights.fingerprint import Fingerprint, fingerprints, model_fingerprint
from ..weights.live import LiveWeights
from ..weights.protocol import SEGMENT, Weights, runs

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
            "name": self.name,
            "folder": str(self.checkpoint.folder.resolve()),
            "prefix": self.prefix,
            "fresh": sorted(self.fresh),
            "fingerprint": self.fingerprint,
            "dtypes": dtypes,
        }


def from_disk(live: LiveWeights, where: str | os.PathLike[str], *, compare: bool) -> Origin | None:
    """The origin at a path or Hub id. With `compare`, the live weights are expected to be the base's.

    Tensors whose bits differ are `fresh`. Returns None when most of the shared weights differ: then the run
    began elsewhere.

    Raises:
        CheckpointError, TensorMismatch: it cannot be read, or has nothing to do with the model.
    """
    base = live.ranks.each(lambda: _open(live, where))
    fresh: set[str] = set()
    if compare:
        fresh = set().union(*live.ranks.together(lambda: _differing(live, base.weights)))
        shared = sum(info.numel for name, info in live.tensors.items() if name in base.weights.tensors)
        differing = sum(live.tensors[name].numel for name in fresh)
        if differing > _MAJORITY * shared:
            return None
    fresh |= live.trained_whole
    return _origin(str(where), base, fresh, live.ranks)


class _OpenedBase(NamedTuple):
    """A base on disk, and the same under a run's names and in its dtypes."""

    checkpoint: Checkpoint
    weights: Weights
    prefix: str = ""


def _open(live: Weights, where: str | os.PathLike[str]) -> _OpenedBase:
    checkpoint = Checkpoint.open(locate(where, local_only=True))
    aligned, prefix = align(checkpoint, live.tensors.keys(), model=live.label)
    return _OpenedBase(checkpoint, cast_to(aligned, live.tensors), prefix)


def from_live(live: LiveWeights, folder: Path, companions: Mapping[str, str]) -> Origin:
    """Keep the live weights in `folder` as a checkpoint: the base of a run that has none on disk.

    `companions` maps file names to the text of further files, such as the model's configuration.
    """
    layout = Layout(files={SINGLE: dict(live.tensors)})
    ranks = live.ranks
    with shared_staging(folder, ranks) as staging:
        ranks.together(lambda: CheckpointWriter(staging, layout).close() if ranks.first else None)
        ranks.together(lambda: _spool(live, staging, layout))
        if ranks.first:
            for name, text in companions.items():
                (staging / name).write_text(text)
    checkpoint = Checkpoint.open(folder)
    return _origin(str(folder), _OpenedBase(checkpoint, checkpoint), set(live.trained_whole), ranks)


def _spool(live: LiveWeights, staging: Path, layout: Layout) -> None:
    with CheckpointWriter(staging, layout, join=True) as writer:
        for name, spans in live.owned.items():
            for begin, end in spans:
                for offset, count in runs(end - begin, SEGMENT):
                    writer.write(name, begin + offset, live.read(name, begin + offset, count))


def establish(
    live: LiveWeights, model: Any, folder: Path, *, base: str | os.PathLike[str] | None = None
) -> Origin:
    """The origin of a model that is about to be trained: the given base, or where it was loaded from if it
    still has the weights on disk, or else its weights as they are, kept in `folder`.

    Raises:
        CheckpointError, TensorMismatch: a base was given that cannot be read, or has nothing to do with the
            model.
    """
    if base is not None:
        origin = from_disk(live, base, compare=False)
        assert origin is not None, "only a comparison can reject a base"
        return origin
    return find(live, loaded_from(model)) or from_live(live, folder, _configuration(model))


def loaded_from(model: Any) -> str | None:
    """The path or Hub id that a model was given to `from_pretrained`, if it says so."""
    model = unwrapped(model)
    return (
        getattr(getattr(model, "config", None), "name_or_path", None)
        or getattr(model, "name_or_path", None)
        or None
    )


def _configuration(model: Any) -> dict[str, str]:
    config = getattr(unwrapped(model), "config", None)
    return {"config.json": config.to_json_string(use_diff=False)} if config is not None else {}


def recall(record: Mapping[str, Any], live: LiveWeights) -> Origin:
    """The origin that an earlier part of the run put on record.

    Raises:
        BaseMismatch: it is gone, or no longer what it was.
    """
    remedy = "put it back where it was, or pass base= to the callback"
    try:
        base = live.ranks.each(lambda: _open(live, record["folder"]))
    except CheckpointError as error:
        raise BaseMismatch(
            "base of the resumed run", expected=record["folder"], found=str(error.found), remedy=remedy
        ) from error
    origin = _origin(record["name"], base, set(record["fresh"]), live.ranks)
    if origin.fingerprint != record["fingerprint"]:
        expected = f"fingerprint {record['fingerprint'][:12]}…, as at the start of the run"
        raise BaseMismatch(
            f"base of the resumed run: {record['folder']}",
            expected=expected,
            found=f"{origin.fingerprint[:12]}…",
            remedy=remedy,
        )
    return origin


def _origin(name: str, base: _OpenedBase, fresh: set[str], ranks: Ranks) -> Origin:
    return Origin(
        name=name,
        checkpoint=base.checkpoint,
        weights=base.weights,
        prefix=base.prefix,
        fresh=frozenset(fresh),
        fingerprint=_shared_fingerprint(base.weights, ranks),
    )


def _shared_fingerprint(weights: Weights, ranks: Ranks) -> str:
    """The fingerprint of all weights, of which each rank reads a share."""
    infos = weights.tensors
    work = [(name, *run) for name, info in infos.items() for run in runs(info.numel, SEGMENT)]
    mine: dict[str, list[tuple[int, int]]] = {}
    for name, start, count in work[ranks.rank :: ranks.world]:
        mine.setdefault(name, []).append((start, start + count))
    prints = dict.fromkeys(infos, Fingerprint())
    for shares in ranks.together(lambda: fingerprints(weights, mine)):
        for name, (first, second) in shares.items():
            prints[name] = prints[name].plus((first, second))
    return model_fingerprint(
        (name, info.dtype.code, info.shape, prints[name]) for name, info in infos.items()
    )


def _differing(live: LiveWeights, base: Weights) -> list[str]:
    """Tensors of both whose own part here does not hold the base's bits, up to rows added at the end."""

    def same(name: str) -> bool:
        info = live.tensors[name]
        base_info = base.tensors[name]
        before = base_info.shape
        after = info.shape
        grown = bool(after) and after[1:] == before[1:] and after[0] >= before[0]
        if info.dtype != base_info.dtype or not (after == before or grown):
            return False
        spans = [(begin, min(end, base_info.numel)) for begin, end in live.owned[name]]
        work = [(begin + s, n) for begin, end in spans for s, n in runs(end - begin, SEGMENT)]
        return all(np.array_equal(live.read(name, s, n), base.read(name, s, n)) for s, n in work)

    shared = [name for name in live.tensors if name in base.tensors]
    return [name for name, equal in zip(shared, ordered_map(same, shared), strict=True) if not equal]


def find(live: LiveWeights, name_or_path: str | None) -> Origin | None:
    """The origin that `from_pretrained` loaded a model from, or None when there is none to be had on this
    machine.

    None too for weights that are not safetensors, or that have nothing in common with the model's.
    """
    if not all(live.ranks.gather(bool(name_or_path) and _readable(live, str(name_or_path)))):
        return None
    return from_disk(live, str(name_or_path), compare=True)


def _readable(live: LiveWeights, where: str) -> bool:
    try:
        _open(live, where)
    except (CheckpointError, TensorMismatch):
        return False
    return True
