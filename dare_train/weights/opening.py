"""Whatever a user calls weights, opened as `Weights`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Union, cast

import numpy as np

from ..errors import ConfigError
from .checkpoint import Checkpoint
from .protocol import ArrayWeights, Weights

if TYPE_CHECKING:
    from .named_tensors import Live


WeightsLike = Union[str, "os.PathLike[str]", "Live", Mapping[str, np.ndarray], Weights]
"""A checkpoint folder, file or Hub id; a module or state dict; a mapping of numpy arrays; or anything that is
`Weights`."""


def open_weights(what: WeightsLike, *, kernels: str | None = None) -> Weights:
    """Look at any holder of weights as `Weights`; `kernels` are for models in memory: see `LiveWeights`.

    Raises:
        CheckpointError: it cannot be read.
    """
    if isinstance(what, (str, os.PathLike)):
        return Checkpoint.open(what)
    if hasattr(what, "read") and hasattr(what, "tensors"):
        return what  # type: ignore[return-value]
    if isinstance(what, Mapping) and all(isinstance(value, np.ndarray) for value in what.values()):
        return ArrayWeights(cast("Mapping[str, np.ndarray]", what))
    if not isinstance(what, Mapping) and not hasattr(what, "state_dict"):
        expected = "a folder, a Hub id, a module, a state dict or a mapping of arrays"
        raise ConfigError("weights", expected=expected, found=f"a {type(what).__name__}")
    from .live import LiveWeights
    from .live_lora import Merged

    live = LiveWeights(cast("Live", what), kernels=kernels)
    return Merged(live, live.updates(), live.tensors) if live.adapted else live
