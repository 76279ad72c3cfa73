"""Two checkpoints that are quantised in one scheme: what belongs to one weight travels as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import DareConfig
from ..errors import CheckpointError, ConfigError
from ..weights.files.full_precision import quantised_error
from ..weights.files.quantised import Quantised, Unit
from ..weights.protocol import Weights

_LOSSLESS = "p=0 (--p 0), of which two checkpoints in one scheme come back bit for bit"


def check_one_scheme(base: Weights, tuned: Weights, said: Mapping[str, Any]) -> None:
    """Before names are looked at, which differ from scheme to scheme.

    Args:
        said: a configuration that says how weights are quantised.

    Raises:
        CheckpointError: one is quantised and the other is not, or in another scheme.
    """
    of_base, of_tuned = Quantised(base.tensors, said), Quantised(tuned.tensors, said)
    if of_base.schemes != of_tuned.schemes:
        raise _differ(base, tuned, of_base, of_tuned)


def parts_of_units(
    base: Weights,
    tuned: Weights,
    config: DareConfig,
    *,
    said: Mapping[str, Any],
    masks: Mapping[str, Any] | None = None,
) -> Mapping[str, bool]:
    """The tensors of both that are parts of quantised weights, under the same names; and whether one is the
    bits of the weight, not a scale.

    Raises:
        CheckpointError: they are quantised in other places; or elements would be dropped.
        ConfigError: an option would tear a unit apart.
    """
    of_base, of_tuned = Quantised(base.tensors, said), Quantised(tuned.tensors, said)
    if of_base.layout != of_tuned.layout:
        raise _differ(base, tuned, of_base, of_tuned)
    for unit in of_tuned.units:
        _check(unit, tuned, of_tuned, config, masks or {})
    return {part: part == unit.packed for part, unit in of_tuned.unit_of.items()}


def _differ(base: Weights, tuned: Weights, of_base: Quantised, of_tuned: Quantised) -> CheckpointError:
    weights, quantised, other, of_other = (tuned, of_tuned, base, of_base)
    if not quantised:
        weights, quantised, other, of_other = (base, of_base, tuned, of_tuned)
    expected = f"the same precision in both, and {other.label} {_described(of_other)}"
    return quantised_error(weights, quantised, expected=expected)


def _described(quantised: Quantised) -> str:
    return f"is quantised otherwise: {quantised}" if quantised else "is not quantised"


def _check(
    unit: Unit, tuned: Weights, quantised: Quantised, config: DareConfig, masks: Mapping[str, Any]
) -> None:
    rules = {name: config.rule(name) for name in sorted(unit.parts)}
    if len({(rule.covered, rule.whole) for rule in rules.values()}) > 1:
        expected = (
            f"include, exclude and whole to name all of {', '.join(rules)}, which are one weight, or none"
        )
        raise ConfigError(unit.weight, expected=expected, found="some of them")
    covered = [rule for rule in rules.values() if rule.covered and not rule.whole]
    if any(rule.threshold for rule in covered):
        expected = "full precision, of which elements can be dropped"
        raise quantised_error(tuned, quantised, expected=expected, or_else=_LOSSLESS)
    if covered and config.values not in ("auto", "exact"):
        raise ConfigError(
            f"values of {unit.weight}", expected="exact: it is quantised", found=repr(config.values)
        )
    masked = sorted(unit.parts & masks.keys())
    if masked:
        raise ConfigError(f"masks[{masked[0]!r}]", expected="a weight in full precision", found=unit.scheme)
