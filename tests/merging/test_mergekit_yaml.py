"""mergekit's configurations: what is made of them, where the result differs, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dare_train.errors import ConfigError
from dare_train.merging.config.mergekit import METHODS, read
from dare_train.merging.config.recipe import Recipe
from dare_train.merging.config.recipe_parts import LayerRange, Model
from dare_train.merging.methods.parameters import Case, Gradient, Parameter
from dare_train.merging.methods.registry import MERGE_METHODS

WEIGHT = Parameter(name="weight", default=1.0, per_model=True)
DENSITY = Parameter(name="density", per_model=True)
P = Parameter(name="p", per_model=True)
T = Parameter(name="t")


def config(**keys: Any) -> str:
    """A configuration in one line of braces, of two models and a base; None leaves a key out."""
    given = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}], **keys}
    return f"{ ({key: value for key, value in given.items() if value is not None})!r}".replace("None", "null")


def recipe(**keys: Any) -> Recipe:
    return read(config(**keys))[0]


def notes(**keys: Any) -> list[str]:
    return read(config(**keys))[1]


def names(made: Recipe) -> list[str]:
    return [each.model for each in made.models]


def slices(*ranges: tuple[int, int], models: tuple[str, ...] = ("base", "a")) -> list[Any]:
    return [{"sources": [{"model": model, "layer_range": list(each)} for model in models]} for each in ranges]


# Configurations as people post them.

TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

SLERP = """
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 32]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 32]
# or, the equivalent models: syntax:
# models:
merge_method: slerp
base_model: garage-bAInd/Platypus2-13B
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: bfloat16
"""

DARE_TIES = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: abacusai/Slerp-CM-mist-dpo
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
"""

MODEL_STOCK = """
models:
  - model: org/one
  - model: org/two
  - model: org/three
merge_method: model_stock
base_model: meta-llama/Meta-Llama-3-8B
dtype: bfloat16
tokenizer_source: base
"""


def test_ties() -> None:
    made, said = read(TIES)
    assert made == Recipe(
        method="ties",
        base="TheBloke/Llama-2-13B-fp16",
        models=(
            Model(
                model="psmathur/orca_mini_v3_13b",
                parameters={"density": Gradient((1, 0.7, 0.1)), "weight": 1.0},
            ),
            Model(
                model="garage-bAInd/Platypus2-13B",
                parameters={"density": 0.5, "weight": Gradient((0, 0.3, 0.7, 1))},
            ),
            Model(
                model="WizardLM/WizardMath-13B-V1.0",
                parameters={"density": 0.33, "weight": (Case(filter="mlp", value=0.5), Case(value=0))},
            ),
        ),
        parameters={"normalize": True},
        rescale="none",
        out_dtype="F16",
    )
    assert said == [
        "mergekit computes in float16 and rounds after every step; here everything is float32 "
        "and rounded once",
        "int8_mask is ignored: it saves mergekit memory and changes no value",
    ]


def test_the_values_of_ties() -> None:
    values = read(TIES)[0].resolver(40)
    mlp, attention = (
        "model.layers.{}.mlp.up_proj.weight".format,
        "model.layers.{}.self_attn.k_proj.weight".format,
    )
    # Layer 13 of 40 is a third of the way: 2/3 between 1 and 0.7; layer 26 two thirds: 1/3 between 0.7 and
    # 0.1.
    assert [values.value(DENSITY, mlp(layer), 0) for layer in (0, 13, 26, 39)] == pytest.approx(
        [1, 0.8, 0.5, 0.1]
    )
    assert [values.value(WEIGHT, mlp(layer), 1) for layer in (0, 13, 26, 39)] == pytest.approx(
        [0, 0.3, 0.7, 1]
    )
    assert [values.value(WEIGHT, name, 2) for name in (mlp(3), attention(3), "lm_head.weight")] == [0.5, 0, 0]
    assert [values.value(DENSITY, "lm_head.weight", model) for model in range(3)] == [1, 0.5, 0.33]


def test_slerp() -> None:
    made, said = read(SLERP)
    t = (
        Case(filter="self_attn", value=Gradient((0, 0.5, 0.3, 0.7, 1))),
        Case(filter="mlp", value=Gradient((1, 0.5, 0.7, 0.3, 0))),
        Case(value=0.5),
    )
    assert made == Recipe(
        method="slerp",
        base="garage-bAInd/Platypus2-13B",
        models=(Model(model="garage-bAInd/Platypus2-13B"), Model(model="psmathur/orca_mini_v3_13b")),
        parameters={"t": t},
        layers=(LayerRange(first=0, last=32, models=({}, {})),),
        out_dtype="BF16",
    )
    assert said == [
        "mergekit computes in bfloat16 and rounds after every step; here everything is float32 "
        "and rounded once"
    ]


def test_the_values_of_slerp() -> None:
    values = read(SLERP)[0].resolver(32)
    found = [values.value(T, f"model.layers.{layer}.self_attn.q_proj.weight") for layer in (0, 10, 31)]
    # Layer 10 of 32 is at 10/31 · 4 = 1.290322...: 0.5 - 0.2 · 0.290322...
    assert found == pytest.approx([0, 0.44193548387096776, 1])
    assert [values.value(T, f"model.layers.{layer}.mlp.down_proj.weight") for layer in (0, 31)] == [1, 0]
    assert (
        values.value(T, "model.layers.3.input_layernorm.weight")
        == values.value(T, "model.embed_tokens.weight")
        == 0.5
    )
    with pytest.raises(ConfigError, match="layers: expected the model's 40 layers"):
        read(SLERP)[0].resolver(40)


def test_dare_ties() -> None:
    made, said = read(DARE_TIES)
    assert made == Recipe(
        method="dare_ties",
        base="mistralai/Mistral-7B-v0.1",
        models=(
            Model(model="samir-fama/SamirGPT-v1", parameters={"p": 0.47, "weight": 0.4}),
            Model(model="abacusai/Slerp-CM-mist-dpo", parameters={"p": 0.47, "weight": 0.3}),
        ),
        rescale="paper",
        out_dtype="BF16",
    )
    assert said == [
        "mergekit computes in bfloat16 and rounds after every step; here everything is float32 "
        "and rounded once",
        "mergekit rescales so that the L1 norm is kept; here by 1/(1 - p), as the papers do; "
        "rescale: norm gives mergekit's",
        "masks come from a seed (seed: 0), not from a global generator: same file, same result",
        "int8_mask is ignored: it saves mergekit memory and changes no value",
    ]


