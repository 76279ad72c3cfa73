"""What a training run's delta is relative to: found on disk, or kept there before the first step changes
it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BaseMismatch, CheckpointError, ConfigError, TensorMismatch
from ..hub.download import locate
from ..parallel.ranks import Ranks
from ..parallel.staged_folder import shared_staging
from ..reading.structures import checked
from ..weights.alignment import align, cast_to
from ..weights.files import full_precision
from ..weights.files.checkpoint import SINGLE, Checkpoint
from ..weights.files.checkpoint_writer import CheckpointWriter, Layout
from ..weights.fingerprint import Fingerprint, fingerprints, model_fingerprint
from ..weights.live.live import LiveWeights
from ..weights.live.live_lora import Merged
from ..weights.live.wrapped import inner_model
from ..weights.lora.adapters_on_files import AdaptersOnFiles, check_full_precision
from ..weights.protocol import SEGMENT, Weights, runs
from . import comparing

_log = logging.getLogger("dare_train")
_NEAR = 0.5
"""Relative distance up to which a tensor under an adapter counts as the base's, moved: an initialisation of
its own is at about 1.4."""
_ROUNDED = 0.01
"""Relative distance that rounding to 16 bits and back stays below."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A base on disk and how the run's weights began relative to it."""

    name: str
    """What packages call the base: a Hub id or a folder."""
    checkpoint: Checkpoint
    """The files, memory-mapped, under their own names."""
    weights: Weights
    """The same under the run's names, rounded to the run's dtypes."""
    own: Weights
    """The same under the run's names, in their own dtypes."""
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

    Tensors whose bits differ are `fresh`. Returns None when most of the shared weights differ, or are
    quantised there: then the run began elsewhere. What is under an adapter may have been moved by how the
    adapter begins (PiSSA, OLoRA): there the merged weights count, and as fresh only where they are far from
    the base's.

    Raises:
        CheckpointError, TensorMismatch: it cannot be read, or has nothing to do with the model.
        ConfigError: the model is quantised, and these are not its weights in full precision.
    """
    base = live.ranks.each(lambda: _open(live, where))
    if live.packed:
        return _under_packed(live, where, base)
    if not compare:
        full_precision.check_full_precision(base.checkpoint, purpose="as the model in training", option=False)
    fresh: set[str] = set()
    if compare and _quantised(base.weights, live):
        return None
    if compare:
        updates = live.updates()
        differing = comparing.differing(live, base.weights)
        adapted = differing & updates.keys()
        if comparing.most(live, base.weights, differing - adapted, besides=updates.keys()):
            return None
        merged = Merged(comparing.ZeroFilled(live), updates, live.tensors)
        distances = comparing.relative_distances(merged, live, base.weights, adapted)
        fresh = differing - {name for name, distance in distances.items() if distance <= _NEAR}
    fresh |= live.trained_whole
    return _origin(str(where), base, fresh, live.ranks)


def _under_packed(live: LiveWeights, where: str | os.PathLike[str], base: _OpenedBase) -> Origin:
    """The files that a quantised model's adapters go on: in their own dtypes. What is not packed has to be
    theirs, but for rounding; what is not counts as fresh.
    """
    plain = (live.tensors.keys() & base.weights.tensors.keys()) - live.trained - live.trained_whole
    distances = comparing.relative_distances(live, live, base.weights, plain)
    far = {name for name, distance in distances.items() if distance > _ROUNDED}
    if far and comparing.most(live, base.weights, far, besides=live.tensors.keys() - plain):
        name = min(far)
        expected = "the full-precision model that was quantised"
        found = f"another, whose {name} differs"
        raise BaseMismatch(f"base {where}", expected=expected, found=found, remedy="pass base=")
    fresh = far | (live.tensors.keys() - base.weights.tensors.keys()) | live.trained_whole
    AdaptersOnFiles(live, base.weights, fresh)
    return _origin(str(where), base, fresh, live.ranks)


def _quantised(base: Weights, live: LiveWeights) -> bool:
    """Whether files hold packed what was dequantised when it was loaded."""
    shared = live.tensors.keys() & base.tensors.keys()
    return any(
        live.tensors[name].dtype.can_be_delta > base.tensors[name].dtype.can_be_delta for name in shared
    )


class _OpenedBase(NamedTuple):
    """A base on disk, and the same under a run's names: in the run's dtypes, and in its own."""

    checkpoint: Checkpoint
    weights: Weights
    own: Weights
    prefix: str = ""


def _open(live: LiveWeights, where: str | os.PathLike[str]) -> _OpenedBase:
    checkpoint = Checkpoint.open(locate(where, local_only=True))
    aligned, prefix = align(checkpoint, live.tensors.keys(), model=live.label)
    rounded = aligned if live.packed else cast_to(aligned, live.tensors)
    return _OpenedBase(checkpoint, rounded, aligned, prefix)


def from_live(live: LiveWeights, folder: Path, companions: Mapping[str, str]) -> Origin:
    """Keep the live weights in `folder` as a checkpoint: the base of a run that has none on disk.

    `companions` maps file names to the text of further files, such as the model's configuration.
    """
    layout = Layout(files={SINGLE: dict(live.tensors)})
    ranks = live.ranks
    with shared_staging(folder, ranks, read_back=layout.read_back) as staging:
        ranks.together(lambda: CheckpointWriter(staging, layout).close() if ranks.first else None)
        ranks.together(lambda: _spool(live, staging, layout))
        if ranks.first:
            for name, text in companions.items():
                (staging / name).write_text(text)
    base = Checkpoint.open(folder)
    return _origin(str(folder), _OpenedBase(base, base, base), set(live.trained_whole), ranks)


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
        ConfigError: the model is quantised, and its full-precision weights are not at hand.
    """
    return at_hand(live, model, folder, base=base) or kept(live, model, folder)


