"""The same packages whatever runs the training: each rank writes what it holds, and together it is what one
process writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import run_ranks, train_on
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training import classifier, save_base
from transformers import TrainerCallback

from dare_train import DareCallback, DeltaPackage, apply_, extract
from dare_train.parallel.ranks import Ranks
from dare_train.weights.fingerprint import Fingerprint, model_fingerprint, total
from dare_train.weights.live import LiveWeights
from dare_train.weights.protocol import TensorInfo

RUNS = [
    ("ddp", 2),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3", 3),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("fsdp1", 2),
]
by_run = pytest.mark.parametrize(
    ("engine", "world"), RUNS, ids=[f"{engine}-{world}" for engine, world in RUNS]
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def trained(
    rank: int, engine: str, base: Path, out: Path, options: dict[str, Any], **arguments: Any
) -> list[tuple[int, str]]:
    """Step and fingerprint of each package of a run."""
    callback = DareCallback(**options)
    train_on(engine, lambda: classifier(base), out, callback, **arguments)
    return [(snapshot.step, snapshot.package.manifest.result) for snapshot in callback.packages]


def trained_for_two(
    rank: int, engine: str, base: Path, out: Path, options: dict[str, Any]
) -> dict[str, list[tuple[int, str]]]:
    """The same for packages of exact and of rounded values, by the name of their callback."""
    callbacks = [DareCallback(**options, values=values, name=values) for values in ("exact", "int8")]
    train_on(engine, lambda: classifier(base), out, *callbacks)
    return {
        callback.name: [(snapshot.step, snapshot.package.manifest.result) for snapshot in callback.packages]
        for callback in callbacks
    }


def meaning(package: DeltaPackage) -> list[Any]:
    """What a package says of its tensors: masks, counts, fingerprints of base and result."""
    records = package.manifest.tensors
    return [
        (r.name, r.info, r.kind, r.mask, r.p, r.threshold, r.values, r.kept, r.changed, r.base, r.result)
        for r in records
    ]


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights. Under ZeRO-3 this transformers saves LayerNorm's under names of years ago."""
    if (sharded := checkpoint / "pytorch_model_fsdp_0").exists():
        dcp_to_torch_save(sharded, checkpoint / "whole.bin")
        return torch.load(checkpoint / "whole.bin")["model"]
    state = load_file(checkpoint / "model.safetensors")
    return {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): state[name]
        for name in state
    }


@by_run
def test_packages_are_those_that_one_process_makes(
    base: Path, tmp_path: Path, engine: str, world: int
) -> None:
    out, options = tmp_path / "out", {"p": 0.5, "seed": 3}
    found = run_ranks(trained_for_two, world, engine, base, out, options)
    assert all(rank == found[0] for rank in found)
    states = {step: saved(out / f"checkpoint-{step}") for step in (2, 4)}
    for values in ("exact", "int8"):
        assert [step for step, _ in found[0][values]] == [2, 4, 4], values
        for step, state in states.items():
            ours = DeltaPackage.open(out / f"{values}/step-{step}")
            again = tmp_path / f"{values}-{step}"
            theirs = extract(base, state, again, cast_base=True, values=values, **options)
            assert meaning(ours) == meaning(theirs), (values, step)
            ours.verify(base)
        assert sorted(path.name for path in (out / values).iterdir()) == ["final", "step-2", "step-4"]


def resumed(rank: int, engine: str, base: Path, out: Path, checkpoint: Path) -> tuple[str, list[str]]:
    callback = DareCallback(p=0.5, seed=3)
    train_on(engine, lambda: classifier(base), out, callback, resume=checkpoint)
    assert callback.package is not None
    return callback.package.manifest.parent, [
        str(snapshot.package.path.name) for snapshot in callback.packages
    ]


RESUMED = [
    *((engine, world, world) for engine, world in RUNS if engine != "fsdp1"),
    ("ddp", 2, 3),
    ("ddp", 2, 1),
    ("fsdp2", 2, 3),
]


@pytest.mark.parametrize(
    ("engine", "world", "then"), RESUMED, ids=[f"{engine}-{world}-{then}" for engine, world, then in RESUMED]
)
def test_resumed_runs_keep_the_true_base(
    base: Path, tmp_path: Path, engine: str, world: int, then: int
) -> None:
    """The weights at the beginning of a resumed run are not the base's: a base taken then would go unnoticed
    in a fresh run.
    """
    out = tmp_path / "out"
    [_, _, (_, uninterrupted)], *_ = run_ranks(trained, world, engine, base, out, {"p": 0.5, "seed": 3})
    parent = DeltaPackage.open(out / "dare/step-2").manifest.parent
    found = run_ranks(resumed, then, engine if then > 1 else "single", base, out, out / "checkpoint-2")
    assert set(map(str, found)) == {str((parent, ["step-4", "final"]))}
    package = DeltaPackage.open(out / "dare/final")
    assert meaning(package) == meaning(
        extract(base, saved(out / "checkpoint-4"), tmp_path / "extracted", p=0.5, seed=3)
    )
    if world == then and engine != "fsdp1":
        assert package.manifest.result == uninterrupted


