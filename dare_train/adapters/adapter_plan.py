"""What a LoRA adapter makes of each tensor that was tuned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""By PEFT's word for a task: ends of the names of modules that PEFT itself takes for `modules_to_save`."""
_READ_DIRECTLY = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "zamba", "zamba2", "jamba", "bamba")
"""Model types with layers whose weights are used without calling them, so that an adapter has no effect."""
_LEAVE_OUT = "leave it out (exclude, --exclude), or ship the delta as a package"


@dataclass(frozen=True, kw_only=True)
class Plan:
    matrices: tuple[str, ...]
    """Linear layers whose weights get factors."""
    biases: tuple[str, ...]
    """Biases of linear layers, which are written as they are."""
    saved: tuple[str, ...]
    """Modules that are written as they are, with all their tensors."""
    tied: tuple[str, ...]
    """Those that PEFT ties to one of these, and are written, too."""
    transposed: frozenset[str]
    """Those of the matrices that lie as [in, out]."""


def planned(
    model: Any,
    changed: Collection[str],
    added: Collection[str],
    *,
    task: str | None,
    aliases: Mapping[str, str],
) -> Plan:
    """
    Args:
        model: of the tuned model's class; it needs no weights.
        changed: its tensors that are not the base's.
        added: those that the base does not have.
        task: in PEFT's words.
        aliases: names of tensors that are others' under another name, and whose.

    Raises:
        ConfigError: an adapter cannot hold one of them.
    """
    modules = dict(model.named_modules())
    _check_called(model, changed)
    tied = _tied(changed, aliases)
    heads = [name for name in modules if name.endswith(_HEADS.get(task or "", ()))]
    new = {_owner(name) for name in added}
    embeddings = {_owner(aliases[f"{name}.weight"]) for name in tied}
    saved = {*heads, *new, *embeddings, *(_owner(name) for name in changed if not _in_linear(modules, name))}
    saved = {name for name in modules if name.endswith(tuple(saved))} if saved else set()
    for name in saved - {*heads}:
        _check_saved(name, modules, changed)
    saved = {name for name in saved if not _inside(name, saved)}
    linear = [name for name in changed if not _inside(name, {*saved, *tied})]
    matrices = tuple(_owner(name) for name in linear if name.endswith(".weight"))
    transposed = frozenset(name for name in matrices if isinstance(modules[name], Conv1D))
    return Plan(
        matrices=matrices,
        biases=tuple(name for name in linear if name.endswith(".bias")),
        saved=tuple(sorted(saved)),
        tied=tied,
        transposed=transposed,
    )


def _tied(changed: Collection[str], aliases: Mapping[str, str]) -> tuple[str, ...]:
    """Modules whose weights are the input embedding's, where that was tuned.

    Raises:
        ConfigError: PEFT would not tie them.
    """
    found = []
    for name, source in sorted(aliases.items()):
        if name in changed or source in changed:
            if (_last(source), _last(name)) != ("embed_tokens", "lm_head"):
                found_tied = f"one tied to {name}"
                expected = "a tensor of its own, or embed_tokens tied to lm_head alone"
                raise ConfigError(source, expected=expected, found=found_tied, remedy=_LEAVE_OUT)
            found.append(_owner(name))
    return tuple(found)


def _last(tensor: str) -> str:
    """The last part of the name of a tensor's module."""
    return _owner(tensor).rpartition(".")[2]


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _inside(name: str, modules: Collection[str]) -> bool:
    """Whether a module or tensor lies in one of some modules."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts)))


def _is_linear(module: Any) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def _in_linear(modules: Mapping[str, Any], tensor: str) -> bool:
    """Whether a tensor is the weight or bias of a linear layer that is called."""
    owner = _owner(tensor)
    above = modules[_owner(owner)]
    called = not isinstance(above, torch.nn.MultiheadAttention)
    return _is_linear(modules[owner]) and called and tensor.rpartition(".")[2] in ("weight", "bias")


def _check_saved(name: str, modules: Mapping[str, Any], changed: Collection[str]) -> None:
    """A module that is written whole brings no linear layers along that have nothing to do with it."""
    module = modules[name]
    layers = sum(map(_is_linear, module.modules()))
    own = [f"{name}.{part}".lstrip(".") for part, _ in module.named_parameters(recurse=False)]
    tuned = next((tensor for tensor in own if tensor in changed), name)
    if not name or (layers and not _is_linear(module)):
        expected = "a tensor of a linear layer, or of a module without such layers"
        found = f"one of {type(module).__name__}" + (f", around {layers} linear layers" if layers else "")
        raise ConfigError(tuned, expected=expected, found=found, remedy=_LEAVE_OUT)


def _check_called(model: Any, changed: Collection[str]) -> None:
    kind = getattr(model.config, "model_type", "")
    if kind in _READ_DIRECTLY and changed:
        expected = "a model whose linear layers are all called"
        found = f"{kind}, which reads weights of some without calling them"
        raise ConfigError(next(iter(changed)), expected=expected, found=found, remedy="ship it as a package")
