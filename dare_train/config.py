"""What a user decides about a delta: how much to drop, how to store it, which tensors it covers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Integral, Real
from types import MappingProxyType
from typing import Literal, Union, get_args

from .errors import ConfigError, brief

Rescale = Literal["paper", "none"]
Values = Literal["auto", "exact", "rounded", "int8", "int4", "sign"]
Target = Literal["trained", "base"]
Rounding = Literal["stochastic", "nearest"]
Source = Literal["weights", "master"]
"""What is read where an engine trains fp32 masters beside 16-bit weights: the weights, or the masters."""

Patterns = Union[str, Collection[str]]
"""A shell-style name pattern, or several."""

DRAW_RANGE = 1 << 16
"""Number of distinct draws of the mask generator."""

_LONGEST_NAME = 100
MOST_MASKS = 10_000
"""Of a figure: a hundredth of its spread over masks is left of the mean's."""


def threshold_of(p: float) -> int:
    """The smallest draw that is kept at drop rate `p`: round(p · 2¹⁶)."""
    return round(p * DRAW_RANGE)


def check_drop_rate(p: float, *, name: str = "p") -> float:
    """`p` itself, when it lies in [0, 1) and leaves at least one draw that keeps an element.

    Raises:
        ConfigError: otherwise.
    """
    number = isinstance(p, Real) and not isinstance(p, bool)
    if not number or not 0 <= p < 1:
        raise ConfigError(name, expected="a number in [0, 1)", found=repr(p), remedy="0 keeps everything")
    if threshold_of(p) == DRAW_RANGE:
        raise ConfigError(name, expected=f"at most 1 - 2**-16 = {1 - 1 / DRAW_RANGE:.6f}", found=repr(p))
    return float(p)


def check_count(name: str, count: int, *, at_least: int = 1, at_most: int | None = None) -> int:
    """`count` itself, when it is a whole number in a range.

    Raises:
        ConfigError: otherwise.
    """
    number = isinstance(count, Integral) and not isinstance(count, bool)
    if not number or count < at_least or (at_most is not None and count > at_most):
        expected = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most:,}"
        raise ConfigError(name, expected=expected, found=brief(count))
    return int(count)