def test_model_stock() -> None:
    made, said = read(MODEL_STOCK)
    assert (made.method, made.base, names(made)) == (
        "model_stock",
        "meta-llama/Meta-Llama-3-8B",
        ["org/one", "org/two", "org/three"],
    )
    assert (made.tokenizer, made.out_dtype, len(said)) == ("base", "BF16", 1)


# Where a configuration comes from.


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(TIES, encoding="utf-8")
    assert read(file) == read(str(file)) == read(TIES)


def test_paths_of_models_stay_as_written() -> None:
    assert names(recipe(models=[{"model": "../a"}, {"model": "org/b@main"}])) == ["../a", "org/b@main"]


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no such.yml: expected a file of YAML text"):
        read("no such.yml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="expected a file of YAML text"):
        read(tmp_path / "merge.yml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n  - [1, 2\n", "line 3: expected YAML, found"),
        (
            "a: 1\n---\nb: 2\n",
            "the configuration: expected one merge in a file, found 2; dare-train merge runs",
        ),
        (
            "a: !!python/object:os.system 1\n",
            "line 1: expected YAML, found a tag, 'tag:yaml.org,2002:python/object:os.system'",
        ),
        ("a: 2024-99-99\n", "the configuration: expected YAML, found"),
        ("- a\n- b\n", "the configuration: expected a mapping with keys among merge_method, .*found"),
        ("\n", "the configuration: expected a mapping with keys .*, found None"),
        ("[" * 3_000 + "\n", "expected YAML"),
    ],
    ids=["bracket", "two documents", "python", "date", "list", "empty", "deep"],
)
def test_text_that_is_no_configuration(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


# Methods.

_OURS = {
    *(
        "average",
        "task_arithmetic",
        "ties",
        "magnitude",
        "dare_linear",
        "dare_ties",
        "drop_only",
        "breadcrumbs",
        "breadcrumbs_ties",
    ),
    *(
        "della",
        "della_linear",
        "model_stock",
        "slerp",
        "nuslerp",
        "karcher",
        "sce",
        "fisher",
        "regmean",
        "consensus_ta",
        "consensus_ties",
    ),
    *("nearswap", "arcee_fusion", "multislerp", "ram", "ramplus_tl"),
    *("tsv", "iso_c", "iso_cts", "wudi", "emr"),
}
_BASELESS = {"average", "karcher", "nuslerp", "multislerp"}


def test_every_method_of_ours_can_be_named() -> None:
    assert METHODS["linear"] == "average"
    assert METHODS.keys() == _OURS | {"linear"}
    assert all(METHODS[name] == name for name in _OURS)


@pytest.mark.parametrize("name", sorted(_OURS))
def test_a_method_keeps_its_name(name: str) -> None:
    assert recipe(merge_method=name, parameters={"weight": 1}).method == name


@pytest.mark.parametrize("name", ["passthrough", "TIES", "none"])
def test_a_method_that_we_lack(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"merge_method: expected one of linear, average, .*, found '{name}'"
    ):
        recipe(merge_method=name)


def test_a_method_must_be_named() -> None:
    with pytest.raises(ConfigError, match="merge_method: expected a name, found none"):
        read("{models: [{model: a}]}")


# The base among the models.

_LISTED = [{"model": "a", "parameters": {"weight": 1}}, {"model": "base", "parameters": {"weight": 2}}]


@pytest.mark.parametrize("name", sorted(_OURS - {"average", "karcher", "slerp"}))
def test_a_base_that_is_listed_is_no_input(name: str) -> None:
    made = recipe(merge_method=name, models=_LISTED)
    weighs = any(parameter.name == "weight" for parameter in MERGE_METHODS[name].parameters)
    assert (made.base, made.models) == (
        "base",
        (Model(model="a", parameters={"weight": 1} if weighs else {}),),
    )


@pytest.mark.parametrize("name", ["linear", "average", "karcher"])
def test_a_base_that_is_listed_stays_an_input_of_a_mean(name: str) -> None:
    made = recipe(merge_method=name, models=_LISTED)
    assert made.models == (
        Model(model="a", parameters={"weight": 1}),
        Model(model="base", parameters={"weight": 2}),
    )


def test_slerp_begins_at_its_base() -> None:
    made = recipe(merge_method="slerp", models=_LISTED, parameters={"t": 0.25})
    assert made.models == (
        Model(model="base"),
        Model(model="a"),
    )
    assert names(recipe(merge_method="slerp", models=[{"model": "a"}], parameters={"t": 0.25})) == [
        "base",
        "a",
    ]


def test_only_the_base_is_nothing_to_merge() -> None:
    with pytest.raises(ConfigError, match="models: expected at least one besides the base"):
        recipe(models=[{"model": "base"}])


def test_a_base_that_is_not_listed_becomes_an_input_of_linear() -> None:
    """With the weight that all have; mergekit refuses it without one."""
    assert names(recipe(merge_method="linear", parameters={"weight": 0.5})) == ["a", "b", "base"]
    with pytest.raises(
        ConfigError,
        match="base_model: expected one of the models: linear makes it an input, found 'base'; list it with",
    ):
        recipe(merge_method="linear", models=[{"model": "a", "parameters": {"weight": 1}}])


def test_a_base_that_is_not_listed_becomes_an_input_of_karcher() -> None:
    assert names(recipe(merge_method="karcher")) == ["a", "b", "base"]


@pytest.mark.parametrize("name", ["linear", "karcher"])
def test_slices_have_the_inputs_they_list(name: str) -> None:
    made = recipe(merge_method=name, models=None, slices=slices((0, 2), models=("a", "b")))
    assert (made.base, names(made)) == ("base", ["a", "b"])


def test_our_own_average_has_the_inputs_it_lists() -> None:
    assert names(recipe(merge_method="average")) == ["a", "b"]


@pytest.mark.parametrize("name", ["linear", *sorted(_BASELESS)])
def test_without_a_base_the_first_model_is_it(name: str) -> None:
    made = recipe(merge_method=name, base_model=None)
    assert (made.base, names(made)) == ("a", ["a", "b"])


@pytest.mark.parametrize("name", sorted(_OURS - _BASELESS))
def test_others_need_a_base(name: str) -> None:
    with pytest.raises(ConfigError, match="base_model: expected a name, found none"):
        recipe(merge_method=name, base_model=None)


def test_nuslerp_is_of_weights_or_of_deltas() -> None:
    options = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    assert recipe(merge_method="nuslerp", parameters=options).parameters == {"of": "deltas", **options}
    assert recipe(merge_method="nuslerp", parameters=options, base_model=None).parameters == {
        "of": "weights",
        **options,
    }
    assert recipe(merge_method="nuslerp", parameters={"of": "weights"}).parameters == {"of": "weights"}


@pytest.mark.parametrize(("base", "of"), [("base", "deltas"), (None, "weights")])
def test_multislerp_without_a_base_is_of_weights(base: str | None, of: str) -> None:
    made = recipe(merge_method="multislerp", base_model=base, parameters={"normalize_weights": False})
    assert made.parameters == {"of": of, "normalize_weights": False}


def test_arcee_fusion_says_what_it_does_otherwise() -> None:
    (said,) = notes(merge_method="arcee_fusion", models=[{"model": "a"}])
    assert said.startswith("mergekit samples quartiles of large tensors at random")


# Parameters.


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "drop_only"])
def test_a_density_becomes_a_drop_rate_at_every_level(name: str) -> None:
    source = {"model": "a", "layer_range": [0, 2], "parameters": {"density": [1, "0.3"]}}
    cases = [{"filter": "mlp", "value": [0.9, 0.2]}, {"value": 0.7}]
    made = recipe(
        merge_method=name,
        models=None,
        slices=[{"sources": [source], "parameters": {"density": 0.9}}],
        parameters={"density": cases, "lambda": 1.1, "normalize": False},
    )
    expected = (Case(filter="mlp", value=Gradient((0.1, 0.8))), Case(value=0.3))
    assert made.parameters == {"p": expected, "lambda": 1.1, "normalize": False}
    assert made.layers == (
        LayerRange(first=0, last=2, parameters={"p": 0.1}, models=({"p": Gradient((0.0, 0.7))},)),
    )


