"""What configurations say and mergekit ignores: parameters of other methods, and what is one for all models
beside one of them. They are left out, and told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

from ..methods.parameters import Parameter, Settings
from ..methods.registry import MERGE_METHODS
from .yaml_parts import Inputs

_OF_THE_MERGE = ("rescale", "seed")
"""What is refused elsewhere, since it decides the result."""
_ELSEWHERE = {"scale", "noise_floor", "default_n_val", "k"}
"""Parameters of mergekit's that methods here have under other names, or not at all."""
_TYPO = 0.81
_BEGINNING = 4


class Foreign:
    """What is left out of a configuration for a method.

    Attributes:
        notes: a sentence for each thing, in the order in which they were found.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._known: Mapping[str, Parameter] = {
            parameter.name: parameter for parameter in MERGE_METHODS[method].parameters
        }
        self._left_out: dict[str, None] = {}

    @property
    def notes(self) -> list[str]:
        return [*self._left_out]

    def out_of(self, inputs: Inputs) -> Inputs:
        """Models and slices without what they say in vain."""
        return inputs.changed(self._of_a_model, self.of_all)

    def of_all(self, settings: Settings) -> Settings:
        """What is said of all models, as far as the method reads it."""
        return {name: setting for name, setting in settings.items() if not self._is_foreign(name)}

    def _of_a_model(self, settings: Settings) -> Settings:
        kept = self.of_all(settings)
        shared = {name for name in kept if name in self._known and not self._known[name].per_model}
        for name in sorted(shared):
            note = f"{name} beside a model is ignored: it is one for all models of {self._method}"
            self._left_out[note] = None
        return {name: setting for name, setting in kept.items() if name not in shared}

    def _is_foreign(self, name: str) -> bool:
        if name in (*self._known, *_OF_THE_MERGE) or (not is_parameter(name) and is_typo(name, self._known)):
            return False
        self._left_out[f"{name} is ignored: {self._method} has no such parameter"] = None
        return True


def is_parameter(name: str) -> bool:
    """Whether a method, here or of mergekit's, has a parameter of this name."""
    return name in _ELSEWHERE or any(
        parameter.name == name for method in MERGE_METHODS.values() for parameter in method.parameters
    )


def is_typo(name: str, known: Collection[str]) -> bool:
    """Whether a name is nearly one that is known, or begins it: what was meant would be ignored with it."""
    plain = name.lower().replace("-", "_")
    begins = len(plain) >= _BEGINNING and any(each.startswith(plain) for each in known)
    return begins or bool(get_close_matches(plain, known, n=1, cutoff=_TYPO))
