"""Where a model's files and its modules name and cut their tensors differently: fused experts, old names.

transformers joins some tensors of a checkpoint when it loads it, and takes them apart when it saves. What it
would save of a parameter is found by letting it take apart a stand-in whose elements say where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..errors import ConfigError
from .sharding import Held

_WIDTH = 8
"""Elements that stand in for a row: what can be found are the results of conversions that keep rows whole."""

Slices = dict[str, tuple[str, int, tuple[int, ...]]]
"""File name -> name in the module, flat start there, shape."""

_known: WeakKeyDictionary[torch.nn.Module, Slices] = WeakKeyDictionary()


def places_in_files(model: Any, held: Mapping[str, Held]) -> Slices:
    """Where each tensor that `save_pretrained` would write lies in the model's own.

    Args:
        model: out of its wrappers.
        held: what is held of the model's tensors.

    Raises:
        ConfigError: a tensor of the files is no contiguous run of a parameter.
    """
    if not _converts(model):
        return {name: (name, 0, tensor.shape) for name, tensor in held.items()}
    slices = _known.get(model)
    if slices is None or {name for name, _, _ in slices.values()} != held.keys():
        slices = _known[model] = _slices(model, held)
    return slices


def _converts(model: Any) -> bool:
    pretrained = hasattr(model, "save_pretrained") and hasattr(model, "base_model_prefix")
    return pretrained and bool(_conversions(model))


def _conversions(model: Any) -> list[Any]:
    """What transformers did to names and tensors when it loaded the model, or would do.

    Under ZeRO-3 it does not sort out which of the conversions of old names a file really needed; then none of
    them counts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        known = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in known if type(conversion).__name__ != "PrefixChange"]
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        known = get_model_conversion_mapping(model, add_legacy=False)
        settled = {_patterns(conversion) for conversion in known}
        conversions = [conversion for conversion in conversions if _patterns(conversion) in settled]
    return [conversion for conversion in conversions if not _unpacks(conversion)]


def _unpacks(conversion: Any) -> bool:
    """Whether it made other values of what the files had, for a quantisation library; saving need not undo
    it.
    """
    operations = getattr(conversion, "operations", None) or ()
    return any(".integrations." in type(operation).__module__ for operation in operations)


def _patterns(conversion: Any) -> tuple[str, ...]:
    return (*conversion.source_patterns, "->", *conversion.target_patterns)


class _Configured:
    """A model as far as taking its tensors apart needs one, with conversions of our choice."""

    def __init__(self, model: Any, conversions: list[Any]) -> None:
        self._weight_conversions = conversions
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _slices(model: Any, held: Mapping[str, Held]) -> Slices:
    from transformers.core_model_loading import revert_weight_conversion

    configured = _Configured(model, _conversions(model))
    slices: Slices = {}
    for name, tensor in held.items():
        shape = tensor.shape
        narrow = (*shape[:-1], min(shape[-1], _WIDTH)) if len(shape) > 1 else shape
        stand_in = torch.arange(prod(narrow)).reshape(narrow)
        for file, part in revert_weight_conversion(configured, {name: stand_in}).items():
            slices[file] = (name, *_place(file, part, narrow, shape))
    return slices


def _place(
    file: str, part: torch.Tensor, narrow: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Flat start and shape, in the real parameter, of what was taken out of its stand-in."""
    flat = part.reshape(-1)
    first = int(flat[0]) if flat.numel() else 0
    if narrow == shape:
        start = first
        real = tuple(part.shape)
    else:
        start = first // narrow[-1] * shape[-1]
        real = (*part.shape[:-1], shape[-1])
    whole_rows = narrow == shape or (part.shape[-1] == narrow[-1] and first % narrow[-1] == 0)
    if not whole_rows or not torch.equal(flat, torch.arange(first, first + flat.numel())):
        expected = "a contiguous run of a parameter"
        found = "one that is transposed or interleaved"
        remedy = "extract from the saved checkpoint instead"
        raise ConfigError(file, expected=expected, found=found, remedy=remedy)
    return start, real
