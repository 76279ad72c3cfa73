"""Weights that accelerate keeps in CPU memory between forward passes, as `device_map="auto"` does with what a
GPU has no room for.

The module's own parameter is on the meta device then, and a hook of the module, or of one around it, has the
values by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import ConfigError

Maps = Mapping[str, Mapping[str, torch.Tensor]]
"""By the prefix of a module's name: what its hook has, by the names that it gives them."""


def maps(module: torch.nn.Module) -> Maps:
    """Where hooks keep weights, by the names of their modules."""
    return {prefix: hook.weights_map for prefix, part in module.named_modules() for hook in _hooks(part)}


def _hooks(part: torch.nn.Module) -> Iterator[Any]:
    hook: Any = getattr(part, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and one.weights_map is not None:
            yield one


def behind(tensor: torch.Tensor, name: str, kept: Maps) -> torch.Tensor:
    """The values of a parameter: those that a hook keeps for it, or itself.

    Raises:
        ConfigError: they lie on disk.
    """
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1) if tensor.is_meta else ():
        values = kept.get(".".join(parts[:cut]))
        found = None if values is None else _kept(values, ".".join(parts[cut:]), name)
        if found is not None:
            return found
    return tensor


def _kept(values: Any, own: str, name: str) -> torch.Tensor | None:
    """What a map has under a name of its own. Asking the map itself would read a file, and give a copy."""
    while hasattr(values, "prefix"):
        own, values = values.prefix + own, values.dataset
    in_memory = getattr(values, "state_dict", values)
    if own not in in_memory and own in getattr(values, "index", ()):
        remedy = (
            "work on the checkpoint's files (extract, apply), or load the model with a "
            "device_map that keeps it in memory"
        )
        raise ConfigError(
            name, expected="weights in memory", found="weights that accelerate keeps on disk", remedy=remedy
        )
    found: torch.Tensor | None = in_memory.get(own)
    return found
