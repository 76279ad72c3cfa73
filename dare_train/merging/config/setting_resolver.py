"""Which of a recipe's settings counts for a tensor and a model.

The rules are those of mergekit 0.1.5. The first of these that says something counts:

    a model's settings for a range of layers  >  the model's  >  the range's  >  the recipe's  >  the
    parameter's default
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...errors import ConfigError
from ..methods.parameters import Parameter, Scalar, Settings, value_at
from ..models.layers import comes_before_layers, layer_of
from .recipe_parts import LayerRange, Model


@dataclass(frozen=True, kw_only=True)
class SettingResolver:
    """What a recipe says about each parameter, for each tensor and model."""

    method: str
    models: tuple[Model, ...]
    ranges: tuple[LayerRange, ...]
    parameters: Settings
    """As in the recipe."""
    layers: int | Mapping[str, int]
    """The number of layers, of every stack or by stack."""

    def value(self, parameter: Parameter, tensor: str, model: int | None = None) -> Scalar:
        """The value of `parameter`, of its kind.

        Args:
            tensor: its name in the checkpoint.
            model: the place of a model in the recipe, for a parameter that each model has for itself.

        Raises:
            ConfigError: nothing is said about a required parameter, or a value is not of its kind.
        """
        if not parameter.per_model:
            model = None
        where = (
            f"{parameter.name} for {tensor}"
            if model is None
            else f"{parameter.name} of {self.models[model].model!r} for {tensor}"
        )
        layers, t = self._place(tensor)
        for settings in self._levels(layers, model):
            if parameter.name in settings:
                value = value_at(parameter, settings[parameter.name], tensor=tensor, t=t, where=where)
                if value is not None:
                    return value
        if parameter.default is None:
            raise ConfigError(
                where,
                expected=f"a value: {self.method} needs one",
                found="none",
                remedy="add it to the parameters",
            )
        return parameter.convert(parameter.default, where)

    def takes_part(self, tensor: str, model: int) -> bool:
        """Whether a model is one of those that a slice merges."""
        layers, _ = self._place(tensor)
        return layers is None or layers.models[model] is not None

    def _levels(self, layers: LayerRange | None, model: int | None) -> Iterator[Settings]:
        """From the first that counts to the last."""
        if model is not None:
            if layers is not None:
                yield layers.models[model] or {}
            yield self.models[model].parameters
        if layers is not None:
            yield layers.parameters
        yield self.parameters

    def _place(self, tensor: str) -> tuple[LayerRange | None, float]:
        """The range that a tensor belongs to, and where in it, or in the model, it lies: from 0 to 1."""
        place = layer_of(tensor)
        if place is None:
            return (self.ranges[0 if comes_before_layers(tensor) else -1] if self.ranges else None), 0.0
        stack, index = place
        count = self.layers if isinstance(self.layers, int) else self.layers.get(stack, 0)
        if index >= count:
            raise ConfigError(
                tensor,
                expected=f"a layer below {count}",
                found=f"layer {index}",
                remedy="count the layers of this model",
            )
        for each in self.ranges:
            if each.first <= index < each.last:
                return each, _share(index - each.first, each.last - each.first)
        return None, _share(index, count)


def _share(place: int, count: int) -> float:
    return place / (count - 1) if count > 1 else 1.0
