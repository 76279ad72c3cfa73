"""What a user says of tensors by their names, and what comes to nothing: it is told, since it was meant for
something.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ..config import DareConfig, matches, unmatched
from ..errors import ConfigError
from .plan import TensorPlan


def notes_on_patterns(
    config: DareConfig, plans: Sequence[TensorPlan], others: Collection[str], *, label: str
) -> list[str]:
    """A sentence on each pattern that matches nothing, and on tensors that travel though they are excluded.

    Args:
        plans: of the result's tensors.
        others: names of tensors that only the base has.
        label: what messages call base and model.

    Raises:
        ConfigError: `include` names none.
    """
    names = {*others, *(plan.name for plan in plans)}
    missing = {option: unmatched(patterns, names) for option, patterns in config.patterns.items()}
    if names and len(missing["include"]) == len(config.include):
        found = ", ".join(missing["include"]) or "none"
        raise ConfigError("include", expected=f"name patterns of tensors of {label}", found=found)
    unknown = [
        f"{option}: no tensor of {label} is called {pattern}: is it misspelt?"
        for option, patterns in missing.items()
        for pattern in patterns
    ]
    return [*unknown, *_travelling(config, plans)]


def notes_on_renaming(rename: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """A sentence on each part of names to replace that no name has."""
    given = [*names]
    return [
        f"rename: no tensor has {old} in its name: is it misspelt?"
        for old in rename
        if not any(old in name for name in given)
    ]


def _travelling(config: DareConfig, plans: Sequence[TensorPlan]) -> Iterator[str]:
    excluded = [plan.name for plan in plans if plan.kind == "whole" and matches(plan.name, config.exclude)]
    if excluded:
        more = f" and {len(excluded) - 1} more" if len(excluded) > 1 else ""
        yield f"exclude: {excluded[0]}{more} travels all the same, since the base has none of its form"