def at_hand(
    live: LiveWeights, model: Any, folder: Path, *, base: str | os.PathLike[str] | None = None
) -> Origin | None:
    """The same as `establish` as far as it is on disk already: in `folder`, too, from a run that began with
    the same weights.
    """
    if base is not None:
        return from_disk(live, base, compare=False)
    origin = find(live, loaded_from(model))
    if origin is not None or live.packed:
        return origin
    kept_before = find(live, str(folder)) if all(live.ranks.gather(folder.is_dir())) else None
    same = kept_before is not None and kept_before.fresh == live.trained_whole
    return kept_before if same else None


def kept(live: LiveWeights, model: Any, folder: Path) -> Origin:
    """The live weights as they are, kept in `folder`; one line says so, and why.

    Raises:
        ConfigError: the model is quantised.
    """
    name = loaded_from(model)
    if live.packed:
        expected = "the full-precision model that was quantised, since adapters are merged into that"
        found = f"none at {name}" if name else "none that the model names"
        raise ConfigError("base", expected=expected, found=found, remedy="pass base= (a folder or a Hub id)")
    why = "the model does not say where it was loaded from"
    if name is not None:
        why = f"{name} has no weights to be read here"
        if all(live.ranks.gather(_readable(live, name))):
            why = f"the model's weights are not those of {name}"
    if live.ranks.first:
        megabytes = sum(info.nbytes for info in live.tensors.values()) / 1e6
        _log.warning(
            "base of the packages: a copy of the model as it is now, %.1f MB in %s, since %s; base= names "
            "another, and saves the copy",
            megabytes,
            folder,
            why,
        )
    return from_live(live, folder, _configuration(model))


@dataclass(frozen=True)
class FirstLook:
    """What a process sees of a model before anything is trained, without asking the others."""

    where: str
    """Where the model was loaded from."""
    differing: frozenset[str]
    """Tensors that are not as they are there, of what lies in this process."""