@pytest.mark.parametrize(
    "name", ["ties", "magnitude", "della", "della_linear", "breadcrumbs", "consensus_ties"]
)
def test_elsewhere_a_density_stays_one(name: str) -> None:
    assert recipe(merge_method=name, parameters={"density": 0.9}).parameters == {"density": 0.9}


_KEEPING_ALL = [
    *((name, DENSITY, 1.0) for name in ("ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")),
    *((name, P, 0.0) for name in ("dare_linear", "dare_ties")),
]
_HALF = {"density": 0.5}


@pytest.mark.parametrize(("name", "parameter", "everything"), _KEEPING_ALL)
def test_without_a_density_everything_is_kept(name: str, parameter: Parameter, everything: float) -> None:
    """The default of mergekit's, which is not that of the method here."""
    assert recipe(merge_method=name).parameters == {parameter.name: everything}
    assert recipe(merge_method=name, parameters=_HALF).parameters == {parameter.name: 0.5}


@pytest.mark.parametrize(("name", "parameter", "everything"), _KEEPING_ALL)
def test_where_a_density_is_not_given_everything_is_kept(
    name: str, parameter: Parameter, everything: float
) -> None:
    def found(tensor: str, model: int, **keys: Any) -> Any:
        return recipe(merge_method=name, **keys).resolver(2).value(parameter, tensor, model)

    one_of_two = [{"model": "a", "parameters": _HALF}, {"model": "b"}]
    assert [found("norm.weight", model, models=one_of_two) for model in (0, 1)] == [0.5, everything]
    in_mlp = {"density": [{"filter": "mlp", "value": 0.5}]}
    assert [found(tensor, 0, parameters=in_mlp) for tensor in ("mlp.weight", "norm.weight")] == [
        0.5,
        everything,
    ]
    models = [{"model": "a", "parameters": in_mlp}]
    assert [found(tensor, 0, models=models) for tensor in ("mlp.weight", "norm.weight")] == [0.5, everything]
    first, second = slices((0, 1), (1, 2))
    parts = [{**first, "parameters": _HALF}, second]
    assert [found(f"layers.{layer}.w", 0, models=None, slices=parts) for layer in (0, 1)] == [0.5, everything]
    assert found("norm.weight", 0, parameters={"density": []}) == everything


@pytest.mark.parametrize(("name", "parameter"), [each[:2] for each in _KEEPING_ALL])
def test_where_every_model_gives_a_density_nothing_is_added(name: str, parameter: Parameter) -> None:
    rest = {"density": [{"filter": "mlp", "value": 0.1}, {"value": 0.5}]}
    models = [{"model": "base"}, {"model": "a", "parameters": _HALF}, {"model": "b", "parameters": rest}]
    assert recipe(merge_method=name, models=models).parameters == {}
    first, second = slices((0, 1), (1, 2))
    sources = [{**source, "parameters": _HALF} for source in second["sources"]]
    assert (
        recipe(
            merge_method=name, models=None, slices=[{**first, "parameters": _HALF}, {"sources": sources}]
        ).parameters
        == {}
    )


@pytest.mark.parametrize(
    "name", sorted(_OURS - {name for name, _, _ in _KEEPING_ALL} - {"nuslerp", "multislerp"})
)
def test_other_methods_keep_their_own_defaults(name: str) -> None:
    assert recipe(merge_method=name).parameters == {}


@pytest.mark.parametrize("name", [*(name for name, _, _ in _KEEPING_ALL), "nuslerp", "multislerp"])
def test_our_own_flavour_implies_nothing(name: str) -> None:
    assert recipe(flavour="dare_train", merge_method=name).parameters == {}


