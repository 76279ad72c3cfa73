"""`adapter_config.json` of a PEFT adapter: the fields that decide what merging gives; others are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, brief
from ...reading.structures import json_in
from .module_patterns import ModulePatterns, Refused

MERGE = "merge it with PEFT (merge_and_unload, then save_pretrained) and extract from the merged model"

_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "target_parameters",
}
_SHOWN_BY_TENSORS = {
    "bias",
    "lora_bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}
_OF_TRAINING = {
    "init_lora_weights",
    "lora_dropout",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "inference_mode",
}
_NOTES = {
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
}
_UNDERSTOOD = _READ | _SHOWN_BY_TENSORS | _OF_TRAINING | _NOTES
"""Any other field that is set may change what the adapter's tensors mean."""

_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ,
LoRA-GA) take something out of it, which merging into the untouched base would count twice."""

_LIMIT = 1e9


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    path: Path
    rank: int
    alpha: float
    rank_pattern: ModulePatterns[float]
    alpha_pattern: ModulePatterns[float]
    rslora: bool
    """Rank-stabilized: divide by the root of the rank (arXiv 2312.03732)."""
    dora: bool
    transposed: bool
    """`fan_in_fan_out`: weights lie as [in, out]."""
    added: tuple[str, ...]
    """`modules_to_save`: ends of the names of modules that were trained in full."""
    parameters: tuple[str, ...]
    """`target_parameters`: ends of the names of parameters that are adapted themselves."""
    base: str
    """What it was trained on, as it says; empty where it does not."""
    classes: tuple[str, ...]
    """Of the model that it was trained on, as far as it says so: a class, or a task in PEFT's words."""

    @classmethod
    def read(cls, path: Path) -> AdapterConfig:
        """
        Raises:
            CheckpointError: it cannot be read, or describes an adapter that cannot be merged here.
        """
        fields = json_in(path, expected="a PEFT adapter's configuration")
        _check_supported(path, fields)
        return cls(
            path=path,
            rank=_number(path, fields, "r", whole=True),
            alpha=_number(path, fields, "lora_alpha"),
            rank_pattern=_patterns(path, fields, "rank_pattern", whole=True),
            alpha_pattern=_patterns(path, fields, "alpha_pattern"),
            rslora=bool(fields.get("use_rslora")),
            dora=bool(fields.get("use_dora")),
            transposed=bool(fields.get("fan_in_fan_out")),
            added=_names(path, fields, "modules_to_save"),
            parameters=_names(path, fields, "target_parameters"),
            base=_text(fields, "base_model_name_or_path"),
            classes=tuple(_classes(fields)),
        )

    def rank_of(self, module: str) -> int:
        return int(self._matched(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """s of one module: α / rank, or α / √rank."""
        rank = self.rank_of(module)
        return self._matched(self.alpha_pattern, module, self.alpha) / (
            math.sqrt(rank) if self.rslora else rank
        )

    def adds(self, tensor: str) -> bool:
        """Whether a tensor belongs to a module that was trained in full."""
        return any(f"{module}." in tensor for module in self.added)

    def _matched(self, patterns: ModulePatterns[float], module: str, default: float) -> float:
        try:
            return patterns.value(module, default)
        except Refused as refusal:
            where = f"{self.path}: rank_pattern or alpha_pattern"
            raise _not_understood(where, module, refusal) from refusal


def _check_supported(path: Path, fields: Mapping[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type", expected='"LORA"', found=brief(kind), remedy=MERGE)
    start = fields.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        where = f"{path}: init_lora_weights"
        expected = "a start that leaves the base as it is"
        raise CheckpointError(where, expected=expected, found=brief(start), remedy=MERGE)
    for field, value in fields.items():
        understood = field in _UNDERSTOOD or (field == "ensure_weight_tying" and _tied_whole(fields))
        if value and not understood:
            found = brief(value)
            raise CheckpointError(f"{path}: {field}", expected="not set", found=found, remedy=MERGE)


def _tied_whole(fields: Mapping[str, Any]) -> bool:
    """Whether the embedding that PEFT ties to the head was trained in full, so that both are written as they
    are.
    """
    saved, adapted = fields.get("modules_to_save"), fields.get("target_modules")
    if not isinstance(saved, list) or not isinstance(adapted, list):
        return False
    ends = {str(name).rpartition(".")[2] for name in adapted}
    in_full = {str(name).rpartition(".")[2] for name in saved}
    return "embed_tokens" in in_full and not ends & {"embed_tokens", "lm_head"}


def _not_understood(where: str, what: object, refusal: Refused) -> CheckpointError:
    expected = "patterns of characters, sets, groups, alternatives and repeats"
    return CheckpointError(where, expected=expected, found=f"{refusal}: {brief(what)}", remedy=MERGE)


def _number(path: Path | str, fields: Mapping[str, Any], name: str, *, whole: bool = False) -> Any:
    value = fields.get(name)
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not (1 if whole else -_LIMIT) <= value <= _LIMIT:  # type: ignore[operator]
        expected = "a positive integer" if whole else "a number"
        raise CheckpointError(f"{path}: {name}", expected=expected, found=brief(value))
    return value


def _patterns(
    path: Path, fields: Mapping[str, Any], name: str, *, whole: bool = False
) -> ModulePatterns[float]:
    given = fields.get(name) or {}
    where = f"{path}: {name}"
    if not isinstance(given, dict):
        raise CheckpointError(where, expected="name patterns with numbers", found=brief(given))
    for key in given:
        _number(where, given, key, whole=whole)
    try:
        return ModulePatterns(given)
    except Refused as refusal:
        raise _not_understood(where, given, refusal) from refusal


def _text(fields: Mapping[str, Any], name: str) -> str:
    given = fields.get(name)
    return given if isinstance(given, str) else ""


def _classes(fields: Mapping[str, Any]) -> Iterator[str]:
    mapping = fields.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    yield from (name for name in (named, fields.get("task_type")) if isinstance(name, str))


def _names(path: Path, fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    given = fields.get(name) or ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(item, str) and item for item in given):
        raise CheckpointError(f"{path}: {name}", expected="a list of names", found=brief(given))
    return tuple(given)
