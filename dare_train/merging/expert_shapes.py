"""Architectures that a mixture of experts can have: which dense models they are made of, what their tensors
are called, and their configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..dtypes import DTYPE_NAMES
from ..errors import CheckpointError, ConfigError, brief
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.config_file import config_beside
from ..weights.skeletons import asks_for
from .expert_recipe import DRAWN, ExpertRecipe

Gated = Literal["none", "plain", "gated"]
"""Whether an architecture has an expert that every token goes to, and whether that one has a gate."""
_IN_MLP = re.compile(r"^(model\.layers\.(\d+)\.)mlp\.(.+)$")
_OWN_TO_A_CLASS = (
    "model_type", "architectures", "transformers_version", "layer_types", "sliding_window",
    "use_sliding_window", "_name_or_path",
)  # fmt: skip
"""What a configuration says of its own class, or that the result does without, as mergekit's does."""
_CODE_OF_DEEPSEEK = "deepseek-ai/deepseek-moe-16b-base"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An architecture of the result."""

    name: str
    of: tuple[str, ...]
    """The model types of the dense models."""
    shared: Gated
    model_type: str
    architecture: str
    block: str = "mlp"
    """What a layer's experts and router lie in."""
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """What an expert's matrices are called, in this order."""
    shared_block: str = ""
    biased: bool = False
    """Whether queries, keys and values need biases."""

    def expert(self, name: str, number: int) -> str:
        """What a tensor of a dense model's MLP is called in an expert."""
        begin, _, inner = _in_mlp(name)
        return f"{begin}{self.block}.experts.{number}.{self._part(inner)}"

    def in_shared(self, name: str) -> str:
        """The same in the expert that every token goes to."""
        begin, _, inner = _in_mlp(name)
        return f"{begin}{self.block}.{self.shared_block}.{inner}"

    def router(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def shared_router(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}.{self.shared_block}_gate.weight"

    def _part(self, inner: str) -> str:
        part, _, leaf = inner.partition(".")
        known = dict(zip(("gate_proj", "up_proj", "down_proj"), self.parts, strict=True))
        return f"{known.get(part, part)}.{leaf}"


SHAPES = (
    Shape(
        name="Mixtral", of=("llama", "mistral"), shared="none", model_type="mixtral",
        architecture="MixtralForCausalLM", block="block_sparse_moe", parts=("w1", "w3", "w2"),
    ),
    Shape(
        name="DeepSeek MoE", of=("llama", "mistral"), shared="plain", model_type="deepseek",
        architecture="DeepseekForCausalLM", shared_block="shared_experts",
    ),
    Shape(
        name="Qwen MoE", of=("llama", "mistral", "qwen2"), shared="gated", model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM", shared_block="shared_expert", biased=True,
    ),
    Shape(
        name="Qwen3 MoE", of=("qwen3",), shared="none", model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
    ),
)  # fmt: skip
"""The first that fits is taken."""


def is_in_mlp(name: str) -> bool:
    return _IN_MLP.match(name) is not None


def _in_mlp(name: str) -> tuple[str, str, str]:
    found = _IN_MLP.match(name)
    assert found is not None
    return found.group(1), found.group(2), found.group(3)


def shape_for(recipe: ExpertRecipe, models: Mapping[str, Checkpoint]) -> Shape:
    """
    Args:
        models: by the name in the recipe.

    Raises:
        ConfigError: there is none of that name, or none that can be made of these models.
    """
    wanted = recipe.architecture.lower()
    named = [shape for shape in SHAPES if shape.name.lower().startswith(wanted)]
    if not named:
        expected = f"one of {', '.join(shape.name for shape in SHAPES)}"
        raise ConfigError("architecture", expected=expected, found=recipe.architecture)
    types = {str(config_beside(model).get("model_type")) for model in models.values()}
    complaints = {shape: _complaint(shape, recipe, types) for shape in named}
    fitting = [shape for shape, complaint in complaints.items() if not complaint]
    if not fitting:
        found = "; ".join(f"{shape.name}: {complaint}" for shape, complaint in complaints.items())
        raise ConfigError("experts", expected="models of which an architecture can be made", found=found)
    return fitting[0]


def _complaint(shape: Shape, recipe: ExpertRecipe, types: set[str]) -> str:
    """Why an architecture cannot be made of models; nothing where it can."""
    prompts = any(expert.positive or expert.negative for expert in recipe.shared)
    if len(types) != 1 or not types <= {*shape.of}:
        return f"takes models of one type among {', '.join(shape.of)}, not {', '.join(sorted(types))}"
    if shape.shared == "none" and recipe.shared:
        return "has no shared_experts"
    if shape.shared == "plain" and (len(recipe.shared) > 1 or prompts):
        return "has at most one of shared_experts, without prompts"
    if shape.shared == "gated":
        known = recipe.gate in DRAWN or (recipe.shared and recipe.shared[0].positive)
        return "" if len(recipe.shared) == 1 and known else "has one of shared_experts, with prompts"
    return ""


def config_for(shape: Shape, recipe: ExpertRecipe, base: Checkpoint, code: str) -> dict[str, Any]:
    """The result's `config.json`.

    Args:
        code: of the result's dtype.

    Raises:
        CheckpointError: the base's asks for code, or for modules without end.
        ConfigError: transformers is not installed.
    """
    raw = config_beside(base)
    for name, value in asks_for(raw):
        raise CheckpointError(
            base.label,
            expected="a configuration without code and without endless modules",
            found=f"{name}: {value}",
        )
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        remedy = 'pip install "dare_train[train]"'
        raise ConfigError("moe", expected="transformers", found="not installed", remedy=remedy) from error
    try:
        complete = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw)).to_dict()
    except Exception as error:
        expected = f"a configuration of {raw['model_type']}"
        raise CheckpointError(base.label, expected=expected, found=brief(error)) from error
    fields = {name: value for name, value in complete.items() if name not in _OWN_TO_A_CLASS}
    fields |= {"architectures": [shape.architecture], "num_experts_per_tok": recipe.per_token}
    if shape.model_type == "deepseek":
        return _of_deepseek(fields, recipe, code)
    count = "num_local_experts" if shape.model_type == "mixtral" else "num_experts"
    fields |= {count: len(recipe.experts), "dtype": DTYPE_NAMES[code]}
    if shape.model_type != "mixtral":
        fields |= {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": []}
        fields["moe_intermediate_size"] = fields["intermediate_size"]
    if shape.shared == "gated":
        fields["shared_expert_intermediate_size"] = fields["intermediate_size"]
    result: dict[str, Any] = CONFIG_MAPPING[shape.model_type](**fields).to_diff_dict()
    return {"architectures": [shape.architecture], "model_type": shape.model_type, **result}


def _of_deepseek(fields: dict[str, Any], recipe: ExpertRecipe, code: str) -> dict[str, Any]:
    """Of a class that transformers does not have: of the code in its repository, which is older than
    `rope_parameters` and `dtype`.
    """
    rope = dict(fields.pop("rope_parameters", None) or {})
    fields.pop("dtype", None)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "dynamic"):
        expected = "rope_type default, linear or dynamic, which DeepSeek's code knows"
        raise ConfigError("architecture", expected=expected, found=str(kind))
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
    modules = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
    modules |= {"AutoModel": "modeling_deepseek.DeepseekModel"}
    modules |= {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}
    return {
        **fields,
        "model_type": "deepseek",
        "torch_dtype": DTYPE_NAMES[code],
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if kind == "default" else {"type": kind, **scaling},
        "n_routed_experts": len(recipe.experts),
        "n_shared_experts": len(recipe.shared) or None,
        "moe_intermediate_size": fields["intermediate_size"],
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "auto_map": {name: f"{_CODE_OF_DEEPSEEK}--{module}" for name, module in modules.items()},
    }


def notes_on(shape: Shape, experts: Sequence[object]) -> list[str]:
    """What there is to say of a result."""
    notes = []
    if shape.model_type == "deepseek":
        notes.append(
            f"{shape.name}: no class of transformers; it loads with trust_remote_code=True, by the code of "
            f"{_CODE_OF_DEEPSEEK}"
        )
    if len(experts) & (len(experts) - 1):
        notes.append(f"{len(experts)} experts are no power of two, which llama.cpp asks for")
    return notes
