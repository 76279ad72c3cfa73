"""Will DARE work here, and at which p? Answered from the two checkpoints alone, before any package is
written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..dtypes import to_float
from ..extracting.completeness import check_complete
from ..package.magnitudes import Magnitudes, merged
from ..parallel.threads import ordered_map
from ..weights.alignment import cast_to, dtype_mismatch
from ..weights.files.full_precision import check_full_precision
from ..weights.lora.lora_checkpoint import merge_adapter
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.lora.other_layouts import in_layout_of
from ..weights.lora.wrapped_files import without_wrapper
from ..weights.meeting import meet, renamed
from ..weights.protocol import SEGMENT, Weights, runs

logger = logging.getLogger("dare_train")

DROP_RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
PAPER_MAGNITUDES = (0.002, 0.005, 0.01)
"""arXiv 2311.03099 §4.5: DARE holds while most |δ| stay within 0.002, and fails after continued pretraining,
beyond 0.01 or so."""
TOLERANCE = 0.1
"""Expected relative error of a layer's output up to which a drop rate is called safe."""


@dataclass(frozen=True, kw_only=True)
class LayerDiagnosis:
    """One matrix. Errors are ‖(Ŵ - W)x‖ / ‖Wx‖ in expectation over masks and over inputs of equal,
    independent variance: sqrt(p / (1 - p)) · ‖δ‖ / ‖W‖, from the variance p / (1 - p) · δ² of each
        element."""

    name: str
    magnitudes: Magnitudes
    relative_delta: float
    """‖δ‖ / ‖W‖, Frobenius norms, W the fine-tuned weights."""

    def error(self, p: float) -> float:
        return float(np.sqrt(p / (1 - p))) * self.relative_delta


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    layers: tuple[LayerDiagnosis, ...]
    """Matrices whose delta is not zero."""
    magnitudes: Magnitudes
    """|δ| over all shared floating-point tensors."""
    new: tuple[str, ...]
    """Tensors that only the tuned weights have, or in another shape; a package carries them whole."""

    def share_within(self, bound: float) -> float:
        """Share of the elements with |δ| ≤ bound, within the width of a histogram bin."""
        return self.magnitudes.share_below(bound)

    def error(self, p: float) -> float:
        """The expected relative output error that nine layers in ten stay below."""
        return float(np.quantile([layer.error(p) for layer in self.layers], 0.9)) if self.layers else 0.0

    def safe_drop_rate(self, tolerance: float = TOLERANCE) -> float | None:
        """The largest of `DROP_RATES` whose error is tolerable, or None."""
        safe = [p for p in DROP_RATES if self.error(p) <= tolerance]
        return max(safe, default=None)

    @property
    def verdict(self) -> str:
        """A plain answer in one or two sentences."""
        if not self.magnitudes.largest:
            return "Nothing changed: there is no delta to drop."
        p = self.safe_drop_rate()
        worst = self.error(0.5)
        if p is None:
            return (
                "DARE will not work here: even p = 0.5 is expected to move layer outputs by "
                f"{worst:.0%}. The delta is as large as after "
                "continued pretraining or a high learning rate; ship it with p = 0, which is exact."
            )
        higher = [rate for rate in DROP_RATES if rate > p]
        limit = (
            f" p = {higher[0]:g} is expected to move layer outputs by {self.error(higher[0]):.0%}."
            if higher
            else ""
        )
        return f"p = {p:g} is safe: layer outputs are expected to move by {self.error(p):.1%}.{limit}"


def diagnose(
    base: WeightsLike,
    tuned: WeightsLike,
    *,
    rename: Mapping[str, str] | None = None,
    cast_base: bool = False,
    dequantize: bool = False,
) -> Diagnosis:
    """Compare two sets of weights as `extract` would, and predict what dropping does to each layer.

    Args:
        rename, cast_base, dequantize: see `extract`.

    Raises:
        CheckpointError, TensorMismatch: they cannot be read, or have nothing in common.
        DtypeMismatch: they have different dtypes, and `cast_base` is false.
    """
    tuned_weights = open_weights(tuned, dequantize=dequantize)
    plain = open_weights(base, dequantize=dequantize)
    for weights in (plain, tuned_weights):
        check_full_precision(weights, purpose="of which elements can be dropped")
    folder = getattr(tuned_weights, "folder", None)
    tuned_weights = renamed(merge_adapter(tuned_weights, plain), rename or {})
    tuned_weights = in_layout_of(plain, without_wrapper(plain, tuned_weights))
    aligned, _ = meet(plain, tuned_weights)
    for note in check_complete(folder, plain, aligned, tuned_weights, decided=lambda name: False):
        logger.warning("%s", note)
    if cast_base:
        aligned = cast_to(aligned, tuned_weights.tensors)
    shared = list(_shared(aligned, tuned_weights))
    measured = list(ordered_map(lambda name: (name, *_measure(aligned, tuned_weights, name)), shared))
    matrices = [item for item in measured if len(tuned_weights.tensors[item[0]].shape) >= 2 and item[2] > 0]
    return Diagnosis(
        layers=tuple(
            LayerDiagnosis(name=name, magnitudes=sizes, relative_delta=ratio)
            for name, sizes, ratio in matrices
        ),
        magnitudes=merged(sizes for _, sizes, _ in measured),
        new=tuple(sorted(tuned_weights.tensors.keys() - set(shared))),
    )


def _shared(base: Weights, tuned: Weights) -> Iterator[str]:
    for name, info in sorted(tuned.tensors.items()):
        base_info = base.tensors.get(name)
        if base_info is None or base_info.shape != info.shape or not info.dtype.can_be_delta:
            continue
        if base_info.dtype != info.dtype:
            raise dtype_mismatch(
                name,
                expected=info,
                found=base_info,
                where=base.label,
                remedy="cast_base=True (--cast-base) rounds the base first",
            )
        yield name


def _measure(base: Weights, tuned: Weights, name: str) -> tuple[Magnitudes, float]:
    dtype = tuned.tensors[name].dtype
    parts = []
    moved = 0.0
    norm = 0.0
    for start, count in runs(tuned.tensors[name].numel, SEGMENT):
        tuned_values = to_float(tuned.read(name, start, count), dtype).astype(np.float32)
        delta = tuned_values - to_float(base.read(name, start, count), dtype).astype(np.float32)
        parts.append(Magnitudes.of(delta))
        moved += float(np.dot(delta.astype(np.float64), delta))
        norm += float(np.dot(tuned_values.astype(np.float64), tuned_values))
    return merged(parts), float(np.sqrt(moved / norm)) if norm else 0.0
