"""Who needs weights in full precision says so, and what a quantised checkpoint can do about it."""

from __future__ import annotations

from ...errors import CheckpointError
from ..protocol import Weights
from .checkpoint import Checkpoint
from .dequantise import is_formula
from .quantised import Quantised

_BEFORE = "give the model in full precision, as it was before it was quantised"


def check_full_precision(weights: Weights, *, purpose: str, option: bool = True) -> None:
    """
    Args:
        purpose: what they are needed for.
        option: whether who asks has `dequantize`.

    Raises:
        CheckpointError: they are quantised.
    """
    quantised = Quantised.of(weights)
    if quantised:
        raise quantised_error(weights, quantised, expected=f"full precision, {purpose}", option=option)


def quantised_error(
    weights: Weights, quantised: Quantised, *, expected: str, or_else: str = "", option: bool = True
) -> CheckpointError:
    """`or_else`: another remedy; `option`: as above."""
    remedies = [_BEFORE]
    if option and isinstance(weights, Checkpoint) and is_formula(quantised, weights.tensors):
        remedies.append("or dequantize=True (--dequantize), which reads it so")
    remedies += [f"or {or_else}"] if or_else else []
    found = f"quantised weights: {quantised}"
    return CheckpointError(weights.label, expected=expected, found=found, remedy=", ".join(remedies))
