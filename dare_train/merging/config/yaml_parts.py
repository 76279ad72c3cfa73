"""A configuration's YAML as the parts of a recipe: models or slices, settings, and what a mapping may
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, brief
from ...reading import bounded_yaml
from ...reading.plain_files import content
from ..methods.parameters import Case, Gradient, Scalar, Setting, Settings
from .recipe_parts import BASE_LAYERS, TAKES_PART, LayerRange, Model

REMEDIES = {"modules": "give it a module, such as default: {models: [...]}"}
"""What to do about keys of mergekit's that are not read here."""
WHOLE = ("model", "parameters")
"""Keys of a model that is listed, and of other mappings."""
SLICE = ("sources", "parameters", "base_model", BASE_LAYERS)
SOURCE = ("model", "layer_range", "parameters", TAKES_PART)
TOKENIZER = ("source", "tokens", "pad_to_multiple_of")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The models that a configuration lists, and its slices."""

    models: tuple[Model, ...]
    layers: tuple[LayerRange, ...] = ()

    def arranged(self, order: Sequence[int | None], base: str) -> Inputs:
        """The models at these places; None stands for the base, with no settings of its own."""
        models = tuple(Model(model=base) if place is None else self.models[place] for place in order)
        return Inputs(models=models, layers=tuple(_arranged(each, order) for each in self.layers))

    def changed(
        self, change: Callable[[Settings], Settings], of_all: Callable[[Settings], Settings] | None = None
    ) -> Inputs:
        """With every model's and slice's settings replaced; `of_all`: those of a slice for all models."""
        models = tuple(Model(model=each.model, parameters=change(each.parameters)) for each in self.models)
        layers = tuple(_changed(each, change, of_all or change) for each in self.layers)
        return Inputs(models=models, layers=layers)

    def settings(self) -> Iterator[Settings]:
        for model in self.models:
            yield model.parameters
        for layers in self.layers:
            yield layers.parameters
            yield from filter(None, layers.models)

    def say(self, parameter: str) -> bool:
        """Whether a parameter is given for every model and tensor, so that what they share does not count."""
        ranges = [
            [layers.parameters, *(each for each in layers.models if each is not None)]
            for layers in self.layers
        ] or [[{}, *(each.parameters for each in self.models)]]
        return all(
            says(shared, parameter) or all(says(each, parameter) for each in of_models)
            for shared, *of_models in ranges
        )


def parsed(path_or_text: str | Path) -> object:
    """What a file of YAML holds, or YAML itself: text of several lines, or in braces.

    Raises:
        ConfigError: it cannot be read, or holds several documents.
    """
    documents = documents_of(path_or_text)
    if len(documents) > 1:
        remedy = "dare-train merge runs them one after the other; here, give each a file"
        found = str(len(documents))
        raise ConfigError("the configuration", expected="one merge in a file", found=found, remedy=remedy)
    return documents[0] if documents else None


def documents_of(path_or_text: str | Path) -> list[object]:
    """As `parsed`, of all documents that are not empty."""
    import yaml

    text = _yaml_text(path_or_text)
    try:
        return bounded_yaml.documents(text)
    # Dates and numbers that YAML's grammar takes for such raise ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None)
        where = f"line {mark.line + 1}" if mark is not None else "the configuration"
        deep = "values nested too deep" if isinstance(error, RecursionError) else f"{error}"
        raise ConfigError(where, expected="YAML", found=problem or deep) from error


def _yaml_text(path_or_text: str | Path) -> str:
    if isinstance(path_or_text, str) and ("\n" in path_or_text or path_or_text.lstrip().startswith("{")):
        return path_or_text
    expected = "a file of YAML text"
    raw = content(
        Path(path_or_text), at_most=bounded_yaml.LARGEST, expected=expected, error=ConfigError, remedy=""
    )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path_or_text}", expected=expected, found=f"{error}") from error


def inputs_of(top: Mapping[str, Any]) -> Inputs:
    """The models that are listed, as they are or slice by slice.

    Raises:
        ConfigError: both, neither, or slices that move layers.
    """
    if ("models" in top) == ("slices" in top):
        raise ConfigError(
            "models",
            expected="either models or slices",
            found="both" if "models" in top else "neither",
            remedy="list what is to be merged",
        )
    return _sliced(top["slices"]) if "slices" in top else Inputs(models=tuple(_models(top["models"])))


def _models(value: object) -> Iterator[Model]:
    for place, each in enumerate(_list(value, "models")):
        where = f"models[{place}]"
        fields = fields_of(each, WHOLE, where)
        yield Model(
            model=text_of(fields, "model", where),
            parameters=settings_of(fields.get("parameters", {}), f"{where}.parameters"),
        )


def _sliced(value: object) -> Inputs:
    slices: list[tuple[list[_Source], Settings, object]] = []
    for place, each in enumerate(_list(value, "slices")):
        where = f"slices[{place}]"
        fields = fields_of(each, SLICE, where)
        sources = _sources(fields.get("sources"), f"{where}.sources")
        _check_once([source.model for source in sources], f"{where}.sources")
        settings = settings_of(fields.get("parameters", {}), f"{where}.parameters")
        slices.append((sources, settings, fields.get(BASE_LAYERS)))
    names = [*dict.fromkeys(source.model for sources, _, _ in slices for source in sources)]
    layers, first = list[LayerRange](), 0
    for place, (sources, settings, base) in enumerate(slices):
        layers.append(_range(sources, settings, names, first, base, f"slices[{place}]"))
        first = layers[-1].last
    return Inputs(models=tuple(Model(model=name) for name in names), layers=tuple(layers))


def _range(
    sources: Sequence[_Source], settings: Settings, names: Sequence[str], first: int, base: object, where: str
) -> LayerRange:
    """A slice, of those models that it names, for the layers of the result from `first`."""
    parts = {source.model: source for source in sources if source.takes_part}
    origins = tuple(parts[name].first if name in parts else 0 for name in names)
    return LayerRange(
        first=first,
        last=first + sources[0].last - sources[0].first,
        parameters=settings,
        models=tuple(parts[name].parameters if name in parts else None for name in names),
        origins=origins,
        base=None if base is None else _base_layers(base, f"{where}.{BASE_LAYERS}"),
    )


def _base_layers(value: object, where: str) -> tuple[str, int]:
    fields = fields_of(value, ("model", "from"), where)
    first = fields.get("from")
    if type(first) is not int or first < 0:
        raise ConfigError(f"{where}.from", expected="the number of a layer", found=brief(first))
    return text_of(fields, "model", where), first


def _check_once(names: Sequence[str], where: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        remedy = "give it the sum of its weights"
        raise ConfigError(where, expected="each model once", found=f"{twice[0]!r} again", remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class _Source:
    model: str
    first: int
    last: int
    parameters: Settings
    takes_part: bool


def _sources(value: object, where: str) -> list[_Source]:
    """One slice's sources, with as many layers from each."""
    sources = [_source(each, f"{where}[{place}]") for place, each in enumerate(_list(value, where))]
    count = sources[0].last - sources[0].first
    for place, each in enumerate(sources):
        if each.last - each.first != count:
            raise ConfigError(
                f"{where}[{place}].layer_range",
                expected=f"{count} layers, as many as the first has",
                found=f"[{each.first}, {each.last}]",
                remedy="merge as many layers of each model in a slice",
            )
    return sources


