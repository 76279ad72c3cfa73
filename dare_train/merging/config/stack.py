"""A configuration of mergekit's `passthrough`: layers of models, stacked in any order, none of them
merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..methods.parameters import Parameter, Settings, value_at
from ..models.chat_templates import check_template
from .mergekit import METHODS
from .result_dtype import result_dtype
from .spelling import spelt_out
from .yaml_parts import SLICE, SOURCE, TOKENIZER, WHOLE, fields_of, parsed, settings_of, text_of

PASSTHROUGH = "passthrough"
SCALE = Parameter(name="scale", default=1.0, per_model=True, meaning="factor of each weight")
_KEYS = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StackedLayers:
    """Layers `first` up to but without `last` of one model; `last` is None for all of them."""

    model: str
    first: int
    last: int | None
    settings: tuple[Settings, ...]
    """The first that says something of a tensor counts."""

    def scale(self, tensor: str, share: float) -> float:
        """The factor of a tensor; `share`: where in the layers it lies, from 0 to 1."""
        for settings in self.settings:
            if SCALE.name in settings:
                where = f"{SCALE.name} for {tensor}"
                value = value_at(SCALE, settings[SCALE.name], tensor=tensor, t=share, where=where)
                if value is not None:
                    return float(value)
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What a result is stacked from."""

    layers: tuple[StackedLayers, ...]
    described_by: str
    """The model whose configuration the result gets."""
    tokenizer: str
    """The model whose tokenizer it gets, where tokens are the same."""
    out_dtype: str | None
    """A safetensors code; None leaves each tensor its own."""
    chat_template: str
    notes: tuple[str, ...]
    """What was left out."""
    text: str
    """The configuration as it was read."""


def read_stack(given: Path | dict[str, Any], *, strict: bool = False) -> Stack | None:
    """The stack that a configuration asks for; None where it asks for something else.

    Args:
        given: a file, or what it holds.
        strict: refuse what nobody reads, instead of leaving it out and saying so.

    Raises:
        ConfigError: it cannot be read, or asks for what is not done here.
    """
    import yaml

    document = given if isinstance(given, dict) else parsed(given)
    if not isinstance(document, dict):
        return None
    known, ignored = spelt_out(document, _KEYS, strict=strict)
    if document.get("merge_method") != PASSTHROUGH:
        if not _adds_nothing(known):
            return None
        known = _copying(known)
        ignored.append(f"nothing is added to {known['base_model']}: it is written as it is")
    top = fields_of(known, _KEYS, "")
    shared = _settings(top, "")
    layers = tuple(_sliced(top["slices"], shared) if "slices" in top else _whole(top, shared))
    template = top.get("chat_template", "")
    if template:
        check_template(template)
    base = top.get("base_model")
    described_by = base if isinstance(base, str) and base else layers[0].model
    return Stack(
        layers=layers,
        described_by=described_by,
        out_dtype=result_dtype(top),
        chat_template=template,
        tokenizer=_tokenizer(top, described_by),
        notes=tuple(ignored),
        text=yaml.safe_dump(given, sort_keys=False) if isinstance(given, dict) else given.read_text("utf-8"),
    )


def _adds_nothing(top: Mapping[str, Any]) -> bool:
    """Whether a base with an adapter is all that a merge on a base names: people write the one into the other
    so.
    """
    base, method = top.get("base_model"), METHODS.get(str(top.get("merge_method")))
    if not isinstance(base, str) or "+" not in base or method is None or "flavour" in top:
        return False
    listed = [each for part in _parts(top) for each in part]
    return bool(listed) and all(isinstance(each, dict) and each.get("model") == base for each in listed)


def _parts(top: Mapping[str, Any]) -> list[list[Any]]:
    """The models of each slice, or of all layers."""
    slices = top.get("slices")
    if not isinstance(slices, list):
        return [top["models"]] if isinstance(top.get("models"), list) else []
    found = [each.get("sources") if isinstance(each, dict) else None for each in slices]
    return [sources if isinstance(sources, list) else [None] for sources in found]


def _copying(top: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that copies what `_adds_nothing` found."""
    kept = {key: value for key, value in top.items() if key not in ("models", "slices", "parameters")}
    plain = [
        [{key: value for key, value in source.items() if key != "parameters"} for source in part[:1]]
        for part in _parts(top)
    ]
    what = {"slices": [{"sources": part} for part in plain]} if "slices" in top else {"models": plain[0]}
    return {**kept, **what, "merge_method": PASSTHROUGH}


def _sliced(value: object, shared: Settings) -> Iterator[StackedLayers]:
    if not isinstance(value, list) or not value:
        raise ConfigError("slices", expected="a list with at least one entry", found=repr(value))
    for place, each in enumerate(value):
        where = f"slices[{place}]"
        fields = fields_of(each, SLICE, where)
        sources = fields.get("sources")
        if not isinstance(sources, list) or len(sources) != 1:
            found = len(sources) if isinstance(sources, list) else repr(sources)
            expected = f"one model: {PASSTHROUGH} merges nothing"
            raise ConfigError(f"{where}.sources", expected=expected, found=found)
        own = fields_of(sources[0], SOURCE, f"{where}.sources[0]")
        first, last = _range(own.get("layer_range"), f"{where}.sources[0].layer_range")
        yield StackedLayers(
            model=text_of(own, "model", f"{where}.sources[0]"),
            first=first,
            last=last,
            settings=(_settings(own, f"{where}.sources[0]."), _settings(fields, f"{where}."), shared),
        )


def _whole(top: Mapping[str, Any], shared: Settings) -> Iterator[StackedLayers]:
    models = top.get("models")
    if not isinstance(models, list) or len(models) != 1:
        found = len(models) if isinstance(models, list) else repr(models)
        raise ConfigError(
            "models", expected=f"one model, or slices: {PASSTHROUGH} merges nothing", found=found
        )
    fields = fields_of(models[0], WHOLE, "models[0]")
    name = text_of(fields, "model", "models[0]")
    yield StackedLayers(model=name, first=0, last=None, settings=(_settings(fields, "models[0]."), shared))


def _settings(fields: Mapping[str, Any], where: str) -> Settings:
    settings = settings_of(fields.get("parameters", {}), f"{where}parameters")
    for name in settings:
        if name != SCALE.name:
            found = f"{where}parameters.{name}"
            raise ConfigError(
                found, expected=f"a parameter of {PASSTHROUGH}: {SCALE.name}", remedy="take it out"
            )
    return settings


def _tokenizer(top: Mapping[str, Any], described_by: str) -> str:
    said = fields_of(top["tokenizer"], TOKENIZER, "tokenizer") if "tokenizer" in top else {}
    for key in ("tokens", "pad_to_multiple_of"):
        if key in said:
            remedy = f"merge_method: linear gives the result of this a vocabulary with {key}"
            raise ConfigError(f"tokenizer.{key}", expected=f"none: {PASSTHROUGH} copies rows", remedy=remedy)
    source = said.get("source") or top.get("tokenizer_source") or "base"
    if not isinstance(source, str):
        raise ConfigError("tokenizer_source", expected="base or a model", found=repr(source))
    source = source.removeprefix("model:")
    return described_by if source in ("base", "union") else source


def _range(value: object, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(end) is int for end in value):
        raise ConfigError(where, expected="[first, last + 1]", found=repr(value))
    first, last = value
    if not 0 <= first <= last:
        raise ConfigError(where, expected="[first, last + 1]", found=repr(value))
    return first, last
