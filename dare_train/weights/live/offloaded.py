"""Weights that accelerate keeps in CPU memory between forward passes, as `device_map="auto"` does with what a
GPU has no room for.

The module's own parameter is on the meta device then, and a hook of the module, or of one around it, has the
values by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...errors import ConfigError

Maps = Mapping[str, Mapping[str, torch.Tensor]]
"""By the prefix of a module's name: what its hook has, by the names that it gives them."""


def maps(module: torch.nn.Module) -> Maps:
    """Where hooks keep weights, by the names of their modules."""
    return {prefix: hook.weights_map for prefix, part in module.named_modules() for hook in _hooks(part)}


def _hooks(part: torch.nn.Module) -> Iterator[Any]:
    outer: Any = getattr(part, "_hf_hook", None)
    for hook in getattr(outer, "hooks", (outer,)):
        if getattr(hook, "offload", False) and hook.weights_map is not None:
            yield hook


def behind(tensor: torch.Tensor, name: str, kept: Maps) -> torch.Tensor:
    """The values of a parameter: those that a hook keeps for it, or itself.

    Raises:
        ConfigError: they lie on disk.
    """
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1) if tensor.is_meta else ():
        weights_map = kept.get(".".join(parts[:cut]))
        values = None if weights_map is None else _kept(weights_map, ".".join(parts[cut:]), name)
        if values is not None:
            return values
    return tensor


def _kept(weights_map: Any, key: str, name: str) -> torch.Tensor | None:
    """What a map has under a key of its own. Asking the map itself would read a file, and give a copy."""
    while hasattr(weights_map, "prefix"):
        key = weights_map.prefix + key
        weights_map = weights_map.dataset
    in_memory = getattr(weights_map, "state_dict", weights_map)
    if key not in in_memory and key in getattr(weights_map, "index", ()):
        expected = "weights in memory"
        found = "weights that accelerate keeps on disk"
        remedy = (
            "work on the checkpoint's files (extract, apply), or load the model with a "
            "device_map that keeps it in memory"
        )
        raise ConfigError(name, expected=expected, found=found, remedy=remedy)
    tensor: torch.Tensor | None = in_memory.get(key)
    return tensor
