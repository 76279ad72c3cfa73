"""`extract`: base and tuned weights in, a delta package out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import AdapterWeights, merge_adapter
from .assembly import Provenance, work_of, write_manifest, write_parts
from .checkpoint import Checkpoint, companions
from .config import DareConfig, Patterns, Rescale, Values
from .errors import NonFiniteDelta
from .fingerprint import Fingerprint
from .kernels import cpu
from .manifest import CARRIED, FileRecord
from .package import DeltaPackage, file_record
from .parallel import ordered_map
from .plan import WeightsLike, align, cast_to, open_weights, plan_tensors
from .publish import staged_folder
from .segments import Encoded, TensorPlan, encode_delta, encode_whole
from .weights import Weights


def extract(
    base: WeightsLike,
    tuned: WeightsLike,
    out: str | os.PathLike[str],
    *,
    p: float | Mapping[str, float] = 0.9,
    seed: int = 0,
    rescale: Rescale = "paper",
    values: Values = "auto",
    include: Patterns = ("*",),
    exclude: Patterns = (),
    whole: Patterns = (),
    masks: Mapping[str, Any] | None = None,
    cast_base: bool = False,
    allow_nonfinite: bool = False,
    base_model: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> DeltaPackage:
    """Write the delta from `base` to `tuned` as a package at `out` (arXiv 2311.03099, eq. 1-2).

    Args:
        base, tuned: checkpoint folders or Hub ids (streamed, never loaded), modules, state dicts or numpy arrays by name.
            `tuned` may be a PEFT LoRA adapter's: it is merged into the base while it is read, in float64, rounded once.
        out: folder to create.
        p, seed, rescale, values, include, exclude, whole, allow_nonfinite: see `DareConfig`.
        masks: hand-made masks, bool arrays shaped as their tensors (True = kept) by tensor name. They are stored in the
            package; `p` and `rescale` do not count for those tensors.
        cast_base: round the base to the tuned weights' dtypes first. The package is then relative to the rounded base.
        base_model: what the package calls its base; by default the folder or Hub id given.
        overwrite: replace a folder that is already there.
        progress: called with (bytes read, bytes in all) of the tuned weights as work goes on.

    Raises:
        ConfigError, CheckpointError, TensorMismatch, DtypeMismatch, NonFiniteDelta, OutputExists, StorageError.
    """
    config = DareConfig(
        p=p, seed=seed, rescale=rescale, values=values, include=include, exclude=exclude, whole=whole, allow_nonfinite=allow_nonfinite
    )
    tuned_weights = open_weights(tuned)
    plain_base = open_weights(base)
    tuned_weights = merge_adapter(tuned_weights, plain_base)
    aligned, prefix = align(plain_base, tuned_weights.tensors.keys(), model=tuned_weights.label)
    if cast_base:
        aligned = cast_to(aligned, tuned_weights.tensors)
    fresh = tuned_weights.whole if isinstance(tuned_weights, AdapterWeights) else ()
    plans = plan_tensors(aligned, tuned_weights, config, fresh=fresh, masks=masks)
    source = Provenance(base_model=base_model or plain_base.label, prefix=prefix, base_only=_base_only(aligned, plans), config=config)
    inputs = [folder for folder in (_folder_of(plain_base), _folder_of(tuned_weights)) if folder is not None]
    with staged_folder(Path(out), overwrite=overwrite, inputs=inputs) as staging:
        files = carry_files(_folder_of(plain_base), _folder_of(tuned_weights), staging)
        with closing(ordered_map(lambda work: _encode(aligned, tuned_weights, *work), work_of(plans))) as encoded:
            parts, tallies = write_parts(staging, _reported(encoded, plans, progress))
        write_manifest(staging, plans, tallies, parts, source, files)
    return DeltaPackage.open(out)


def _base_only(base: Weights, plans: Iterable[TensorPlan]) -> tuple[str, ...]:
    return tuple(sorted(base.tensors.keys() - {plan.name for plan in plans}))


def _folder_of(weights: Weights) -> Path | None:
    return weights.folder if isinstance(weights, (Checkpoint, AdapterWeights)) else None


def _reported(encoded: Iterable[Encoded], plans: list[TensorPlan], progress: Callable[[int, int], object] | None) -> Iterator[Encoded]:
    """The same runs, telling `progress` of them."""
    done, everything = 0, sum(plan.info.nbytes for plan in plans)
    for run, (plan, _, count) in zip(encoded, work_of(plans), strict=True):
        done += count * plan.info.dtype.itemsize
        if progress is not None:
            progress(done, everything)
        yield run


def _encode(base: Weights, tuned: Weights, plan: TensorPlan, start: int, count: int) -> Encoded:
    words = base.read(plan.name, start, count) if plan.in_base and start < plan.base_numel else None
    if plan.kind == "base":
        assert words is not None
        print_ = Fingerprint.of(words, start)
        return Encoded(index=plan.index, base=print_, result=print_)
    new = tuned.read(plan.name, start, count)
    if not plan.allow_nonfinite and plan.info.dtype.is_float and cpu.has_nonfinite(new, plan.info.dtype.exponent_mask):
        _refuse_nonfinite(plan, start, new)
    if plan.kind == "delta" and words is not None:
        positions = plan.positions(start, count)
        return encode_delta(plan, start, words, positions, cpu.take(new, positions))
    encoded = encode_whole(plan, start, new)
    return encoded if words is None else _with_base(encoded, Fingerprint.of(words, start))


def _refuse_nonfinite(plan: TensorPlan, start: int, words: np.ndarray) -> None:
    dtype = plan.info.dtype
    if dtype.code == "F8_E4M3":  # its largest exponent holds numbers; only all ones is NaN
        bad = (words & np.uint8(0x7F)) == np.uint8(0x7F)
    else:
        bad = (words & dtype.word.type(dtype.exponent_mask)) == dtype.word.type(dtype.exponent_mask)
    if bad.any():
        first = start + int(np.argmax(bad))
        remedy = "did training diverge? allow_nonfinite=True (--allow-nonfinite) carries them as they are"
        raise NonFiniteDelta(plan.name, expected="finite weights", found=f"NaN or infinity at flat index {first}", remedy=remedy)


def _with_base(encoded: Encoded, base: Fingerprint) -> Encoded:
    return Encoded(**{**vars(encoded), "base": base})


def carry_files(base: Path | None, tuned: Path | None, staging: Path) -> tuple[FileRecord, ...]:
    """Copy into the package the configuration and tokenizer files that the base lacks or has otherwise."""
    if tuned is None:
        return ()
    carried = []
    for relative in companions(tuned):
        if relative.suffix not in CARRIED:
            continue
        if base is None or not _same_content(base / relative, tuned / relative):
            target = staging / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((tuned / relative).read_bytes())
            carried.append(file_record(target, staging))
    return tuple(carried)


def _same_content(one: Path, other: Path) -> bool:
    if not one.is_file():
        return False
    left, right = one.read_bytes(), other.read_bytes()
    if left != right and one.suffix == ".json":
        try:
            return bool(_settled(json.loads(left)) == _settled(json.loads(right)))
        except (ValueError, RecursionError):
            return False
    return left == right


def _settled(content: Any) -> Any:
    """Without what a fast tokenizer remembers of its last call, so that half a megabyte need not travel for it."""
    if isinstance(content, dict) and "added_tokens" in content:
        return {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    return content