class Apply(TrainerCallback):
    """Applies a package when training begins, and looks at the weights before, with and after it."""

    def __init__(self, package: Path | None, *, revert: bool) -> None:
        self.package, self.revert = package, revert
        self.prints: list[str] = []
        self.masters_follow: bool | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.prints.append(print_of(model))
        undo = apply_(model, self.package)
        self.prints.append(print_of(model))
        self.masters_follow = masters_equal_weights(model)
        if self.revert:
            undo.revert()
            self.prints.append(print_of(model))


def print_of(model: torch.nn.Module) -> str:
    """The fingerprint of a model that several ranks hold."""
    live = LiveWeights(model, ranks=Ranks.joined())
    own = {
        name: total(Fingerprint.of(live.read(name, a, b - a), a) for a, b in live.owned[name])
        for name in live.tensors
    }
    told = live.ranks.gather(own)
    shares = {name: total((first, second) for first, second in (rank[name] for rank in told)) for name in own}
    return model_fingerprint(
        (name, info.dtype.code, info.shape, shares[name]) for name, info in live.tensors.items()
    )


def masters_equal_weights(model: torch.nn.Module) -> bool:
    """Whether each fp32 master that this rank keeps, rounded, is the weight; true where there are none."""
    live = LiveWeights(model)
    equal = []
    for name, held in live._held.items():
        for master in held.masters or ():
            weights = from_words(live.read(name, master.start, master.length), live.tensors[name])
            equal.append(torch.equal(master.flat().to(weights.dtype), weights))
    return all(equal)


def from_words(words: np.ndarray, info: TensorInfo) -> torch.Tensor:
    return torch.from_numpy(words.copy().view(np.uint8)).view(
        {"F32": torch.float32, "BF16": torch.bfloat16}[info.dtype.code]
    )


def applied_and_trained(
    rank: int, engine: str, base: Path, out: Path, package: Path | None, revert: bool, bf16: bool
) -> dict[str, Any]:
    callback, applying = DareCallback(p=0.5, seed=3, when=1), Apply(package, revert=revert)
    others = [applying] if package else []
    dtype = torch.bfloat16 if bf16 else torch.float32
    train_on(
        engine,
        lambda: classifier(base, dtype=dtype),
        out,
        callback,
        *others,
        save_strategy="no",
        bf16=bf16,
        max_steps=1,
    )
    assert callback.package is not None
    return {
        "prints": applying.prints,
        "masters": applying.masters_follow,
        "trained": callback.package.manifest.result,
    }


APPLIED = [
    *((engine, world, False) for engine, world in RUNS),
    *((engine, world, True) for engine, world in RUNS if "fsdp" not in engine),
]
"""FSDP makes fp32 weights of a bf16 checkpoint."""


@pytest.mark.parametrize(
    ("engine", "world", "bf16"),
    APPLIED,
    ids=[f"{e}-{n}-{'bf16' if half else 'fp32'}" for e, n, half in APPLIED],
)
def test_applying_to_a_model_in_training_and_back(
    base: Path, tmp_path: Path, engine: str, world: int, bf16: bool
) -> None:
    model = classifier(base, dtype=torch.bfloat16 if bf16 else torch.float32)
    tuned = {
        name: tensor + 0.25 * tensor.abs().mean()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    package = extract(dict(model.state_dict()), {**model.state_dict(), **tuned}, tmp_path / "package", p=0.5)
    reverted = run_ranks(
        applied_and_trained, world, engine, base, tmp_path / "reverted", package.path, True, bf16
    )
    kept = run_ranks(applied_and_trained, world, engine, base, tmp_path / "kept", package.path, False, bf16)
    for rank in reverted:
        before, during, after = rank["prints"]
        assert (before, during, after) == (
            package.manifest.parent,
            package.manifest.result,
            package.manifest.parent,
        )
    assert all(rank["prints"] == [package.manifest.parent, package.manifest.result] for rank in kept)
    assert all(rank["masters"] for rank in reverted + kept)
    assert reverted[0]["trained"] != kept[0]["trained"]
    plain = run_ranks(applied_and_trained, world, engine, base, tmp_path / "plain", None, True, bf16)
    assert plain[0]["trained"] == reverted[0]["trained"]
