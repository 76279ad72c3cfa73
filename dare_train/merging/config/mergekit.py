"""Reads mergekit's configurations, so that a file people have gives the merge they expect, or says why
not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError, brief
from ..methods.parameters import Case, Gradient, Parameter, Scalar, Setting, Settings
from ..models.token_rows import token_rows
from .foreign import Foreign
from .recipe import CHOICES, FLAVOUR, Recipe
from .result_dtype import result_dtype
from .slice_bases import bases_of, with_bases, with_own_bases
from .spelling import model_name, spelt_out
from .yaml_parts import (
    TOKENIZER,
    Inputs,
    fields_of,
    inputs_of,
    parsed,
    says,
    settings_of,
    text_of,
)

_NAMES = (
    "average task_arithmetic ties magnitude dare_linear dare_ties drop_only breadcrumbs "
    "breadcrumbs_ties della della_linear "
    "model_stock slerp nuslerp karcher sce fisher regmean consensus_ta consensus_ties "
    "nearswap arcee_fusion multislerp ram ramplus_tl tsv iso_c iso_cts wudi emr"
)

METHODS = {"linear": "average", **{name: name for name in _NAMES.split()}}
"""Names of methods in configurations, and ours."""

_BASE_MAY_BE_MISSING = {"average", "karcher", "nuslerp", "multislerp"}
_BASE_IS_NONE = {"average", "karcher"}
"""Where mergekit takes a base for a model like others, if slices list it."""
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

_KEYS = (
    "merge_method base_model models slices parameters dtype out_dtype tokenizer_source "
    "tokenizer rescale rounding seed flavour"
)
_DENSITY = Parameter(name="density")


def read(
    given: str | Path | dict[str, Any], *, strict: bool = False, seed: int = 0
) -> tuple[Recipe, list[str]]:
    """A recipe from a configuration for mergekit, or one that `Recipe.to_yaml` wrote. Both may have our own
    keys besides: `seed`, `rescale`, `rounding`, and those of `CHOICES`.

    Args:
        given: a file; YAML itself, as text of several lines, or in braces; or what it holds.
        strict: refuse what mergekit ignores, instead of leaving it out and saying so.
        seed: that of the masks, where the configuration says none.

    Returns:
        The recipe, and sentences that say what was left out, and where the result will differ from
        mergekit's, on purpose.

    Raises:
        ConfigError: the file cannot be read, or asks for something that this package does not do.
    """
    known = (*_KEYS.split(), *CHOICES)
    document, ignored = given if isinstance(given, dict) else parsed(given), list[str]()
    if not isinstance(document, dict) or "flavour" not in document:
        document, ignored = spelt_out(document, known, strict=strict)
    top = fields_of(document, known, "")
    if seed:
        top = _seeded(top, seed)
    if "flavour" not in top:
        recipe, notes = _translated(top, strict=strict)
        return recipe, [*ignored, *notes]
    if top["flavour"] != FLAVOUR:
        raise ConfigError(
            "flavour", expected=FLAVOUR, found=repr(top["flavour"]), remedy="leave it out for mergekit's own"
        )
    return _as_written(top), []


def _seeded(top: dict[str, Any], seed: int) -> dict[str, Any]:
    parameters = top.get("parameters")
    said = top.get("seed", parameters.get("seed") if isinstance(parameters, dict) else None)
    if said not in (None, seed):
        remedy = "leave --seed out, or the configuration's"
        raise ConfigError("seed", expected=f"one: {seed} is given", found=brief(said), remedy=remedy)
    return {**top, "seed": seed} if said is None else top


def _as_written(top: Mapping[str, Any]) -> Recipe:
    inputs = inputs_of(top)
    return Recipe(
        method=text_of(top, "merge_method"),
        base=text_of(top, "base_model"),
        models=inputs.models,
        layers=inputs.layers,
        parameters=settings_of(top.get("parameters", {}), "parameters"),
        rescale=top.get("rescale", "paper"),
        seed=top.get("seed", 0),
        out_dtype=result_dtype(top),
        rounding=top.get("rounding", "nearest"),
        **_vocabulary(top, text_of(top, "base_model")),
        **{name: top[name] for name in CHOICES if name in top},
    )


def _translated(top: Mapping[str, Any], *, strict: bool) -> tuple[Recipe, list[str]]:
    name = text_of(top, "merge_method")
    if name not in METHODS:
        raise ConfigError(
            "merge_method",
            expected=f"one of {', '.join(METHODS)}",
            found=repr(name),
            remedy="choose one of these",
        )
    method = METHODS[name]
    listed = inputs_of(top)
    bases = bases_of(top.get("slices"), top.get("base_model"))
    base_model = top.get("base_model", next(filter(None, bases), None))
    top = {**top, "base_model": base_model} if base_model is not None else top
    base = _base(top, method, listed)
    _check_names([each.model for each in listed.models])
    shared = dict(settings_of(top.get("parameters", {}), "parameters"))
    rescale = _only(top, shared, "rescale")
    seed = _only(top, shared, "seed")
    order: Sequence[int | None]
    if method not in _BASE_IS_NONE and {*bases} - {base_model}:
        is_slerp = method == "slerp"
        inputs = with_own_bases(listed, bases, merged_too=is_slerp, first=is_slerp)
        order = [[each.model for each in listed.models].index(each.model) for each in inputs.models]
    else:
        listed = with_bases(listed, base_model if len({*bases}) < 2 else None)
        order = _order(name, listed, base_model, shared)
        inputs = listed.arranged(order, base)
    given = {parameter for settings in (shared, *inputs.settings()) for parameter in settings}
    change = _spelling(method, given)
    foreign = Foreign(method)
    changed, in_common = inputs.changed(change), change(shared)
    if not strict:
        changed, in_common = foreign.out_of(changed), foreign.of_all(in_common)
    recipe = Recipe(
        method=method,
        base=base,
        models=changed.models,
        layers=changed.layers,
        parameters=_with_implied(method, base_model, changed, in_common),
        rescale=_rescale(rescale, method),
        seed=0 if seed is None else seed,
        out_dtype=result_dtype(top),
        rounding=top.get("rounding", "nearest"),
        **_vocabulary(top, base),
        **_choices(top, order, len(listed.models)),
    )
    return recipe, [*foreign.notes, *_notes(recipe, given, top.get("dtype", ""))]


def _notes(recipe: Recipe, given: set[str], dtype: str) -> Iterator[str]:
    computed = dtype.removeprefix("torch.")
    if computed in ("bfloat16", "float16"):
        yield (
            f"mergekit computes in {computed} and rounds after every step; here everything is "
            "float32 and rounded once"
        )
    elif computed == "float64":
        yield (
            "mergekit computes in float64; here in float32, except where the base is float64, "
            "and rounded once"
        )
    if recipe.rescale == "paper" and recipe.method in _RESCALED:
        yield (
            "mergekit rescales so that the L1 norm is kept; here by 1/(1 - p), as the papers "
            "do; rescale: norm gives mergekit's"
        )
    if recipe.method in _RANDOM:
        yield (
            f"masks come from a seed (seed: {recipe.seed}), not from a global generator: same "
            "file, same result"
        )
    if "int8_mask" in given:
        yield "int8_mask is ignored: it saves mergekit memory and changes no value"
    if recipe.method == "arcee_fusion":
        yield (
            "mergekit samples quartiles of large tensors at random and compares divergences in float32; here "
            "both are exact, in float64"
        )
    if recipe.method == "karcher" and "weight" in given:
        yield "mergekit's karcher ignores weight; here it counts"


# What mergekit's words mean.


def _base(top: Mapping[str, Any], method: str, inputs: Inputs) -> str:
    if "base_model" not in top and method in _BASE_MAY_BE_MISSING:
        return inputs.models[0].model
    return text_of(top, "base_model")


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            "models",
            expected="each model once",
            found=f"{twice[0]!r} again",
            remedy="give it the sum of its weights",
        )


def _order(name: str, inputs: Inputs, base: str | None, shared: Settings) -> list[int | None]:
    """Places of the models that are inputs; None is the base, where it is one without being listed."""
    names = [each.model for each in inputs.models]
    if base is None:
        return [*range(len(names))]
    others = [place for place, each in enumerate(names) if each != base]
    if METHODS[name] == "slerp":
        return [names.index(base) if base in names else None, *others]
    if METHODS[name] not in _BASE_IS_NONE:
        return [*others]
    # mergekit adds a base to `models`, not to `slices`; and `average` is no word of mergekit's.
    if base in names or inputs.layers or name == "average":
        return [*range(len(names))]
    if name == "linear" and "weight" not in shared:
        remedy = "list it with its weight, or take base_model out"
        raise ConfigError(
            "base_model",
            expected="one of the models: linear makes it an input",
            found=repr(base),
            remedy=remedy,
        )
    return [*range(len(names)), None]


def _with_implied(method: str, base: str | None, inputs: Inputs, shared: Settings) -> Settings:
    """What the models share, and with it what mergekit decides where a file says nothing, and this package
    otherwise.
    """
    of = ("of", "weights" if base is None else "deltas")
    implied = {**_IMPLIED, "nuslerp": of, "multislerp": of}
    if method not in implied:
        return shared
    name, value = implied[method]
    if inputs.say(name) or says(shared, name):
        return shared
    said = shared.get(name)
    return {**shared, name: (*said, Case(value=value)) if isinstance(said, tuple) and said else value}


def _choices(top: Mapping[str, Any], order: Sequence[int | None], listed: int) -> dict[str, Any]:
    """Files of statistics stand in the order of the models in the file, which is not always that of the
    inputs.
    """
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
    setting = shared.pop(name)
    if name in top:
        raise ConfigError(
            name, expected="one", found="one at the top and one among the parameters", remedy="take one out"
        )
    if isinstance(setting, (Gradient, tuple)):
        raise ConfigError(
            name, expected="one value for the merge", found="a gradient or cases", remedy="choose one value"
        )
    return setting


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
        raise ConfigError(
            "density", expected="density or p = 1 - density", found="both", remedy="say the same thing once"
        )

    def change(settings: Settings) -> Settings:
        kept = {name: setting for name, setting in settings.items() if name != "int8_mask"}
        return {
            renamed.get(name, name): _complement(setting) if name in renamed else setting
            for name, setting in kept.items()
        }

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


def _vocabulary(top: Mapping[str, Any], base: str) -> dict[str, Any]:
    """What is said of the result's tokenizer, as fields of a recipe."""
    if "tokenizer" in top and "tokenizer_source" in top:
        raise ConfigError(
            "tokenizer", expected="tokenizer or tokenizer_source", found="both", remedy="take one out"
        )
    said = fields_of(top["tokenizer"], TOKENIZER, "tokenizer") if "tokenizer" in top else {}
    source = model_name(said.get("source", "union" if "tokenizer" in top else top.get("tokenizer_source")))
    if source is None:
        return {}
    if not isinstance(source, str) or not source:
        raise ConfigError("tokenizer_source", expected="base, union or a model", found=repr(source))
    source = source.removeprefix("model:")
    return {
        "tokenizer": "base" if source == base else source,
        "tokens": token_rows(said.get("tokens", {}), "tokenizer.tokens"),
        "pad_to_multiple_of": said.get("pad_to_multiple_of"),
    }
