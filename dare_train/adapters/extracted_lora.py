"""`extract_lora`: a delta as a LoRA adapter of low rank, which PEFT loads on the base."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Patterns, check_count, matches, unmatched
from ..dtypes import DTYPES, Words
from ..errors import CheckpointError, ConfigError, brief
from ..parallel.staged_folder import staged_folder, storage_errors
from ..weights.protocol import TensorInfo
from ..weights.skeletons import skeleton, task_of_class
from .adapter_factors import Factors, relative
from .adapter_files import check_ranks, config_fields, write_adapter, write_tokenizer_of
from .adapter_plan import Plan, planned
from .adapter_sources import Place, Tuned, gram_beside, open_both, places_read
from .module_deltas import ModuleDeltas

logger = logging.getLogger("dare_train")

_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, kw_only=True)
class ExtractedLora:
    """What an adapter holds, and what of the delta it leaves out."""

    path: Path
    ranks: Mapping[str, int]
    """By linear layer."""
    errors: Mapping[str, float]
    """By linear layer: the relative Frobenius error, ‖Δ − B A‖ / ‖Δ‖."""
    saved: tuple[str, ...]
    """Modules that are written as they are (`modules_to_save`)."""
    left_out: tuple[str, ...]
    """Tensors that `exclude` left as in the base, though they were tuned."""
    error: float
    """Of all of the delta that the base has tensors for, with what was left out."""
    output_error: float | None
    """‖(Δ − B A)x‖ / ‖Δx‖ over all layers with Gram matrices, in the mean of their inputs; None without."""
    nbytes: int
    """Of the adapter's weights."""

    @property
    def norm_left(self) -> float:
        """Share of the delta's norm that the adapter has."""
        return math.sqrt(max(0.0, 1 - self.error**2))

    def __str__(self) -> str:
        ranks = sorted({*self.ranks.values()})
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        parts = [f"{len(self.ranks)} linear layers at {span}"]
        if self.saved:
            parts.append(f"{len(self.saved)} module{'s' * (len(self.saved) != 1)} whole")
        if self.left_out:
            count = len(self.left_out)
            parts.append(f"{count} tuned tensor{'s' * (count != 1)} left as in the base")
        text = (
            f"{', '.join(parts)}, {self.nbytes:,} bytes; "
            f"{self.norm_left:.2%} of the delta's norm is left (relative error {self.error:.3g})"
        )
        if self.output_error is not None:
            left = math.sqrt(max(0.0, 1 - self.output_error**2))
            text += f", {left:.2%} of what it does to outputs (relative error {self.output_error:.3g})"
        return text


