"""What live LoRA layers do to the weights of the modules that they are around."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, Union

import numpy as np
import torch

from ...errors import ConfigError
from ..low_rank import LowRank, Matrix, Stacked, stacked_factors
from .live_lora import MERGE, is_lora, tuner_layers
from .packed import packing
from .sharding import is_dtensor

_BASE_LAYERS = re.compile(r"(\.base_layer)+$")
"""What PEFT puts behind the name of a module of which it adapts several parameters."""


Kind = Union[LowRank, Stacked]


def updates(model: Any, path: str) -> dict[str, list[Kind]]:
    """What the active adapters do to each tensor of the base, by the model's own name of it.

    All ranks that share the model call it together. Factors are copied, whole, to the host: they are small.

    Args:
        model: with adapters.
        path: what names in it begin with before those of the model.

    Raises:
        ConfigError: a layer is adapted in a way that is not known.
    """
    by_tensor: dict[str, list[Kind]] = {}
    layers = [(name, layer) for name, layer in tuner_layers(model) if is_lora(layer)]
    with _gathered([factor for _, layer in layers for factor in _factors(layer)]):
        for name, layer in layers:
            module = _BASE_LAYERS.sub("", name.removeprefix(path))
            for adapter in layer.active_adapters:
                if _takes_effect(layer, adapter):
                    for part, update in _updates_of(module, layer, adapter):
                        by_tensor.setdefault(f"{module}.{part}", []).append(update)
    return by_tensor


def once_where_tied(found: Mapping[str, list[Kind]], aliases: Mapping[str, str]) -> dict[str, list[Kind]]:
    """The same updates without those of tensors that are others' under another name: a checkpoint has one for
    the two, so they have to be updated alike.

    Args:
        found: updates by tensor.
        aliases: names of tensors that are tied, and of those they are tied to.

    Raises:
        ConfigError: one of the two is updated otherwise than the other.
    """
    for name, source in aliases.items():
        here, there = found.get(name, []), found.get(source, [])
        if len(here) != len(there) or not all(map(_alike, here, there)):
            of, other = (name, source) if here else (source, name)
            expected = f"the same update of {other}, which is tied to it"
            remedy = (
                "ensure_weight_tying=True in the LoraConfig adapts both as one; or load the model with "
                "tie_word_embeddings=False"
            )
            raise ConfigError(of, expected=expected, found="one of it alone", remedy=remedy)
    return {name: updates for name, updates in found.items() if name not in aliases}


def check_tied(model: Any, path: str, aliases: Mapping[str, str]) -> None:
    """Adapters of tensors that are tied have their factors in common: others are equal as they begin, and are
    then trained apart.

    Args:
        model, path: see `updates`.
        aliases: see `once_where_tied`.

    Raises:
        ConfigError: factors of two are trained apart.
    """
    layers = {name.removeprefix(path): layer for name, layer in tuner_layers(model) if is_lora(layer)}
    for name, source in aliases.items():
        pair = [layers.get(tensor.rpartition(".")[0]) for tensor in (name, source)]
        here, there = (_places(layer) if layer is not None else frozenset() for layer in pair)
        if here and there and here != there:
            expected = f"the factors of {source}, to which it is tied"
            remedy = (
                "PEFT casts the two apart: get_peft_model(..., autocast_adapter_dtype=False), or load the "
                "model in float32, on the device that it is trained on"
            )
            raise ConfigError(name, expected=expected, found="others", remedy=remedy)


def _places(layer: Any) -> frozenset[int]:
    """Where factors in training lie, as far as they lie here whole."""
    trained = [factor for factor in _factors(layer) if factor.requires_grad]
    whole = [factor for factor in trained if not (is_dtensor(factor) or hasattr(factor, "ds_tensor"))]
    return frozenset(factor.untyped_storage().data_ptr() for factor in whole)


def _alike(one: Kind, other: Kind) -> bool:
    """Whether two updates are the same, of which one may lie transposed."""
    if isinstance(one, Stacked) or isinstance(other, Stacked):
        return False
    a, b = (one.a, one.b) if one.transposed == other.transposed else (one.b.T, one.a.T)
    factors = np.array_equal(a, other.a) and np.array_equal(b, other.b)
    return factors and one.scaling == other.scaling and one.magnitude is other.magnitude is None


def _takes_effect(layer: Any, adapter: str) -> bool:
    """Whether an active adapter has factors here, and these are not in the base's weights already."""
    pending = adapter in layer.scaling and adapter not in layer.merged_adapters
    return pending and not layer.disable_adapters


