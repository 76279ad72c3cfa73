"""One model in memory whose weights are exchanged in place from point to point."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CheckpointError
from ..parallel.threads import ordered_map
from ..weights.alignment import cast_to
from ..weights.files.full_precision import check_full_precision
from ..weights.fingerprint import weights_fingerprint
from ..weights.live.live import LiveWeights
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.protocol import HeldWords, Weights, runs

if TYPE_CHECKING:
    import torch

_RUN = 1 << 20


class SwappedModel:
    """A model that other weights take the place of; as a context it has its own back afterwards, to the bit.

    Args:
        model: its weights are overwritten.
        tuned: the same weights on disk, so that they need not be copied.

    Attributes:
        model: the model.
        own_weights: the model's own weights.
        fingerprint: theirs.

    Raises:
        CheckpointError: `tuned` is not what the model holds, or is quantised.
    """

    def __init__(self, model: torch.nn.Module, tuned: WeightsLike | None = None) -> None:
        self.model = model
        self._live = LiveWeights(model)
        self._taken: set[str] = set()
        self.own_weights: Weights = _copied(self._live) if tuned is None else open_weights(tuned)
        self.fingerprint = weights_fingerprint(self.own_weights)
        if tuned is not None:
            check_full_precision(self.own_weights, purpose="as the model has them", option=False)
        if tuned is not None and weights_fingerprint(self._live) != self.fingerprint:
            raise CheckpointError(
                self.own_weights.label,
                expected="the weights that the model has",
                found="others",
                remedy="leave tuned= out",
            )

    def __enter__(self) -> SwappedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.swap_in(HeldWords("none", {}, {}))

    def swap_in(self, weights: Weights) -> None:
        """Let the weights take the place of the model's own; tensors that they lack are the model's own."""
        names = self._live.tensors.keys() & weights.tensors.keys()
        source = cast_to(weights, self._live.tensors)
        back = self._taken - names
        self._taken = names | self._taken
        work = (
            (name, start, count)
            for name in sorted(names | back)
            for start, count in runs(self._live.tensors[name].numel, _RUN)
        )

        def overwrite(run: tuple[str, int, int]) -> None:
            name, start, _ = run
            self._live.overwrite(name, start, (self.own_weights if name in back else source).read(*run))

        with closing(ordered_map(overwrite, work)) as done:
            for _ in done:
                pass
        self._taken = names


def _copied(live: LiveWeights) -> Weights:
    """A model's weights as they are now."""
    return HeldWords(
        live.label,
        live.tensors,
        {name: np.array(live.read(name, 0, info.numel)) for name, info in live.tensors.items()},
    )
