"""What configurations say and mergekit ignores: parameters of other methods, what is one for all models
beside one of them, keys that nobody reads. They are left out, and told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from ..methods.parameters import Parameter, Settings
from ..methods.registry import MERGE_METHODS
from .yaml_parts import REMEDIES, Inputs

_OF_THE_MERGE = ("rescale", "seed")
"""What is refused elsewhere, since it decides the result."""
_ELSEWHERE = {"scale", "noise_floor", "default_n_val", "k"}
"""Parameters of mergekit's that methods here have under other names, or not at all."""
_TYPO = 0.81


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
        if name in (*self._known, *_OF_THE_MERGE) or (not _is_known(name) and is_typo(name, self._known)):
            return False
        self._left_out[f"{name} is ignored: {self._method} has no such parameter"] = None
        return True


def _is_known(name: str) -> bool:
    return name in _ELSEWHERE or any(
        parameter.name == name for method in MERGE_METHODS.values() for parameter in method.parameters
    )


def is_typo(name: str, known: Collection[str]) -> bool:
    """Whether a name is nearly one that is known: what was meant would be ignored with it."""
    return bool(get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=_TYPO))


def without_stray(document: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """A configuration without keys at its top that nobody reads, and a sentence for each. What is nearly a
    key that is known, or asks for something that is not done here, stays, and will be refused.
    """
    stray = [
        key
        for key in document
        if isinstance(key, str) and key not in known and key not in REMEDIES and not is_typo(key, known)
    ]
    kept = {key: value for key, value in document.items() if key not in stray}
    return kept, [f"{key} is ignored: no merge here or in mergekit reads it" for key in stray]
