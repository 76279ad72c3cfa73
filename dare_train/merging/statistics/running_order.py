"""What a model's linear layers lie in, in the order in which it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...errors import ConfigError
from ...evaluation.linear_layers import Batch, evaluating, linear_layers, named_places


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """A member of a list of layers, such as a transformer layer; or a linear layer that lies in none."""

    path: str
    """In the model."""
    module: torch.nn.Module
    linear: tuple[tuple[str, Any], ...]
    """Its linear layers, by the checkpoint names of their weights."""
    tensors: frozenset[str]
    """Checkpoint names of all that lies in it."""


def blocks_in_order(model: torch.nn.Module, batches: Sequence[Batch]) -> list[Block]:
    """The blocks that run, the first first, which is the same order for each of the batches.

    Raises:
        ConfigError: they run in another order, or one runs again after another that comes between, or holds
            a tensor of another: then no order is that in which they can be merged.
    """
    blocks = _blocks(model)
    orders = [_run(model, blocks, batch) for batch in batches]
    for order in orders:
        if order != orders[0]:
            raise ConfigError(
                "batches",
                expected=f"{len(orders[0])} layers run in one order for all models",
                found=f"{len(order)} in another",
                remedy="give all models batches of one kind",
            )
    order = orders[0] if orders else []
    again = next((path for number, path in enumerate(order) if path in order[:number]), None)
    if again is not None:
        raise ConfigError(
            "model",
            expected="layers that run one after another",
            found=f"{again}, which runs again after another",
            remedy="merge with regmean",
        )
    return [blocks[path] for path in order]


def _run(model: torch.nn.Module, blocks: Mapping[str, Block], batch: Batch) -> list[str]:
    """Paths of the blocks in the order in which a batch goes through them."""
    order: list[str] = []

    def begin(path: str, *_: object) -> None:
        if order[-1:] != [path]:
            order.append(path)

    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for path, block in blocks.items():
            hooks.callback(block.module.register_forward_pre_hook(partial(begin, path)).remove)
        model(**batch)
    return order


def _blocks(model: torch.nn.Module) -> dict[str, Block]:
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    linear: dict[str, list[tuple[str, Any]]] = {}
    for name, layer in linear_layers(model):
        linear.setdefault(_block_of(paths[id(layer)], modules), []).append((name, layer))
    owners = {
        name: {id(part) for piece in held.pieces for part in (piece.tensor, piece.owner)}
        for name, held in named_places(model).items()
    }
    tensors = {path: _tensors_in(modules[path], owners) for path in linear}
    seen: dict[str, str] = {}
    for path, names in tensors.items():
        for name in names:
            if name in seen:
                found = f"{name} in {seen[name]} and in {path}"
                expected = "no tensor in two layers"
                raise ConfigError("model", expected=expected, found=found, remedy="merge with regmean")
            seen[name] = path
    return {
        path: Block(path=path, module=modules[path], linear=tuple(layers), tensors=tensors[path])
        for path, layers in linear.items()
    }


def _block_of(path: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """The path of the outermost member of a list that a module is or lies in; its own, if there is none."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        member = ".".join(parts[: count + 1])
        in_list = isinstance(modules[".".join(parts[:count])], torch.nn.ModuleList)
        if in_list and not isinstance(modules[member], torch.nn.ModuleList):
            return member
    return path


def _tensors_in(module: torch.nn.Module, owners: Mapping[str, set[int]]) -> frozenset[str]:
    inside = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return frozenset(name for name, parts in owners.items() if parts & inside)
