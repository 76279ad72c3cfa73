"""A merge as data: the method, the models, every setting; `setting_resolver` tells which counts where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from ...config import Rounding, check_seed
from ...dtypes import DTYPE_NAMES
from ...errors import ConfigError
from ..methods.parameters import (
    Case,
    Gradient,
    Parameter,
    Setting,
    Settings,
    checked_settings,
    scalars,
)
from ..models.token_rows import TokenRow
from .checks import (
    check_choice,
    check_text,
    instances_of,
    is_integer,
    patterns_of,
    texts_by_text,
    texts_of,
)
from .recipe_parts import BASE_LAYERS, TAKES_PART, LayerRange, Model
from .setting_resolver import SettingResolver

RESCALES = ("paper", "norm", "q", "none")

MOST_ROWS = 1 << 16
"""That embeddings are padded to a multiple of."""

FLAVOUR = "dare_train"
"""Marks a configuration of our own, which `mergekit.read` takes literally."""

CHOICES = ("exclude", "take", "rename", "cast_base", "dequantize", "chat_template", "fisher", "gram")
"""Fields of a recipe that mergekit has no word for, and that a configuration has by the same names, where it
has them."""

_OF_THE_RECIPE = ("rescale", "seed")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a merge.

    Raises:
        ConfigError: a value is out of range, or two fields conflict.
    """

    method: str
    base: str
    """The base model: its folder, its id on the Hub, or a label."""
    models: tuple[Model, ...]
    """What is merged, in order."""
    parameters: Settings = field(default_factory=dict)
    """Settings for all models and layers."""
    layers: tuple[LayerRange, ...] = ()
    """None, or every layer of the model in one of them, in order."""
    rescale: str = "paper"
    """What multiplies the elements that dropping leaves: `paper`, 1 / (1 - p); `norm`, what keeps the L1 norm
    (mergekit's); `q`, DAREx's; `none`, 1."""
    seed: int = 0
    """Selects the masks, in [0, 2**64)."""
    out_dtype: str | None = None
    """The result's, as a safetensors code such as "BF16"; None is that of the base, tensor by tensor."""
    rounding: Rounding = "nearest"
    """Where an element of the result between two numbers of its dtype lands: on the nearest; or
    (`stochastic`) on either, so that its expectation is right."""
    tokenizer: str | None = None
    """Whose vocabulary the result has: `base`; `union`, that of all models; or a model's, as `models` calls
    it, or one whose tokenizer alone is taken. None when they need no comparison."""
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    """Tokens that the result has in any case, and where their rows come from."""
    pad_to_multiple_of: int | None = None
    """Embeddings get so many rows that this divides them: means of the others."""
    exclude: tuple[str, ...] = ()
    """Tensors whose name matches one of these patterns (`fnmatch`) stay as in the base. A single text is one
    pattern."""
    take: Mapping[str, str] = field(default_factory=dict)
    """By name pattern, the model, as `models` calls it, from which tensors are taken as they are; the first
    that matches counts."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Parts of tensor names to replace in the models' names, one after another."""
    cast_base: bool = False
    """Round the base to the models' dtypes first."""
    dequantize: bool = False
    """Read quantised checkpoints in full precision."""
    chat_template: str = ""
    """Of the result: `auto`, the one that most inputs have; a name; or Jinja. Empty: the tokenizer's own."""
    fisher: tuple[str, ...] = ()
    """Files of the models' Fisher information, in their order; none: those beside the models."""
    gram: tuple[str, ...] = ()
    """Files of the models' Gram matrices, in their order; none: those beside the models."""

    def __post_init__(self) -> None:
        check_text("method", self.method)
        check_text("base", self.base)
        object.__setattr__(self, "models", instances_of("models", self.models, Model))
        object.__setattr__(self, "layers", instances_of("layers", self.layers, LayerRange))
        object.__setattr__(self, "parameters", checked_settings(self.parameters, ""))
        if not self.models:
            remedy = "merge_method: passthrough copies a model" if "+" in self.base else ""
            raise ConfigError("models", expected="at least one besides the base", found="none", remedy=remedy)
        check_choice("rescale", self.rescale, RESCALES)
        check_seed(self.seed)
        if self.out_dtype is not None:
            check_choice("out_dtype", self.out_dtype, tuple(DTYPE_NAMES))
        check_choice("rounding", self.rounding, get_args(Rounding))
        self._check_tokenizer()
        object.__setattr__(self, "exclude", patterns_of("exclude", self.exclude))
        object.__setattr__(self, "take", texts_by_text("take", self.take, "models by name pattern"))
        object.__setattr__(self, "rename", texts_by_text("rename", self.rename, "new parts of names by old"))
        for name in ("cast_base", "dequantize"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, expected="true or false", found=repr(getattr(self, name)))
        for name in ("fisher", "gram"):
            object.__setattr__(self, name, texts_of(name, getattr(self, name), "a list of files"))
        if not isinstance(self.chat_template, str):
            raise ConfigError("chat_template", expected="a text", found=repr(self.chat_template))
        self._check_models_of_choices()
        self._check_ranges()
        self._check_places()

    def resolver(self, layers: int | Mapping[str, int]) -> SettingResolver:
        """Finds the values of this recipe's parameters.

        Args:
            layers: how many layers the model has; or, by stack of layers, what `layer_counts` gives.

        Raises:
            ConfigError: the recipe's ranges are not the model's layers.
        """
        counts = [layers] if isinstance(layers, int) else list(layers.values())
        if self.layers and len(counts) != 1:
            raise ConfigError(
                "layers",
                expected="one stack of layers",
                found=f"{len(counts)} in the model",
                remedy="leave the ranges out",
            )
        if self.layers and self.layers[-1].last != counts[0]:
            raise ConfigError(
                "layers",
                expected=f"the model's {counts[0]} layers",
                found=f"ranges that end before layer {self.layers[-1].last}",
                remedy="a merge keeps every layer",
            )
        return SettingResolver(
            method=self.method,
            models=self.models,
            ranges=self.layers,
            parameters=self.parameters,
            layers=layers,
        )

    def unknown_parameters(self, known: Collection[str]) -> list[str]:
        """Names that settings are given for and that are not among `known`, sorted."""
        return sorted({name for level in self.levels() for name in level.settings} - set(known))

    def check_parameters(self, known: Collection[Parameter]) -> None:
        """Refuses settings that the method would not see, and values that are not of their parameter's kind.

        Raises:
            ConfigError: naming the first of them.
        """
        by_name = {parameter.name: parameter for parameter in known}
        for level in self.levels():
            for name, setting in level.settings.items():
                where = f"{name}{level.where}"
                if name not in by_name:
                    names = ", ".join(sorted(by_name)) or "none"
                    raise ConfigError(
                        where, expected=f"a parameter of {self.method}: {names}", remedy="take it out"
                    )
                if level.per_model and not by_name[name].per_model:
                    raise ConfigError(
                        where,
                        expected="one value for all models",
                        remedy="move it to the recipe's parameters",
                    )
                for value in scalars(setting):
                    by_name[name].convert(value, where)

    def to_yaml(self) -> str:
        """A configuration with mergekit's keys and our own; `mergekit.read` gives back this recipe.

        Where both a range of layers and a model say something about a parameter, the model's part is folded
        into the range's.
        """
        import yaml

        text: str = yaml.safe_dump(
            self._plain(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=1 << 30
        )
        return text

    def digest(self) -> str:
        """SHA-256, in hex, of this recipe as canonical JSON: equal for recipes that say the same."""
        plain = self._plain()
        # Their order says something, which sorted keys would not.
        plain |= {
            name: [list(pair) for pair in plain[name].items()] for name in ("take", "rename") if name in plain
        }
        text = json.dumps(_canonical(plain), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"flavour": FLAVOUR, "merge_method": self.method, "base_model": self.base}
        if self.layers:
            plain["slices"] = [self._plain_slice(each) for each in self.layers]
        else:
            plain["models"] = [
                {"model": each.model, **_plain_parameters(each.parameters)} for each in self.models
            ]
        plain |= _plain_parameters(self.parameters)
        plain |= {"rescale": self.rescale, "seed": self.seed}
        if self.out_dtype is not None:
            plain["out_dtype"] = DTYPE_NAMES[self.out_dtype]
        if self.rounding != "nearest":
            plain["rounding"] = self.rounding
        if self.tokens or self.pad_to_multiple_of is not None:
            rows = {token: row.plain() for token, row in self.tokens.items()}
            given = {"source": self.tokenizer, "tokens": rows, "pad_to_multiple_of": self.pad_to_multiple_of}
            plain["tokenizer"] = {name: value for name, value in given.items() if value}
        elif self.tokenizer is not None:
            plain["tokenizer_source"] = self.tokenizer
        chosen = {name: getattr(self, name) for name in CHOICES}
        return plain | {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in chosen.items()
            if value
        }

    def _plain_slice(self, layers: LayerRange) -> dict[str, Any]:
        count = layers.last - layers.first
        sources = [
            {
                "model": model.model,
                "layer_range": [layers.origin(number), layers.origin(number) + count],
                **(
                    {TAKES_PART: False}
                    if settings is None
                    else _plain_parameters(_folded(settings, model.parameters))
                ),
            }
            for number, (model, settings) in enumerate(zip(self.models, layers.models, strict=True))
        ]
        plain = {"sources": sources, **_plain_parameters(layers.parameters)}
        if layers.base is not None:
            plain[BASE_LAYERS] = {"model": layers.base[0], "from": layers.base[1]}
        return plain

    def levels(self) -> Iterator[Level]:
        """Everywhere where settings stand."""
        yield Level(settings=self.parameters, where="", per_model=False)
        for model in self.models:
            yield Level(settings=model.parameters, where=f" of {model.model!r}", per_model=True)
        for layers in self.layers:
            yield Level(settings=layers.parameters, where=f" in {layers.label}", per_model=False)
            for model, settings in zip(self.models, layers.models, strict=True):
                if settings is None:
                    continue
                yield Level(settings=settings, where=f" of {model.model!r} in {layers.label}", per_model=True)

    def _check_tokenizer(self) -> None:
        if self.tokenizer is not None:
            check_text("tokenizer", self.tokenizer)
        multiple = self.pad_to_multiple_of
        if multiple is not None and not (is_integer(multiple) and 0 < multiple <= MOST_ROWS):
            raise ConfigError(
                "pad_to_multiple_of", expected=f"an integer from 1 to {MOST_ROWS}", found=repr(multiple)
            )
        if (self.tokens or multiple is not None) and self.tokenizer is None:
            raise ConfigError("tokenizer", expected="base, union or a model, beside its tokens", found="none")
        object.__setattr__(self, "tokens", dict(self.tokens))

    def _check_models_of_choices(self) -> None:
        names = [each.model for each in self.models]
        for pattern, model in self.take.items():
            if model not in names:
                remedy = "exclude keeps tensors of the base" if model == self.base else ""
                raise ConfigError(
                    f"take[{pattern!r}]",
                    expected=f"one of {', '.join(names)}",
                    found=repr(model),
                    remedy=remedy,
                )
        for name, files in (("fisher", self.fisher), ("gram", self.gram)):
            if len(files) not in (0, len(names)):
                raise ConfigError(
                    name, expected=f"a file for each of {', '.join(names)}", found=str(len(files))
                )

    def _check_ranges(self) -> None:
        end = 0
        for layers in self.layers:
            if layers.first != end:
                remedy = "ranges follow one another and leave no layer out"
                raise ConfigError(
                    "layers",
                    expected=f"a range that begins with layer {end}",
                    found=layers.label,
                    remedy=remedy,
                )
            if len(layers.models) != len(self.models):
                expected = f"settings for each of {len(self.models)} models"
                raise ConfigError(
                    layers.label,
                    expected=expected,
                    found=f"{len(layers.models)}",
                    remedy="{} where there are none",
                )
            end = layers.last

    def _check_places(self) -> None:
        for level in self.levels():
            for name in _OF_THE_RECIPE:
                if name in level.settings:
                    raise ConfigError(
                        f"{name}{level.where}",
                        expected="one value for the merge",
                        remedy=f"set the recipe's {name}",
                    )


@dataclass(frozen=True, kw_only=True)
class Level:
    """Settings, and the words that tell where in a recipe they stand."""

    settings: Settings
    where: str
    per_model: bool


def _folded(first: Settings, then: Settings) -> Settings:
    """Settings that say what `first` says, and what `then` says where that says nothing."""
    joined = {
        name: _cases(setting) + _cases(then[name])
        for name, setting in first.items()
        if isinstance(setting, tuple) and name in then
    }
    return {**then, **first, **joined}


def _cases(setting: Setting) -> tuple[Case, ...]:
    return setting if isinstance(setting, tuple) else (Case(value=setting),)


def _plain_parameters(settings: Settings) -> dict[str, Any]:
    return (
        {"parameters": {name: _plain_setting(setting) for name, setting in settings.items()}}
        if settings
        else {}
    )


def _plain_setting(setting: Setting) -> Any:
    if isinstance(setting, Gradient):
        return list(setting.values)
    if not isinstance(setting, tuple):
        return setting
    return [
        {**({} if case.filter is None else {"filter": case.filter}), "value": _plain_setting(case.value)}
        for case in setting
    ]


def _canonical(plain: Any) -> Any:
    """1 and 1.0 are one value, which JSON writes in two ways."""
    if isinstance(plain, dict):
        return {key: _canonical(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_canonical(value) for value in plain]
    return int(plain) if isinstance(plain, float) and plain.is_integer() else plain
