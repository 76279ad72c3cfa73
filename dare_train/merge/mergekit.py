"""Reads mergekit's configurations, so that a file people have gives the merge they expect, or says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .parameters import Case, Gradient, Parameter, Scalar, Setting, Settings
from .recipe import CHOICES, DTYPE_NAMES, FLAVOUR, LayerRange, Model, Recipe, Tokenizer

_NAMES = (
    "average task_arithmetic ties magnitude dare_linear dare_ties drop_only breadcrumbs breadcrumbs_ties della della_linear "
    "model_stock slerp nuslerp karcher sce fisher regmean consensus_ta consensus_ties"
)

METHODS = {"linear": "average", **{name: name for name in _NAMES.split()}}
"""Names of methods in configurations, and ours."""

_BASE_MAY_BE_MISSING = {"average", "karcher", "nuslerp"}
_DENSITY_BECOMES_P = {"dare_linear", "dare_ties", "drop_only"}
_RANDOM = {"dare_linear", "dare_ties", "drop_only", "della", "della_linear"}
_RESCALED = {"dare_linear", "dare_ties", "della", "della_linear"}
_TRIMMED = {"ties", "magnitude", "breadcrumbs", "breadcrumbs_ties", "consensus_ties"}
_NOT_RESCALED = _TRIMMED | {"task_arithmetic", "drop_only"}
_IMPLIED: dict[str, tuple[str, Scalar]] = {
    **dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"), ("density", 1.0)),
    **dict.fromkeys(("dare_linear", "dare_ties"), ("p", 0.0)),
}
"""What mergekit's methods keep where a file says nothing: everything."""

_KEYS = "merge_method base_model models slices parameters dtype out_dtype tokenizer_source tokenizer rescale seed flavour"
_WHOLE_MODELS = "merge whole models; mergekit's passthrough can move, repeat or leave out layers before or after"
_REMEDIES = {
    "modules": "list models; every part of a model is merged by the same method",
    "chat_template": "take it out; set the template in the result's tokenizer",
    "residual_weight": _WHOLE_MODELS,
    "base_model": "one base_model for the merge, outside slices",
    "tokens": "take it out; a token's embedding is merged like any other's",
    "pad_to_multiple_of": "take it out; resize the embeddings of the result",
}
_DENSITY = Parameter(name="density")


