"""What a mixture of experts is made of: configurations of `mergekit-moe`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ConfigError, brief
from .config.checks import check_choice
from .config.result_dtype import result_dtype
from .config.yaml_parts import fields_of, parsed, text_of

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
"""What routes tokens: the base model's hidden states of prompts (of the last token, or the mean over tokens),
the embeddings of their tokens, or draws, normal or as a new linear layer has them."""
DRAWN: tuple[GateMode, ...] = ("random", "uniform_random")
_KEYS = (
    "base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture",
)  # fmt: skip
_OF_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_LARGEST = 1e30
"""Of scales: more has no float32."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A dense model whose MLPs are one expert of each layer."""

    model: str
    positive: tuple[str, ...]
    """Prompts that are for it."""
    negative: tuple[str, ...]
    """Prompts that are not."""
    noise: float
    """Standard deviation of what is added to its weights."""
    residual: float
    """Factor of what it adds to the residual stream."""


@dataclass(frozen=True, kw_only=True)
class ExpertRecipe:
    """A checked configuration."""

    base: str
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]
    """Experts that every token goes to."""
    gate: GateMode
    dtype: str | None
    """A safetensors code; None for the base's."""
    per_token: int
    architecture: str
    """How the name of the result's shape begins; may be empty."""
    text: str
    """The configuration as it was read."""


def read_experts(path: Path, *, allow_same: bool = False) -> ExpertRecipe:
    """
    Args:
        allow_same: take one model for all experts, which is of use only if the result is trained.

    Raises:
        ConfigError: it cannot be read, or asks for what cannot be.
    """
    top = fields_of(parsed(path), _KEYS, "")
    gate = top.get("gate_mode", "hidden")
    check_choice("gate_mode", gate, get_args(GateMode))
    per_token = top.get("experts_per_token", 2)
    experts = tuple(_experts(top.get("experts"), "experts"))
    if type(per_token) is not int or not 1 <= per_token <= len(experts):
        expected = f"1 to {len(experts)}, as many as there are experts"
        raise ConfigError("experts_per_token", expected=expected, found=brief(per_token))
    shared = tuple(_experts(top["shared_experts"], "shared_experts")) if top.get("shared_experts") else ()
    architecture = text_of(top, "architecture") if "architecture" in top else ""
    recipe = ExpertRecipe(
        base=text_of(top, "base_model"),
        experts=experts,
        shared=shared,
        gate=gate,
        dtype=result_dtype(top),
        per_token=per_token,
        architecture=architecture,
        text=path.read_text(encoding="utf-8"),
    )
    if gate not in DRAWN:
        _check_prompts(experts, gate)
    if not allow_same and len(experts) > 1 and len({expert.model for expert in experts}) == 1:
        remedy = "allow_same=True (--allow-same), if the result is to be trained"
        raise ConfigError("experts", expected="different models", found=experts[0].model, remedy=remedy)
    return recipe


def _experts(value: object, where: str) -> Iterator[Expert]:
    if not isinstance(value, list) or not value:
        raise ConfigError(where, expected="a list with at least one entry", found=brief(value))
    for place, each in enumerate(value):
        here = f"{where}[{place}]"
        fields = fields_of(each, _OF_EXPERT, here)
        yield Expert(
            model=text_of(fields, "source_model", here),
            positive=_prompts(fields, "positive_prompts", here),
            negative=_prompts(fields, "negative_prompts", here),
            noise=_number(fields, "noise_scale", 0.0, here),
            residual=_number(fields, "residual_scale", 1.0, here),
        )


def _prompts(fields: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = fields.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"{where}.{key}", expected="a list of texts", found=brief(value))
    return tuple(value)


def _number(fields: dict[str, Any], key: str, default: float, where: str) -> float:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
        raise ConfigError(f"{where}.{key}", expected="a number", found=brief(value))
    return float(value)


def _check_prompts(experts: tuple[Expert, ...], gate: GateMode) -> None:
    for place, expert in enumerate(experts):
        if not expert.positive:
            expected = f"at least one, from which gate_mode {gate} tells what is for this expert"
            remedy = f"or gate_mode: {DRAWN[0]}"
            raise ConfigError(
                f"experts[{place}].positive_prompts", expected=expected, found="none", remedy=remedy
            )
    if len(experts) > 1 and len({(expert.positive, expert.negative) for expert in experts}) == 1:
        expected = "different prompts, by which tokens find their expert"
        raise ConfigError("experts", expected=expected, found="the same for all")