def _source(value: object, where: str) -> _Source:
    fields = fields_of(value, SOURCE, where)
    ends = fields.get("layer_range")
    if (
        not isinstance(ends, list)
        or len(ends) != 2
        or not all(type(end) is int for end in ends)
        or not 0 <= ends[0] <= ends[1]
    ):
        raise ConfigError(f"{where}.layer_range", expected="[first, last + 1]", found=brief(ends))
    settings = settings_of(fields.get("parameters", {}), f"{where}.parameters")
    return _Source(
        model=text_of(fields, "model", where),
        first=ends[0],
        last=ends[1],
        parameters=settings,
        takes_part=fields.get(TAKES_PART) is not False,
    )


def settings_of(value: object, where: str) -> Settings:
    """Values, gradients and cases by parameter name.

    Raises:
        ConfigError: naming what is none of these.
    """
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(where, expected="settings by parameter name", found=brief(value))
    return {name: _setting(setting, f"{where}.{name}") for name, setting in value.items()}


def _setting(value: object, where: str) -> Setting:
    cases = [value] if isinstance(value, dict) else value
    if isinstance(cases, list) and all(isinstance(each, dict) for each in cases):
        return tuple(_case(each, where) for each in cases)
    return _value(value, where)


def _case(value: object, where: str) -> Case:
    fields = fields_of(value, ("filter", "value"), where)
    if not isinstance(fields.get("filter", ""), str):
        raise ConfigError(f"{where}.filter", expected="a part of tensor names", found=brief(fields["filter"]))
    return Case(value=_value(fields.get("value"), f"{where}.value"), filter=fields.get("filter"))


def _value(value: object, where: str) -> Scalar | Gradient:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list) and value and all(isinstance(each, (bool, int, float, str)) for each in value):
        return Gradient(tuple(value))
    raise ConfigError(
        where, expected="a value, a list of values, or cases of filter and value", found=brief(value)
    )


def fields_of(value: object, known: Sequence[str], where: str) -> dict[str, Any]:
    """What a mapping holds; null is as good as nothing."""
    if not isinstance(value, dict):
        raise ConfigError(
            where or "the configuration",
            expected=f"a mapping with keys among {', '.join(known)}",
            found=brief(value),
        )
    given = {key: item for key, item in value.items() if item is not None}
    for key, item in given.items():
        if key not in known:
            remedy = REMEDIES.get(key, "take it out")
            raise ConfigError(
                f"{where}.{key}" if where else f"{key}",
                expected=f"one of {', '.join(known)}",
                found=brief(item),
                remedy=remedy,
            )
    return given


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise ConfigError(where, expected="a list with at least one entry", found=brief(value))
    return value


def text_of(fields: Mapping[str, Any], key: str, where: str = "") -> str:
    """A name that must be there."""
    text = fields.get(key)
    if not isinstance(text, str) or not text:
        raise ConfigError(
            f"{where}.{key}" if where else key,
            expected="a name",
            found="none" if text is None else brief(text),
        )
    return text


def _arranged(layers: LayerRange, order: Sequence[int | None]) -> LayerRange:
    models = tuple({} if place is None else layers.models[place] for place in order)
    of_base = layers.base[1] if layers.base is not None else layers.first
    origins = tuple(of_base if place is None else layers.origin(place) for place in order)
    return replace(layers, models=models, origins=origins)


def _changed(
    layers: LayerRange, change: Callable[[Settings], Settings], of_all: Callable[[Settings], Settings]
) -> LayerRange:
    models = tuple(None if each is None else change(each) for each in layers.models)
    return replace(layers, parameters=of_all(layers.parameters), models=models)


def says(settings: Settings, name: str) -> bool:
    """Whether settings give a parameter for every tensor: cases may leave some out."""
    setting = settings.get(name, ())
    return not isinstance(setting, tuple) or any(case.matches("") for case in setting)
