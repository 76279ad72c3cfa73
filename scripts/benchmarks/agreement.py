"""Whether merges agree with mergekit's: the same configuration, computed in float32 and written in bfloat16,
by both.

On float32 models no two magnitudes are equal, and results should differ by a rounding step at most. Deltas of
bfloat16 models repeat: among equals at a threshold mergekit keeps whichever its unstable sort puts first, we
the first by index.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import llama
from .common import WEIGHTS, scratch
from .process import DARE_TRAIN, measure
from .report import Row

NOTES = [
    "agreement: elements that differ from mergekit's by more than one bf16 step, and by any, "
    "tiny Llama, dtype float32, out_dtype bfloat16",
    "float32 models have no equal magnitudes; among equals of bf16 models mergekit's choice is "
    "arbitrary, so trims are compared in float32",
]
_EVERY = {"weight": 0.4}
MERGE_METHODS: dict[str, dict[str, Any]] = {
    "linear": {"models": {"weight": 1.0}},
    "task_arithmetic": {"models": _EVERY},
    "ties": {"models": {"weight": 0.5, "density": 0.3}},
    "slerp": {"count": 1, "parameters": {"t": 0.3}},
    "breadcrumbs": {"models": {"weight": 0.5, "density": 0.6, "gamma": 0.05}},
    "model_stock": {},
    "nuslerp": {"count": 2, "models": {"weight": 0.5}},
    "karcher": {},
    "sce": {"parameters": {"select_topk": 0.4}},
}
_TRIMS = ("ties", "breadcrumbs", "sce")
_BASELESS = ("linear", "karcher")


def rows(peers: Path) -> Iterator[Row]:
    """Two rows for each method."""
    with scratch() as folder:
        for kind, base, models in (_float32(folder / "float32"), _bfloat16()):
            for method in MERGE_METHODS:
                if kind == "bf16" and method in _TRIMS:
                    continue
                far, any_ = _compared(peers, folder, method, base, models)
                target = (
                    0
                    if method in ("linear", "task_arithmetic", "ties", "slerp", "breadcrumbs", "model_stock")
                    else None
                )
                yield Row(
                    what=f"{method}, {kind} models: differ by more than a step", values=[far], at_most=target
                )
                yield Row(what=f"{method}, {kind} models: differ at all", values=[100 * any_], unit="%")


def _bfloat16() -> tuple[str, Path, list[Path]]:
    pair = llama.pair("tiny")
    return "bf16", pair.base, [pair.tuned, *llama.others("tiny", 2)]


def _float32(folder: Path) -> tuple[str, Path, list[Path]]:
    """Random float32 models of the same shape."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(5)
    base = {
        name: generator.normal(scale=0.02, size=shape).astype(np.float32)
        for name, shape in llama.SHAPES["tiny"].tensors().items()
    }
    names = ["base", "one", "two", "three"]
    for name in names:
        (folder / name).mkdir(parents=True)
        shutil.copy(llama.pair("tiny").base / "config.json", folder / name)
        scale = 0.0 if name == "base" else 5e-4
        tensors = {
            key: (value + generator.laplace(scale=scale, size=value.shape)).astype(np.float32)
            for key, value in base.items()
        }
        save_file(tensors, folder / name / WEIGHTS, metadata={"format": "pt"})
    return "float32", folder / "base", [folder / name for name in names[1:]]


def _compared(peers: Path, folder: Path, method: str, base: Path, models: list[Path]) -> tuple[int, float]:
    """Elements more than one step apart, and the share of all that differ."""
    asked = MERGE_METHODS[method]
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(model), "parameters": asked.get("models", {})}
            for model in models[: asked.get("count")]
        ],
        "parameters": asked.get("parameters", {}),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method not in _BASELESS:
        config["base_model"] = str(base)
    (folder / "merge.yml").write_text(json.dumps(config))
    for out in ("theirs", "ours"):
        shutil.rmtree(folder / out, ignore_errors=True)
    theirs: list[str | Path] = [
        peers / "mergekit-yaml",
        folder / "merge.yml",
        folder / "theirs",
        "--no-copy-tokenizer",
        "--quiet",
    ]
    measure(theirs, env={"HF_HUB_OFFLINE": "1"})
    measure([*DARE_TRAIN, "merge", folder / "merge.yml", "--out", folder / "ours"])
    steps = np.concatenate(list(_steps(folder / "theirs", folder / "ours")))
    return int(np.count_nonzero(steps > 1)), float(np.count_nonzero(steps)) / steps.size


def _steps(theirs: Path, ours: Path) -> Iterator[NDArray[np.int32]]:
    """How many bf16 numbers lie between the two, tensor by tensor."""
    from dare_train.weights.files.checkpoint import Checkpoint

    one, other = Checkpoint.open(theirs), Checkpoint.open(ours)
    if one.tensors.keys() != other.tensors.keys():
        raise RuntimeError(f"other tensors: {sorted(one.tensors.keys() ^ other.tensors.keys())}")
    for name, info in one.tensors.items():
        left, right = (_ordered(side.read(name, 0, info.numel)) for side in (one, other))
        yield np.abs(left - right)


def _ordered(words: NDArray[np.unsignedinteger]) -> NDArray[np.int32]:
    """bf16 words as integers in the order of the numbers."""
    wide = words.astype(np.int32)
    return np.where(wide & 0x8000, 0xFFFF - wide, wide | 0x8000)
