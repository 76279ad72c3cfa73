"""Real Trainer runs in 1, 2 or 3 real processes on CPU, under every engine.

`run_ranks(function, world, *args)` is a `torchrun` whose ranks are forked from a process that has imported
everything: one costs a second, not the ten that the imports take. `train_on(engine, ...)` is what such a
function calls to train. Functions and results travel by pickle, so a function is one of a module's own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from training import make_trainer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

Result = TypeVar("Result")

PRELOADED = (
    "dare_train.applying.in_place",
    "dare_train.cli.main",
    "dare_train.extracting.extract",
    "dare_train.merging.merge",
    "dare_train.snapshots.callback",
    "deepspeed",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # ZeRO imports it to compare the optimizer with
    "hypothesis",
    "lightning.pytorch",
    "llvmlite.binding",
    "peft",
    "pytest",
    "pytorch_lightning",
    "torch._dynamo",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "wandb",
    __name__,
    "worked_out_once",
)
"""What the server imports. What is not installed makes only those ranks slower that need it."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}
GRACE = 15.0
"""Seconds that ranks have to end after another has failed: they may be waiting for it in vain."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        result: what the function returned, if it did.
        error: None, the name of the exception's type, "killed" (the process ended without a word), or "hung".
        message: the exception's text, the exit code, or for how long it ran.
        traceback: where it happened; where each thread was, if it hung.
    """

    result: Any = None
    error: str | None = None
    message: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        return (
            "finished" if self.error is None else f"{self.error}: {self.message}\n{self.traceback}".rstrip()
        )


class RanksFailed(AssertionError):
    """Not every rank returned a result; tells of each of them how it ended."""


def run_ranks(function: Callable[..., Result], world: int, *args: Any, timeout: float = 120) -> list[Result]:
    """`function(rank, *args)` in `world` processes as `torchrun` would start them; their results, by rank.

    Raises:
        RanksFailed: a rank raised, was killed, or still ran after `timeout` seconds.
    """
    ends = outcomes(function, world, *args, timeout=timeout)
    if any(end.error for end in ends):
        raise RanksFailed("\n".join(f"rank {rank} {end}" for rank, end in enumerate(ends)))
    return [end.result for end in ends]


def outcomes(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Outcome]:
    """As `run_ranks`, for ranks that are meant to fail: how each of them ended."""
    # The store lives here, as it does in torchrun: its port is free for certain, and it outlives any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends: dict[_Rank, Outcome] = {}
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ranks = [
            _Rank(pickle.dumps((function, rank, args)), rank, world, store.port, Path(folder))
            for rank in range(world)
        ]
        stack.callback(lambda: [rank.end() for rank in ranks])
        start = time.monotonic()
        deadline = start + timeout
        while len(ends) < world and (left := deadline - time.monotonic()) > 0:
            waiting: dict[Any, _Rank] = {rank.channel: rank for rank in ranks if rank not in ends}
            for channel in connection.wait(list(waiting), left):
                ends[waiting[channel]] = end = waiting[channel].outcome()
                deadline = min(deadline, time.monotonic() + GRACE) if end.error else deadline
        ran = f"still running after {time.monotonic() - start:.0f} s"
        return [
            ends.get(rank) or Outcome(error="hung", message=ran, traceback=rank.stacks()) for rank in ranks
        ]


class _Rank:
    """One process, seen from the one that started it."""

    def __init__(self, job: bytes, rank: int, world: int, port: int, folder: Path) -> None:
        # The job is bytes: multiprocessing's own pickler would share tensors through files that end with
        # their process.
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        environment = {
            **os.environ,
            **ENVIRONMENT,
            **{name: str(value) for name, value in {**place, **store}.items()},
        }
        context = _server()
        self._stacks, self._answered = folder / f"rank-{rank}", False
        self.channel, theirs = context.Pipe()
        self._process = context.Process(
            target=_live, args=(job, environment, self._stacks, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def outcome(self) -> Outcome:
        self._answered = True
        try:
            return pickle.loads(self.channel.recv_bytes())
        except (EOFError, OSError):
            self._process.join()
            return Outcome(error="killed", message=f"exit code {self._process.exitcode}")

    def stacks(self) -> str:
        """Where a rank is that does not answer."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)
            time.sleep(0.5)
        return self._stacks.read_text() if self._stacks.exists() else ""

    def end(self) -> None:
        self.channel.close()  # what a rank waits for that is done
        self._process.join(5 if self._answered else 0)
        self._process.kill()
        self._process.join()
        self._process.close()


@functools.cache
def _server() -> Any:
    """Starts what ranks are forked from. It gets its environment now: much of it is read when libraries are
    imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with patch.dict(os.environ, {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent)}):
        forkserver.ensure_running()
    return context


def _live(job: bytes, environment: dict[str, str], stacks: Path, channel: Any) -> None:
    """The life of a rank. It ends by `os._exit`: gloo's threads at times abort an orderly one."""
    faulthandler.register(signal.SIGUSR1, file=stacks.open("w"), all_threads=True)
    gc.freeze()  # what the server has imported is not looked through again
    os.fsync = os.fstat  # no test cuts the power
    os.environ.clear()  # the server's may be older than a test's
    os.environ.update(environment)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which os._exit leaves behind
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="dare_train")
    try:
        function, rank, args = pickle.loads(job)
        answer = pickle.dumps(Outcome(function(rank, *args)))
        failed = False
    except BaseException as error:  # noqa: BLE001 - told to the test, SystemExit as well
        answer = pickle.dumps(
            Outcome(error=type(error).__name__, message=str(error), traceback=traceback.format_exc())
        )
        failed = True
    channel.send_bytes(answer)
    if not failed:  # a rank that leaves early breaks the others' connections; one that failed should
        channel.poll(None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failed)


ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp1")