def test_a_drop_rate_can_be_said_directly() -> None:
    assert recipe(merge_method="dare_linear", parameters={"p": 0.9}).parameters == {"p": 0.9}


def test_a_density_and_a_drop_rate_say_the_same_twice() -> None:
    with pytest.raises(ConfigError, match="density: expected density or p = 1 - density, found both"):
        recipe(
            merge_method="dare_ties",
            models=[{"model": "a", "parameters": {"density": 0.1}}],
            parameters={"p": 0.9},
        )


@pytest.mark.parametrize("density", [True, "much", [0.5, "x"], {"value": False}])
def test_a_density_is_a_number(density: Any) -> None:
    with pytest.raises(ConfigError, match="density: expected a finite number, found"):
        recipe(merge_method="dare_ties", parameters={"density": density})


_TRIMMING = ["ties", "magnitude", "breadcrumbs", "breadcrumbs_ties", "consensus_ties"]


@pytest.mark.parametrize(
    ("name", "told"),
    [*((name, "norm") for name in _TRIMMING), ("task_arithmetic", "paper"), ("drop_only", "paper")],
)
def test_some_methods_do_not_rescale_unless_told(name: str, told: str) -> None:
    """What trimming leaves has the L1 norm of the whole then, as in mergekit."""
    assert recipe(merge_method=name).rescale == "none"
    assert (
        recipe(merge_method=name, parameters={"rescale": True}).rescale
        == recipe(merge_method=name, rescale=True).rescale
        == told
    )
    assert recipe(merge_method=name, parameters={"rescale": False}).rescale == "none"


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_some_methods_rescale_unless_told(name: str) -> None:
    assert recipe(merge_method=name).rescale == "paper"
    assert recipe(merge_method=name, parameters={"rescale": False}).rescale == "none"


@pytest.mark.parametrize(
    ("given", "meant"),
    [("norm", "norm"), ("q", "q"), ("none", "none"), ("paper", "paper"), (1, "norm"), (0, "none")],
)
def test_a_rescale_can_be_named(given: Any, meant: str) -> None:
    assert recipe(parameters={"rescale": given}).rescale == recipe(rescale=given).rescale == meant


_WRONG_RESCALES: list[tuple[dict[str, Any], str]] = [
    (
        {"parameters": {"rescale": [True, False]}},
        "rescale: expected one value for the merge, found a gradient or cases",
    ),
    (
        {"parameters": {"rescale": [{"filter": "mlp", "value": True}]}},
        "rescale: expected one value for the merge, found a gradient or cases",
    ),
    ({"parameters": {"rescale": "l2"}}, "rescale: expected one of paper, norm, q, none, found 'l2'"),
    ({"rescale": 0.5}, "rescale: expected true, false, or the name of a rule, found 0.5"),
    ({"rescale": [True]}, r"rescale: expected true, false, or the name of a rule, found \[True\]"),
    (
        {"rescale": "norm", "parameters": {"rescale": True}},
        "rescale: expected one, found one at the top and one among the parameters",
    ),
    (
        {"models": [{"model": "a", "parameters": {"rescale": True}}]},
        "rescale of 'a': expected one value for the merge",
    ),
    (
        {"models": None, "slices": [{**slices((0, 1))[0], "parameters": {"rescale": True}}]},
        "rescale in layers 0 to 0: expected one value",
    ),
]


@pytest.mark.parametrize(("keys", "text"), _WRONG_RESCALES)
def test_a_rescale_is_one_for_the_merge(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        recipe(**keys)


def test_a_seed() -> None:
    assert (recipe().seed, recipe(seed=7).seed, recipe(parameters={"seed": 7}).seed) == (0, 7, 7)
    with pytest.raises(ConfigError, match=r"seed: expected an integer in \[0, 2\*\*64\), found 'x'"):
        recipe(seed="x")


# What is ours: top-level keys of both flavours.

_CHOSEN: dict[str, Any] = {
    "exclude": ["*.bias", "lm_head.*"],
    "take": {"*.norm.weight": "b", "*.norm.*": "a"},
    "rename": {"language_model.": "", "gamma": "weight"},
    "cast_base": True,
    "fisher": ["a.safetensors", "b.safetensors"],
    "gram": ["../a.gram", "b.gram"],
}


@pytest.mark.parametrize("flavour", [None, "dare_train"])
def test_what_is_decided_by_name_stands_at_the_top(flavour: str | None) -> None:
    made, said = read(config(merge_method="task_arithmetic", flavour=flavour, rescale="none", **_CHOSEN))
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in _CHOSEN.items()
    }
    models = (Model(model="a"), Model(model="b"))
    assert made == Recipe(method="task_arithmetic", base="base", models=models, rescale="none", **changes)
    assert [list(made.take), list(made.rename)] == [list(_CHOSEN["take"]), list(_CHOSEN["rename"])]
    assert said == []


@pytest.mark.parametrize("flavour", [None, "dare_train"])
@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"exclude": [1]}, r"exclude: expected a list of name patterns, found \[1\]"),
        ({"take": {"*": "c"}}, r"take\['\*'\]: expected one of a, b, found 'c'"),
        ({"take": ["a"]}, r"take: expected models by name pattern, found \['a'\]"),
        ({"rename": {"a": 1}}, "rename: expected new parts of names by old, found {'a': 1}"),
        ({"cast_base": "true"}, "cast_base: expected true or false, found 'true'"),
        ({"fisher": "a.fisher"}, "fisher: expected a list of files, found 'a.fisher'"),
        ({"gram": ["a.gram"]}, "gram: expected a file for each of a, b, found 1"),
    ],
)
def test_what_is_decided_by_name_is_checked(flavour: str | None, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text}"):
        recipe(flavour=flavour, **keys)


def test_a_single_pattern_needs_no_list() -> None:
    assert recipe(exclude="*.bias").exclude == ("*.bias",)