def first_look(model: Any, base: str | os.PathLike[str] | None) -> FirstLook | None:
    """Where a model's base is, and what it has that its base has not; None where it has none on disk.

    Raises:
        ConfigError: the model is quantised, and its full-precision weights are not at hand.
    """
    live = LiveWeights(model, but_packed=True)
    where = loaded_from(model) if base is None else os.fspath(base)
    opened = _opened(live, where) if where else None
    if live.packed:
        if opened is None or where is None:
            kept(live, model, Path())
        else:
            check_full_precision(live, opened.weights)
    if where is None or opened is None or base is not None:
        return None
    return FirstLook(where, frozenset(comparing.differing_here(live, opened.weights, live.held)))


def begun_at(look: FirstLook, live: LiveWeights) -> Origin:
    """The origin of a run whose model was seen before its first step. All ranks call it together.

    Raises:
        CheckpointError: it is gone.
    """
    base = live.ranks.each(lambda: _open(live, look.where))
    apart = set[str]().union(*live.ranks.gather(sorted(look.differing)))
    fresh = (apart - live.updates().keys()) & live.tensors.keys() | live.trained_whole
    return _origin(look.where, base, fresh, live.ranks)


def loaded_from(model: Any) -> str | None:
    """The path or Hub id that a model was given to `from_pretrained`, if it says so."""
    inner: Any = inner_model(model).model
    config = getattr(inner, "config", None)
    of_diffusers = config.get("_name_or_path") if isinstance(config, Mapping) else None
    return (
        of_diffusers or getattr(config, "name_or_path", None) or getattr(inner, "name_or_path", None) or None
    )


def _configuration(model: Any) -> dict[str, str]:
    inner: Any = inner_model(model).model
    config: Any = getattr(inner, "config", None)
    if hasattr(config, "to_json_string"):
        return {"config.json": config.to_json_string(use_diff=False)}
    return {"config.json": inner.to_json_string()} if hasattr(inner, "to_json_string") else {}


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What `recall` needs of a record."""

    name: str
    folder: str
    fresh: list[str]
    fingerprint: str


def recall(record: Mapping[str, Any], live: LiveWeights, elsewhere: Sequence[str] = ()) -> Origin:
    """The origin that an earlier part of the run put on record; or `elsewhere`, where the same weights are.

    Raises:
        BaseMismatch: it is gone, or no longer what it was.
    """
    remedy = "put it back where it was, or pass base= to the callback"
    kept: _Recorded = checked(
        dict(record), _Recorded, where="base of the resumed run", error=BaseMismatch, remedy=remedy
    )
    found = "nothing there"
    for where in dict.fromkeys((kept.folder, *elsewhere)):
        if not all(live.ranks.gather(_readable(live, where))):
            continue
        base = live.ranks.each(lambda where=where: _open(live, where))  # type: ignore[misc]
        moved = where != kept.folder and kept.name.startswith(("/", ".", "~"))
        origin = _origin(where if moved else kept.name, base, set(kept.fresh), live.ranks)
        if origin.fingerprint == kept.fingerprint:
            return origin
        if where == kept.folder:
            found = f"one with fingerprint {origin.fingerprint[:12]}…"
    expected = f"one with fingerprint {kept.fingerprint[:12]}…, as at the start of the run"
    name = f"base of the resumed run: {kept.folder}"
    raise BaseMismatch(name, expected=expected, found=found, remedy=remedy)


def _origin(name: str, base: _OpenedBase, fresh: set[str], ranks: Ranks) -> Origin:
    return Origin(
        name=name,
        checkpoint=base.checkpoint,
        weights=base.weights,
        own=base.own,
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


def find(live: LiveWeights, name_or_path: str | None) -> Origin | None:
    """The origin that `from_pretrained` loaded a model from, or None when there is none to be had on this
    machine.

    None too for weights that are not safetensors, or that have nothing in common with the model's.
    """
    if not all(live.ranks.gather(bool(name_or_path) and _readable(live, str(name_or_path)))):
        return None
    return from_disk(live, str(name_or_path), compare=True)


def _readable(live: LiveWeights, where: str) -> bool:
    return _opened(live, where) is not None


def _opened(live: LiveWeights, where: str) -> _OpenedBase | None:
    try:
        return _open(live, where)
    except (CheckpointError, TensorMismatch):
        return None
