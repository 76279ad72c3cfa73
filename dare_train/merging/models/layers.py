"""Layers by the names of their tensors: which a tensor belongs to, how many there are, and what a
configuration says of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...weights.protocol import Weights

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.([0-9]{1,6})(?=\.|$)")
_BEFORE_LAYERS = re.compile(r"emb(?!ed_out)|wte|wpe|(?:^|\.)shared\.")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What configurations call the number of layers."""


def comes_before_layers(tensor: str) -> bool:
    """Whether a tensor outside of layers is read before them, such as an embedding."""
    return _BEFORE_LAYERS.search(tensor) is not None


def layer_of(tensor: str) -> tuple[str, int] | None:
    """The stack that a tensor's layer belongs to, such as `model.layers`, and its place there; None outside
    layers.

    The first number after `layers`, `layer`, `h`, `block`, `blocks` or `resblocks` counts: experts have
    numbers too.
    """
    number = _LAYER.search(tensor)
    return (tensor[: number.start(1) - 1], int(number[1])) if number else None


def layer_counts(tensors: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has, from the names of a checkpoint's tensors."""
    counts: dict[str, int] = {}
    for stack, index in filter(None, map(layer_of, tensors)):
        counts[stack] = max(counts.get(stack, 0), index + 1)
    return counts


def stack_of(model: Weights) -> tuple[str, int]:
    """What stands before the numbers of a model's layers, and how many there are.

    Raises:
        ConfigError: it has several stacks, or none.
    """
    counts = layer_counts(model.tensors)
    if len(counts) != 1:
        found = ", ".join(sorted(counts)) or "none"
        raise ConfigError(model.label, expected="one stack of layers", found=found)
    return next(iter(counts.items()))


def with_layers(config: Mapping[str, Any], before: int, numbers: Sequence[int]) -> dict[str, Any]:
    """A configuration with other layers: their count, and what it lists for each of them.

    Args:
        before: how many there were.
        numbers: which of those each is.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in LAYER_COUNTS and value == before:
            result[key] = len(numbers)
        elif isinstance(value, list) and len(value) == before and key.startswith(("layer", "no_rope")):
            result[key] = [value[number] if number < before else value[-1] for number in numbers]
        elif isinstance(value, dict) and key.endswith("_config"):
            result[key] = with_layers(value, before, numbers)
        else:
            result[key] = value
    return result
