"""What wandb is told of a snapshot, in the run that is already there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.wandb_run import active_run
from ..package.magnitudes import merged
from .reporting import figures

if TYPE_CHECKING:
    from .shared_pass import Snapshot


def log(snapshot: Snapshot, *, name: str, artifact: bool = True, stays: bool = True) -> None:
    """Log a snapshot to the active run; nothing happens without one. A package that does not stay gets a
    second place, in the run's folder: an offline run is uploaded later.

    Figures carry `train/global_step`, as the Trainer's own do: wandb's step stays the Trainer's.
    """
    run = active_run()
    if run is None:
        return
    import wandb

    parts = {layer: part for layer, part in snapshot.magnitudes.items() if part.total}
    histograms = {f"{name}/layers/{layer}": _histogram(wandb, part) for layer, part in parts.items()}
    if parts:
        histograms[f"{name}/delta_histogram"] = _histogram(wandb, merged(parts.values()))
    run.log({**figures(snapshot, name), **histograms, "train/global_step": snapshot.step})
    if artifact:
        folder = snapshot.package.path if stays else _second_place(run, snapshot, name)
        aliases = ["latest", f"step-{snapshot.step}"]
        run.log_artifact(_artifact(wandb, snapshot, name, folder), aliases=aliases)


def _histogram(wandb: Any, magnitudes: Any) -> Any:
    return wandb.Histogram(np_histogram=magnitudes.histogram())


def _artifact(wandb: Any, snapshot: Snapshot, name: str, folder: Path) -> Any:
    manifest = snapshot.package.manifest
    metadata = {
        "base_model": manifest.base_model,
        "p": sorted({record.p for record in manifest.tensors if record.kind == "delta"}),
        "seed": manifest.seed,
        "rescale": manifest.rescaled,
        "continues": manifest.continues,
        "parent_fingerprint": manifest.parent,
        "result_fingerprint": manifest.result,
        "step": snapshot.step,
        "bits_per_parameter": snapshot.package.stats["bits_per_parameter"],
    }
    artifact = wandb.Artifact(name, type="dare-package", metadata=metadata)
    artifact.add_dir(str(folder), policy="immutable")
    return artifact


def _second_place(run: Any, snapshot: Snapshot, name: str) -> Path:
    """The package's files in the folder of the wandb run, without a copy where the disk can do that."""
    package = snapshot.package.path
    place = Path(run.dir).parent / "dare_train" / name / package.name
    shutil.copytree(package, place, copy_function=_link, dirs_exist_ok=True)
    return place


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
