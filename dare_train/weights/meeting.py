"""A base and a model whose names must meet: aligned, renamed where the user says so, and refused where much
of the one is not in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ..errors import ConfigError, TensorMismatch
from .alignment import align
from .protocol import TensorInfo, Weights, under
from .renaming import check_names_meet, explained


def meet(
    base: Weights, model: Weights, *, known: Callable[[str], bool] = lambda name: False
) -> tuple[Weights, str]:
    """As `align`, with names that meet.

    Args:
        known: whether the user has said of a tensor that it is new, or is to stay as in the base.

    Raises:
        TensorMismatch: not one name in common; or many of the base's tensors lie in the model under
            other names.
    """
    aligned, prefix = aligned_or_explained(base, model.tensors, label=model.label)
    told = {name: info for name, info in model.tensors.items() if not known(name)}
    asked = {name: info for name, info in aligned.tensors.items() if not known(name)}
    check_names_meet(asked, told, base_label=base.label, label=model.label)
    return aligned, prefix


def aligned_or_explained(
    base: Weights, tensors: Mapping[str, TensorInfo], *, label: str
) -> tuple[Weights, str]:
    """As `align`.

    Raises:
        TensorMismatch: not one name in common; if shapes are, with the names that would be.
    """
    try:
        return align(base, tensors.keys(), model=label)
    except TensorMismatch as error:
        better = explained(base.tensors, tensors, base_label=base.label, label=label)
        if better is None:
            raise
        raise better from error


def renamed_names(names: Iterable[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Names after `rename`, each with the name that it had.

    Raises:
        ConfigError: two become one.
    """
    result: dict[str, str] = {}
    for given in names:
        name = given
        for old, new in rename.items():
            name = name.replace(old, new)
        put_name(result, name, given)
    return result


def renamed(weights: Weights, rename: Mapping[str, str]) -> Weights:
    """Weights under other names."""
    return under(weights, renamed_names(weights.tensors, rename)) if rename else weights


def put_name(names: dict[str, str], name: str, given: str) -> None:
    """
    Raises:
        ConfigError: another one has the name.
    """
    if name in names:
        raise ConfigError(
            "rename", expected="different names for all tensors", found=f"{names[name]} and {given} as {name}"
        )
    names[name] = given