def _factors(layer: Any) -> Iterator[torch.Tensor]:
    matrices = (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B)
    for holder in (*matrices, layer.lora_magnitude_vector):
        yield from holder.parameters()


@contextmanager
def _gathered(factors: list[torch.Tensor]) -> Iterator[None]:
    """Within the block, factors that ZeRO-3 has cut into partitions are whole."""
    partitioned = [factor for factor in factors if hasattr(factor, "ds_tensor")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def _updates_of(module: str, layer: Any, adapter: str) -> Iterator[tuple[str, Kind]]:
    """(part of the module, update): of its weight, and of its bias where the adapter has one; or of the
    parameter that the layer is around.
    """
    if hasattr(layer, "parameter_name"):
        yield layer.parameter_name, _of_parameter(module, layer, adapter)
        return
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    dora = adapter in layer.lora_magnitude_vector
    _check_layer(module, layer, "DoRA" if dora else variant and type(variant).__name__)
    scaling = float(layer.scaling[adapter])
    magnitude = _matrix(layer.lora_magnitude_vector[adapter].weight).reshape(-1) if dora else None
    if adapter in layer.lora_embedding_A:
        a = layer.lora_embedding_A[adapter]
        b = layer.lora_embedding_B[adapter]
        yield (
            "weight",
            LowRank(a=_matrix(a), b=_matrix(b), scaling=scaling, transposed=True, magnitude=magnitude),
        )
        return
    a = layer.lora_A[adapter]
    b = layer.lora_B[adapter]
    transposed = bool(getattr(layer, "fan_in_fan_out", False))
    update = LowRank(
        a=_matrix(a.weight),
        b=_matrix(b.weight),
        scaling=scaling,
        transposed=transposed,
        magnitude=magnitude,
    )
    yield "weight", update
    if b.bias is not None:
        yield "bias", LowRank(a=np.ones((1, 1)), b=_matrix(b.bias), scaling=scaling)


def _of_parameter(module: str, layer: Any, adapter: str) -> Stacked:
    """The update of a parameter of its own, [out, in], or of the experts that lie in one, [experts, …, …]."""
    parameter = layer.get_param()
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    count = layer.num_experts
    a, b = _matrix(layer.lora_A[adapter].weight), _matrix(layer.lora_B[adapter].weight)
    turned = count > 1 and not layer._did_swap_in_out_features
    stacked = stacked_factors(a, b, count, scaling=float(layer.scaling[adapter]), transposed=turned)
    if stacked.height * count != prod(shape[:-1]):
        name = f"{module}.{layer.parameter_name}"
        expected = f"factors of {list(shape)}"
        raise ConfigError(name, expected=expected, found=f"{list(a.shape)} and {list(b.shape)}", remedy=MERGE)
    return stacked


def _check_layer(module: str, layer: Any, variant: str | None) -> None:
    base = layer.get_base_layer()
    kind = type(base).__name__
    linear = isinstance(base, torch.nn.Linear)
    if packing(base) is not None and variant is None:
        return  # what the factors are added to are the weights in the base's files
    other_kinds = (torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
    known = linear or isinstance(base, other_kinds) or kind == "Conv1D"
    if not known or getattr(base, "groups", 1) != 1:
        expected = "a Linear, Embedding, Conv1D or ungrouped convolution"
        raise ConfigError(module, expected=expected, found=f"a {kind}", remedy=MERGE)
    if variant not in (None, "DoRA"):
        raise ConfigError(module, expected="LoRA or DoRA", found=f"{variant} on a {kind}", remedy=MERGE)


def _matrix(factor: torch.Tensor) -> Matrix:
    """A whole factor as float64 [rows, everything else]."""
    whole: Any = factor
    if is_dtensor(factor):
        whole = whole.full_tensor()
    matrix: Matrix = whole.detach().double().cpu().numpy().reshape(whole.shape[0], -1)
    return matrix if matrix.flags.owndata else matrix.copy()
