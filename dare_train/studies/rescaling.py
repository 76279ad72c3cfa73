"""DAREx-q by output change: the rescale factor under which a model's own outputs change least when its delta
is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..applying.in_place import applied
from ..config import check_drop_rate
from ..dtypes import Words
from ..errors import ConfigError
from ..extracting.extract import extract
from ..parallel.scratch_folder import temporary_folder
from ..weights.alignment import align
from ..weights.files.full_precision import check_full_precision
from ..weights.live.live import LiveWeights
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.protocol import TensorInfo, Weights


@dataclass(frozen=True, kw_only=True)
class FoundQ:
    """What `find_q` measured."""

    q: float
    """The best of the candidates: `merge(..., rescale="q", q=q)`."""
    changes: Mapping[float, float]
    """By candidate, the mean squared change of the outputs over the mean square of the fine-tuned model's."""


def find_q(
    model: torch.nn.Module,
    base: WeightsLike,
    batches: Iterable[Mapping[str, Any]],
    *,
    p: float,
    seed: int = 0,
    candidates: Sequence[float] | None = None,
) -> FoundQ:
    """Choose q so that survivors times 1/q change the model's last outputs least, on a batch or more without
    labels.

        argmin_q E‖f(x; θ_SFT) - f(x; θ_PRE + m∘δ/q)‖²

    Deng et al., "DARE the Extreme" (DAREx-q), https://arxiv.org/abs/2410.09344. The masks m are those of `p`
    and `seed`, as in a package or a merge with them.

    Args:
        model: the fine-tuned model. Its weights are changed in place and put back exactly.
        base: what it was fine-tuned from; tensors that this lacks, such as a head, stay as they are.
        batches: keyword arguments for the model, on its device. The logits of its outputs count, or their
            first tensor.
        candidates: values of q, by default nine from 1 - p (DARE's own) to 1 (drop only), evenly spaced in
            their logarithms.

    Raises:
        ConfigError: a value is out of range, there is no batch, or outputs hold no tensor; and as `extract`
            and `apply_`.
    """
    check_drop_rate(p)
    values = (
        [float(q) for q in candidates]
        if candidates is not None
        else [round(float(q), 6) for q in np.geomspace(1 - p, 1, 9)]
    )
    if not values or not all(0 < q <= 1 for q in values):
        raise ConfigError("candidates", expected="numbers in (0, 1]", found=repr(candidates))
    kept = list(batches)
    if not kept:
        raise ConfigError("batches", expected="at least one", found="none")
    was_training = model.training
    model.train(False)
    try:
        return _measured(model, base, kept, values, p=p, seed=seed)
    finally:
        model.train(was_training)


def _measured(
    model: torch.nn.Module,
    base: WeightsLike,
    batches: list[Mapping[str, Any]],
    values: list[float],
    *,
    p: float,
    seed: int,
) -> FoundQ:
    opened = open_weights(base)
    check_full_precision(opened, purpose="of which elements can be dropped", option=False)
    wanted = _outputs(model, batches)
    complete = _Completed(opened, LiveWeights(model))
    size = sum(float(output.square().sum()) for output in wanted)
    changes = {}
    with temporary_folder("dare-q") as folder:
        back = extract(model, complete, folder / "back", p=0.0)
        dropped = extract(complete, model, folder / "dropped", p=p, seed=seed, rescale="none")
        with applied(model, back):
            for q in values:
                with applied(model, dropped, weights=[1 / q]):
                    outputs = _outputs(model, batches)
                moved = sum(
                    float((output - before).square().sum())
                    for output, before in zip(outputs, wanted, strict=True)
                )
                changes[q] = moved / size if size else moved
    return FoundQ(q=min(changes, key=lambda q: changes[q]), changes=changes)


@torch.no_grad()
def _outputs(model: torch.nn.Module, batches: list[Mapping[str, Any]]) -> list[torch.Tensor]:
    return [_first(model(**batch)).double() for batch in batches]


def _first(outputs: Any) -> torch.Tensor:
    """The logits, or the first tensor that comes back."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    values = [
        logits,
        *(
            outputs.values()
            if isinstance(outputs, Mapping)
            else outputs
            if isinstance(outputs, (list, tuple))
            else ()
        ),
    ]
    tensor = next(
        (
            value
            for value in values
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim()
        ),
        None,
    )
    if tensor is None:
        raise ConfigError(
            "model", expected="outputs that hold logits or another tensor", found=type(outputs).__name__
        )
    return tensor


class _Completed:
    """A base under a model's names, with the model's own tensors where it has none of that name and shape."""

    def __init__(self, base: Weights, model: Weights) -> None:
        self._base, _ = align(base, model.tensors.keys(), model=model.label)
        self._model = model
        self.label = base.label
        self.tensors: Mapping[str, TensorInfo] = model.tensors
        self._own = {name for name, info in model.tensors.items() if self._base.tensors.get(name) != info}

    def read(self, name: str, start: int, count: int) -> Words:
        words = (self._model if name in self._own else self._base).read(name, start, count)
        return np.array(words)