def check_seed(seed: int, *, name: str = "seed") -> int:
    """`seed` itself, when it is one.

    Raises:
        ConfigError: otherwise.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise ConfigError(name, expected="an integer in [0, 2**64)", found=brief(seed))
    return int(seed)


def seeds_of(masks: int, first_seed: int = 0, *, name: str = "seeds") -> list[int]:
    """The seeds of so many masks, from the first onwards.

    Raises:
        ConfigError: there are none or more than `MOST_MASKS`, or one is no seed.
    """
    count = check_count(name, masks, at_most=MOST_MASKS)
    first = check_seed(first_seed, name="first_seed")
    check_seed(first + count - 1, name="first_seed + seeds - 1")
    return [first + place for place in range(count)]


def check_folder_name(argument: str, name: str) -> str:
    """`name` itself, when a folder in another one can be called so.

    Raises:
        ConfigError: otherwise.
    """
    plain = isinstance(name, str) and name.isprintable() and not {*"/\\"} & {*name}
    if not plain or name in ("", ".", "..") or len(name) > _LONGEST_NAME:
        expected = f"the name of a folder, of at most {_LONGEST_NAME} characters"
        raise ConfigError(argument, expected=expected, found=brief(name))
    return name


@dataclass(frozen=True, kw_only=True)
class DareConfig:
    """How a delta becomes a package. Patterns are shell-style (`fnmatch`) on checkpoint tensor names.

    Raises:
        ConfigError: a value is out of range, or two fields conflict.
    """

    p: float | Mapping[str, float] = 0.9
    """Probability that an element of the delta is dropped, in [0, 1); or a mapping from name patterns to it,
    first match wins."""

    seed: int = 0
    """Selects the mask, in [0, 2**64). The same seed, tensor name and index always give the same decision."""

    rescale: Rescale = "paper"
    """What multiplies the survivors: `paper`, 1 / (1 - p) (arXiv 2311.03099, eq. 2); `none`, 1 (the drop-only
    baseline)."""

    values: Values = "auto"
    """How kept values are stored. `exact`: bit for bit. `rounded`: the delta as bfloat16. `int8`, `int4`,
    `sign`: quantized
    in groups, unbiased. `auto`: `exact` for 16-bit weights and wherever nothing is dropped, else
    `rounded`."""

    include: Patterns = ("*",)
    """Only tensors whose name matches one of these are covered; the others stay as they are in the base."""

    exclude: Patterns = ()
    """Tensors whose name matches one of these are not covered, whatever `include` says."""

    whole: Patterns = ()
    """Tensors carried as they are instead of as a delta, such as a re-initialised head."""

    allow_nonfinite: bool = False
    """Accept NaN and infinity in the fine-tuned weights instead of refusing them."""

    dtype: Target | None = None
    """Of the result, where weights finer than the base's were trained, as in fp32 or by adapters on a 16-bit
    base. `trained`: theirs. `base`: the base's, on whose grid elements land after they were rescaled
    (docs/format.md §5.7). By default `base` where something is dropped and `values` are `auto`, since
    small updates survive that (docs/results.md)."""

    rounding: Rounding = "stochastic"
    """Where an element between two numbers of the base's dtype lands. `stochastic`: on either, so that its
    expectation is right. `nearest`: on the nearer."""

    _rates: Mapping[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.p if isinstance(self.p, Mapping) else {"*": self.p}
        if not given:
            raise ConfigError("p", expected="at least one pattern", found="an empty mapping")
        if not all(isinstance(pattern, str) for pattern in given):
            raise ConfigError("p", expected="name patterns", found=repr(list(given)))
        rates = {
            pattern: check_drop_rate(rate, name=f"p[{pattern!r}]" if pattern != "*" else "p")
            for pattern, rate in given.items()
        }
        object.__setattr__(self, "_rates", MappingProxyType(rates))
        for name in ("include", "exclude", "whole"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        check_seed(self.seed)
        _check_choice("rescale", self.rescale, get_args(Rescale))
        _check_choice("values", self.values, get_args(Values))
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, get_args(Target))
        _check_choice("rounding", self.rounding, get_args(Rounding))
        if self.dtype == "base" and self.values not in ("auto", "exact"):
            expected = '"auto" or "exact" with dtype="base"'
            remedy = "what lands on the base's grid is stored exactly"
            raise ConfigError("values", expected=expected, found=repr(self.values), remedy=remedy)

    @property
    def lands(self) -> bool:
        """Whether weights finer than the base's land on the base's grid."""
        if self.dtype is None:
            return self.values == "auto" and any(map(threshold_of, self._rates.values()))
        return self.dtype == "base"

    @property
    def patterns(self) -> Mapping[str, Collection[str]]:
        """Name patterns by the field that they are given for."""
        named = {name: getattr(self, name) for name in ("include", "exclude", "whole")}
        return {**named, "p": tuple(self._rates)}

    def rule(self, tensor: str) -> TensorRule:
        """All that this says of one tensor."""
        rates = (rate for pattern, rate in self._rates.items() if fnmatchcase(tensor, pattern))
        return TensorRule(
            tensor=tensor,
            covered=matches(tensor, self.include) and not matches(tensor, self.exclude),
            whole=matches(tensor, self.whole),
            values=self.values,
            rescale=self.rescale,
            rate=next(rates, None),
            patterns=tuple(self._rates),
        )

    def drop_rate(self, tensor: str) -> float:
        """The drop rate p for one tensor.

        Raises:
            ConfigError: `p` is a mapping and no pattern matches.
        """
        return self.rule(tensor).p


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """What a `DareConfig` says of one tensor."""

    tensor: str

    covered: bool
    """Whether the package takes part in this tensor at all."""

    whole: bool
    """Whether it is carried as it is, instead of as a delta."""

    values: Values
    rescale: Rescale

    rate: float | None
    """The drop rate; None where no pattern of `p` matches, which matters only where a delta is dropped."""

    patterns: tuple[str, ...]
    """Those of `p`."""

    @property
    def p(self) -> float:
        """The drop rate.

        Raises:
            ConfigError: `p` is a mapping and no pattern matches.
        """
        if self.rate is None:
            expected = f"a pattern that matches it among {list(self.patterns)}"
            raise ConfigError(f"p for {self.tensor}", expected=expected, remedy='add "*"')
        return self.rate

    @property
    def threshold(self) -> int:
        """The smallest draw that is kept."""
        return threshold_of(self.p)

    @property
    def factor(self) -> float:
        """The rescale γ for survivors: 2¹⁶ / (2¹⁶ - threshold), or 1."""
        return DRAW_RANGE / (DRAW_RANGE - self.threshold) if self.rescale == "paper" else 1.0


def matches(name: str, patterns: Patterns) -> bool:
    """Whether one of the patterns matches; a `DareConfig` holds tuples."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def unmatched(patterns: Patterns, names: Collection[str]) -> list[str]:
    """Those of some name patterns that match none of the names."""
    given = (patterns,) if isinstance(patterns, str) else patterns
    return [pattern for pattern in given if not any(fnmatchcase(name, pattern) for name in names)]


def _patterns(name: str, given: object) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    # Hydra's lists are no `list`.
    patterns = tuple(given) if isinstance(given, (Sequence, Set)) else (None,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(name, expected="a list of name patterns", found=repr(given))
    return patterns


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(name, expected=f"one of {', '.join(choices)}", found=repr(value))
