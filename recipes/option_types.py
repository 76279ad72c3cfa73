"""Numbers on a recipe's command line. What means nothing is refused before anything begins: a Trainer takes 0
steps for three epochs.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from math import inf

from dare_train import DareConfig, DareError


def count(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"expected at least 1, found {number}")
    return number


def seed(text: str) -> int:
    """What all libraries' generators take."""
    number = int(text)
    if not 0 <= number < 1 << 32:
        raise ArgumentTypeError(f"expected a whole number in [0, 2**32), found {number}")
    return number


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < inf:
        raise ArgumentTypeError(f"expected a number above 0, found {number:g}")
    return number


def drop_rate(text: str) -> float:
    rate = float(text)
    try:
        DareConfig(p=rate)
    except DareError as error:
        raise ArgumentTypeError(str(error).removeprefix("p: ")) from error
    return rate


def density(text: str) -> float:
    """A share of elements that are kept."""
    number = float(text)
    if not 0 < number <= 1:
        raise ArgumentTypeError(f"expected a share in (0, 1], found {number:g}")
    return number