def read(path_or_text: str | Path) -> tuple[Recipe, list[str]]:
    """A recipe from a configuration for mergekit, or one that `Recipe.to_yaml` wrote. Both may have our own keys besides: `seed`,
    `rescale`, and those of `CHOICES`.

    Args:
        path_or_text: a file, or YAML itself: text of several lines, or in braces.

    Returns:
        The recipe, and sentences that say where the result will differ from mergekit's, on purpose.

    Raises:
        ConfigError: the file cannot be read, or asks for something that this package does not do.
    """
    top = _fields(_parsed(path_or_text), (*_KEYS.split(), *CHOICES), "")
    if "flavour" not in top:
        return _translated(top)
    if top["flavour"] != FLAVOUR:
        raise ConfigError("flavour", expected=FLAVOUR, found=repr(top["flavour"]), remedy="leave it out for mergekit's own")
    return _as_written(top), []


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The models that a configuration lists, and its slices."""

    models: tuple[Model, ...]
    layers: tuple[LayerRange, ...] = ()

    def arranged(self, order: Sequence[int | None], base: str) -> _Inputs:
        """The models at these places; None stands for the base, with no settings of its own."""
        models = tuple(Model(model=base) if place is None else self.models[place] for place in order)
        return _Inputs(models=models, layers=tuple(_arranged(each, order) for each in self.layers))

    def changed(self, change: Callable[[Settings], Settings]) -> _Inputs:
        """With every model's and slice's settings replaced."""
        models = tuple(Model(model=each.model, parameters=change(each.parameters)) for each in self.models)
        return _Inputs(models=models, layers=tuple(_changed(each, change) for each in self.layers))

    def settings(self) -> Iterator[Settings]:
        for model in self.models:
            yield model.parameters
        for layers in self.layers:
            yield layers.parameters
            yield from layers.models

    def say(self, parameter: str) -> bool:
        """Whether a parameter is given for every model and tensor, so that what they share does not count."""
        ranges = [[layers.parameters, *layers.models] for layers in self.layers] or [[{}, *(each.parameters for each in self.models)]]
        return all(_says(shared, parameter) or all(_says(each, parameter) for each in own) for shared, *own in ranges)


def _as_written(top: Mapping[str, Any]) -> Recipe:
    inputs = _inputs(top)
    return Recipe(
        method=_text(top, "merge_method"),
        base=_text(top, "base_model"),
        models=inputs.models,
        layers=inputs.layers,
        parameters=_settings(top.get("parameters", {}), "parameters"),
        rescale=top.get("rescale", "paper"),
        seed=top.get("seed", 0),
        out_dtype=_out_dtype(top),
        tokenizer=_tokenizer(top, _text(top, "base_model")),
        **{name: top[name] for name in CHOICES if name in top},
    )


def _translated(top: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    name = _text(top, "merge_method")
    if name not in METHODS:
        raise ConfigError("merge_method", expected=f"one of {', '.join(METHODS)}", found=repr(name), remedy="choose one of these")
    method, listed = METHODS[name], _inputs(top)
    base, base_model = _base(top, method, listed), top.get("base_model")
    _check_names(base_model, [each.model for each in listed.models])
    shared = dict(_settings(top.get("parameters", {}), "parameters"))
    rescale, seed = _only(top, shared, "rescale"), _only(top, shared, "seed")
    order = _order(name, listed, base_model, shared)
    inputs = listed.arranged(order, base)
    given = {parameter for settings in (shared, *inputs.settings()) for parameter in settings}
    change = _spelling(method, given)
    changed = inputs.changed(change)
    recipe = Recipe(
        method=method,
        base=base,
        models=changed.models,
        layers=changed.layers,
        parameters=_with_implied(method, base_model, changed, change(shared)),
        rescale=_rescale(rescale, method),
        seed=0 if seed is None else seed,
        out_dtype=_out_dtype(top),
        tokenizer=_tokenizer(top, base),
        **_choices(top, order, len(listed.models)),
    )
    return recipe, list(_notes(recipe, given, top.get("dtype", "")))


def _notes(recipe: Recipe, given: set[str], dtype: str) -> Iterator[str]:
    computed = dtype.removeprefix("torch.")
    if computed in ("bfloat16", "float16"):
        yield f"mergekit computes in {computed} and rounds after every step; here everything is float32 and rounded once"
    elif computed == "float64":
        yield "mergekit computes in float64; here in float32, except where the base is float64, and rounded once"
    if recipe.rescale == "paper" and recipe.method in _RESCALED:
        yield "mergekit rescales so that the L1 norm is kept; here by 1/(1 - p), as the papers do; rescale: norm gives mergekit's"
    if recipe.method in _RANDOM:
        yield f"masks come from a seed (seed: {recipe.seed}), not from a global generator: same file, same result"
    if "int8_mask" in given:
        yield "int8_mask is ignored: it saves mergekit memory and changes no value"
    if recipe.method == "karcher" and "weight" in given:
        yield "mergekit's karcher ignores weight; here it counts"


# What mergekit's words mean.


def _base(top: Mapping[str, Any], method: str, inputs: _Inputs) -> str:
    if "base_model" not in top and method in _BASE_MAY_BE_MISSING:
        return inputs.models[0].model
    return _text(top, "base_model")


def _check_names(base: str | None, names: Sequence[str]) -> None:
    """Refuses what mergekit takes for an adapter, or refuses itself."""
    for where, name in [("base_model", base or ""), *((f"models[{place}].model", name) for place, name in enumerate(names))]:
        if "+" in name:
            raise ConfigError(where, expected="one model", found=repr(name), remedy="pass the adapter's folder itself as a model")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError("models", expected="each model once", found=f"{twice[0]!r} again", remedy="give it the sum of its weights")


def _order(name: str, inputs: _Inputs, base: str | None, shared: Settings) -> list[int | None]:
    """Places of the models that are inputs; None is the base, where it is one without being listed."""
    names = [each.model for each in inputs.models]
    if base is None:
        return [*range(len(names))]
    others = [place for place, each in enumerate(names) if each != base]
    if METHODS[name] == "slerp":
        return [names.index(base) if base in names else None, *others]
    if METHODS[name] not in ("average", "karcher"):
        return [*others]
    # mergekit adds a base to `models`, not to `slices`; and `average` is no word of mergekit's.
    if base in names or inputs.layers or name == "average":
        return [*range(len(names))]
    if name == "linear" and "weight" not in shared:
        remedy = "list it with its weight, or take base_model out"
        raise ConfigError("base_model", expected="one of the models: linear makes it an input", found=repr(base), remedy=remedy)
    return [*range(len(names)), None]


def _with_implied(method: str, base: str | None, inputs: _Inputs, shared: Settings) -> Settings:
    """What the models share, and with it what mergekit decides where a file says nothing, and this package otherwise."""
    implied = {**_IMPLIED, "nuslerp": ("of", "weights" if base is None else "deltas")}
    if method not in implied:
        return shared
    name, value = implied[method]
    if inputs.say(name) or _says(shared, name):
        return shared
    said = shared.get(name)
    return {**shared, name: (*said, Case(value=value)) if isinstance(said, tuple) and said else value}


def _says(settings: Settings, name: str) -> bool:
    """Whether settings give a parameter for every tensor: cases may leave some out."""
    setting = settings.get(name, ())
    return not isinstance(setting, tuple) or any(case.matches("") for case in setting)


def _choices(top: Mapping[str, Any], order: Sequence[int | None], listed: int) -> dict[str, Any]:
    """Files of statistics stand in the order of the models in the file, which is not always that of the inputs."""
    chosen = {name: top[name] for name in CHOICES if name in top}
    for name in ("fisher", "gram"):
        files = chosen.get(name)
        if isinstance(files, list) and len(files) == listed and None not in order:
            chosen[name] = [files[place] for place in order if place is not None]
    return chosen


def _only(top: Mapping[str, Any], shared: dict[str, Setting], name: str) -> Any:
    """A value that the whole merge has once: taken from the top or from the parameters."""
    if name not in shared:
        return top.get(name)
    found = shared.pop(name)
    if name in top:
        raise ConfigError(name, expected="one", found="one at the top and one among the parameters", remedy="take one out")
    if isinstance(found, (Gradient, tuple)):
        raise ConfigError(name, expected="one value for the merge", found="a gradient or cases", remedy="choose one value")
    return found


def _rescale(given: object, method: str) -> str:
    if given is None:
        return "none" if method in _NOT_RESCALED else "paper"
    if isinstance(given, str):
        return given
    if given in (0, 1):
        return ("norm" if method in _TRIMMED else "paper") if given else "none"
    raise ConfigError("rescale", expected="true, false, or the name of a rule", found=repr(given))


def _spelling(method: str, given: set[str]) -> Callable[[Settings], Settings]:
    """Turns mergekit's settings into ours."""
    renamed = {"density": "p"} if method in _DENSITY_BECOMES_P else {}
    if renamed and {"density", "p"} <= given:
        raise ConfigError("density", expected="density or p = 1 - density", found="both", remedy="say the same thing once")

    def change(settings: Settings) -> Settings:
        kept = {name: setting for name, setting in settings.items() if name != "int8_mask"}
        return {renamed.get(name, name): _complement(setting) if name in renamed else setting for name, setting in kept.items()}

    return change