def test_files_of_statistics_follow_their_models() -> None:
    """The base that a file lists is no input of most methods, and the first of slerp's."""
    three = [{"model": "a"}, {"model": "base"}, {"model": "b"}]
    files = ["a.gram", "base.gram", "b.gram"]
    assert recipe(merge_method="regmean", models=three, gram=files).gram == ("a.gram", "b.gram")
    assert recipe(merge_method="regmean", models=three, gram=["a.gram", "b.gram"]).gram == (
        "a.gram",
        "b.gram",
    )
    assert recipe(merge_method="slerp", models=three[:2], gram=files[:2]).gram == ("base.gram", "a.gram")
    assert recipe(merge_method="slerp", models=three[:2], gram=files[:2], flavour="dare_train").gram == (
        "a.gram",
        "base.gram",
    )
    with pytest.raises(ConfigError, match="gram: expected a file for each of a, b, base, found 2"):
        recipe(merge_method="karcher", gram=["a.gram", "b.gram"])


def test_one_case_needs_no_list_and_a_star_is_everything() -> None:
    assert recipe(parameters={"lambda": {"filter": "mlp", "value": 1}}).parameters["lambda"] == (
        Case(filter="mlp", value=1),
    )
    one = recipe(parameters={"lambda": {"filter": None, "value": 1}})
    assert one.parameters["lambda"] == (Case(value=1),)
    values = recipe(merge_method="slerp", parameters={"t": [{"filter": "*", "value": 0.25}]}).resolver(1)
    assert values.value(T, "norm.weight") == 0.25


def test_yaml_reads_some_numbers_as_text() -> None:
    made, _ = read(
        "merge_method: ties\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: 1e-3}}\n"
    )
    assert made.models[0].parameters == {"weight": "1e-3"}
    assert made.resolver(1).value(WEIGHT, "norm.weight", 0) == 0.001


def test_an_empty_list_says_nothing() -> None:
    assert recipe(parameters={"weight": []}).resolver(1).value(WEIGHT, "norm.weight", 0) == 1.0


def test_null_is_as_good_as_nothing() -> None:
    nothing = (
        "parameters: null, dtype: null, tokenizer_source: ~, chat_template: null, "
        "unheard_of: null, take: null, exclude: ~"
    )
    made, _ = read(
        f"{{merge_method: task_arithmetic, base_model: base, models: [{{model: a, parameters: "
        f"null}}], {nothing}}}"
    )
    assert made == Recipe(method="task_arithmetic", base="base", models=(Model(model="a"),), rescale="none")


def test_int8_mask_is_left_out_everywhere() -> None:
    models = [{"model": "a", "parameters": {"int8_mask": True, "weight": 1}}]
    made, said = read(
        config(merge_method="task_arithmetic", models=models, parameters={"int8_mask": [{"value": True}]})
    )
    assert (made.parameters, made.models[0].parameters) == ({}, {"weight": 1})
    assert said == ["int8_mask is ignored: it saves mergekit memory and changes no value"]


# Slices.


def test_slices_become_ranges() -> None:
    source = {"model": "a", "layer_range": [0, 4], "parameters": {"weight": 0.1}}
    base = {"model": "base", "layer_range": [0, 4], "parameters": {"weight": 0.9}}
    first = {"sources": [base, source], "parameters": {"normalize": True}}
    made = recipe(models=None, slices=[first, *slices((4, 6))])
    assert made.models == (Model(model="a"),)
    assert made.layers == (
        LayerRange(first=0, last=4, parameters={"normalize": True}, models=({"weight": 0.1},)),
        LayerRange(first=4, last=6, models=({},)),
    )


def test_slerp_moves_its_base_in_every_slice() -> None:
    source = {"model": "base", "layer_range": [0, 4], "parameters": {"p": 0.1}}
    made = recipe(
        merge_method="slerp",
        models=None,
        slices=[{"sources": [{"model": "a", "layer_range": [0, 4]}, source]}],
    )
    assert (names(made), made.layers[0].models) == (["base", "a"], ({"p": 0.1}, {}))
    made = recipe(merge_method="slerp", models=None, slices=[{"sources": [{**source, "model": "a"}]}])
    assert (names(made), made.layers[0].models) == (["base", "a"], ({}, {"p": 0.1}))


def _sources(*ranges: Any) -> list[Any]:
    return [{"sources": [{"model": f"m{place}", "layer_range": each} for place, each in enumerate(ranges)]}]


_MOVED: list[tuple[list[Any], str]] = [
    (
        _sources([0, 4], [4, 8]),
        "layers 0 to 3: expected base among the sources, since they have layers of other places, found m0",
    ),
    (
        _sources([0, 4], [0, 5]),
        r"slices\[0\].sources\[1\].layer_range: expected 4 layers, as many as the first has, found \[0, 5\]",
    ),
    (
        slices((0, 4)) + slices((4, 6), models=("a", "a")),
        r"slices\[1\].sources: expected each model once, found 'a' again",
    ),
    (
        [{**_sources([0, 2])[0], "base_layers": {"model": "a", "from": -1}}],
        r"slices\[0\].base_layers.from: expected the number of a layer, found -1",
    ),
]


