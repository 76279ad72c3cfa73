"""What a configuration calls a model: a place, and after a plus an adapter that is merged into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from ...dtypes import DTYPES, Words
from ...errors import ConfigError
from ...hub.download import here, locate
from ...weights.files.checkpoint import Checkpoint
from ...weights.files.full_precision import check_full_precision
from ...weights.lora.lora_checkpoint import AdapterWeights, merge_adapter
from ...weights.lora.opening import WeightsLike, open_checkpoint, open_weights
from ...weights.low_rank import UNROUNDED
from ...weights.protocol import Cast, Weights

_PLUS = "+"


@runtime_checkable
class Placed(Weights, Protocol):
    """Weights with a folder where their configuration and tokenizer lie."""

    @property
    def folder(self) -> Path: ...


class Adapted:
    """A model with an adapter merged into it while it is read. Implements `Placed`.

    Args:
        rounded: what is merged has the model's dtypes; otherwise 16-bit weights become float32.
    """

    def __init__(self, model: Checkpoint, adapter: Checkpoint, *, label: str, rounded: bool) -> None:
        check_full_precision(model, purpose="since the adapter is merged into it")
        merged = merge_adapter(adapter, model, unrounded=not rounded)
        if not isinstance(merged, AdapterWeights):
            remedy = "list two models, to merge one with the other"
            raise ConfigError(
                label, expected="an adapter after the plus", found=f"the model {adapter.label}", remedy=remedy
            )
        self._merged = _in_single(merged)
        self.folder = model.folder
        self.label = label
        self.tensors = self._merged.tensors

    def read(self, name: str, start: int, count: int) -> Words:
        return self._merged.read(name, start, count)


class OnBase:
    """What an adapter makes of a merge's base, without rounding. Implements `Placed`: its folder is the
    adapter's.
    """

    def __init__(self, adapted: AdapterWeights) -> None:
        self._merged = _in_single(adapted)
        self.folder = adapted.folder
        self.label = adapted.label
        self.tensors = self._merged.tensors

    def read(self, name: str, start: int, count: int) -> Words:
        return self._merged.read(name, start, count)


def open_reference(given: WeightsLike, *, dequantize: bool = False, rounded: bool = False) -> Weights:
    """What is given as weights, or named: a checkpoint, or `checkpoint+adapter`.

    Raises:
        CheckpointError, TensorMismatch: one of them cannot be read, or they do not fit together.
        ConfigError: there is no adapter after the plus.
    """
    parts = parts_of(given)
    if len(parts) < 2:
        return open_weights(given, dequantize=dequantize)
    model, adapter = (open_checkpoint(part, dequantize=dequantize) for part in parts)
    return Adapted(model, adapter, label=str(given), rounded=rounded)


def open_placed(given: str) -> Placed:
    """A checkpoint, or `checkpoint+adapter` in the checkpoint's dtypes.

    Raises:
        As `open_reference`.
    """
    opened = open_reference(given, rounded=True)
    assert isinstance(opened, Placed)
    return opened


def parts_of(given: object) -> list[str]:
    """The names in what is given: two where there is a plus, and nothing here that has it in its name.

    Raises:
        ConfigError: there are several, or nothing on one side.
    """
    if not isinstance(given, (str, os.PathLike)):
        return []
    name = os.fspath(given)
    if _PLUS not in name or here(name) is not None:
        return [name]
    parts = name.split(_PLUS)
    if len(parts) != 2 or not all(parts):
        remedy = "merge the first adapter into a model of its own before, with passthrough"
        raise ConfigError(name, expected="model+adapter", found=f"{len(parts)} parts", remedy=remedy)
    return parts


def adapters_of(given: object) -> Iterator[Path]:
    """Where adapters lie that are merged into a model."""
    for part in parts_of(given)[1:]:
        yield locate(part)


def folder_of(weights: object) -> Path | None:
    """Where configuration and tokenizer of opened weights lie, if they have a place."""
    folder = getattr(weights, "folder", None)
    return folder if isinstance(folder, Path) else None


def _in_single(adapted: AdapterWeights) -> Weights:
    """What an adapter makes of a base, without rounding, in float32, in which deltas are worked out."""
    wide = [name for name, info in adapted.tensors.items() if info.dtype == UNROUNDED]
    return Cast(adapted, dict.fromkeys(wide, DTYPES["F32"]))