def _complement(setting: Setting) -> Setting:
    """1 - d for every density d in it, without the dust of binary fractions: 1 - 0.9 is 0.1."""
    if isinstance(setting, tuple):
        return tuple(Case(value=_complement_of_value(case.value), filter=case.filter) for case in setting)
    return _complement_of_value(setting)


def _complement_of_value(value: Scalar | Gradient) -> Scalar | Gradient:
    if isinstance(value, Gradient):
        return Gradient(tuple(_complement_of_scalar(each) for each in value.values))
    return _complement_of_scalar(value)


def _complement_of_scalar(value: Scalar) -> float:
    return round(1 - float(_DENSITY.convert(value, "density")), 12)


def _out_dtype(top: Mapping[str, Any]) -> str | None:
    codes = {name: code for code, name in DTYPE_NAMES.items()}
    for key in ("dtype", "out_dtype"):
        if key in top and _text(top, key).removeprefix("torch.") not in codes:
            raise ConfigError(key, expected=f"one of {', '.join(codes)}", found=repr(top[key]), remedy="without it the base's is kept")
    found = top.get("out_dtype", top.get("dtype"))
    return None if found is None else codes[found.removeprefix("torch.")]


def _tokenizer(top: Mapping[str, Any], base: str) -> Tokenizer | None:
    if "tokenizer" in top and "tokenizer_source" in top:
        raise ConfigError("tokenizer", expected="tokenizer or tokenizer_source", found="both", remedy="take one out")
    source = top.get("tokenizer_source")
    if "tokenizer" in top:
        source = _fields(top["tokenizer"], ("source",), "tokenizer").get("source", "union")
    if source is None or source == "union":
        return source
    if source not in ("base", base):
        remedy = "choose one of these, or put that model's tokenizer into the result afterwards"
        raise ConfigError("tokenizer_source", expected="base or union", found=repr(source), remedy=remedy)
    return "base"


