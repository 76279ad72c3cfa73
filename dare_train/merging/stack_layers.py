"""`stack_layers`: a model of layers of others, from Python; `passthrough` in configuration files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from ..dtypes import DTYPE_NAMES
from ..errors import ConfigError
from .config.stack import PASSTHROUGH, SCALE, Stack, StackedLayers
from .methods.parameters import Case, Setting
from .models.chat_templates import check_template
from .models.layers import layer_counts
from .models.references import open_placed
from .stacking import StackedModel, stack

Place = Union[str, "os.PathLike[str]"]


@dataclass(frozen=True)
class Layers:
    """Layers of one model, in their order.

    Raises:
        ConfigError: no such range, or a factor that is no number.
    """

    model: Place
    """A folder or a Hub id."""
    first: int = 0
    last: int | None = None
    """The first that is not taken; None takes all up to the model's last."""
    scale: float | Mapping[str, float] = 1.0
    """Factor of each weight; or by parts of tensor names, of which the first that fits counts: where none
    does, 1."""

    def __post_init__(self) -> None:
        ends = (self.first, self.first if self.last is None else self.last)
        if not all(type(end) is int for end in ends) or not 0 <= ends[0] <= ends[1]:
            expected = "0 ≤ first ≤ last"
            found = f"{self.first!r}, {self.last!r}"
            raise ConfigError(f"layers of {os.fspath(self.model)}", expected=expected, found=found)
        for value in self.scale.values() if isinstance(self.scale, Mapping) else (self.scale,):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError("scale", expected="a number, or numbers by name", found=repr(value))


def stack_layers(
    layers: Sequence[Layers],
    out: Place,
    *,
    base_model: Place | None = None,
    out_dtype: str | None = None,
    chat_template: str = "",
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> StackedModel:
    """Write a model of layers of others, in any order, repeated or not, copied: nothing is merged.

    Embeddings are those of the first entry's model, what follows the layers those of the last one's.

    Args:
        layers: from the first to the last.
        out: folder to create.
        base_model: whose configuration and tokenizer the result gets; by default the first entry's.
        out_dtype: of the result: F64, F32, F16 or BF16; by default each tensor's own.
        chat_template: a name or a Jinja template, as in configurations of merges.
        allow_nonfinite: write NaN and infinity that a factor gives.
        overwrite: replace a folder that is already there.

    Raises:
        CheckpointError: a model cannot be read, or is quantised.
        ConfigError: a model has no such layers.
        TensorMismatch: layers of two models do not have the same form.
        NonFiniteDelta, OutputExists, StorageError.
    """
    if not layers or not all(isinstance(each, Layers) for each in layers):
        raise ConfigError("layers", expected="a list of at least one Layers", found=repr(layers))
    if out_dtype is not None and out_dtype not in DTYPE_NAMES:
        raise ConfigError("out_dtype", expected=f"one of {', '.join(DTYPE_NAMES)}", found=repr(out_dtype))
    if chat_template:
        check_template(chat_template)
    ended = [_ended(each) for each in layers]
    described_by = os.fspath(layers[0].model if base_model is None else base_model)
    what = Stack(
        layers=tuple(map(_stacked, ended)),
        described_by=described_by,
        tokenizer=described_by,
        out_dtype=out_dtype,
        chat_template=chat_template,
        notes=(),
        text=_document(ended, described_by, out_dtype, chat_template),
    )
    return stack(what, Path(out), allow_nonfinite=allow_nonfinite, overwrite=overwrite)


def _ended(each: Layers) -> Layers:
    """The same with its last layer named, as configuration files have it."""
    if each.last is not None:
        return each
    counts = layer_counts(open_placed(os.fspath(each.model)).tensors)
    last = max(each.first, *counts.values()) if counts else each.first
    return Layers(each.model, each.first, last, each.scale)


def _stacked(each: Layers) -> StackedLayers:
    scale: Setting
    if isinstance(each.scale, Mapping):
        scale = tuple(Case(value=value, filter=part) for part, value in each.scale.items())
    else:
        scale = each.scale
    settings = ({SCALE.name: scale},)
    return StackedLayers(model=os.fspath(each.model), first=each.first, last=each.last, settings=settings)


def _document(layers: Sequence[Layers], base_model: str, out_dtype: str | None, chat_template: str) -> str:
    """A configuration that makes the same result; JSON is YAML."""
    document: dict[str, Any] = {"merge_method": PASSTHROUGH, "base_model": base_model}
    document["slices"] = [{"sources": [_source(each)]} for each in layers]
    document |= {"dtype": DTYPE_NAMES[out_dtype]} if out_dtype else {}
    document |= {"chat_template": chat_template} if chat_template else {}
    return json.dumps(document, indent=2) + "\n"


def _source(each: Layers) -> dict[str, Any]:
    source: dict[str, Any] = {"model": os.fspath(each.model), "layer_range": [each.first, each.last]}
    scale: Any = each.scale
    if isinstance(scale, Mapping):
        scale = [{"filter": part, "value": value} for part, value in scale.items()]
    return source if scale == 1 else {**source, "parameters": {SCALE.name: scale}}
