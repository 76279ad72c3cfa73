"""One view of a live model, whoever holds it: over all ranks every element of every tensor once, under its
checkpoint name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import outcomes, run_ranks, train_on
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import classifier, save_base
from transformers import TrainerCallback

from dare_train import DareConfig, DeltaPackage, Snapshotter, extract
from dare_train.errors import ConfigError
from dare_train.parallel.ranks import Ranks
from dare_train.weights.live.live import LiveWeights

RUNS = [
    ("ddp", 2),
    ("zero1", 3),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3", 3),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("fsdp1", 2),
    ("fsdp1", 3),
]
Runs = dict[str, list[tuple[int, bytes]]]


class Walk(TrainerCallback):
    """Looks at the model when training begins and, with other parts of it gathered by then, after an
    evaluation.
    """

    def __init__(self) -> None:
        self.begin: Runs = {}
        self.after_evaluation: Runs = {}
        self.elements: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.begin = self.walk(model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.after_evaluation = self.walk(model)

    def walk(self, model: Any) -> Runs:
        live = LiveWeights(model, ranks=Ranks.joined())
        self.elements = {name: info.numel for name, info in live.tensors.items()}
        return {
            name: [(a, live.read(name, a, b - a).tobytes()) for a, b in spans]
            for name, spans in live.owned.items()
        }


def walked(rank: int, engine: str, base: Path, out: Path) -> tuple[Runs, Runs, dict[str, int]]:
    walk = Walk()
    options = {
        "max_steps": 1,
        "learning_rate": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
    }
    train_on(engine, lambda: classifier(base), out, walk, **options)
    return walk.begin, walk.after_evaluation, walk.elements


@pytest.mark.parametrize(("engine", "world"), RUNS, ids=str)
def test_every_element_is_owned_once(tmp_path: Path, engine: str, world: int) -> None:
    base = save_base(tmp_path / "base")
    ranks = run_ranks(walked, world, engine, base, tmp_path / "out")
    state = classifier(base).state_dict()
    for seen in (0, 1):
        together = {
            name: sorted(run for rank in ranks for run in rank[seen][name]) for name in ranks[0][seen]
        }
        assert together.keys() == state.keys()
        for name, runs in together.items():
            starts = np.cumsum([0, *(len(words) // 4 for _, words in runs)]).tolist()
            assert [start for start, _ in runs] == starts[:-1]
            assert starts[-1] == ranks[0][2][name] == state[name].numel()
            assert b"".join(words for _, words in runs) == state[name].numpy().tobytes(), name
    shares = [sum(len(words) for runs in rank[0].values() for _, words in runs) for rank in ranks]
    if engine not in (
        "ddp",
        "zero1",
        "zero2",
    ):  # which hold it whole: tensors of up to a block go to one rank
        assert min(shares) > 0.5 * sum(shares) / world


def extracted(rank: int, base: Path, out: Path) -> str:
    dist.init_process_group("gloo")
    model = classifier(base)
    fully_shard(model)
    try:
        extract(base, model, out)
    except ConfigError as error:
        return str(error)
    return "a package of what this rank holds"


def test_extract_does_not_take_a_part_for_the_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for said in run_ranks(extracted, 2, base, tmp_path / "package"):
        assert (
            "in this process, found a part of them; other ranks hold the rest: use the callback "
            "or a Snapshotter" in said
        )
    assert not (tmp_path / "package").exists()


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("lost", torch.ones(2), persistent=False)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch.compile's own import
@pytest.mark.parametrize(
    "wrap",
    [lambda module: module, torch.compile, torch.nn.DataParallel],
    ids=["plain", "compile", "data parallel"],
)
def test_tied_weights_count_once_and_wrappers_not_at_all(wrap: Any) -> None:
    assert {name: info.shape for name, info in LiveWeights(wrap(Tied())).tensors.items()} == {
        "embedding.weight": (5, 3),
        "kept": (2,),
    }


class Meshed(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


def on_mesh(rank: int, shape: tuple[int, ...], placements: list[Any]) -> list[tuple[int, bytes]]:
    dist.init_process_group("gloo")
    tensor = distribute_tensor(torch.arange(35.0).reshape(7, 5), init_device_mesh("cpu", shape), placements)
    live = LiveWeights(Meshed(tensor), ranks=Ranks.joined())
    return [(a, live.read("weight", a, b - a).tobytes()) for a, b in live.owned["weight"]]


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((2,), [Shard(0)]),
        ((2,), [Replicate()]),
        ((1, 2), [Replicate(), Shard(0)]),
        ((2, 1), [Replicate(), Shard(0)]),
    ],
    ids=["uneven", "replicated", "hybrid", "hybrid replicated"],
)
def test_meshes(shape: tuple[int, ...], placements: list[Any]) -> None:
    runs = sorted(run for rank in run_ranks(on_mesh, 2, shape, placements) for run in rank)
    assert b"".join(words for _, words in runs) == torch.arange(35.0).numpy().tobytes()


@pytest.mark.parametrize(
    ("shape", "placements"), [((2,), [Shard(1)]), ((1, 2), [Shard(0), Shard(0)])], ids=["columns", "two ways"]
)
def test_meshes_that_cut_otherwise_are_refused(shape: tuple[int, ...], placements: list[Any]) -> None:
    for outcome in outcomes(on_mesh, 2, shape, placements):
        assert outcome.error == "ConfigError"
        assert "weight: expected plain modules, DDP, FSDP1" in outcome.message
        assert "on a mesh of shape" in outcome.message


def begun(rank: int, folder: Path) -> str:
    with pytest.raises(
        ConfigError,
        match="WORLD_SIZE: expected 2 processes that work together, found each of them for itself",
    ):
        Snapshotter.begin(torch.nn.Linear(2, 2), folder, DareConfig(p=0.5))
    return "refused"


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path) -> None:
    assert run_ranks(begun, 2, tmp_path) == ["refused", "refused"]


def looped(rank: int, base: Path, folder: Path) -> list[str]:
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(classifier(base))
    snapshotter = Snapshotter.begin(model, folder, DareConfig(p=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    snapshotter.take(model, folder / "one", step=1)
    last = snapshotter.close()
    assert last is not None
    return [last.package.manifest.base_model, last.package.manifest.result, snapshotter.record["folder"]]


def test_a_loop_of_ones_own_finds_the_base_through_wrappers(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    first, second = run_ranks(looped, 2, base, tmp_path / "packages")
    assert first == second
    assert first[0] == first[2] == str(base)
    assert not (tmp_path / "packages/base").exists()
    DeltaPackage.open(tmp_path / "packages/one").verify(base)
