"""The same packages whatever runs the training: each rank writes what it holds, and together it is what one
process writes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import run_ranks, train_on
from hub_server import HubServer, hub_of
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training import classifier, save_base
from transformers import TrainerCallback

from dare_train import DareCallback, DeltaPackage, apply_, extract
from dare_train.parallel.ranks import Ranks
from dare_train.weights.fingerprint import Fingerprint, model_fingerprint, total
from dare_train.weights.live.live import LiveWeights
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
OPTIONS: dict[str, Any] = {"p": 0.5, "seed": 3}
by_run = pytest.mark.parametrize(
    ("engine", "world"), RUNS, ids=[f"{engine}-{world}" for engine, world in RUNS]
)


Told = dict[str, list[tuple[int, str]]]
"""Step and fingerprint of each package of a run, by the name of its callback."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("engines") / "base")


def trained(rank: int, engine: str, base: Path, out: Path, hub: Mapping[str, str]) -> Told:
    """Packages of exact and of rounded values from one training. The exact ones are pushed."""
    pushed = DareCallback(**OPTIONS, values="exact", name="exact", push_to_hub=f"me/{out.parent.name}")
    callbacks = [pushed, DareCallback(**OPTIONS, values="int8", name="int8")]
    with hub_of(hub):
        train_on(engine, lambda: classifier(base), out, *callbacks)
    return {
        callback.name: [(snapshot.step, snapshot.package.manifest.result) for snapshot in callback.packages]
        for callback in callbacks
    }


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def run_of(
    base: Path, hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], tuple[Path, list[Told]]]:
    """A training on an engine to its end, once for all tests: its folder, and what each rank tells of it."""
    made: dict[tuple[str, int], tuple[Path, list[Told]]] = {}

    def run(engine: str, world: int) -> tuple[Path, list[Told]]:
        if (engine, world) not in made:
            out = tmp_path_factory.mktemp(f"{engine}-{world}") / "out"
            made[engine, world] = out, run_ranks(trained, world, engine, base, out, hub.environment)
        return made[engine, world]

    return run


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
    base: Path, run_of: Callable[..., Any], tmp_path: Path, engine: str, world: int
) -> None:
    out, found = run_of(engine, world)
    assert all(rank == found[0] for rank in found)
    states = {step: saved(out / f"checkpoint-{step}") for step in (2, 4)}
    for values in ("exact", "int8"):
        assert [step for step, _ in found[0][values]] == [2, 4, 4], values
        for step, state in states.items():
            ours = DeltaPackage.open(out / f"{values}/step-{step}")
            again = tmp_path / f"{values}-{step}"
            theirs = extract(base, state, again, cast_base=True, values=values, **OPTIONS)
            assert meaning(ours) == meaning(theirs), (values, step)
            ours.verify(base)
        assert sorted(path.name for path in (out / values).iterdir()) == ["final", "step-2", "step-4"]


@by_run
def test_what_was_pushed_is_pulled_to_the_byte(
    hub: HubServer, run_of: Callable[..., Any], tmp_path: Path, engine: str, world: int
) -> None:
    out, _ = run_of(engine, world)
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-m",
        "dare_train",
        "pull",
        f"me/{out.parent.name}",
        "--out",
        tmp_path / "back",
    ]
    subprocess.run(command, env=environment, check=True)
    assert contents(tmp_path / "back") == contents(out / "exact")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resumed(rank: int, engine: str, base: Path, out: Path, checkpoint: Path) -> tuple[str, list[str]]:
    callback = DareCallback(**OPTIONS, values="exact", name="exact")
    train_on(engine, lambda: classifier(base), out, callback, resume=checkpoint)
    assert callback.package is not None
    return callback.package.manifest.parent, [
        str(snapshot.package.path.name) for snapshot in callback.packages
    ]


RESUMED = [
    ("ddp", 2, 2),
    ("ddp", 2, 3),
    ("ddp", 2, 1),
    ("zero1", 2, 2),
    ("zero2", 2, 2),
    ("zero3", 3, 3),
    ("fsdp2", 3, 3),
    ("fsdp2", 2, 3),
]


