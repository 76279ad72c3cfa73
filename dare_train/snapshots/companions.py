"""A live model's configuration and tokenizer as files, which packages carry where the base has others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..parallel.waiting_folder import waiting_folder
from ..weights.live.wrapped import inner_model, unwrapped


def save_companions(model: Any, processing_class: Any, folder: Path, base: Path) -> str:
    """Write them into a folder beside the packages to come. Returns its path; `base` is the base's folder."""
    place = waiting_folder(folder)
    inner: Any = inner_model(model).model
    parts: tuple[Any, ...] = (getattr(inner, "config", None), processing_class)
    for part in parts:
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(place)
    if hasattr(inner, "register_to_config"):
        inner.save_config(place)
    generation = getattr(inner, "generation_config", None)
    if generation is not None:
        # Without save_pretrained's check, which refuses what many published models have.
        generation.to_json_file(place / "generation_config.json", use_diff=True)
    if not (base / "modules.json").exists():
        _save_layout(unwrapped(model), place)
    return str(place)


def _save_layout(model: Any, place: Path) -> None:
    """Of a sentence transformer: which modules it has, and those of them that are all configuration."""
    if not hasattr(model, "named_children") or "sentence_transformers" not in type(model).__module__:
        return
    modules = list(_modules(model))
    (place / "modules.json").write_text(json.dumps(modules, indent=2))
    for module in modules[1:]:
        part = model.get_submodule(module["name"])
        if hasattr(part, "save_config"):
            (place / module["path"]).mkdir()
            part.save_config(str(place / module["path"]))


def _modules(model: Any) -> Iterable[dict[str, Any]]:
    for number, (name, part) in enumerate(model.named_children()):
        kind = type(part)
        path = f"{number}_{kind.__name__}" if number else ""
        yield {"idx": number, "name": name, "path": path, "type": f"{kind.__module__}.{kind.__name__}"}