@pytest.mark.parametrize(("given", "text"), _MOVED)
def test_slices_that_come_to_nothing_are_refused(given: list[Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        recipe(models=None, slices=given)


def test_slices_say_where_layers_are_from() -> None:
    made = recipe(models=None, slices=slices((0, 4), (2, 6)))
    assert [(each.first, each.last, each.origins, each.base) for each in made.layers] == [
        (0, 4, (), ("base", 0)),
        (4, 8, (2,), ("base", 2)),
    ]
    assert read(made.to_yaml())[0] == made
    other = recipe(models=None, slices=slices((0, 4), (3, 7)))
    assert made.digest() != other.digest()


def test_slices_in_their_places_say_nothing_of_it() -> None:
    made = recipe(models=None, slices=slices((0, 4), (4, 6), (6, 6)))
    assert not any(each.moved for each in made.layers)
    assert (made.layers[2].first, made.layers[2].last) == (6, 6)
    assert read(made.to_yaml())[0] == made


@pytest.mark.parametrize(
    "layers", [None, [0], [0, 1, 2], [0, "1"], [0.0, 1], [False, True], [-1, 2], "0-4", {}]
)
def test_a_range_of_layers_is_two_numbers(layers: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"slices\[0\].sources\[0\].layer_range: expected \[first, last \+ 1\], found"
    ):
        recipe(models=None, slices=_sources(layers))


# Types.


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float16"}, "F16"),
        ({"dtype": "float32"}, "F32"),
        ({"dtype": "float64"}, "F64"),
        ({"dtype": "torch.bfloat16"}, "BF16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "BF16"),
        ({"out_dtype": "float16"}, "F16"),
        ({"dtype": "half"}, "F16"),
        ({"dtype": "fp16"}, "F16"),
        ({"dtype": "torch.half", "out_dtype": "bf16"}, "BF16"),
        ({"out_dtype": "fp32"}, "F32"),
    ],
)
def test_the_result_has_the_type_asked_for(keys: dict[str, Any], code: str | None) -> None:
    assert recipe(**keys).out_dtype == code


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize("name", ["auto", "int64", "BF16", "torch.q4"])
def test_other_types_are_refused(key: str, name: str) -> None:
    expected = "expected one of float64, float32, float16, bfloat16"
    with pytest.raises(ConfigError, match=f"^{key}: {expected}, found '{name.removeprefix('torch.')}'"):
        recipe(**{key: name})


# Tokenizers.


@pytest.mark.parametrize(
    ("keys", "meant"),
    [
        ({}, None),
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer_source": "org/base", "base_model": "org/base"}, "base"),
        ({"tokenizer": {"source": "base"}}, "base"),
        ({"tokenizer": {"source": "union"}}, "union"),
        ({"tokenizer": {"source": "union", "tokens": None}}, "union"),
        ({"tokenizer": {}}, "union"),
    ],
)
def test_a_tokenizer(keys: dict[str, Any], meant: str | None) -> None:
    assert recipe(**keys).tokenizer == meant


@pytest.mark.parametrize("keys", [{"tokenizer_source": "model:org/a"}, {"tokenizer": {"source": "org/a"}}])
def test_the_tokenizer_may_be_a_models(keys: dict[str, Any]) -> None:
    assert recipe(**keys).tokenizer == "org/a"
    assert recipe(**keys, base_model="org/a").tokenizer == "base"


# Notes.


def test_nothing_is_noted_where_nothing_differs() -> None:
    assert (
        notes(dtype="float32")
        == notes()
        == notes(parameters={"rescale": False})
        == notes(merge_method="sce")
        == []
    )


def test_a_note_on_float64() -> None:
    assert notes(dtype="float64") == [
        "mergekit computes in float64; here in float32, except where the base is float64, and rounded once"
    ]


def test_no_note_on_the_type_that_is_written() -> None:
    assert notes(dtype="float32", out_dtype="bfloat16") == []


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize(
    ("rescale", "noted"),
    [(None, True), (True, True), ("paper", True), ("norm", False), (False, False), ("q", False)],
)
def test_a_note_on_rescaling(name: str, rescale: Any, noted: bool) -> None:
    assert (
        any(
            "here by 1/(1 - p), as the papers do" in note
            for note in notes(merge_method=name, rescale=rescale)
        )
        == noted
    )


@pytest.mark.parametrize("name", _TRIMMING)
@pytest.mark.parametrize("rescale", [None, True, False, "norm"])
def test_no_note_on_rescaling_what_is_trimmed(name: str, rescale: Any) -> None:
    assert notes(merge_method=name, rescale=rescale) == []


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear", "drop_only"])
def test_a_note_on_masks(name: str) -> None:
    assert "masks come from a seed (seed: 5), not from a global generator: same file, same result" in notes(
        merge_method=name, seed=5
    )


def test_a_note_on_weights_that_mergekit_ignores() -> None:
    assert notes(merge_method="karcher", models=_LISTED) == [
        "mergekit's karcher ignores weight; here it counts"
    ]
    assert notes(merge_method="karcher") == []


# What is refused.

_REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"modules": {"default": {}}},
        "modules: expected one, or several that list the same .*, found default beside models; list models",
    ),
    (
        {"models": None, "modules": {"one": {"models": [{"model": "a"}]}, "two": {}}},
        "modules: expected one, or several that list the same .*, found one, two; list models",
    ),
    (
        {"models": None, "modules": {}},
        "modules: expected one of merge_method, .*, found {}; give it a module",
    ),
    ({"chat_template": 3}, "chat_template: expected a text, found 3"),
    (
        {"mergemethod": "ties"},
        "mergemethod: expected one of merge_method, base_model, .*, found 'ties'; take it out",
    ),
    ({"models": None}, "models: expected either models or slices, found neither"),
    ({"slices": slices((0, 1))}, "models: expected either models or slices, found both"),
    ({"models": []}, r"models: expected a list with at least one entry, found \[\]"),
    ({"models": {"model": "a"}}, "models: expected a list with at least one entry"),
    ({"models": ["a"]}, r"models\[0\]: expected a mapping with keys among model, parameters, found 'a'"),
    ({"models": [{"parameters": {}}]}, r"models\[0\].model: expected a name, found none"),
    ({"models": [{"model": 5}]}, r"models\[0\].model: expected a name, found 5"),
    ({"models": [{"model": {"mode": "a", "lora": "b"}}]}, r"models\[0\].model: expected a name, found {"),
    (
        {"models": [{"model": "a", "weight": 1}]},
        r"models\[0\].weight: expected weight among the parameters, found 1; write parameters: {weight: ...}",
    ),
    (
        {"models": [{"model": "a", "param": {"weight": 1}}]},
        r"models\[0\].param: expected one of model, parameters, found {'weight': 1}; take it out",
    ),
    (
        {"models": [{"model": "a@b", "revision": "c"}]},
        r"models\[0\].revision: expected beside the name of one model .*, found 'a@b'; write model@revision",
    ),
    ({"models": [{"model": "a"}, {"model": "a"}]}, "models: expected each model once, found 'a' again"),
    ({"base_model": 5}, "base_model: expected a name, found 5"),
    ({"base_model": {"model": 5}}, "base_model: expected a name, found {"),
    ({"models": None, "slices": []}, r"slices: expected a list with at least one entry, found \[\]"),
    (
        {"models": None, "slices": [{"sources": []}]},
        r"slices\[0\].sources: expected a list with at least one entry",
    ),
    (
        {"models": None, "slices": [{}]},
        r"slices\[0\].sources: expected a list with at least one entry, found None",
    ),
    (
        {"models": None, "slices": [{"base_model": "a"}]},
        r"slices\[0\].sources: expected a list with at least one entry, found None",
    ),
    (
        {"tokenizer": {"tokens": {"a": 1}}},
        r"tokenizer.tokens\['a'\]: expected source: a model, {kind: zero} or .*, found 1",
    ),
    ({"tokenizer": "base"}, "tokenizer: expected a mapping with keys among source, tokens, .*, found 'base'"),
    ({"tokenizer_source": ["base"]}, r"tokenizer_source: expected base, union or a model, found \['base'\]"),
    (
        {"tokenizer_source": "base", "tokenizer": {}},
        "tokenizer: expected tokenizer or tokenizer_source, found both",
    ),
    ({"parameters": [1]}, r"parameters: expected settings by parameter name, found \[1\]"),
    ({"parameters": {1: 2}}, "parameters: expected settings by parameter name"),
    (
        {"parameters": {"t": None}},
        "parameters.t: expected a value, a list of values, or cases of filter and value, found None",
    ),
    ({"parameters": {"t": [1, {"value": 2}]}}, "parameters.t: expected a value, a list of values, or cases"),
    ({"parameters": {"t": [[1]]}}, "parameters.t: expected a value, a list of values, or cases"),
    (
        {"parameters": {"t": [{"value": [{"value": 1}]}]}},
        "parameters.t.value: expected a value, a list of values",
    ),
    ({"parameters": {"t": [{"value": []}]}}, "parameters.t.value: expected a value, a list of values"),
    ({"parameters": {"t": [{"filter": "mlp"}]}}, "parameters.t.value: expected a value, .*, found None"),
    (
        {"parameters": {"t": [{"filter": 5, "value": 1}]}},
        "parameters.t.filter: expected a part of tensor names, found 5",
    ),
    (
        {"parameters": {"t": [{"filters": "mlp", "value": 1}]}},
        "parameters.t.filters: expected one of filter, value, found 'mlp'",
    ),
    (
        {"models": [{"model": "a", "parameters": {"weight": [None]}}]},
        r"models\[0\].parameters.weight: expected a value",
    ),
    ({"flavour": "mergekit"}, "flavour: expected dare_train, found 'mergekit'; leave it out"),
]


