"""What a merge method can be told, and the values that a recipe gives: one number, a gradient over layers, or
cases by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real
from typing import Union

from ...errors import ConfigError

Scalar = Union[bool, int, float, str]

_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a merge method."""

    name: str
    kind: type[bool] | type[int] | type[float] | type[str] = float
    default: Scalar | None = None
    """None: it must be given."""
    per_model: bool = False
    """Each model may have its own value; otherwise there is one for the merge."""
    meaning: str = ""
    choices: tuple[Scalar, ...] = ()
    """The only values that there are, where they can be counted."""
    between: tuple[float, float] | None = None
    """The least and the greatest number that means something."""

    def convert(self, value: Scalar, where: str) -> Scalar:
        """`value` as this parameter's kind. Text may stand for numbers, since YAML reads 1e-3 as text; a bool
        is no number.

        Raises:
            ConfigError: it cannot be, or means nothing; the message begins with `where`.
        """
        converted = {bool: _as_bool, int: _as_int, float: _as_float, str: _as_text}[self.kind](value)
        if converted is not None and self.choices and converted not in self.choices:
            raise ConfigError(where, expected=" or ".join(map(str, self.choices)), found=repr(value))
        if converted is None:
            expected = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text"}[
                self.kind
            ]
            raise ConfigError(where, expected=expected, found=repr(value))
        if self.between is not None and not self.between[0] <= float(converted) <= self.between[1]:
            least, most = self.between
            expected = f"at least {least:g}" if most == inf else f"a number in [{least:g}, {most:g}]"
            raise ConfigError(where, expected=expected, found=repr(value))
        return converted


@dataclass(frozen=True)
class Gradient:
    """Values spread evenly over layers, from the first to the last, with straight lines between them: those
    of the model, or of the range of them that a recipe treats apart."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A value for the tensors whose name contains `filter`; None and "*" match every tensor."""

    value: Scalar | Gradient
    filter: str | None = None

    @property
    def matches_all(self) -> bool:
        return self.filter is None or self.filter == "*"

    def matches(self, tensor: str) -> bool:
        return self.matches_all or (self.filter or "") in tensor


Setting = Union[Scalar, Gradient, tuple[Case, ...]]
"""A value for a parameter. Of several cases the first that matches counts."""

Settings = Mapping[str, Setting]
"""Settings by parameter name."""


def value_at(parameter: Parameter, setting: Setting, *, tensor: str, t: float, where: str) -> Scalar | None:
    """What a setting says of one tensor; None when no case matches.

    Args:
        t: where the tensor lies between the first layer, 0, and the last, 1.
        where: begins the message of an error.

    Raises:
        ConfigError: the value is not of the parameter's kind.
    """
    if isinstance(setting, tuple):
        matching = next((case for case in setting if case.matches(tensor)), None)
        return (
            None if matching is None else value_at(parameter, matching.value, tensor=tensor, t=t, where=where)
        )
    if isinstance(setting, Gradient):
        return _along(parameter, setting, t, where)
    return parameter.convert(setting, where)


def scalars(setting: Setting) -> Iterator[Scalar]:
    """Every value that a setting holds."""
    if isinstance(setting, tuple):
        for case in setting:
            yield from scalars(case.value)
    elif isinstance(setting, Gradient):
        yield from setting.values
    else:
        yield setting


def checked_settings(given: object, where: str) -> dict[str, Setting]:
    """A copy of settings, in Python's own number types.

    Raises:
        ConfigError: something in them is no setting; the message ends the parameter's name with `where`.
    """
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"parameters{where}", expected="settings by parameter name", found=repr(given))
    return {name: _checked(setting, f"{name}{where}") for name, setting in given.items()}


def _along(parameter: Parameter, gradient: Gradient, t: float, where: str) -> Scalar:
    values = [parameter.convert(value, where) for value in gradient.values]
    place = t * (len(values) - 1)
    left = int(place)
    start = values[left]
    end = values[min(left + 1, len(values) - 1)]
    # Choices have nothing between them.
    if isinstance(start, (bool, str)) or isinstance(end, (bool, str)):
        return start
    share = place - left
    return parameter.convert((1 - share) * start + share * end, where)


def _checked(setting: object, where: str) -> Setting:
    if isinstance(setting, tuple):
        return tuple(_checked_case(case, where) for case in setting)
    return _checked_value(setting, where)


def _checked_case(case: object, where: str) -> Case:
    if not isinstance(case, Case):
        raise ConfigError(
            where, expected="cases", found=repr(case), remedy="a gradient over layers is a Gradient"
        )
    if case.filter is not None and not isinstance(case.filter, str):
        raise ConfigError(f"filter of {where}", expected="a part of tensor names", found=repr(case.filter))
    return Case(value=_checked_value(case.value, where), filter=case.filter)


def _checked_value(value: object, where: str) -> Scalar | Gradient:
    if not isinstance(value, Gradient):
        return _checked_scalar(value, where)
    if not value.values:
        raise ConfigError(where, expected="at least one value", found="an empty gradient")
    return Gradient(tuple(_checked_scalar(each, where) for each in value.values))


def _checked_scalar(value: object, where: str) -> Scalar:
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real) and _as_float(value) is not None:
        return int(value) if isinstance(value, Integral) else float(value)
    raise ConfigError(
        where, expected="a finite number, true, false, a text, a gradient or cases", found=repr(value)
    )


def _as_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


def _as_int(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _as_float(value)
    return int(number) if number is not None and number.is_integer() else None


def _as_bool(value: object) -> bool | None:
    if isinstance(value, str):
        return _WORDS.get(value.lower())
    return bool(value) if value in (0, 1) else None


def _as_text(value: object) -> str | None:
    return value if isinstance(value, str) else None