# From YAML to the recipe's parts.


def _parsed(path_or_text: str | Path) -> object:
    import yaml

    text = _text_of(path_or_text)
    try:
        return yaml.safe_load(text)
    # Dates and numbers that YAML's grammar takes for such raise ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}" if mark is not None else "the configuration"
        raise ConfigError(where, expected="YAML", found=problem or f"{error}") from error


def _text_of(path_or_text: str | Path) -> str:
    if isinstance(path_or_text, str) and ("\n" in path_or_text or path_or_text.lstrip().startswith("{")):
        return path_or_text
    try:
        return Path(path_or_text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path_or_text}", expected="a file of YAML text", found=f"{error}") from error


def _inputs(top: Mapping[str, Any]) -> _Inputs:
    if ("models" in top) == ("slices" in top):
        found = "both" if "models" in top else "neither"
        raise ConfigError("models", expected="either models or slices", found=found, remedy="list what is to be merged")
    return _sliced(top["slices"]) if "slices" in top else _Inputs(models=tuple(_models(top["models"])))


def _models(value: object) -> Iterator[Model]:
    for place, each in enumerate(_list(value, "models")):
        where = f"models[{place}]"
        fields = _fields(each, ("model", "parameters"), where)
        yield Model(model=_text(fields, "model", where), parameters=_settings(fields.get("parameters", {}), f"{where}.parameters"))


def _sliced(value: object) -> _Inputs:
    names: list[str] = []
    layers: list[LayerRange] = []
    for place, each in enumerate(_list(value, "slices")):
        where = f"slices[{place}]"
        fields = _fields(each, ("sources", "parameters"), where)
        sources = _sources(fields.get("sources"), f"{where}.sources", layers[-1].last if layers else 0)
        found = [source.model for source in sources]
        names = names or found
        if found != names:
            raise ConfigError(f"{where}.sources", expected=f"the models {names}", found=f"{found}", remedy=_WHOLE_MODELS)
        shared, own = _settings(fields.get("parameters", {}), f"{where}.parameters"), tuple(source.parameters for source in sources)
        layers.append(LayerRange(first=sources[0].first, last=sources[0].last, parameters=shared, models=own))
    return _Inputs(models=tuple(Model(model=name) for name in names), layers=tuple(layers))


