"""Models without weights, of classes that transformers has: what they are made of, and what they say of
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
    name = name or (config.get("architectures") or [""])[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    configuration = getattr(kind, "config_class", None)
    if kind is None or configuration is None:
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
    found = names.get(config.get("model_type"))
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
