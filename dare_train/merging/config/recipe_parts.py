"""What a recipe lists: models, and ranges of layers, each with settings of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import ConfigError
from ..methods.parameters import Settings, checked_settings
from .checks import check_text, is_integer, sequence_of

TAKES_PART = "takes_part"
"""In a slice of a configuration of our own: false for a model that it leaves out."""


BASE_LAYERS = "base_layers"
"""In such a slice: whose layers stand for the base's, and from which."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of a merge."""

    model: str
    """Its folder, its id on the Hub, or a label."""
    parameters: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_text("model", self.model)
        object.__setattr__(self, "parameters", checked_settings(self.parameters, f" of {self.model!r}"))


@dataclass(frozen=True, kw_only=True)
class LayerRange:
    """Settings for the layers `first` up to but without `last`, of every model. Gradients run from one end of
    it to the other.
    """

    first: int
    last: int
    parameters: Settings = field(default_factory=dict)
    """For all models."""
    models: tuple[Settings | None, ...]
    """For each model, in the recipe's order; None for one that takes no part in these layers."""
    origins: tuple[int, ...] = ()
    """Where the layers begin in each model, 0 for those that take no part; none: where they are in the
    result."""
    base: tuple[str, int] | None = None
    """The model whose layers are the base's here, and where they begin; None: the recipe's, in place."""

    def __post_init__(self) -> None:
        if not (is_integer(self.first) and is_integer(self.last) and 0 <= self.first <= self.last):
            raise ConfigError(
                "layers", expected="first <= last, both at least 0", found=f"{self.first!r} and {self.last!r}"
            )
        object.__setattr__(self, "parameters", checked_settings(self.parameters, f" in {self.label}"))
        settings = (
            None if each is None else checked_settings(each, f" of model {place} in {self.label}")
            for place, each in enumerate(sequence_of("models", self.models))
        )
        object.__setattr__(self, "models", tuple(settings))
        taking = [model is not None for model in self.models]
        if self.origins and len(self.origins) != len(taking):
            expected = f"where layers begin in each of {len(taking)} models"
            raise ConfigError(self.label, expected=expected, found=str(len(self.origins)))
        origins = [origin if takes else 0 for origin, takes in zip(self.origins, taking, strict=False)]
        elsewhere = any(takes and n != self.first for n, takes in zip(origins, taking, strict=False))
        object.__setattr__(self, "origins", tuple(origins) if elsewhere else ())

    @property
    def label(self) -> str:
        return f"layers {self.first} to {self.last - 1}" if self.last > self.first else "a slice of no layers"

    @property
    def moved(self) -> bool:
        """Whether layers have another place in the result than in a model, or the base is another's."""
        return bool(self.origins) or self.base is not None

    def origin(self, model: int) -> int:
        """Where the layers begin in a model."""
        return self.origins[model] if self.origins else self.first