@dataclass(frozen=True, kw_only=True)
class _Source:
    model: str
    first: int
    last: int
    parameters: Settings


def _sources(value: object, where: str, first: int) -> list[_Source]:
    """One slice's sources, which must all be the layers that come next in the result, from `first`."""
    sources = [_source(each, f"{where}[{place}]") for place, each in enumerate(_list(value, where))]
    for place, each in enumerate(sources):
        if each.first != first or each.last != sources[0].last:
            expected = f"[{first}, {sources[0].last if sources[0].first == first else '...'}], the layers' place in the result"
            found = f"[{each.first}, {each.last}]"
            raise ConfigError(f"{where}[{place}].layer_range", expected=expected, found=found, remedy=_WHOLE_MODELS)
    return sources


def _source(value: object, where: str) -> _Source:
    fields = _fields(value, ("model", "layer_range", "parameters"), where)
    found = fields.get("layer_range")
    if not isinstance(found, list) or len(found) != 2 or not all(type(end) is int for end in found) or not 0 <= found[0] < found[1]:
        raise ConfigError(f"{where}.layer_range", expected="[first, last + 1]", found=repr(found))
    settings = _settings(fields.get("parameters", {}), f"{where}.parameters")
    return _Source(model=_text(fields, "model", where), first=found[0], last=found[1], parameters=settings)


def _settings(value: object, where: str) -> Settings:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(where, expected="settings by parameter name", found=repr(value))
    return {name: _setting(setting, f"{where}.{name}") for name, setting in value.items()}


def _setting(value: object, where: str) -> Setting:
    cases = [value] if isinstance(value, dict) else value
    if isinstance(cases, list) and all(isinstance(each, dict) for each in cases):
        return tuple(_case(each, where) for each in cases)
    return _value(value, where)


def _case(value: object, where: str) -> Case:
    fields = _fields(value, ("filter", "value"), where)
    if not isinstance(fields.get("filter", ""), str):
        raise ConfigError(f"{where}.filter", expected="a part of tensor names", found=repr(fields["filter"]))
    return Case(value=_value(fields.get("value"), f"{where}.value"), filter=fields.get("filter"))


def _value(value: object, where: str) -> Scalar | Gradient:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list) and value and all(isinstance(each, (bool, int, float, str)) for each in value):
        return Gradient(tuple(value))
    raise ConfigError(where, expected="a value, a list of values, or cases of filter and value", found=repr(value))


def _fields(value: object, known: Sequence[str], where: str) -> dict[str, Any]:
    """What a mapping holds; null is as good as nothing."""
    if not isinstance(value, dict):
        raise ConfigError(where or "the configuration", expected=f"a mapping with keys among {', '.join(known)}", found=repr(value))
    given = {key: item for key, item in value.items() if item is not None}
    for key, item in given.items():
        if key not in known:
            remedy = _REMEDIES.get(key, "take it out")
            raise ConfigError(
                f"{where}.{key}" if where else f"{key}", expected=f"one of {', '.join(known)}", found=repr(item), remedy=remedy
            )
    return given


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise ConfigError(where, expected="a list with at least one entry", found=repr(value))
    return value


def _text(fields: Mapping[str, Any], key: str, where: str = "") -> str:
    found = fields.get(key)
    if not isinstance(found, str) or not found:
        raise ConfigError(f"{where}.{key}" if where else key, expected="a name", found="none" if found is None else repr(found))
    return found


def _arranged(layers: LayerRange, order: Sequence[int | None]) -> LayerRange:
    return replace(layers, models=tuple({} if place is None else layers.models[place] for place in order))


def _changed(layers: LayerRange, change: Callable[[Settings], Settings]) -> LayerRange:
    return replace(layers, parameters=change(layers.parameters), models=tuple(change(each) for each in layers.models))
