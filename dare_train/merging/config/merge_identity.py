"""What two merges have in common that do the same, wherever their models lie."""

from __future__ import annotations

from dataclasses import replace

from .recipe import Recipe
from .recipe_parts import Model


def place_in(recipe: Recipe, number: int) -> str:
    """What statistics of a model's inputs are marked with that come through a merge's own layers."""
    return f"{number + 1} of {len(recipe.models)} in {_identity(recipe)}"


def _identity(recipe: Recipe) -> str:
    """SHA-256, in hex, of all that a recipe says of weights, with models as numbers."""
    numbers = {model.model: str(number) for number, model in enumerate(recipe.models)}
    models = tuple(Model(model=numbers[model.model], parameters=model.parameters) for model in recipe.models)
    take = {pattern: numbers[model] for pattern, model in recipe.take.items()}
    return replace(
        recipe, base="base", models=models, take=take, tokenizer=None, tokens={}, pad_to_multiple_of=None,
        chat_template="", fisher=(), gram=(),
    ).digest()  # fmt: skip
