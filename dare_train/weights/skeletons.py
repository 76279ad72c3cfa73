"""Models without weights, of classes that transformers has: what they are made of, and what they say of
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MOST_LAYERS = 4096
"""Modules of one kind that a configuration may ask for; ten times what any has."""
_COUNTS = ("layer", "layers", "depth", "blocks", "experts")
"""How settings end that say how many modules there are."""


def asks_for(config: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """What a configuration asks for that a stranger's must not have: name and value of code in a
    repository, and of modules without end. Both are done when a model is made, before a weight is read.
    """
    for name, value in config.items():
        last = str(name).split("_")[-1]
        brings_code = "implementation" in str(name) and "/" in str(
            value
        )  # kernels, which transformers fetches
        endless = last in _COUNTS and isinstance(value, int) and value > _MOST_LAYERS
        if isinstance(value, Mapping):
            yield from asks_for(value)
        elif brings_code or endless:
            yield str(name), repr(value)


def skeleton(config: Mapping[str, Any], name: str | None = None) -> Any:
    """A model on the meta device; None where there can be none: a class that transformers does not have, a
    configuration of another version, or no transformers at all. Nothing that a folder brings is executed.

    Args:
        config: the content of a `config.json`.
        name: of the class; by default the one that the configuration names.
    """
    try:
        import torch
        import transformers
    except ImportError:
        return None
    named = config.get("architectures")
    name = name or (named[0] if isinstance(named, list) and named else None)
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    configuration = getattr(kind, "config_class", None)
    if kind is None or configuration is None or any(asks_for(config)):
        return None
    if not isinstance(config.get("model_type", ""), str):
        return None
    try:
        with torch.device("meta"):
            return kind(configuration.from_dict(dict(config)))
    except Exception:  # noqa: BLE001 - what a class has against a configuration is not known beforehand
        return None


def class_for_task(task: str, config: Mapping[str, Any]) -> str | None:
    """The class that transformers has for a task, in PEFT's words, and a configuration's model type."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return None
    names = getattr(modeling_auto, f"{_MAPPINGS.get(task, '')}_MAPPING_NAMES", {})
    model_type = config.get("model_type")
    found = names.get(model_type) if isinstance(model_type, str) else None
    return found if isinstance(found, str) else None


def task_of_class(name: str, config: Mapping[str, Any]) -> str | None:
    """The task, in PEFT's words, that a class of transformers is for; None where it is for no such task."""
    return next((task for task in _MAPPINGS if class_for_task(task, config) == name), None)


_MAPPINGS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING",
    "FEATURE_EXTRACTION": "MODEL",
}