def extract_lora(
    base: Place,
    tuned: Tuned | Sequence[Tuned],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    error: float | None = None,
    exclude: Patterns = (),
    dtype: str = "F32",
    seed: int = 0,
    gram: Place | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> ExtractedLora:
    """Write the delta between two models as a PEFT adapter of low rank (docs/lora.md).

    The delta of each linear layer is cut to its largest singular values, B A = U√S · √SᵀVᵀ, α being the rank.
    Biases of linear layers, and modules of other kinds, are written as they were tuned.

    Args:
        base: folder or Hub id of the base model.
        tuned: folder or Hub id of the tuned model, or of an adapter; or packages on that base, as `apply`
            takes them.
        out: folder to create.
        rank: of each matrix, at most.
        error: instead of `rank`: each matrix has the smallest rank at which at most this share of its delta's
            Frobenius norm is left out, in (0, 1). Of a large matrix, among the singular values found.
        exclude: name patterns of tensors, by the modules' names, to leave as in the base.
        dtype: of the factors: F32, BF16 or F16.
        seed: of the random combinations of large matrices' columns.
        gram: Gram matrices of the layers' inputs (`collect_gram`), by which the error of outputs is told; by
            default those beside `tuned`.
        overwrite: replace a folder that is already there.
        progress: called with (linear layers done, all of them).

    Raises:
        ConfigError: an option is wrong; no linear layer was tuned; or an adapter cannot hold what was, such
            as tied embeddings.
        CheckpointError: transformers does not have the model's class, or cannot build it.
        TensorMismatch, NonFiniteDelta, OutputExists, StorageError; of packages, as `apply`.
    """
    _check_options(rank, error, dtype)
    start, end, config = open_both(base, tuned)
    model = _model_of(config, label=end.label)
    deltas = ModuleDeltas(start, end, model)
    task = task_of_class(type(model).__name__, config)
    chosen = _chosen(deltas, exclude, label=end.label)
    plan = planned(model, chosen.kept, chosen.added, task=task, aliases=deltas.aliases)
    if not plan.matrices:
        expected = "linear layers that were tuned"
        raise ConfigError(end.label, expected=expected, found="none", remedy="is this the tuned model?")
    factors = Factors(DTYPES[dtype], seed, gram_beside(gram, tuned))
    for number, module in enumerate(plan.matrices):
        delta = deltas.delta(f"{module}.weight")
        matrix = delta.T if module in plan.transposed else delta
        factors.add(module, matrix, rank=rank, error=error)
        if progress is not None:
            progress(number + 1, len(plan.matrices))
    fields = config_fields(
        factors.ranks,
        base=os.fspath(base),
        model=model,
        task=task,
        saved=plan.saved,
        tied=bool(plan.tied),
        biases=bool(plan.biases),
        transposed=bool(plan.transposed),
    )
    with (
        staged_folder(Path(out), overwrite=overwrite, inputs=places_read(base, tuned)) as folder,
        storage_errors(Path(out)),
    ):
        nbytes = write_adapter(folder, fields, {**factors.tensors, **_as_tuned(deltas, plan, model)})
        check_ranks(folder, factors.ranks)
        if not chosen.resized:  # else the tuned model's tokens have no rows in the base
            write_tokenizer_of(getattr(end, "folder", None), getattr(start, "folder", None), folder)
    return ExtractedLora(
        path=Path(out),
        ranks=factors.ranks,
        errors=factors.errors,
        saved=plan.saved,
        left_out=chosen.left_out,
        error=relative(
            factors.squares_left + sum(map(deltas.squares, chosen.left_out)),
            sum(map(deltas.squares, chosen.tuned)),
        ),
        output_error=factors.output_error,
        nbytes=nbytes,
    )


def _check_options(rank: int | None, error: float | None, dtype: str) -> None:
    if (rank is None) == (error is None):
        found = "neither" if rank is None else "both"
        raise ConfigError("rank, error", expected="one of them", found=found)
    if rank is not None:
        check_count("rank", rank)
    if error is not None and not 0 < error < 1:
        raise ConfigError("error", expected="a share between 0 and 1", found=str(error))
    if dtype not in _DTYPES:
        raise ConfigError("dtype", expected=f"one of {', '.join(_DTYPES)}", found=dtype)


def _model_of(config: Mapping[str, Any], *, label: str) -> Any:
    """The model's class, without weights.

    Raises:
        CheckpointError: transformers does not have it, or has something against its settings.
    """
    model = skeleton(config)
    if model is None:
        raise CheckpointError(
            label,
            expected="a config.json of which transformers can build the class under architectures",
            found=brief(config.get("architectures") or "none"),
            remedy="ship it as a package",
        )
    return model


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Tensors, by the modules' names."""

    tuned: Sequence[str]
    """Those that are not the base's."""
    kept: Sequence[str]
    """Of these, what `exclude` leaves."""
    added: Collection[str]
    """Of these, those that the base does not have."""
    resized: bool
    """Whether one is left out that has another shape than the base's."""

    @property
    def left_out(self) -> tuple[str, ...]:
        kept = {*self.kept}
        return tuple(name for name in self.tuned if name not in kept)


def _chosen(deltas: ModuleDeltas, exclude: Patterns, *, label: str) -> _Chosen:
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    for pattern in unmatched(patterns, deltas.shapes):
        logger.warning("exclude: no tensor of %s is called %s: is it misspelt?", label, pattern)
    added = {name for name in deltas.shapes if deltas.added(name)}
    resized = {name for name in deltas.shapes if matches(name, patterns) and deltas.resized(name)}
    tuned = [name for name in deltas.shapes if name in added | resized or deltas.changed(name)]
    kept = [name for name in tuned if not matches(name, patterns)]
    return _Chosen(tuned=tuned, kept=kept, added=added & {*kept}, resized=bool(resized))


def _as_tuned(deltas: ModuleDeltas, plan: Plan, model: Any) -> dict[str, tuple[TensorInfo, Words]]:
    """Biases, under the names that PEFT has for them, and all tensors of modules that are written whole.

    Raises:
        CheckpointError: the tuned model lacks one.
    """
    found = {}
    for bias in plan.biases:
        module = bias.removesuffix(".bias")
        inner = f"{module}.base_layer.bias" if module in plan.matrices else bias
        found[inner] = deltas.words(bias)
    for module in (*plan.saved, *plan.tied):
        for part in model.get_submodule(module).state_dict():
            name = f"{module}.{part}"
            source = deltas.aliases.get(name, name)
            if source not in deltas.shapes:
                expected = f"in the tuned model, as a part of {module}"
                raise CheckpointError(name, expected=expected, found="missing")
            found[name] = deltas.words(source)
    return found
