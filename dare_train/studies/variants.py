"""The rules by which elements are dropped, and the weights that are left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import Words
from ..merging.config.task import task_of
from ..merging.merge import merged_weights
from ..merging.methods.parameters import Case
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.protocol import Weights


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A rule by which elements are dropped."""

    label: str
    """For legends."""
    settings: Mapping[str, Any]
    """Arguments of `merge`; the drop rate goes to `p`, or where the rule has a density, 1 - p to that."""
    seeded: bool = True
    """Whether masks are drawn, so that there are several."""
    of_weights: bool = False
    """Whether the fine-tuned weights themselves are dropped, instead of the delta."""
    needs_gram: bool = False
    """Whether it asks for Gram matrices of the layers' inputs."""


DROP_VARIANTS: Mapping[str, Variant] = {
    "dare": Variant(label="DARE", settings={"method": "dare_linear"}),
    "drop_only": Variant(label="drop only", settings={"method": "drop_only"}),
    "magnitude": Variant(label="magnitude pruning", settings={"method": "magnitude"}, seeded=False),
    "weights": Variant(
        label="DARE on the weights themselves", settings={"method": "dare_linear"}, of_weights=True
    ),
    "norm": Variant(label="L1 norm kept", settings={"method": "dare_linear", "rescale": "norm"}),
    "q": Variant(label="DAREx-q", settings={"method": "dare_linear", "rescale": "q"}, needs_gram=True),
}
"""What arXiv 2311.03099 compares: DARE (§3.1), drop only and magnitude pruning (§4.4), weights instead of
deltas (§4.5); mergekit's rescale rule; and DAREx-q (arXiv 2410.09344), each layer's factor worked out from
its inputs."""


def dropped_weights(
    base: WeightsLike,
    tuned: WeightsLike,
    variant: Variant,
    *,
    p: float | tuple[Case, ...],
    seed: int,
    gram: str | os.PathLike[str] | None = None,
) -> Weights:
    """The fine-tuned weights after dropping, worked out when they are read. Rounded once, to the fine-tuned
    model's dtypes. Only those tensors that the base has too.

    `p` may be a rate for each of some tensors, where the rule is DARE's.

    Raises:
        As `merge`.
    """
    settings = dict(variant.settings)
    settings |= {"density": 1 - p} if settings["method"] == "magnitude" else {"p": p}  # type: ignore[operator]
    if variant.needs_gram and gram is not None:
        settings["gram"] = [gram]
    start = _Zeros(open_weights(base)) if variant.of_weights else base
    return merged_weights(task_of(start, [tuned], seed=seed, cast_base=True, **settings)).merged_only()


def base_weights_only(base: WeightsLike, tuned: WeightsLike) -> Weights:
    """The base's weights under the fine-tuned model's names, as far as the base has them."""
    merged = merged_weights(task_of(base, [tuned], method="task_arithmetic", weights=[0.0], cast_base=True))
    return merged.merged_only()


class _Zeros:
    """A base of zeros: what is dropped then is the weights themselves."""

    def __init__(self, like: Weights) -> None:
        self.label = f"zeros like {like.label}"
        self.tensors = like.tensors

    def read(self, name: str, start: int, count: int) -> Words:
        return np.zeros(count, self.tensors[name].dtype.word)