BATCH = 12
"""Rows in a step, whatever the number of ranks; with the rows of `training.examples`, four steps are an
epoch."""


def train_on(
    engine: str,
    model_maker: Callable[[], PreTrainedModel],
    out: Path,
    *callbacks: TrainerCallback,
    resume: Path | None = None,
    train_rows: list[dict[str, Any]] | None = None,
    **training_arguments: Any,
) -> Trainer:
    """`training.train` on this rank under an engine, which is proven to be at work.

    Args:
        engine: one of `ENGINES`.
        model_maker: makes the model once the engine is configured, so that ZeRO-3 gets its `zero.Init`.
        out: the same folder on every rank.
        train_rows: examples for a model that is no classifier.
        resume: a checkpoint, as in `Trainer.train(resume_from_checkpoint=...)`.
        training_arguments: go before the engine's and the tests' own.
    """
    options = {**engine_arguments(engine), **training_arguments}
    script = TrainingArguments(
        output_dir=str(out), use_cpu=True, **options
    )  # a user's script makes them before the model
    trainer = make_trainer(model_maker(), out, *callbacks, **options)
    del script  # which kept DeepSpeed's configuration alive
    trainer.train_dataset = train_rows or trainer.train_dataset
    trainer.add_callback(EngineAtWork(engine, trainer))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def engine_arguments(engine: str) -> dict[str, Any]:
    """What `TrainingArguments` (or TRL's kinds of them) need for an engine, besides `use_cpu=True`. Prepares
    this process, for good.
    """
    assert multiprocessing.parent_process(), "inside run_ranks: it changes the process that calls it"
    world = int(os.environ.get("WORLD_SIZE", 1))
    options: dict[str, Any] = {"ddp_backend": "gloo", "per_device_train_batch_size": BATCH // world}
    options |= {
        "average_tokens_across_devices": False
    }  # it multiplies the loss of a model like BERT by the number of ranks
    if engine == "single":
        assert world == 1
        os.environ.pop("LOCAL_RANK", None)  # by which accelerate knows a launcher's child
        return {**options, "ddp_backend": None}
    if engine.startswith("zero"):
        return {**options, "deepspeed": _zero(int(engine[-1]))}
    if engine.startswith("fsdp"):
        _let_fsdp_train_on_cpu()
        os.environ["ACCELERATE_TORCH_DEVICE"] = (
            "cpu"  # else it is cpu:0, and FSDP1 takes that for another device
        )
        return {**options, "fsdp": True, "fsdp_config": {**FSDP[engine]}}
    assert engine == "ddp", f"{engine}: one of {', '.join(ENGINES)}"
    return options


def _zero(stage: int) -> dict[str, Any]:
    import deepspeed

    # Else it is probed, and then shared memory's kernels are compiled for a minute.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, verbose=False
    )  # as TrainingArguments do, but not with use_cpu
    sizes = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    zero |= {
        "stage3_param_persistence_threshold": 100
    }  # between a tiny model's vectors and its matrices: both kinds occur
    zero |= {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}  # by default gigabytes
    return {
        **dict.fromkeys(sizes, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


_LAYERS = {
    "transformer_layer_cls_to_wrap": ["BertLayer"]
}  # by default its embeddings as well, which accelerate then shards twice
FSDP = {
    "fsdp2": {"version": 2, **_LAYERS},
    # A full state dict crashes the process. With a sharded one, accelerate does not load AdamW's state again.
    "fsdp1": {
        "version": 1,
        **_LAYERS,
        "use_orig_params": True,
        "sync_module_states": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}


def _let_fsdp_train_on_cpu() -> None:
    """accelerate knows FSDP on GPUs only, and elsewhere trains with DDP without a word."""
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


_KINDS = {"single": "NO", "ddp": "MULTI_CPU", "zero": "DEEPSPEED", "fsdp": "FSDP"}
_WRAPPERS = {
    "single": PreTrainedModel,
    "ddp": DistributedDataParallel,
    "fsdp1": FullyShardedDataParallel,
    "fsdp2": FSDPModule,
}


class EngineAtWork(TrainerCallback):
    """Fails the run unless the trainer trains with the engine that the test believes in."""

    def __init__(self, engine: str, trainer: Trainer) -> None:
        self.engine, self.trainer = engine, trainer
        found = trainer.accelerator.distributed_type
        assert found == _KINDS[engine.rstrip("123")], f"{engine} was asked for, {found} trains"

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        wrapped, parameters = self.trainer.model_wrapped, list(self.trainer.model.parameters())
        assert dist.is_initialized() == (self.engine != "single")
        assert isinstance(wrapped, _WRAPPERS.get(self.engine, torch.nn.Module)), (
            f"{self.engine}: {type(wrapped)}"
        )
        if self.engine.startswith("zero"):
            assert wrapped.zero_optimization_stage() == int(self.engine[-1])
        if self.engine == "zero3":
            assert all(hasattr(parameter, "ds_tensor") for parameter in parameters)
        if self.engine == "fsdp2":
            assert all(isinstance(parameter, DTensor) for parameter in parameters)
