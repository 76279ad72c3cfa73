"""Tiny models of any class: its default configuration with every number made small that says how large
something is.

Nothing has to be computed with such a model: it has to be built, saved and loaded. So a rule by name is
enough, with a few ways to try, of which the first counts that builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

LARGEST = 12_000_000
"""Parameters of a model that still counts as tiny."""

_PARTS = re.compile(r"config(s)?$|_dict$")
_LAYERS = re.compile(r"layers?$|^n_layer|^depth$|num_blocks$|_depth$|num_stages$|n_blocks")
_NO_LAYERS = re.compile(
    r"group|idx|ids|index|skip|mlp_|mapping|window|_no_|feature_layer|interval|conv_kernel|shared_layers|feat_extract"
)
_HEADS = re.compile(r"heads?$|n_head|head_num|_heads_")
_WIDTH = re.compile(
    r"hidden|dim|width|d_model|d_ff|embd|embed|size$|intermediate|channels|features?$|rank$|inner|ffn|filters|d_kv|d_inner|"
    r"state|d_ssm|d_conv_in"
)
_NO_WIDTH = re.compile(
    r"patch|kernel|stride|image|window|vocab|batch|block_size|num_channels|in_chans|group_size|chunk|crop|pool|type_|"
    r"grid|spatial|time|merge_size|hop|fft|bins|position|sample|conv_size|buckets|codebook_size|ratio|factor|relative|num_feature|"
    r"tubelet|^input_size|^max_|out_features|out_indices|ids$|hidden_act|temporal|n_feat|input_feat|mel|audio_channels"
)
_EXPERTS = re.compile(r"experts$|_experts|num_local")
_TOP = re.compile(r"per_tok|top_?k|topk")
_LENGTHS = re.compile(
    r"position|max_.*length|seq_len|context_length|max_source|max_target|n_ctx|n_positions|max_len"
)
_TOKENS = re.compile(r"token(_id)?s?$|_ids?$|token_index|_idx$")


@dataclass(frozen=True)
class Way:
    """How small things get."""

    divisor: int
    heads: int = 2
    head_dim: int = 16
    layers: int = 2
    least: int = 16
    experts: int = 4


WAYS = (
    Way(divisor=32), Way(divisor=16), Way(divisor=32, heads=1), Way(divisor=16, heads=4), Way(divisor=8),
    Way(divisor=8, heads=4, least=32), Way(divisor=16, layers=4), Way(divisor=8, layers=4),
    Way(divisor=4, least=32), Way(divisor=8, layers=6, heads=1), Way(divisor=4, heads=10_000, layers=4),
    Way(divisor=1, heads=10_000, layers=2, head_dim=10_000),
    Way(divisor=1, heads=10_000, layers=1_000, head_dim=10_000, experts=8),
)  # fmt: skip

CHANGES: dict[str, dict[str, Any]] = {
    "Dinov2ForImageClassification": {"use_swiglu_ffn": True},
    "Dinov2WithRegistersForImageClassification": {"use_swiglu_ffn": True},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16, "hidden_size": 64},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "MinistralForCausalLM": {"head_dim": 16},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16},
    "BambaForCausalLM": {"mamba_n_heads": 16, "mamba_d_head": 16},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16},
    "AutoformerModel": {"prediction_length": 4},
    "InformerModel": {"prediction_length": 4},
    "TimeSeriesTransformerModel": {"prediction_length": 4},
    "AutoformerForPrediction": {"prediction_length": 4},
    "InformerForPrediction": {"prediction_length": 4},
    "TimeSeriesTransformerForPrediction": {"prediction_length": 4},
    "XLNetLMHeadModel": {"d_model": 32, "n_head": 2, "d_head": 16},
    "BitForImageClassification": {"num_groups": 4},
}
"""What a class needs beside its defaults, or what has more to convert than these."""


class Unbuildable(Exception):
    """No way led to a tiny model; the text says why the last did not."""


def build(model_class: Any, seed: int = 1) -> Any:
    """A tiny model of a class, initialised from a seed of its own.

    Raises:
        Unbuildable: there is none.
    """
    import torch
    from transformers import set_seed

    why = "no default configuration"
    for way, config in _configurations(model_class):
        try:
            with torch.device("meta"):
                parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
        except Exception as error:  # noqa: BLE001 - whatever a class has against its configuration
            why = f"{way}: {type(error).__name__}: {error}"
            if "meta" not in str(error):
                continue
            parameters = 0
        if parameters > LARGEST:
            why = f"{way}: {parameters} parameters"
            continue
        try:
            set_seed(seed)
            return model_class(config).eval()
        except Exception as error:  # noqa: BLE001
            why = f"{way}: {type(error).__name__}: {error}"
    raise Unbuildable(why.replace("\n", " ")[:160])


def _configurations(model_class: Any) -> Iterator[tuple[Way, Any]]:
    config_class = model_class.config_class
    try:
        plain = config_class().to_dict()
    except Exception as error:
        raise Unbuildable(f"its configuration has no default: {str(error)[:100]}") from error
    for way in WAYS:
        values = _shrunk(plain, way)
        values.update(CHANGES.get(model_class.__name__, {}))
        with suppress(Exception):  # the next way
            yield way, config_class.from_dict(values)


def _shrunk(values: dict[str, Any], way: Way) -> dict[str, Any]:
    layers = max((value for name, value in values.items() if _is_layers(name, value)), default=0)
    small = {}
    for name, value in values.items():
        if name in ("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype"):
            continue
        small[name] = _smaller(name, value, way, layers, values)
    if layers > way.layers and any("stage" in str(name) for name in small.get("out_features") or ()):
        for name in ("out_features", "out_indices", "stage_names"):
            small.pop(name, None)
    return small


def _is_layers(name: str, value: Any) -> bool:
    return _is_count(value) and bool(_LAYERS.search(name)) and not _NO_LAYERS.search(name)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _smaller(name: str, value: Any, way: Way, layers: int, beside: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        if value and all(str(key).isdigit() for key in value):
            return {key: item for key, item in value.items() if int(key) < way.layers}
        return _shrunk(value, way) if _PARTS.search(name) or "model_type" in value else value
    if isinstance(value, (list, tuple)):
        return _smaller_list(name, list(value), way, layers, beside)
    return _number(name, value, way, beside) if _is_count(value) and value > 0 else value


def _smaller_list(name: str, value: list[Any], way: Way, layers: int, beside: dict[str, Any]) -> list[Any]:
    if layers > way.layers and len(value) == layers:
        kinds = sorted({str(item): place for place, item in reversed([*enumerate(value)])}.values())
        rest = [place for place in range(layers) if place not in kinds]
        value = [value[place] for place in sorted([*kinds, *rest][: way.layers])]
    if name.endswith("feature_layer") or name.endswith("feature_layers"):
        return [min(item, way.layers - 1) for item in value]
    if re.search(r"depths|num_blocks|layers$|num_layers", name) and all(map(_is_count, value)):
        return [min(item, 2) if not _NO_LAYERS.search(name) else item for item in value]
    return [_smaller(name, item, way, 0, beside) if _is_count(item) else item for item in value]


def _number(name: str, value: int, way: Way, beside: dict[str, Any]) -> int:
    if _TOKENS.search(name) and not name.startswith("num_"):
        return min(value, 40 + value % 20) if value > 60 else value
    if "vocab" in name and "dim" not in name and "hidden" not in name:
        return min(value, 64)
    if _TOP.search(name):
        return min(value, 2)
    if _EXPERTS.search(name):
        return min(value, way.experts)
    if _is_layers(name, value):
        return min(value, way.layers)
    if name.endswith("shared_layers"):
        return min(value, way.layers // 2)
    if _HEADS.search(name) and "dim" not in name:
        return _heads(name, value, way, beside)
    if re.search(r"head_(dim|size)|_head_dim|d_kv$|rotary_dim|kv_channels|d_head", name):
        return min(value, way.head_dim if "rope" not in name else way.head_dim // 2)
    if _LENGTHS.search(name) and "dim" not in name:
        return min(value, 64)
    if "image_size" in name or name == "img_size":
        patch = beside.get("patch_size")
        return min(value, 2 * patch if isinstance(patch, int) else 64)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= 32:
        return max(way.least, value // way.divisor // 8 * 8)
    return value


def _heads(name: str, value: int, way: Way, beside: dict[str, Any]) -> int:
    """As many for keys and values as for queries, or half of them, as it was."""
    if re.search(r"kv|key_value", name):
        queries = [
            number
            for other, number in beside.items()
            if _is_count(number) and other.endswith("attention_heads")
        ]
        fewer = bool(queries) and value < max(queries)
        return max(1, min(value, way.heads // 2 if fewer else way.heads))
    return min(value, way.heads)