@pytest.mark.parametrize(
    ("keys", "text"), _REFUSED, ids=[re.sub(r"\W+", " ", text)[:60] for _, text in _REFUSED]
)
def test_what_we_do_not_do_is_refused(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text}"):
        recipe(**keys)


def test_infinite_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight of 'a': expected a finite number"):
        read("merge_method: ties\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: .inf}}\n")


# Our own flavour is taken literally; the round trip is tested with the recipes.


def test_our_own_flavour_follows_no_rule_of_mergekits() -> None:
    models = [{"model": "a+b"}, {"model": "base"}, {"model": "a+b"}]
    made, said = read(
        config(
            flavour="dare_train",
            merge_method="dare_ties",
            models=models,
            parameters={"p": 0.5},
            out_dtype="bfloat16",
        )
    )
    assert (names(made), made.rescale, said) == (["a+b", "base", "a+b"], "paper", [])


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"base_model": None}, "base_model: expected a name, found none"),
        (
            {"parameters": {"rescale": True}},
            "rescale: expected one value for the merge; set the recipe's rescale",
        ),
        ({"rescale": True}, "rescale: expected one of paper, norm, q, none, found True"),
        ({"unheard_of": 1}, "unheard_of: expected one of"),
    ],
)
def test_our_own_flavour_is_checked(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        recipe(flavour="dare_train", **keys)


# What mergekit ignores.


@pytest.mark.parametrize(
    ("name", "said", "note"),
    [
        ("slerp", "weight", "weight is ignored: slerp has no such parameter"),
        ("sce", "weight", "weight is ignored: sce has no such parameter"),
        ("model_stock", "density", "density is ignored: model_stock has no such parameter"),
        ("task_arithmetic", "density", "density is ignored: task_arithmetic has no such parameter"),
        ("della", "lambda", "lambda beside a model is ignored: it is one for all models of della"),
    ],
)
def test_what_a_method_does_not_read_is_left_out_and_told(name: str, said: str, note: str) -> None:
    models = [{"model": each, "parameters": {said: 0.5}} for each in "ab"]
    keys = {"merge_method": name, "models": models}
    assert all(said not in model.parameters for model in recipe(**keys).models)
    assert notes(**keys).count(note) == 1
    made, _ = read(config(**keys), strict=True)
    with pytest.raises(ConfigError, match=said):
        made.check_parameters(MERGE_METHODS[made.method].parameters)


def test_what_all_models_share_is_left_out_too() -> None:
    found = notes(merge_method="sce", parameters={"normalize": True, "select_topk": 0.5})
    assert "normalize is ignored: sce has no such parameter" in found
    assert recipe(merge_method="sce", parameters={"normalize": True}).parameters == {}


@pytest.mark.parametrize("name", ["weigth", "Lambda", "densty", "normalise"])
def test_what_is_nearly_a_parameter_is_refused(name: str) -> None:
    made = recipe(merge_method="ties", parameters={name: 1})
    with pytest.raises(ConfigError, match=name):
        made.check_parameters(MERGE_METHODS["ties"].parameters)


def test_keys_that_nobody_reads_are_told() -> None:
    assert notes(name="my-merge", random_seed=3) == [
        "name is ignored: no merge here or in mergekit reads it",
        "random_seed is ignored: no merge here or in mergekit reads it",
    ]
    with pytest.raises(ConfigError, match="name: expected one of"):
        read(config(name="my-merge"), strict=True)


def test_slices_may_have_models_of_their_own() -> None:
    given = slices((0, 2), models=("a", "b")) + slices((2, 4), models=("c", "a"))
    made = recipe(merge_method="linear", base_model=None, models=None, slices=given)
    assert names(made) == ["a", "b", "c"]
    assert [layers.models for layers in made.layers] == [({}, {}, None), ({}, None, {})]
    again, _ = read(made.to_yaml())
    assert again == made
    found = made.resolver(4)
    taking = [
        [model for model in range(3) if found.takes_part(tensor, model)]
        for tensor in ("model.embed_tokens.weight", "model.layers.1.w", "model.layers.2.w", "lm_head.weight")
    ]
    assert taking == [[0, 1], [0, 1], [0, 2], [0, 2]]


def test_a_base_may_stand_in_slices() -> None:
    given = [{**each, "base_model": "base"} for each in slices((0, 2), (2, 4))]
    assert recipe(base_model=None, models=None, slices=given).base == "base"


def test_each_slice_may_have_a_base_of_its_own() -> None:
    """Which is among its sources, and one of them where it is not the base."""
    given = [
        {**each, "base_model": base} for each, base in zip(slices((0, 2), (2, 4)), ("base", "a"), strict=True)
    ]
    made = recipe(base_model=None, models=None, slices=given)
    assert (made.base, names(made)) == ("base", ["base", "a"])
    assert [layers.base for layers in made.layers] == [("base", 0), ("a", 2)]
    assert [layers.models for layers in made.layers] == [(None, {}), ({}, None)]
    assert read(made.to_yaml())[0] == made
    assert recipe(base_model="other", models=None, slices=given).base == "other"
    mixed = recipe(models=None, slices=[{**given[0], "base_model": None}, given[1]])
    assert [layers.base for layers in mixed.layers] == [("base", 0), ("a", 2)]


def test_a_slices_base_comes_before_that_of_all() -> None:
    given = [{**each, "base_model": "a"} for each in slices((0, 2), (2, 4))]
    made = recipe(models=None, slices=given)
    assert made.base == "base"
    assert [(layers.base, layers.models) for layers in made.layers] == [
        (("a", 0), ({}, None)),
        (("a", 2), ({}, None)),
    ]


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_means_have_no_base_in_slices(method: str) -> None:
    given = [
        {**each, "base_model": base} for each, base in zip(slices((0, 2), (2, 4)), ("base", "a"), strict=True)
    ]
    made = recipe(merge_method=method, base_model=None, models=None, slices=given)
    assert [layers.models for layers in made.layers] == [({}, {}), ({}, {})]


@pytest.mark.parametrize(
    ("method", "bases", "text"),
    [
        (
            "ties",
            ("base", "b"),
            "base_model of layers 2 to 3: expected one of its sources: base, a, found b; list",
        ),
        (
            "ties",
            ("base", None),
            "base_model of layers 2 to 3: expected one of its sources: base, a, found none",
        ),
        (
            "slerp",
            ("base", "a"),
            "base_model of layers .*: expected a model that is the base wherever it meets",
        ),
    ],
)
def test_bases_of_slices_that_cannot_be(method: str, bases: tuple[str | None, ...], text: str) -> None:
    given = [{**each, "base_model": base} for each, base in zip(slices((0, 2), (2, 4)), bases, strict=True)]
    with pytest.raises(ConfigError, match=text):
        recipe(merge_method=method, base_model=None, models=None, slices=given)


# What is said in several ways.

_SOURCES = [
    {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 0.4}},
    {"model": "b", "layer_range": [0, 2]},
]


