"""Whatever a user calls weights, opened as `Weights`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Union, cast

import numpy as np

from ...errors import ConfigError
from ..files.checkpoint import Checkpoint
from ..files.dequantise import Dequantised
from ..files.quantised import Quantised
from ..protocol import ArrayWeights, Weights
from ..wrapper_names import without_wrappers

if TYPE_CHECKING:
    from ..live.named_tensors import Live


WeightsLike = Union[str, "os.PathLike[str]", "Live", Mapping[str, np.ndarray], Weights]
"""A checkpoint folder, file or Hub id; a module or state dict; a mapping of numpy arrays; or anything that is
`Weights`."""


def open_weights(what: WeightsLike, *, kernels: str | None = None, dequantize: bool = False) -> Weights:
    """Look at any holder of weights as `Weights`; `kernels` are for models in memory: see `LiveWeights`.

    `dequantize`: a quantised checkpoint is read in full precision.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: other processes hold parts of it.
    """
    if isinstance(what, (str, os.PathLike)):
        return open_checkpoint(what, dequantize=dequantize)
    if hasattr(what, "read") and hasattr(what, "tensors"):
        return what  # type: ignore[return-value]
    if isinstance(what, Mapping) and all(isinstance(value, np.ndarray) for value in what.values()):
        arrays = cast("Mapping[str, np.ndarray]", what)
        return ArrayWeights({name: arrays[given] for name, given in without_wrappers(arrays).items()})
    if not isinstance(what, Mapping) and not hasattr(what, "state_dict"):
        expected = "a folder, a Hub id, a module, a state dict or a mapping of arrays"
        raise ConfigError("weights", expected=expected, found=f"a {type(what).__name__}")
    from ..live.live import LiveWeights
    from ..live.live_lora import Merged

    live = LiveWeights(cast("Live", what), kernels=kernels)
    live.check_whole()
    return Merged(live, live.updates(), live.tensors) if live.adapted else live


def open_checkpoint(where: str | os.PathLike[str], *, dequantize: bool = False) -> Checkpoint:
    """A checkpoint on disk; with `dequantize` in full precision, if it is quantised.

    Raises:
        CheckpointError: it cannot be read, or its scheme is no formula.
    """
    checkpoint = Checkpoint.open(where)
    return Dequantised(checkpoint) if dequantize and Quantised.of(checkpoint) else checkpoint
