"""LoRA adapters that are being trained, seen as the model that they make of the base they sit on.

PEFT puts a layer with small factors around each adapted module. What a package is about is the base model's
tensor as it would be after merging; nothing is merged here, and the live model is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from .low_rank import LowRank, Matrix, merged_words
from .protocol import TensorInfo, Weights
from .sharding import clean, is_dtensor

MERGE = "merge_and_unload() and save the model, then dare-train extract"
_FACTORS = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)\.")


def is_adapted(module: object) -> bool:
    """Whether it is a PEFT model."""
    return hasattr(module, "peft_config") and hasattr(module, "base_model")


def base_tensors(
    model: Any, named: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """The tensors of the base that an adapted model goes on from, and the names of those it trains copies of.

    Args:
        model: a PEFT model.
        named: its tensors by their cleaned names.

    Raises:
        ConfigError: an adapter is not LoRA, or does something to the base that merging cannot express.
    """
    _check_kinds(model)
    active = set(model.active_adapters) if hasattr(model, "active_adapters") else {model.active_adapter}
    tensors: dict[str, torch.Tensor] = {}
    whole: set[str] = set()
    for name, tensor in named.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        saved = _SAVED.search(plain)
        if saved is not None and saved[1] in active:
            plain = _SAVED.sub(".", plain)
            whole.add(plain)
        elif saved is not None or ".original_module." in plain or _FACTORS.search(f"{plain}."):
            continue
        tensors[plain] = tensor
    return tensors, frozenset(whole)


def _check_kinds(model: Any) -> None:
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        expected = "FSDP2, DDP, DeepSpeed ZeRO or one process"
        remedy = "FSDP1 lays factors and base out in one flat parameter: use FSDP2"
        raise ConfigError("adapters", expected=expected, found="FSDP1", remedy=remedy)
    for name, config in model.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise ConfigError(f"adapter {name!r}", expected="a LoRA adapter", found=kind, remedy=MERGE)
        for option in ("target_parameters", "trainable_token_indices", "layer_replication"):
            value = getattr(config, option, None)
            if value:
                found = repr(value)
                raise ConfigError(f"adapter {name!r}", expected=f"no {option}", found=found, remedy=MERGE)


def updates(model: Any) -> dict[str, list[LowRank]]:
    """What the active adapters do to each tensor of the base, by checkpoint name.

    All ranks that share the model call it together. Factors are copied, whole, to the host: they are small.

    Raises:
        ConfigError: a layer is adapted in a way that is not known.
    """
    by_tensor: dict[str, list[LowRank]] = {}
    layers = [(clean(name), layer) for name, layer in model.named_modules() if _is_lora(layer)]
    with _gathered([factor for _, layer in layers for factor in _factors(layer)]):
        for name, layer in layers:
            module = name.removeprefix("base_model.model.")
            for adapter in layer.active_adapters:
                if _takes_effect(layer, adapter):
                    for part, update in _updates_of(module, layer, adapter):
                        by_tensor.setdefault(f"{module}.{part}", []).append(update)
    return by_tensor


def _takes_effect(layer: Any, adapter: str) -> bool:
    """Whether an active adapter has factors here, and these are not in the base's weights already."""
    pending = adapter in layer.scaling and adapter not in layer.merged_adapters
    return pending and not layer.disable_adapters


def _is_lora(layer: Any) -> bool:
    return hasattr(layer, "lora_A") and hasattr(layer, "scaling") and hasattr(layer, "get_base_layer")


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


def _updates_of(module: str, layer: Any, adapter: str) -> Iterator[tuple[str, LowRank]]:
    """(part of the module, update): of its weight, and of its bias where the adapter has one."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    dora = adapter in layer.lora_magnitude_vector
    _check_layer(module, layer, "DoRA" if dora else variant and type(variant).__name__)
    scaling = float(layer.scaling[adapter])
    if adapter in layer.lora_embedding_A:
        a = layer.lora_embedding_A[adapter]
        b = layer.lora_embedding_B[adapter]
        yield "weight", LowRank(a=_matrix(a), b=_matrix(b), scaling=scaling, transposed=True)
        return
    a = layer.lora_A[adapter]
    b = layer.lora_B[adapter]
    magnitude = _matrix(layer.lora_magnitude_vector[adapter].weight).reshape(-1) if dora else None
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


def _check_layer(module: str, layer: Any, variant: str | None) -> None:
    base = layer.get_base_layer()
    kind = type(base).__name__
    linear = isinstance(base, torch.nn.Linear)
    other_kinds = (torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
    known = linear or isinstance(base, other_kinds) or kind == "Conv1D"
    if not known or getattr(base, "groups", 1) != 1 or not base.weight.dtype.is_floating_point:
        expected = "a Linear, Embedding, Conv1D or ungrouped convolution"
        raise ConfigError(module, expected=expected, found=f"a {kind}", remedy=MERGE)
    if variant is not None and not (variant == "DoRA" and linear):
        found = f"{variant} on a {kind}"
        raise ConfigError(module, expected="LoRA, or DoRA on Linear", found=found, remedy=MERGE)


def _matrix(factor: torch.Tensor) -> Matrix:
    """A whole factor as float64 [rows, everything else]."""
    whole: Any = factor
    if is_dtensor(factor):
        whole = whole.full_tensor()
    matrix: Matrix = whole.detach().double().cpu().numpy().reshape(whole.shape[0], -1)
    return matrix if matrix.flags.owndata else matrix.copy()


class Merged:
    """Weights of a base with updates merged into what is read. Implements `Weights`."""

    def __init__(
        self, base: Weights, updates: Mapping[str, list[LowRank]], tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.label = base.label
        self.tensors = tensors
        self._base = base
        self._updates = updates

    def read(self, name: str, start: int, count: int) -> Any:
        if name not in self._updates:
            return self._base.read(name, start, count)
        return merged_words(self._base, self._updates[name], self.tensors[name], name, start, count)
