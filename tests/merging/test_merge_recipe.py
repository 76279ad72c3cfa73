"""Recipes: what they refuse, which setting counts where, and the form they are kept in."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dare_train.errors import ConfigError
from dare_train.merging.config import mergekit
from dare_train.merging.config.recipe import Recipe
from dare_train.merging.config.recipe_parts import LayerRange, Model
from dare_train.merging.methods.parameters import Case, Gradient, Parameter
from dare_train.merging.models.layers import layer_counts, layer_of

WEIGHT = Parameter(name="weight", default=1.0, per_model=True)
T = Parameter(name="t")
NORMALIZE = Parameter(name="normalize", kind=bool, default=True)
STEPS = Parameter(name="steps", kind=int, default=10)
OF = Parameter(name="of", kind=str, default="deltas")

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def q(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def up(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


def recipe(**changes: Any) -> Recipe:
    return Recipe(
        **{"method": "ties", "base": "base", "models": (Model(model="a"), Model(model="b")), **changes}
    )


def two_ranges(**changes: Any) -> Recipe:
    first = LayerRange(first=0, last=2, parameters={"t": 0.1}, models=({"weight": 0.2}, {}))
    second = LayerRange(first=2, last=7, parameters={"t": 0.3}, models=({}, {"weight": 0.4}))
    return recipe(**{"layers": (first, second), **changes})


def cases(*pairs: tuple[str | None, Any]) -> tuple[Case, ...]:
    return tuple(Case(filter=name, value=value) for name, value in pairs)


# What a recipe refuses.

_BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": ""}, "method: expected a name, found ''"),
    ({"method": None}, "method: expected a name, found None"),
    ({"base": ""}, "base: expected a name"),
    ({"models": ()}, "models: expected at least one besides the base, found none"),
    ({"models": ("a",)}, "models: expected Model objects, found ('a',)"),
    ({"models": "a"}, "models: expected a tuple, found 'a'"),
    ({"layers": ({},)}, "layers: expected LayerRange objects"),
    ({"parameters": [1]}, "parameters: expected settings by parameter name, found [1]"),
    ({"parameters": {1: 2}}, "parameters: expected settings by parameter name"),
    (
        {"parameters": {"t": [0, 1]}},
        "t: expected a finite number, true, false, a text, a gradient or cases, found [0, 1]",
    ),
    ({"parameters": {"t": None}}, "t: expected a finite number"),
    ({"parameters": {"t": math.nan}}, "t: expected a finite number"),
    ({"parameters": {"t": math.inf}}, "t: expected a finite number"),
    ({"parameters": {"t": 10**400}}, "t: expected a finite number"),
    ({"parameters": {"t": Gradient(())}}, "t: expected at least one value, found an empty gradient"),
    ({"parameters": {"t": Gradient((0, None))}}, "t: expected a finite number"),
    ({"parameters": {"t": (0, 1)}}, "t: expected cases, found 0; a gradient over layers is a Gradient"),
    (
        {"parameters": {"t": (Case(value=1, filter=5),)}},
        "filter of t: expected a part of tensor names, found 5",
    ),  # type: ignore[arg-type]
    ({"parameters": {"t": (Case(value=(Case(value=1),)),)}}, "t: expected a finite number"),  # type: ignore[arg-type]
    (
        {"parameters": {"rescale": "norm"}},
        "rescale: expected one value for the merge; set the recipe's rescale",
    ),
    (
        {"models": (Model(model="a", parameters={"seed": 1}),)},
        "seed of 'a': expected one value for the merge; set the recipe's seed",
    ),
    ({"rescale": "l1"}, "rescale: expected one of paper, norm, q, none, found 'l1'"),
    ({"rescale": True}, "rescale: expected one of"),
    ({"seed": -1}, "seed: expected an integer in [0, 2**64), found -1"),
    ({"seed": 2**64}, "seed"),
    ({"seed": True}, "seed"),
    ({"seed": 0.0}, "seed"),
    ({"out_dtype": "bfloat16"}, "out_dtype: expected one of F64, F32, F16, BF16, found 'bfloat16'"),
    ({"tokenizer": ""}, "tokenizer: expected a name, found ''"),
    ({"exclude": None}, "exclude: expected a list of name patterns, found None"),
    ({"exclude": ("*.bias", 5)}, "exclude: expected a list of name patterns, found ('*.bias', 5)"),
    ({"exclude": ""}, "exclude: expected a list of name patterns, found ('',)"),
    ({"exclude": {"*": "a"}}, "exclude: expected a list of name patterns, found {'*': 'a'}"),
    ({"take": {"*.bias": "c"}}, "take['*.bias']: expected one of a, b, found 'c'"),
    (
        {"take": {"*.bias": "base"}},
        "take['*.bias']: expected one of a, b, found 'base'; exclude keeps tensors of the base",
    ),
    ({"take": {"*.bias": 0}}, "take: expected models by name pattern, found {'*.bias': 0}"),
    ({"take": {"": "a"}}, "take: expected models by name pattern, found {'': 'a'}"),
    ({"take": ("*.bias",)}, "take: expected models by name pattern, found ('*.bias',)"),
    ({"take": None}, "take: expected models by name pattern, found None"),
    ({"rename": {"": "x"}}, "rename: expected new parts of names by old, found {'': 'x'}"),
    ({"rename": {"x": None}}, "rename: expected new parts of names by old, found {'x': None}"),
    ({"rename": "x"}, "rename: expected new parts of names by old, found 'x'"),
    ({"cast_base": 1}, "cast_base: expected true or false, found 1"),
    ({"cast_base": None}, "cast_base: expected true or false, found None"),
    ({"fisher": "a"}, "fisher: expected a list of files, found 'a'"),
    ({"fisher": ("a", "")}, "fisher: expected a list of files, found ('a', '')"),
    ({"fisher": ("a",)}, "fisher: expected a file for each of a, b, found 1"),
    ({"gram": ("a", None)}, "gram: expected a list of files, found ('a', None)"),
    ({"gram": ("a", "b", "c")}, "gram: expected a file for each of a, b, found 3"),
]


@pytest.mark.parametrize(("changes", "text"), _BAD, ids=[text[:50] for _, text in _BAD])
def test_a_recipe_refuses_what_is_wrong(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        recipe(**changes)


@pytest.mark.parametrize("name", ["", None, 5])
def test_a_model_has_a_name(name: Any) -> None:
    with pytest.raises(ConfigError, match="model: expected a name"):
        Model(model=name)


def test_a_wrong_setting_of_a_model_is_named() -> None:
    with pytest.raises(ConfigError, match="weight of 'a': expected a finite number"):
        Model(model="a", parameters={"weight": [1]})  # type: ignore[dict-item]


@pytest.mark.parametrize(("first", "last"), [(2, 1), (-1, 1), (0, True), (0.0, 1), (0, None)])
def test_a_range_of_layers_is_one(first: Any, last: Any) -> None:
    with pytest.raises(ConfigError, match="layers: expected first <= last, both at least 0"):
        LayerRange(first=first, last=last, models=({}, {}))


@pytest.mark.parametrize(
    ("starts", "text"),
    [
        ([(1, 2)], "layers: expected a range that begins with layer 0, found layers 1 to 1"),
        ([(0, 2), (1, 3)], "layers: expected a range that begins with layer 2, found layers 1 to 2"),
        (
            [(0, 2), (3, 4)],
            "layers: expected a range that begins with layer 2, found layers 3 to 3; ranges "
            "follow one another",
        ),
    ],
)
def test_ranges_neither_overlap_nor_leave_layers_out(starts: list[tuple[int, int]], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        recipe(layers=tuple(LayerRange(first=first, last=last, models=({}, {})) for first, last in starts))


def test_a_range_has_settings_for_each_model() -> None:
    with pytest.raises(ConfigError, match="layers 0 to 1: expected settings for each of 2 models, found 1"):
        recipe(layers=(LayerRange(first=0, last=2, models=({},)),))


def test_numbers_become_pythons_own_and_lists_tuples() -> None:
    made = recipe(
        models=[
            Model(
                model="a",
                parameters={"weight": np.float32(0.5), "n": np.int64(3), "g": Gradient((np.float64(1),))},
            )
        ]
    )
    assert made == recipe(
        models=(Model(model="a", parameters={"weight": 0.5, "n": 3, "g": Gradient((1.0,))}),)
    )
    assert type(made.models[0].parameters["n"]) is int


def test_a_recipe_does_not_change_when_the_callers_settings_do() -> None:
    settings: dict[str, Any] = {"weight": 1.0}
    made = recipe(parameters=settings)
    settings["weight"] = 2.0
    assert made.parameters == {"weight": 1.0}


def test_choices_by_name_are_copied_too() -> None:
    take, rename = {"*": "a"}, {"old": "new"}
    made = recipe(take=take, rename=rename, exclude=["x"], fisher=["1", "2"])
    take["*"], rename["old"] = "b", ""
    assert (made.take, made.rename, made.exclude, made.fisher) == (
        {"*": "a"},
        {"old": "new"},
        ("x",),
        ("1", "2"),
    )


def test_patterns_may_be_one_text_or_a_set() -> None:
    assert recipe(exclude="*.bias").exclude == ("*.bias",)
    assert recipe(exclude={"c", "a", "b"}).exclude == ("a", "b", "c")


# Layers, by name.


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        (q(31), ("model.layers", 31)),
        ("model.layers.3.block_sparse_moe.experts.5.w1.weight", ("model.layers", 3)),
        ("h.0.attn.c_attn.weight", ("h", 0)),
        ("transformer.h.11.ln_1.bias", ("transformer.h", 11)),
        ("bert.encoder.layer.2.output.dense.weight", ("bert.encoder.layer", 2)),
        ("encoder.block.4.layer.1.DenseReluDense.wi.weight", ("encoder.block", 4)),
        ("visual.blocks.7.attn.qkv.weight", ("visual.blocks", 7)),
        ("visual.transformer.resblocks.7.ln_1.weight", ("visual.transformer.resblocks", 7)),
        ("blocks.7", ("blocks", 7)),
        (EMBEDDING, None),
        ("classifier.0.weight", None),
        ("experts.3.weight", None),
        ("model.players.3.weight", None),
        ("model.layers.3b.weight", None),
        ("model.layers.weight", None),
        ("model.layers.99999999999999999999.weight", None),
        ("", None),
    ],
)
def test_the_layer_of_a_tensor(tensor: str, place: tuple[str, int] | None) -> None:
    assert layer_of(tensor) == place


def test_layers_are_counted_by_stack() -> None:
    names = [EMBEDDING, q(0), up(0), q(3), "visual.blocks.1.w", "visual.merger.mlp.0.weight"]
    assert layer_counts(names) == {"model.layers": 4, "visual.blocks": 2}
    assert layer_counts([]) == {}


# Which value counts.


def test_the_default_counts_where_nothing_is_said() -> None:
    assert recipe().resolver(4).value(WEIGHT, q(0), 1) == 1.0


def test_a_required_parameter_must_be_given() -> None:
    text = "t for model.norm.weight: expected a value: ties needs one, found none; add it to the parameters"
    with pytest.raises(ConfigError, match=text):
        recipe().resolver(4).value(T, NORM)


def test_a_required_parameter_of_a_model_is_named_with_it() -> None:
    with pytest.raises(ConfigError, match=r"density of 'b' for model.norm.weight: expected a value"):
        recipe().resolver(4).value(Parameter(name="density", per_model=True), NORM, 1)


def test_a_models_value_counts_before_the_recipes() -> None:
    models = (Model(model="a", parameters={"weight": 0.25}), Model(model="b"))
    values = recipe(models=models, parameters={"weight": 0.75}).resolver(4)
    assert [values.value(WEIGHT, q(0), model) for model in (0, 1)] == [0.25, 0.75]


def test_settings_of_models_do_not_reach_what_the_merge_has_once() -> None:
    models = (Model(model="a", parameters={"t": 0.25}), Model(model="b"))
    assert recipe(models=models, parameters={"t": 0.5}).resolver(4).value(T, q(0), 0) == 0.5


@pytest.mark.parametrize("given", range(5))
def test_the_order_of_precedence(given: int) -> None:
    """Each level counts when those above it say nothing."""
    said: list[dict[str, Any]] = [{"weight": 10.0 + level} if level >= given else {} for level in range(4)]
    layers = (LayerRange(first=0, last=4, parameters=said[2], models=(said[0], {})),)
    made = recipe(
        models=(Model(model="a", parameters=said[1]), Model(model="b")), layers=layers, parameters=said[3]
    )
    assert made.resolver(4).value(WEIGHT, q(1), 0) == (10.0 + given if given < 4 else 1.0)


def test_cases_that_do_not_match_leave_the_word_to_the_next_level() -> None:
    models = (Model(model="a", parameters={"weight": cases(("mlp", 0.1))}), Model(model="b"))
    values = recipe(models=models, parameters={"weight": cases(("self_attn", 0.2))}).resolver(4)
    assert [values.value(WEIGHT, name, 0) for name in (up(0), q(0), NORM)] == [0.1, 0.2, 1.0]
    assert [values.value(WEIGHT, name, 1) for name in (up(0), q(0), NORM)] == [1.0, 0.2, 1.0]


def test_no_cases_at_all_say_nothing() -> None:
    assert recipe(parameters={"weight": ()}).resolver(4).value(WEIGHT, q(0), 0) == 1.0


@pytest.mark.parametrize("everything", [None, "*", ""])
def test_of_several_cases_the_first_that_matches_counts(everything: str | None) -> None:
    values = recipe(
        parameters={"t": cases(("q_proj", 0.1), ("self_attn", 0.2), (everything, 0.3), ("mlp", 0.4))}
    ).resolver(4)
    assert [values.value(T, name) for name in (q(2), q(2).replace("q_", "k_"), up(2), HEAD)] == [
        0.1,
        0.2,
        0.3,
        0.3,
    ]


# Gradients: expected numbers by hand.


def test_a_gradient_over_the_model() -> None:
    values = recipe(parameters={"t": Gradient((0, 0.5, 0.3, 0.7, 1))}).resolver(9)
    found = [values.value(T, q(layer)) for layer in range(9)]
    assert found == pytest.approx([0, 0.25, 0.5, 0.4, 0.3, 0.5, 0.7, 0.85, 1], abs=1e-15)


def test_a_gradient_between_layers_that_do_not_divide_it() -> None:
    values = recipe(parameters={"weight": Gradient((1, 0.7, 0.1))}).resolver(32)
    # Layer 10 of 32 lies at 10/31 · 2 = 0.645161..., so 1 - 0.3 · 0.645161; layer 20 at 1.290322..., so 0.7 -
    # 0.6 · 0.290322.
    expected = {0: 1.0, 10: 0.8064516129032258, 20: 0.5258064516129032, 31: 0.1}
    assert {layer: values.value(WEIGHT, up(layer), 0) for layer in expected} == pytest.approx(
        expected, abs=1e-15
    )


@pytest.mark.parametrize("tensor", [EMBEDDING, NORM, HEAD])
def test_outside_layers_a_gradient_has_its_first_value(tensor: str) -> None:
    assert recipe(parameters={"t": Gradient((0.25, 0.75))}).resolver(4).value(T, tensor) == 0.25


def test_a_single_layer_has_a_gradients_last_value() -> None:
    assert recipe(parameters={"t": Gradient((0.25, 0.75))}).resolver(1).value(T, q(0)) == 0.75


def test_a_gradient_of_one_value_is_that_value() -> None:
    assert recipe(parameters={"t": Gradient((0.25,))}).resolver(2).value(T, q(1)) == 0.25


def test_a_gradient_within_a_case() -> None:
    values = recipe(parameters={"t": cases(("mlp", Gradient((1, 0))), (None, 0.5))}).resolver(5)
    assert [values.value(T, up(layer)) for layer in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert values.value(T, q(1)) == 0.5


def test_text_in_a_gradient_of_numbers_is_a_number() -> None:
    values = recipe(parameters={"t": Gradient(("1e-3", "3e-3"))}).resolver(3)
    assert values.value(T, q(1)) == pytest.approx(2e-3)


def test_choices_in_a_gradient_are_chosen() -> None:
    """Between 0 and 1 the first of two counts; only the last layer has the second."""
    values = recipe(
        parameters={"normalize": Gradient((True, False)), "of": Gradient(("deltas", "weights", "deltas"))}
    ).resolver(5)
    assert [values.value(NORMALIZE, q(layer)) for layer in range(5)] == [True, True, True, True, False]
    assert [values.value(OF, q(layer)) for layer in range(5)] == [
        "deltas",
        "deltas",
        "weights",
        "weights",
        "deltas",
    ]


def test_integers_in_a_gradient_must_stay_integers() -> None:
    values = recipe(parameters={"steps": Gradient((2, 4))}).resolver(5)
    assert [values.value(STEPS, q(layer)) for layer in (0, 2, 4)] == [2, 3, 4]
    with pytest.raises(ConfigError, match=r"steps for model.layers.1.*: expected an integer, found 2.5"):
        values.value(STEPS, q(1))


# Ranges of layers.


def test_each_range_has_its_own_settings() -> None:
    values = two_ranges(parameters={"weight": 0.9}).resolver(7)
    assert [values.value(T, q(layer)) for layer in (0, 1, 2, 6)] == [0.1, 0.1, 0.3, 0.3]
    assert [values.value(WEIGHT, q(layer), 0) for layer in (1, 2)] == [0.2, 0.9]
    assert [values.value(WEIGHT, q(layer), 1) for layer in (1, 2)] == [0.9, 0.4]


def test_a_gradient_runs_through_each_range_again() -> None:
    values = two_ranges(parameters={"weight": Gradient((0, 1))}).resolver(7)
    assert [values.value(WEIGHT, q(layer), 1) for layer in (0, 1)] == [0, 1]
    assert [values.value(WEIGHT, q(layer), 0) for layer in range(2, 7)] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(
    "tensor",
    [EMBEDDING, "transformer.wte.weight", "wpe.weight", "bert.embeddings.LayerNorm.weight", "shared.weight"],
)
def test_what_comes_before_the_layers_belongs_to_the_first_range(tensor: str) -> None:
    assert two_ranges().resolver(7).value(T, tensor) == 0.1


@pytest.mark.parametrize(
    "tensor", [NORM, HEAD, "embed_out.weight", "transformer.ln_f.bias", "score.weight", "pooler.dense.weight"]
)
def test_what_comes_after_the_layers_belongs_to_the_last_range(tensor: str) -> None:
    assert two_ranges().resolver(7).value(T, tensor) == 0.3


@pytest.mark.parametrize("count", [6, 8])
def test_ranges_must_be_the_layers_of_the_model(count: int) -> None:
    with pytest.raises(
        ConfigError,
        match=f"layers: expected the model's {count} layers, found ranges that end before layer 7",
    ):
        two_ranges().resolver(count)


def test_ranges_need_one_stack() -> None:
    assert two_ranges().resolver({"model.layers": 7}).value(T, q(6)) == 0.3
    with pytest.raises(ConfigError, match="layers: expected one stack of layers, found 2 in the model"):
        two_ranges().resolver({"model.layers": 7, "visual.blocks": 3})


def test_every_stack_has_its_own_gradient() -> None:
    values = recipe(parameters={"t": Gradient((0, 1))}).resolver({"model.layers": 5, "visual.blocks": 3})
    assert [values.value(T, name) for name in (q(1), "visual.blocks.1.w")] == [0.25, 0.5]


@pytest.mark.parametrize("layers", [2, {"model.layers": 2}, {"other": 9}])
def test_a_layer_that_was_not_counted_is_an_error(layers: Any) -> None:
    with pytest.raises(ConfigError, match=r"model.layers.2.*: expected a layer below [02], found layer 2"):
        recipe(parameters={"t": 1}).resolver(layers).value(T, q(2))


# Kinds.


@pytest.mark.parametrize(
    ("parameter", "given", "value"),
    [
        (T, 1, 1.0),
        (T, "1e-3", 0.001),
        (T, "-2", -2.0),
        (STEPS, "5", 5),
        (STEPS, 5.0, 5),
        (NORMALIZE, 0, False),
        (NORMALIZE, 1.0, True),
        (NORMALIZE, "false", False),
        (NORMALIZE, "True", True),
        (OF, "weights", "weights"),
    ],
)
def test_values_become_of_their_kind(parameter: Parameter, given: Any, value: Any) -> None:
    found = recipe(parameters={parameter.name: given}).resolver(1).value(parameter, NORM)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("parameter", "given", "text"),
    [
        (T, True, "t for model.norm.weight: expected a finite number, found True"),
        (T, "half", "expected a finite number, found 'half'"),
        (T, "nan", "expected a finite number, found 'nan'"),
        (T, "", "expected a finite number, found ''"),
        (T, Gradient((0, False)), "expected a finite number, found False"),
        (STEPS, 2.5, "expected an integer, found 2.5"),
        (STEPS, True, "expected an integer, found True"),
        (STEPS, "many", "expected an integer, found 'many'"),
        (NORMALIZE, 2, "expected true or false, found 2"),
        (NORMALIZE, "maybe", "expected true or false, found 'maybe'"),
        (OF, 1, "expected a text, found 1"),
    ],
)
def test_a_value_of_another_kind_is_refused(parameter: Parameter, given: Any, text: str) -> None:
    made = recipe(parameters={parameter.name: given})
    with pytest.raises(ConfigError, match=text):
        made.resolver(1).value(parameter, NORM)
    with pytest.raises(ConfigError, match=text.split(": ")[-1]):
        made.check_parameters([parameter])


def test_a_wrong_value_is_named_with_its_model() -> None:
    made = recipe(models=(Model(model="a"), Model(model="org/b", parameters={"weight": True})))
    with pytest.raises(
        ConfigError, match=r"weight of 'org/b' for model.norm.weight: expected a finite number, found True"
    ):
        made.resolver(1).value(WEIGHT, NORM, 1)


# Names of parameters.


def test_unknown_parameters_are_found_at_every_level() -> None:
    layers = (LayerRange(first=0, last=1, parameters={"c": 1}, models=({"d": 1}, {"weight": 1})),)
    made = recipe(
        models=(Model(model="a", parameters={"b": 1}), Model(model="b")),
        parameters={"a": 1, "t": 1},
        layers=layers,
    )
    assert made.unknown_parameters({"t", "weight"}) == ["a", "b", "c", "d"]
    assert made.unknown_parameters(["a", "b", "c", "d", "t", "weight"]) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"parameters": {"wieght": 1}}, "wieght: expected a parameter of ties: t, weight; take it out"),
        ({"models": (Model(model="a", parameters={"x": 1}),)}, "x of 'a': expected a parameter of ties"),
        (
            {"layers": (LayerRange(first=0, last=2, parameters={"x": 1}, models=({}, {})),)},
            "x in layers 0 to 1: expected a parameter",
        ),
        (
            {"layers": (LayerRange(first=0, last=2, models=({}, {"x": 1})),)},
            "x of 'b' in layers 0 to 1: expected a parameter",
        ),
        (
            {"models": (Model(model="a", parameters={"t": 1}),)},
            "t of 'a': expected one value for all models; move it to the recipe's",
        ),
        (
            {"models": (Model(model="a", parameters={"weight": cases(("x", "y"))}),)},
            "weight of 'a': expected a finite number, found 'y'",
        ),
    ],
)
def test_parameters_that_the_method_would_not_see_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        recipe(**changes).check_parameters([T, WEIGHT])


def test_parameters_that_fit_are_accepted() -> None:
    two_ranges(parameters={"weight": cases(("mlp", Gradient((0, "1e-3"))), (None, 1))}).check_parameters(
        [T, WEIGHT]
    )


# The form it is kept in.

_RICH = recipe(
    method="dare_ties",
    base="org/base@main",
    models=(
        Model(
            model="./a b",
            parameters={
                "weight": Gradient((0, 0.5, 1)),
                "p": cases(("mlp", 0.1), (None, Gradient((1e-05, 1e20)))),
            },
        ),
        Model(model="+x: #é'\"", parameters={"weight": "1e-3", "note": "true", "empty": ()}),
        Model(model="org/base@main"),
        Model(model="org/base@main"),
    ),
    parameters={"normalize": False, "lambda": 1.0, "steps": 3},
    rescale="norm",
    seed=2**64 - 1,
    out_dtype="BF16",
    tokenizer="union",
)

_CHOSEN = replace(
    _RICH,
    models=(Model(model="a"), Model(model="org/b")),
    exclude=("*.bias", "lm_head.*"),
    take={"model.norm.*": "org/b", "*.norm.weight": "a"},
    rename={"language_model.": "", "yes": "null"},
    cast_base=True,
    fisher=("./a b.fisher", "123"),
    gram=("a: #é", "b.gram"),
)

_KEPT = {
    "plain": recipe(),
    "rich": _RICH,
    "chosen": _CHOSEN,
    "chosen with ranges": two_ranges(exclude="*", take={"*": "b"}, gram=("a", "b")),
    "ranges": two_ranges(parameters={"weight": Gradient((True, "x"))}),
    "average without its base": recipe(method="average"),
    "karcher without its base": recipe(method="karcher"),
    "slerp without its base": recipe(method="slerp", parameters={"t": 0.5}),
    "slerp, base last": recipe(method="slerp", models=(Model(model="a"), Model(model="base"))),
    "nuslerp": recipe(method="nuslerp"),
    "nuslerp of weights": recipe(method="nuslerp", parameters={"of": "weights"}),
    "base's tokenizer": recipe(tokenizer="base", out_dtype="F32"),
    "a method to come": recipe(method="of tomorrow"),
    "names like YAML": recipe(
        base="null",
        models=(Model(model="123"), Model(model="yes"), Model(model="- a\n- b"), Model(model="x" * 300)),
    ),
}


@pytest.mark.parametrize("kept", _KEPT.values(), ids=_KEPT)
def test_a_recipe_comes_back_from_yaml(kept: Recipe) -> None:
    assert mergekit.read(kept.to_yaml()) == (kept, [])
    assert mergekit.read(kept.to_yaml())[0].digest() == kept.digest()


def test_the_order_of_choices_comes_back_from_yaml() -> None:
    made, _ = mergekit.read(_CHOSEN.to_yaml())
    assert (list(made.take), list(made.rename)) == (
        ["model.norm.*", "*.norm.weight"],
        ["language_model.", "yes"],
    )


def test_choices_are_written_where_they_are_made() -> None:
    made = recipe(
        exclude="*.bias",
        take={"*.norm": "a"},
        rename={"x.": ""},
        cast_base=True,
        fisher=("1", "b"),
        gram=("c", "d"),
    )
    assert made.to_yaml().splitlines()[len(recipe().to_yaml().splitlines()) :] == [
        "exclude: ['*.bias']",
        "take: {'*.norm': a}",
        "rename: {x.: ''}",
        "cast_base: true",
        "fisher: ['1', b]",
        "gram: [c, d]",
    ]


def test_the_yaml_is_for_people() -> None:
    made = recipe(
        models=(Model(model="a", parameters={"weight": Gradient((0, 1))}),),
        parameters={"t": cases(("mlp", 0.5))},
        out_dtype="F16",
    )
    assert made.to_yaml().splitlines() == [
        "flavour: dare_train",
        "merge_method: ties",
        "base_model: base",
        "models:",
        "- model: a",
        "  parameters:",
        "    weight: [0, 1]",
        "parameters:",
        "  t:",
        "  - {filter: mlp, value: 0.5}",
        "rescale: paper",
        "seed: 0",
        "out_dtype: float16",
    ]


def test_settings_of_models_and_ranges_are_folded_into_one() -> None:
    """YAML has one place for both; the values and the digest stay."""
    models = (
        Model(model="a", parameters={"weight": cases(("q_proj", 5.0)), "p": 0.5}),
        Model(model="b", parameters={"weight": 7.0, "p": 2}),
    )
    own = {"weight": cases(("mlp", Gradient((0, 1))))}
    made = recipe(
        models=models,
        layers=(LayerRange(first=0, last=3, models=(own, {**own, "p": 3})),),
        parameters={"weight": 9.0},
    )
    again, _ = mergekit.read(made.to_yaml())
    assert again.digest() == made.digest()
    p = Parameter(name="p", per_model=True)
    for parameter, tensor, model in [
        (each, name, place) for each in (p, WEIGHT) for name in (up(1), q(1), NORM) for place in (0, 1)
    ]:
        assert again.resolver(3).value(parameter, tensor, model) == made.resolver(3).value(
            parameter, tensor, model
        )
    assert [again.resolver(3).value(WEIGHT, name, 0) for name in (up(1), q(1), NORM)] == [0.5, 5.0, 9.0]
    assert [again.resolver(3).value(WEIGHT, name, 1) for name in (up(1), q(1), NORM)] == [0.5, 7.0, 7.0]
    assert [again.resolver(3).value(p, NORM, model) for model in (0, 1)] == [0.5, 3.0]


def test_a_digest_is_that_of_the_meaning() -> None:
    one = recipe(parameters={"a": 1, "b": 0.5})
    assert one.digest() == recipe(parameters={"b": 0.5, "a": 1.0}).digest()
    assert re.fullmatch("[0-9a-f]{64}", one.digest())


_CHANGES: list[dict[str, Any]] = [
    {"method": "average"},
    {"base": "a"},
    {"models": (Model(model="b"), Model(model="a"))},
    {"models": (Model(model="a", parameters={"weight": 1}), Model(model="b"))},
    {"parameters": {"t": 0.5}},
    {"parameters": {"t": "0.5"}},
    {"parameters": {"t": True}},
    {"parameters": {"t": 1}},
    {"parameters": {"t": Gradient((1,))}},
    {"parameters": {"t": cases((None, 1))}},
    {"layers": (LayerRange(first=0, last=1, models=({}, {})),)},
    {"rescale": "q"},
    {"seed": 1},
    {"out_dtype": "F32"},
    {"tokenizer": "base"},
    {"exclude": ("a",)},
    {"exclude": ("a", "b")},
    {"take": {"x": "a"}},
    {"take": {"x": "b"}},
    {"take": {"x": "a", "y": "b"}},
    {"take": {"y": "b", "x": "a"}},
    {"rename": {"x": "a"}},
    {"rename": {"x": "y", "y": "x"}},
    {"rename": {"y": "x", "x": "y"}},
    {"cast_base": True},
    {"fisher": ("a", "b")},
    {"fisher": ("b", "a")},
    {"gram": ("a", "b")},
]


def test_a_digest_tells_every_change() -> None:
    assert len({replace(recipe(), **change).digest() for change in [{}, *_CHANGES]}) == len(_CHANGES) + 1


def test_a_digest_stays_what_it_was() -> None:
    assert _RICH.digest() == "69caafe245565a02755e86267aec866952832a682432cef399e368380d4ba6e0"
    assert _CHOSEN.digest() == "ac4805d017e5196c055eda533f7f5701905c01007448b1cc059b418a2bda8e4a"
