"""What each rank of `scripts/bench ranks` does; started by torchrun, which leaves what was measured in a
file.

A model is trained for a few steps of real gradients with the engine itself, no Trainer around it: what is
timed is the engine's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from dare_train import DareConfig, Snapshotter

from . import llama
from .common import WEIGHTS, Pair, remove
from .process import Watch

P = 0.9
RATE = 1e-5
TOKENS = (1, 4)
"""Rows and length of a step's input: gradients are as large as the model, however few tokens they come
from."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model under an engine: one step of it, and the two ways in which the engine writes to a new
    folder.
    """

    model: torch.nn.Module
    step: Callable[[], None]
    save: Callable[[Path], Any]
    """The weights alone."""
    checkpoint: Callable[[Path], Any]
    """Everything that training needs to go on."""


def main() -> None:
    what, size, runs, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    dist.init_process_group("gloo")
    measured = (
        memory(llama.pair(size), runs, folder)
        if what == "memory"
        else waits(what, llama.pair(size).base, runs, folder)
    )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, measured)
    if dist.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps(everyone))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads at times abort an orderly end


# Memory.


def memory(pair: Pair, runs: int, folder: Path) -> dict[str, Any]:
    """Anonymous memory beyond the sharded model's, in MB: the peak of each snapshot, and what stays after it;
    a package's name.

    Everything counts that came since before `Snapshotter.begin`.
    """
    model = _sharded(_load(pair.base))
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    before = _settled()
    snapshotter = Snapshotter.begin(model, folder / "dare", DareConfig(p=P))
    _become(model, pair.tuned)
    peaks, stays = [], []
    for number in range(runs):
        _settled()
        watch = Watch(os.getpid())
        snapshotter.take(model, folder / f"dare/step-{number}", step=number)
        snapshotter.wait()
        watch.stop()
        peaks.append(watch.peaks["RssAnon"] - before)
        stays.append(_settled() - before)
    snapshotter.close()
    return {"held": held, "peaks": peaks, "stays": stays}


def _settled() -> float:
    """Anonymous memory in MB, with what was freed given back: else a snapshot could hide in it."""
    dist.barrier()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    ]
    return int(line.split()[1]) * 1024 / 1e6


@torch.no_grad()
def _become(model: torch.nn.Module, tuned: Path) -> None:
    """Give this rank's shards the values of a fine-tune."""
    parameter: Any
    with safe_open(tuned / WEIGHTS, "pt") as file:
        for name, parameter in model.named_parameters():
            local = parameter.to_local()
            first = dist.get_rank() * len(local)  # the ranks divide all of this model's first dimensions
            local.copy_(file.get_slice(name)[first : first + len(local)])


# Waiting.


def waits(engine: str, base: Path, runs: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each snapshot, of each of the engine's own ways to write, and of each question whether a
    snapshot is written.
    """
    training = ENGINES[engine](base)
    snapshotter = Snapshotter.begin(training.model, folder / "dare", DareConfig(p=P), base=base)
    seconds: dict[str, list[float]] = {"snapshot": [], "save": [], "checkpoint": [], "finished": []}
    for number in range(runs):
        training.step()
        take = partial(snapshotter.take, training.model, folder / "dare/package", step=number)
        seconds["snapshot"].append(_timed(take))
        seconds["finished"].append(_timed(snapshotter.finished))
        snapshotter.wait()
        for kind, write in (("save", training.save), ("checkpoint", training.checkpoint)):
            _emptied(folder / kind)
            seconds[kind].append(_timed(lambda: write(folder / kind)))  # noqa: B023
            _emptied(folder / kind)
    snapshotter.close()
    return seconds


def _timed(work: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    before = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - before


def _emptied(folder: Path) -> None:
    if dist.get_rank() == 0:
        remove(folder)
        folder.mkdir()
    dist.barrier()


# Engines.


def _load(base: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


def _sharded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _loss(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 8000, TOKENS, generator=torch.Generator().manual_seed(dist.get_rank()))
    return model(input_ids=tokens, labels=tokens).loss


def _stepper(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ddp(base: Path) -> Training:
    model = _load(base)
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=RATE)

    def save(out: Path) -> None:
        if dist.get_rank() == 0:
            model.save_pretrained(out)

    def checkpoint(out: Path) -> None:
        save(out)
        if dist.get_rank() == 0:
            torch.save(optimizer.state_dict(), out / "optimizer.pt")

    return Training(model=wrapped, step=_stepper(wrapped, optimizer), save=save, checkpoint=checkpoint)


def fsdp2(base: Path) -> Training:
    model = _sharded(_load(base))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def save(out: Path) -> None:
        save_shards({"model": get_model_state_dict(model)}, checkpoint_id=out)

    def checkpoint(out: Path) -> None:
        save_shards(
            {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
            checkpoint_id=out,
        )

    return Training(model=model, step=_stepper(model, optimizer), save=save, checkpoint=checkpoint)


def zero3(base: Path) -> Training:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for a minute
    deepspeed.init_distributed("gloo")
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
    partitioning = HfDeepSpeedConfig(config)
    model = _load(base)
    del partitioning
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=RATE), config=config
    )

    def step() -> None:
        engine.backward(_loss(engine))
        engine.step()

    return Training(
        model=engine.module, step=step, save=engine.save_16bit_model, checkpoint=engine.save_checkpoint
    )


ENGINES: dict[str, Callable[[Path], Training]] = {"ddp": ddp, "zero3": zero3, "fsdp2": fsdp2}

if __name__ == "__main__":
    main()
