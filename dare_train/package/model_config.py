"""A model's configuration, where the weights beside it are not those that it was written for: more rows, a
head of their own, full precision. One function for whatever writes models.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dtypes import code_named
from ..weights.files.config_file import CONFIG, read_config
from ..weights.heads import embeddings_in
from ..weights.protocol import TensorInfo
from ..weights.skeletons import skeleton

TIE = "tie_word_embeddings"
VOCABULARY = "vocab_size"
_QUANTISED = ("quantization_config", "compression_config")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of weights that a configuration has to describe.

    Attributes:
        tensors: of the result.
        sizes: numbers of rows that embeddings had before, for which a configuration's `vocab_size` may stand.
        untied: whether it has apart what the base's configuration may say is one, such as a head.
        dtype: what to write, in a configuration's words; None leaves it.
        dequantised: whether it is in full precision, of something that was not.
    """

    tensors: Mapping[str, TensorInfo]
    sizes: Collection[int] = ()
    untied: bool = False
    dtype: str | None = None
    dequantised: bool = False


def settle_config(folder: Path, facts: Facts) -> list[str]:
    """Make a folder's configuration say what its weights are. Returns sentences on what it contradicted."""
    before = read_config(folder / CONFIG)
    if not before:
        return []
    config, notes = settled(before, facts)
    if config != before:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return notes


def settled(config: Mapping[str, Any], facts: Facts) -> tuple[dict[str, Any], list[str]]:
    """A configuration that describes the weights, and sentences on what it contradicted."""
    result = dict(config)
    notes: list[str] = []
    if facts.dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        result = with_value(result, key, facts.dtype, add=True)
    if facts.untied and config.get(TIE, True):
        result = with_value(result, TIE, False, add=True)
    if facts.dequantised:
        result = {key: value for key, value in result.items() if key not in _QUANTISED}
    heights = vocabulary_sizes(facts.tensors)
    if len(heights) == 1:
        (rows,) = heights
        result = with_value(result, VOCABULARY, rows, instead_of={*facts.sizes, rows})
        said = _said_size(result)
        if said not in (None, rows):
            result, note = _contradicted(result, facts.tensors, said, rows)
            notes += note
    return result, notes


def vocabulary_sizes(tensors: Mapping[str, TensorInfo]) -> set[int]:
    """Numbers of rows of embeddings."""
    return {tensors[name].shape[0] for name in embeddings_in(tensors) if tensors[name].shape}


def said_dtype(config: Mapping[str, Any]) -> str | None:
    """The code of the type that a configuration says its weights have; None where it says none."""
    for fields in (config, config.get("text_config")):
        said = fields.get("dtype", fields.get("torch_dtype")) if isinstance(fields, Mapping) else None
        code = code_named(said)
        if code is not None:
            return code
    return None


def _said_size(config: Mapping[str, Any]) -> int | None:
    for fields in (config, config.get("text_config")):
        size = fields.get(VOCABULARY) if isinstance(fields, Mapping) else None
        if type(size) is int:
            return size
    return None


def _contradicted(
    config: dict[str, Any], tensors: Mapping[str, TensorInfo], said: int | None, rows: int
) -> tuple[dict[str, Any], list[str]]:
    """A size that is not the weights': some classes have more rows than that, and mean it; they say so
    themselves.
    """
    name = next(iter(embeddings_in(tensors)))
    expected = _height_in(config, name)
    if expected == rows:
        return config, []
    where = f"config.json says {VOCABULARY} {said}, and {name} has {rows} rows"
    other = with_value(config, VOCABULARY, rows)
    if expected is not None and _height_in(other, name) == rows:
        return other, [f"{where}: it is written as {rows}, or the model would not load"]
    return config, [f"{where}: correct one of them if the model does not load"]


def _height_in(config: Mapping[str, Any], name: str) -> int | None:
    """Rows that a class of transformers gives an embedding; None where that is not known."""
    model = skeleton({key: value for key, value in config.items() if key not in _QUANTISED})
    if model is None:
        return None
    ending = name.rpartition(".")[0].rpartition(".")[2]
    heights = {
        tensor.shape[0]
        for of, tensor in model.named_parameters()
        if of == name or of.endswith((f".{name}", f"{ending}.weight"))
    }
    return heights.pop() if len(heights) == 1 else None


def with_value(
    config: Mapping[str, Any],
    key: str,
    value: object,
    *,
    add: bool = False,
    instead_of: Collection[int] | None = None,
) -> dict[str, Any]:
    """A configuration with another value of a key, also in its parts, such as `text_config`; where they have
    it, or it is to be added, and where it is one of certain values."""
    parts = {
        name: with_value(part, key, value, instead_of=instead_of)
        for name, part in config.items()
        if name.endswith("_config") and isinstance(part, dict)
    }
    here = add if key not in config else instead_of is None or _is_one(config[key], instead_of)
    return {**config, **parts, **({key: value} if here else {})}


def _is_one(value: object, sizes: Collection[int]) -> bool:
    return type(value) is int and value in sizes
