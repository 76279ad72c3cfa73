"""A model's linear layers under their names in files, and examples that go through it undisturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..weights.live import sharding as engines
from ..weights.live.live import LiveWeights
from ..weights.live.named_tensors import NamedTensors
from ..weights.live.sharding import Held
from ..weights.live.views import held_in

Batch = Mapping[str, Any]
"""Arguments of the model by name. Tensors have one row for each example."""


def linear_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """(checkpoint name of the weight, layer), layers that share a weight one after another.

    Raises:
        ConfigError: files hold a layer's weight in parts.
    """
    names: dict[int, list[tuple[str, Held]]] = {}
    for name, held in named_places(model).items():
        for piece in held.pieces:
            names.setdefault(id(piece.tensor), []).append((name, held))
    linear = {part: isinstance(part, (torch.nn.Linear, Conv1D)) for part in model.modules()}
    elsewhere = {
        id(tensor)
        for part, is_linear in linear.items()
        if not is_linear
        for tensor in part.parameters(recurse=False)
    }
    named_layers = []
    for layer in (part for part, is_linear in linear.items() if is_linear):
        weight: Any = layer.weight
        places = (
            names.get(id(weight), [])
            if weight.dtype.is_floating_point and id(weight) not in elsewhere
            else []
        )
        for name, held in places:
            if held.shape != tuple(weight.shape):
                remedy = "use a model whose modules hold this tensor as its files do"
                raise ConfigError(
                    name,
                    expected=f"shape {tuple(weight.shape)}, as in the model",
                    found=str(held.shape),
                    remedy=remedy,
                )
            named_layers.append((name, layer))
    return named_layers


def width_of(layer: Any) -> int:
    """Number of inputs."""
    return int(layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1])


def watch_inputs(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[tuple[str, Any]],
    see: Callable[[str, torch.Tensor], object],
    until: torch.nn.Module | None = None,
) -> int:
    """Let the model run, in evaluation mode and without gradients, while `see(name, rows)` gets what goes
    into each linear layer.

    Rows are [tokens, in], where masked positions of the batch's `attention_mask` are left out. `until` is the
    module before which each run ends. Returns how many examples there were.
    """
    count = 0
    watch = _Watch(see)
    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        if until is not None:
            hooks.callback(until.register_forward_pre_hook(_stop).remove)
        for name, layer in layers:
            hooks.callback(
                layer.register_forward_pre_hook(partial(watch.look, name), with_kwargs=True).remove
            )
        for batch in batches:
            watch.mask = padding_mask(model, batch)
            with suppress(_Stopped):
                model(**batch)
            count += batch_size(model, batch)
    return count


class _Stopped(Exception):
    """Nothing more of this run is wanted."""


def _stop(*_: object) -> None:
    raise _Stopped


class _Watch:
    """Takes the rows that count out of what goes into a layer."""

    def __init__(self, see: Callable[[str, torch.Tensor], object]) -> None:
        self._see = see
        self.mask: torch.Tensor | None = None
        """bool [batch, seq] of the batch that is going through the model: the positions that count."""

    def look(
        self, name: str, layer: torch.nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> None:
        """A forward pre-hook of one layer."""
        inputs: torch.Tensor = (*args, *named.values())[0]
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        if self.mask is not None and inputs.shape[:-1] in (self.mask.shape, (self.mask.numel(),)):
            rows = rows[self.mask.reshape(-1)]
        self._see(name, rows)


def padding_mask(model: torch.nn.Module, batch: Batch) -> torch.Tensor | None:
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    if has_two_sequences(model):
        remedy = "pass batches of one example each, without padding"
        raise ConfigError(
            "attention_mask", expected="no padding, with encoder and decoder", found="padding", remedy=remedy
        )
    return mask.bool()


def has_two_sequences(model: Any) -> bool:
    """Whether it has encoder and decoder: the mask of one says nothing about the other."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def examples_of(
    model: torch.nn.Module, batches: Iterable[Batch], examples: int | None
) -> Iterator[dict[str, Any]]:
    """The first so many examples, in the batches they come in, on the model's device; no batch is asked for
    without need.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    left = examples
    for batch in batches:
        size = batch_size(model, batch)
        rows = size if left is None else min(size, left)
        yield {
            name: value.to(device) if hasattr(value, "to") else value
            for name, value in batch_part(batch, 0, rows, size).items()
        }
        if left is not None:
            left -= rows
            if not left:
                return


def batch_size(model: Any, batch: Batch) -> int:
    """How many examples a batch holds."""
    if not isinstance(batch, Mapping):
        raise ConfigError(
            "batches",
            expected="mappings from arguments of the model to tensors",
            found=f"a {type(batch).__name__}",
        )
    main = batch.get(getattr(model, "main_input_name", "input_ids"))
    tensors = [value for value in (main, *batch.values()) if isinstance(value, torch.Tensor) and value.dim()]
    if not tensors:
        raise ConfigError(
            "batches",
            expected="mappings from arguments of the model to tensors",
            found=f"{sorted(batch)} and no tensor",
        )
    return int(tensors[0].shape[0])


def batch_part(batch: Batch, start: int, stop: int, size: int) -> dict[str, Any]:
    """Examples [start, stop) of a batch of `size`."""
    if stop - start == size:
        return dict(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] != size:
            expected = f"{size} rows, one for each example"
            shape = f"shape {tuple(value.shape)}"
            raise ConfigError(
                f"batches: {name}", expected=expected, found=shape, remedy="pass batches of one example each"
            )
    return {
        name: value[start:stop] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in batch.items()
    }


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A block in which all modules are in evaluation mode; afterwards each is in its own again."""
    flags = [(part, part.training) for part in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def named_places(model: Any, *, adapters: bool = True) -> dict[str, Held]:
    """Where each tensor of the model's files lies: in one of its parameters or buffers, or in a run of one.

    Raises:
        ConfigError: they are not whole in this process; or there are adapters where there should be none.
    """
    live = LiveWeights(model)
    if live.adapted and not adapters:
        found = "a PEFT model"
        remedy = "merge_and_unload() first, and collect from what it returns; gram needs no merging"
        raise ConfigError(
            "model",
            expected="no adapters: the Fisher information is that of merged weights",
            found=found,
            remedy=remedy,
        )
    named = NamedTensors(model)
    tensors = named.tensors
    held = engines.held(tensors.items(), model)
    ids = {id(tensor) for tensor in tensors.values()}
    if not live.whole or any(
        id(piece.tensor) not in ids for place in held.values() for piece in place.pieces
    ):
        remedy = "save the model, load it with from_pretrained in one process or under DDP, and collect there"
        raise ConfigError(
            "model",
            expected="weights that are whole in this process",
            found="shards (FSDP, ZeRO-3)",
            remedy=remedy,
        )
    places = named.places(held)
    return {file: held_in(place, file, held) for file, place in places.items()}
