"""Weights in training that are finer than their base's: what is read of them, and what is said."""

from __future__ import annotations

import logging
from collections.abc import Collection

from ..config import DareConfig, Source
from ..extracting.plan import dtypes_at_hand
from ..weights.live.live import LiveWeights, Reading
from ..weights.protocol import Weights

_log = logging.getLogger("dare_train")


def reading_of(config: DareConfig, source: Source) -> Reading:
    """What is read of a live model: to land on the base's grid, the finest weights at hand."""
    return "finest" if config.dtype == "base" else source


def tell(
    own: Weights, live: LiveWeights, merged: Collection[str], config: DareConfig, *, lands: bool
) -> None:
    """Say in a line what packages have where finer weights than the base's are trained, and what the other
    choice would be.

    Args:
        own: the base in its own dtypes.
        merged: names of tensors under adapters.
        lands: whether elements land on the base's grid.
    """
    at_hand = dtypes_at_hand(own, live, merged)
    grids = {name: own.tensors[name].dtype for name in at_hand}
    finer = [name for name, dtype in at_hand.items() if dtype.mantissa_bits > grids[name].mantissa_bits]
    if not finer:
        return
    name, grid = finer[0], grids[finer[0]].code
    how = "by adapters" if name in merged else f"in {at_hand[name].code}"
    if lands:
        written = f"packages land on its grid, rescaled before they are rounded ({config.rounding})"
        other = 'dtype="trained" keeps what was trained as it is, and rounds adapters first'
    else:
        written = f"packages are in {live.tensors[name].dtype.code}"
        other = 'dtype="base" lands on its grid, where something is dropped: rescaled before it is rounded'
    _log.warning("a base in %s is trained %s: %s; %s", grid, how, written, other)
