"""What a configuration for mergekit comes to, in float64: means, sums of deltas, arcs and copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
State = Mapping[str, Array]
Document = dict[str, Any]
METHODS = ("linear", "slerp", "passthrough", "task_arithmetic")
BEFORE, AFTER = ("model.embed_tokens.weight",), ("lm_head.weight", "model.norm.weight")


def name_of(model: Any) -> str:
    if isinstance(model, str):
        return model
    lora = model.get("lora")
    return f"{model['model']['path']}{'+' + lora['path'] if lora else ''}"


def sliced(document: Document, layers: int) -> list[Document]:
    """Slices, of whatever says what is merged; a base that is not listed is added to models."""
    inner = {**document, **next(iter(document.get("modules", {"": {}}).values()))}
    if "slices" in inner:
        return [*inner["slices"]]
    whole = [{**each, "layer_range": [0, layers]} for each in inner["models"]]
    base = document.get("base_model")
    if base is not None and base not in [name_of(each["model"]) for each in whole]:
        whole.append({"model": base, "layer_range": [0, layers]})
    return [{"sources": whole}]


def length(each: Document) -> int:
    """Of a slice."""
    first, last = each["sources"][0]["layer_range"]
    return int(last) - int(first)


def said(name: str, tensor: str, share: float, *levels: Document, default: float) -> float:
    """A parameter: of the first level that says something of a tensor; lists run from layer to layer."""
    for level in levels:
        setting = level.get("parameters", {}).get(name)
        if isinstance(setting, list) and isinstance(setting[0], dict):
            fitting = [
                case["value"] for case in setting if case.get("filter") is None or case["filter"] in tensor
            ]
            setting = fitting[0] if fitting else None
        if setting is not None:
            values = setting if isinstance(setting, list) else [setting]
            return float(np.interp(share * (len(values) - 1), range(len(values)), values))
    return default


@dataclass(frozen=True, kw_only=True)
class Definition:
    """Of one configuration.

    Attributes:
        states: the models', by what it calls them.
        within: tensors of each layer, after its number.
        layers: of each model.
    """

    document: Document
    states: Mapping[str, State]
    within: Sequence[str]
    layers: int

    def result(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        slices, place = sliced(self.document, self.layers), 0
        for each in slices:
            firsts = [source["layer_range"][0] for source in each["sources"]]
            for number in range(length(each)):
                share = number / (length(each) - 1) if length(each) > 1 else 1.0
                for within in self.within:
                    names = [f"model.layers.{first + number}.{within}" for first in firsts]
                    found[f"model.layers.{place}.{within}"] = self._tensor(each, names, share)
                place += 1
        for each, outside in ((slices[0], BEFORE), (slices[-1], AFTER)):
            for name in outside:
                found[name] = self._tensor(each, [name] * len(each["sources"]), 0.0)
        return found

    def _tensor(self, each: Document, names: Sequence[str], share: float) -> Array:
        """One tensor; `names`: of it in each source."""
        sources, document = each["sources"], self.document
        models = [name_of(source["model"]) for source in sources]
        values = [self.states[model][name] for model, name in zip(models, names, strict=True)]
        base = each.get("base_model", document.get("base_model"))
        if document["merge_method"] == "passthrough":
            return values[0] * said("scale", names[0], share, sources[0], each, document, default=1.0)
        if document["merge_method"] == "slerp":
            (other,) = [place for place, model in enumerate(models) if model != base]
            t = said("t", names[0], share, each, document, default=0.5)
            return _arc(t, values[1 - other], values[other])
        weights = [
            said("weight", name, share, source, each, document, default=1.0)
            for source, name in zip(sources, names, strict=True)
        ]
        if document["merge_method"] == "linear":
            return np.asarray(np.average(values, axis=0, weights=weights))
        assert document["merge_method"] == "task_arithmetic"
        of_base = self.states[base][names[models.index(base) if base in models else 0]]
        total = np.zeros_like(of_base)
        for model, weight, value in zip(models, weights, values, strict=True):
            total += weight * (value - of_base) if model != base else 0
        return of_base + said("lambda", names[0], share, document, default=1.0) * total


def _arc(t: float, left: Array, right: Array) -> Array:
    cosine = (left * right).sum() / (np.linalg.norm(left) * np.linalg.norm(right))
    angle = np.arccos(np.clip(cosine, -1, 1))
    return np.asarray((np.sin((1 - t) * angle) * left + np.sin(t * angle) * right) / np.sin(angle))
