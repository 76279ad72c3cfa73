"""The model inside whatever trains it: DDP, `torch.compile`, PEFT, a sentence transformer, a module of one's
own.

Checkpoints name tensors as the model does that `from_pretrained` gave. Wrappers put a path before these
names, of any depth: `0.auto_model.`, `base_model.model.`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .sharding import clean


class Inner(NamedTuple):
    """A model, and where it lies in the module that was asked."""

    model: Any
    path: str
    """What its tensors' names begin with there: empty, or ending in a dot."""


def inner_model(module: Any) -> Inner:
    """The one pretrained model in a module; where there is none, or more than one, the module, out of its
    wrappers.
    """
    found = here = Inner(unwrapped(module), "")
    while not is_pretrained(here.model):
        if is_peft_model(here.model):
            found = here = Inner(unwrapped(here.model.get_base_model()), f"{here.path}base_model.model.")
            continue
        children = list(_outermost(here.model))
        if len(children) != 1:
            return found
        ((place, child),) = children
        here = Inner(child, f"{here.path}{place}.")
    return here


def unwrapped(module: Any) -> Any:
    """The model inside DDP, `torch.compile` and the like."""
    while True:
        inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


def is_pretrained(module: Any) -> bool:
    """Whether it is itself a model of transformers or diffusers. Wrappers pass on what their model has; so
    its class is asked.
    """
    kind = type(module)
    marked = hasattr(kind, "base_model_prefix") or hasattr(kind, "register_to_config")
    return marked and hasattr(kind, "save_pretrained")


def is_peft_model(module: Any) -> bool:
    """Whether it is PEFT's wrapper around a model."""
    return hasattr(type(module), "get_base_model") and hasattr(module, "peft_config")


def _outermost(module: torch.nn.Module, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, model) of the models in a module, pretrained or PEFT's, that are in no other one."""
    for name, child in module.named_children():
        place = clean(f"{path}{name}")
        inside = unwrapped(child)
        if is_pretrained(inside) or is_peft_model(inside):
            yield place, inside
        else:
            yield from _outermost(inside, f"{place}.")
