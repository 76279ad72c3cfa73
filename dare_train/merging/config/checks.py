"""Values of a recipe, looked at as they come in. All of these raise `ConfigError`, naming the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError


def instances_of(name: str, given: object, kind: type) -> tuple[Any, ...]:
    instances = sequence_of(name, given)
    if not all(isinstance(each, kind) for each in instances):
        raise ConfigError(name, expected=f"{kind.__name__} objects", found=repr(given))
    return instances


def sequence_of(name: str, given: object) -> tuple[Any, ...]:
    if not isinstance(given, (tuple, list)):
        raise ConfigError(name, expected="a tuple", found=repr(given))
    return tuple(given)


def patterns_of(name: str, given: object) -> tuple[str, ...]:
    if isinstance(given, str):
        given = (given,)
    # A set has no order to keep, and a digest needs one.
    return texts_of(
        name,
        sorted(given, key=str) if isinstance(given, (set, frozenset)) else given,
        "a list of name patterns",
    )


def texts_of(name: str, given: object, expected: str) -> tuple[str, ...]:
    if not isinstance(given, (tuple, list)) or not all(isinstance(each, str) and each for each in given):
        raise ConfigError(name, expected=expected, found=repr(given))
    return tuple(given)


def texts_by_text(name: str, given: object, expected: str) -> dict[str, str]:
    """A copy. Values may be empty: that is how `rename` takes something away."""
    if not isinstance(given, Mapping) or not all(
        isinstance(key, str) and key and isinstance(given[key], str) for key in given
    ):
        raise ConfigError(name, expected=expected, found=repr(given))
    return dict(given)


def check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(name, expected="a name", found=repr(value))


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(name, expected=f"one of {', '.join(choices)}", found=repr(value))


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