@pytest.mark.parametrize(
    ("engine", "world", "then"), RESUMED, ids=[f"{engine}-{world}-{then}" for engine, world, then in RESUMED]
)
def test_resumed_runs_keep_the_true_base(
    base: Path, run_of: Callable[..., Any], tmp_path: Path, engine: str, world: int, then: int
) -> None:
    """The weights at the beginning of a resumed run are not the base's: a base taken then would go unnoticed
    in a fresh run.
    """
    whole, [told, *_] = run_of(engine, world)
    out = tmp_path / "out"
    for name in ("checkpoint-2", "exact"):
        shutil.copytree(whole / name, out / name)
    parent = DeltaPackage.open(out / "exact/step-2").manifest.parent
    found = run_ranks(resumed, then, engine if then > 1 else "single", base, out, out / "checkpoint-2")
    assert set(map(str, found)) == {str((parent, ["step-4", "final"]))}
    package = DeltaPackage.open(out / "exact/final")
    theirs = extract(base, saved(out / "checkpoint-4"), tmp_path / "extracted", values="exact", **OPTIONS)
    assert meaning(package) == meaning(theirs)
    if world == then:
        assert package.manifest.result == told["exact"][-1][1]


class Apply(TrainerCallback):
    """Applies a package when training begins, and looks at the weights before, with and after it."""

    def __init__(self, package: Path, *, revert: bool) -> None:
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
    rank: int, engine: str, base: Path, out: Path, package: Path, bf16: bool
) -> dict[str, dict[str, Any]]:
    """Three trainings of a step: with the package taken back at once, with it, and without."""
    return {
        name: _applied_and_trained(engine, base, out / name, applying, bf16)
        for name, applying in (
            ("reverted", Apply(package, revert=True)),
            ("kept", Apply(package, revert=False)),
            ("plain", None),
        )
    }


def _applied_and_trained(
    engine: str, base: Path, out: Path, applying: Apply | None, bf16: bool
) -> dict[str, Any]:
    callback = DareCallback(**OPTIONS, when=1)
    train_on(
        engine,
        lambda: classifier(base, dtype=torch.bfloat16 if bf16 else torch.float32),
        out,
        callback,
        *([applying] if applying else []),
        save_strategy="no",
        bf16=bf16,
        max_steps=1,
    )
    assert callback.package is not None
    return {
        "prints": applying.prints if applying else [],
        "masters": applying.masters_follow if applying else None,
        "trained": callback.package.manifest.result,
    }


APPLIED = [
    ("ddp", 2, True),
    ("zero1", 2, False),
    ("zero2", 2, True),
    ("zero3", 2, True),
    ("zero3", 3, False),
    ("fsdp2", 3, False),
    ("fsdp1", 2, False),
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
    ends = run_ranks(applied_and_trained, world, engine, base, tmp_path / "out", package.path, bf16)
    parent, result = package.manifest.parent, package.manifest.result
    for rank in ends:
        assert rank["reverted"]["prints"] == [parent, result, parent]
        assert rank["kept"]["prints"] == [parent, result]
        assert rank["reverted"]["masters"]
        assert rank["kept"]["masters"]
    assert ends[0]["reverted"]["trained"] != ends[0]["kept"]["trained"]
    assert ends[0]["reverted"]["trained"] == ends[0]["plain"]["trained"]


LANDING: dict[str, Any] = {**OPTIONS, "dtype": "base"}


def landed(rank: int, engine: str, base: Path, out: Path, options: dict[str, Any]) -> str:
    callback = DareCallback(**LANDING, when="end", evaluate=True)
    train_on(engine, lambda: classifier(base), out, callback, eval_strategy="epoch", **options)
    assert callback.package is not None
    return callback.package.manifest.result


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2", "fsdp1"])
def test_elements_land_on_ranks_where_they_would_in_one_process(tmp_path: Path, engine: str) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    run_ranks(landed, 2, engine, base, tmp_path / "out", {})
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    theirs = extract(base, saved(tmp_path / "out/checkpoint-4"), tmp_path / "extracted", **LANDING)
    assert meaning(package) == meaning(theirs)
    assert package.manifest.landed == ("stochastic", "paper")


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_what_lands_are_the_masters_where_an_engine_has_some(tmp_path: Path, engine: str) -> None:
    """After rounding to bf16 training has moved little; from fp32 masters more elements land elsewhere."""
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    slow = {"learning_rate": 2e-5, "bf16": True}
    run_ranks(landed, 2, engine, base, tmp_path / "out", slow)
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    state = {name: tensor.bfloat16() for name, tensor in saved(tmp_path / "out/checkpoint-4").items()}
    rounded = extract(base, state, tmp_path / "extracted", **OPTIONS)
    assert package.manifest.landed == ("stochastic", "paper")
    changed = {record.name: record.changed for record in rounded.manifest.tensors}
    more = [
        record.changed > changed[record.name] for record in package.manifest.tensors if record.changed > 50
    ]
    assert len(more) > 5
    assert all(more)
