"""LoRA adapters that are being trained, seen as the model that they make of the base they sit on.

PEFT puts a layer with small factors around each adapted module. What a package is about is the base model's
tensor as it would be after merging; nothing is merged here, and the live model is not touched. It does not
matter who put the layers there: `get_peft_model`, or the `add_adapter` of a model of transformers or
diffusers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import ConfigError
from ..low_rank import Update, merged_words
from ..protocol import TensorInfo, Weights
from .sharding import clean
from .wrapped import is_peft_model

MERGE = "merge_and_unload() and save the model, then dare-train extract"
_FACTORS = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.")
_BASE_LAYERS = re.compile(r"(\.base_layer)+\.")
_COPY = re.compile(r"(?P<module>.*)\.(original_module|modules_to_save\.(?P<adapter>[^.]+))\.(?P<tensor>.*)")


def is_adapted(module: object) -> bool:
    """Whether it is a PEFT model, or has adapters inside."""
    if not isinstance(module, torch.nn.Module):
        return False
    return is_peft_model(module) or any(True for _ in tuner_layers(module))


def tuner_layers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the layers that PEFT put around modules."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, part in module.named_modules():
        if isinstance(part, BaseTunerLayer):
            yield clean(name), part


class MergedNames:
    """Which of an adapted model's tensors are those of the model that merging would give, and what they are
    called there.

    Args:
        module: with adapters.
        path: what names in it begin with before those of the model.

    Attributes:
        trained_whole: names of tensors whose copies an adapter trains (`modules_to_save`).

    Raises:
        ConfigError: an adapter is not LoRA, or does something to the base that merging cannot express.
    """

    def __init__(self, module: Any, path: str) -> None:
        _check_engine(module)
        _check_kinds(module)
        self._active = dict(_active_copies(module, path))
        self.trained_whole: set[str] = set()

    def plain(self, name: str) -> str | None:
        """The name after merging; None for what is not there then, such as a factor."""
        if _FACTORS.search(f"{name}."):
            return None
        name = _BASE_LAYERS.sub(".", name)
        copy = _COPY.fullmatch(name)
        if copy is None:
            return name
        if copy["adapter"] != self._active.get(copy["module"]):
            return None
        merged = f"{copy['module']}.{copy['tensor']}"
        if copy["adapter"] is not None:
            self.trained_whole.add(merged)
        return merged


def _active_copies(module: Any, path: str) -> Iterator[tuple[str, str | None]]:
    """(module, adapter whose copy of it is in use), for each module of `modules_to_save`; None where the
    original is.
    """
    for name, part in module.named_modules():
        if type(part).__name__ == "ModulesToSaveWrapper":
            at_work = [] if part.disable_adapters else part.active_adapters
            copies = [adapter for adapter in at_work if adapter in part.modules_to_save]
            yield clean(name).removeprefix(path), copies[0] if copies else None


def _check_engine(module: Any) -> None:
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        expected = "FSDP2, DDP, DeepSpeed ZeRO or one process"
        remedy = "FSDP1 lays factors and base out in one flat parameter: use FSDP2"
        raise ConfigError("adapters", expected=expected, found="FSDP1", remedy=remedy)


def _check_kinds(module: Any) -> None:
    for name, config in _configurations(module).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            remedy = MERGE
            if getattr(config, "is_prompt_learning", False):
                remedy = "what it trains changes no weights: train LoRA, or leave the callback out"
            raise ConfigError(f"adapter {name!r}", expected="a LoRA adapter", found=kind, remedy=remedy)
        for option in ("trainable_token_indices", "layer_replication"):
            value = getattr(config, option, None)
            if value:
                found = repr(value)
                raise ConfigError(f"adapter {name!r}", expected=f"no {option}", found=found, remedy=MERGE)
    for name, layer in tuner_layers(module):
        if not is_lora(layer):
            raise ConfigError(name, expected="a LoRA layer", found=type(layer).__name__, remedy=MERGE)


def _configurations(module: Any) -> dict[str, Any]:
    """By adapter: of PEFT's wrapper, and of models that have adapters inside."""
    found: dict[str, Any] = {}
    for part in module.modules():
        given = part.peft_config if is_peft_model(part) else vars(part).get("peft_config")
        if isinstance(given, Mapping):
            found.update(given)
    return found


def is_lora(layer: Any) -> bool:
    return hasattr(layer, "lora_A") and hasattr(layer, "scaling") and hasattr(layer, "get_base_layer")


@contextmanager
def silenced(module: object) -> Iterator[None]:
    """Within the block, adapters add nothing; copies that `modules_to_save` trains stay in use."""
    layers = [layer for _, layer in tuner_layers(module)] if isinstance(module, torch.nn.Module) else []
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


class Merged:
    """Weights of a base with updates merged into what is read, in the dtypes that `tensors` says. Implements
    `Weights`.
    """

    def __init__(
        self, base: Weights, updates: Mapping[str, list[Update]], tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.label = base.label
        self.tensors = tensors
        self._base = base
        self._updates = updates

    def read(self, name: str, start: int, count: int) -> Any:
        if name not in self._updates:
            return self._base.read(name, start, count)
        info, into = self._base.tensors[name], self.tensors[name].dtype
        return merged_words(self._base, self._updates[name], info, name, start, count, into=into)
