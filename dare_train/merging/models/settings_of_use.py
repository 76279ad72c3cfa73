"""What configurations say of how weights are used, such as the base of rotary embeddings, or of what a head's
rows mean: of a merge's base and models, where they do not say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import brief

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_LABELS = ("id2label", "label2id")
_PLAIN_LABEL = re.compile(r"LABEL_[0-9]+")
_ALONE = (
    "max_position_embeddings",
    "partial_rotary_factor",
    "sliding_window",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "num_experts_per_tok",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "problem_type",
)
_GROUPS = (_ROPE, _LABELS, *((name,) for name in _ALONE))
"""Settings that say one thing together."""
_THETA = 10000.0
"""Where a configuration is silent."""
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What a result's configuration says: settings by name, None for those that it does not have; and
    sentences on where base and models differ.
    """

    changes: Mapping[str, Any]
    notes: Sequence[str]


def settled_use(base: Config, models: Sequence[tuple[str, Config]], *, labels: bool = True) -> Settled:
    """What all models say instead of the base; and what the base says, where they contradict one another.

    Args:
        base: the base's configuration.
        models: those of the models, and what messages call these; empty where one has none.
        labels: whether rows of heads are merged, so that their labels have to be the same.
    """
    changes: dict[str, Any] = {}
    notes = []
    for group in _GROUPS if labels else [group for group in _GROUPS if group != _LABELS]:
        own = _meaning(group, base)
        said = [(label, config, _meaning(group, config)) for label, config in models]
        said = [each for each in said if each[2] is not None]
        agreed = bool(said) and all(each[2] == said[0][2] for each in said)
        if not said or (agreed and own == said[0][2]) or (agreed and own is None and group != _LABELS):
            continue
        if agreed:
            first = said[0][1]
            changes |= {name: first.get(name) for name in group if name in first or name in base}
        reference = ("the base", base, own) if own is not None else said[0]
        apart = next((each for each in said if each[2] != reference[2]), None)
        if apart is not None:
            told = f"config.json: {group[0]} is {_shown(group, reference[1])} in {reference[0]}, and "
            told += f"{_shown(group, apart[1])} in {apart[0]}"
            notes.append(f"{told}, as in the result" if agreed else f"{told}: check what the result says")
    return Settled(changes=changes, notes=notes)


def _shown(group: Sequence[str], config: Config) -> str:
    """What a configuration says in a group of settings."""
    values = [config[name] for name in group if config.get(name) is not None]
    return ", ".join(map(brief, values[:1] if group == _LABELS else values)) or "not said"


def with_settings(config: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other settings."""
    removed = {name for name, value in changes.items() if value is None}
    kept = {name: value for name, value in config.items() if name not in removed}
    return {**kept, **{name: value for name, value in changes.items() if value is not None}}


def _meaning(group: Sequence[str], config: Config) -> Any:
    """What a group of settings says; None where it says nothing, or nothing that could be compared."""
    if not config:
        return None
    if group == _ROPE:
        return _rope(config)
    if group == _LABELS:
        labels = config.get("id2label")
        named = labels.values() if isinstance(labels, Mapping) else ()
        return labels if any(not _PLAIN_LABEL.fullmatch(str(name)) for name in named) else None
    return config.get(group[0])


def _rope(config: Config) -> tuple[float, dict[str, Any]] | None:
    """The base of rotary embeddings, and how they are scaled, in whichever words."""
    together = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or together
    if not isinstance(together, Mapping) or not isinstance(scaling, Mapping):
        return None
    if any(isinstance(each, Mapping) for each in together.values()):  # for each kind of layer
        return None
    theta = config.get("rope_theta", together.get("rope_theta", _THETA))
    rest = {name: value for name, value in scaling.items() if name != "rope_theta"}
    kind = rest.pop("rope_type", rest.pop("type", "default"))
    return theta, {} if kind == "default" else {**rest, "rope_type": kind}