def test_a_module_is_the_model() -> None:
    slices_of = [{"sources": _SOURCES, "parameters": {"density": 0.3}}]
    inside = {"models": None, "modules": {"default": {"slices": slices_of}}}
    assert recipe(**inside) == recipe(models=None, slices=slices_of)
    models = [{"model": "a"}, {"model": "b"}]
    assert recipe(models=None, modules={"text": {"models": models}}) == recipe()


def test_what_a_module_says_counts_before_what_all_do() -> None:
    module = {
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": {"filter": "mlp", "value": 2}, "density": 0.5},
    }
    made = recipe(models=None, modules={"default": module}, parameters={"weight": 3, "lambda": 0.5})
    values = made.resolver(1)
    assert [values.value(WEIGHT, name, 0) for name in ("layers.0.mlp.w", "layers.0.attn.w")] == [2, 3]
    assert made.parameters["density"] == 0.5
    assert made.parameters["lambda"] == 0.5


def test_modules_that_say_the_same_are_one() -> None:
    module = {"models": [{"model": "a"}, {"model": "b"}]}
    assert recipe(models=None, modules={"encoder": module, "decoder": module}) == recipe()
    slices_of = {"slices": [{"sources": _SOURCES}]}
    with pytest.raises(ConfigError, match="modules: expected models: each module has layers of its own"):
        recipe(models=None, modules={"encoder": slices_of, "decoder": slices_of})


def test_a_model_may_be_a_mapping() -> None:
    path = {"path": "b", "revision": "v1"}
    made = recipe(base_model={"model": {"path": "base"}}, models=[{"model": "a"}, {"model": {"model": path}}])
    assert (made.base, names(made)) == ("base", ["a", "b@v1"])


def test_a_revision_beside_a_model_is_its_own() -> None:
    models = [{"model": "a"}, {"model": "b", "revision": "dpo-v0"}]
    assert names(recipe(models=models)) == ["a", "b@dpo-v0"]
    assert notes(models=models) == ["models[1].revision is read as b@dpo-v0; mergekit takes the newest"]


def test_keys_that_nobody_reads_are_told_wherever_they_stand() -> None:
    source = {**_SOURCES[0], "glorious_base": True}
    given = [{"sources": [source, _SOURCES[1]], "residual_weight": 0.5}]
    keys = {"models": None, "slices": given, "tokenizer": {"source": "base", "why": 1}}
    assert notes(**keys) == [
        "slices[0].residual_weight is ignored: nothing reads it there",
        "slices[0].sources[0].glorious_base is ignored: nothing reads it there",
        "tokenizer.why is ignored: nothing reads it there",
    ]
    with pytest.raises(ConfigError, match=r"slices\[0\].residual_weight: expected one of sources"):
        read(config(**keys), strict=True)
