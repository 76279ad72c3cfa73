"""What sends tokens to experts: a vector for each expert and layer, from prompts or by draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import to_float
from ..errors import CheckpointError, ConfigError
from ..package.masks import generator_of
from ..weights.files.checkpoint import Checkpoint
from .expert_recipe import DRAWN, Expert, ExpertRecipe

Gates = NDArray[np.float32]
"""Shape (layers, experts, hidden size)."""
_TINY = 1e-8
_ALIKE = 5.0
"""Condition number of a layer's gates from which some experts get nearly no tokens."""


def gates_for(recipe: ExpertRecipe, base: Checkpoint, *, layers: int, width: int, seed: int) -> Gates:
    """Gates of the experts and, behind them, of those that every token goes to, if those have any.

    Args:
        layers, width: of the base: how many, and the size of their hidden states.
        seed: of what is drawn.

    Raises:
        CheckpointError: the base has no tokenizer, or no embedding.
        ConfigError: torch or transformers are not installed.
    """
    experts = [*recipe.experts]
    if recipe.gate in DRAWN or any(expert.positive for expert in recipe.shared):
        experts += recipe.shared
    if recipe.gate in DRAWN:
        return np.stack([_drawn(recipe, layer, len(experts), width, seed) for layer in range(layers)])
    of_prompts = _embedded(base, layers) if recipe.gate == "cheap_embed" else _hidden(base, recipe)
    return np.stack([_direction(of_prompts, expert) for expert in experts], axis=1)


def alike(gates: Gates) -> list[int]:
    """Layers in which experts are told apart badly."""
    return [
        layer for layer, of_layer in enumerate(gates) if np.linalg.cond(of_layer.astype(np.float64)) > _ALIKE
    ]


def _drawn(recipe: ExpertRecipe, layer: int, experts: int, width: int, seed: int) -> Gates:
    """Standard normal; or uniform within ±1/√width, as a new linear layer is."""
    generator = generator_of(seed, f"gate of layer {layer}")
    if recipe.gate == "random":
        return generator.standard_normal((experts, width)).astype(np.float32)
    bound = 1 / np.sqrt(width)
    return generator.uniform(-bound, bound, (experts, width)).astype(np.float32)


OfPrompts = Callable[[Sequence[str]], Any]
"""A vector for each layer, of some prompts: a tensor of shape (layers, hidden size)."""


def _direction(of_prompts: OfPrompts, expert: Expert) -> Gates:
    """What prompts for an expert have and those against it have not, of length 1."""
    vectors = of_prompts(expert.positive)
    if expert.negative:
        vectors = vectors - of_prompts(expert.negative)
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=_TINY)
    found: Gates = unit.float().numpy()
    return found


def _embedded(base: Checkpoint, layers: int) -> OfPrompts:
    """The mean direction of the embeddings of all tokens, the same in each layer."""
    torch = _torch()
    tokenizer = _tokenizer(base.folder)
    name = "model.embed_tokens.weight"
    if name not in base.tensors:
        raise CheckpointError(base.label, expected=name, found="none, for gate_mode cheap_embed")
    info = base.tensors[name]
    width = info.shape[1]

    def of_prompts(prompts: Sequence[str]) -> Any:
        tokens = _tokens(tokenizer, prompts)
        ids = tokens["input_ids"][tokens["attention_mask"].bool()].tolist()
        rows = [to_float(base.read(name, token * width, width), info.dtype) for token in ids]
        total = torch.from_numpy(np.sum(np.stack(rows), axis=0, dtype=np.float64))
        return (total / total.norm().clamp(min=_TINY)).repeat(layers, 1)

    return of_prompts


def _hidden(base: Checkpoint, recipe: ExpertRecipe) -> OfPrompts:
    """The hidden states that go into each layer, in the mean over prompts: of the last token, or in the mean
    over tokens. In bfloat16, as mergekit works them out.
    """
    torch = _torch()
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(base.folder)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16).train(False)

    def of_prompts(prompts: Sequence[str]) -> Any:
        tokens = _tokens(tokenizer, prompts)
        with torch.no_grad():
            output = model(**tokens, output_hidden_states=True)
        states = torch.stack(output.hidden_states[:-1])
        of_each = states.mean(dim=2) if recipe.gate == "hidden_avg" else states[:, :, -1]
        return of_each.sum(dim=1) / len(prompts)

    return of_prompts


def _tokens(tokenizer: Any, prompts: Sequence[str]) -> Any:
    begin = tokenizer.bos_token or ""
    texts = [f"{begin}{prompt}" for prompt in prompts]
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except (OSError, ValueError) as error:
        remedy = "gate_mode: random needs none"
        raise CheckpointError(
            str(folder), expected="a tokenizer, for the prompts", found="none", remedy=remedy
        ) from error
    tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        expected = "a token for the beginning or the end, to pad prompts with"
        raise CheckpointError(str(folder), expected=expected, found="neither")
    return tokenizer


def _torch() -> Any:
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        remedy = 'pip install "dare_train[train]", or gate_mode: random'
        raise ConfigError(
            "gate_mode", expected="torch and transformers", found="not installed", remedy=remedy
        ) from error
    return torch
