"""What all tests share: no network, a bounded Hypothesis, a device for kernels, and a way to put weights on
disk.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["WANDB_MODE"] = "offline"

import pytest
from checkpoint_files import save_weights
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import torch


def gpu_found() -> bool:
    """Whether torch sees a GPU. It is imported to be asked only where a driver has left its device files."""
    if not any(file for name in ("nvidia*", "nvhost*", "dxg", "kfd") for file in Path("/dev").glob(name)):
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


if not gpu_found():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are defined

settings.register_profile(
    "tests",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")

MakeCheckpoint = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Recipes first: they take longest, and a process that began one last would keep the others waiting."""
    items.sort(key=lambda item: "recipes" not in item.path.parts)


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> None:
    """What modules have imported lives as long as the process. Each Trainer collects garbage when it begins
    and ends; without this it would look through all of torch and transformers each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def power_stays_on() -> Iterator[None]:
    """Nothing need reach the disk: no test cuts the power. Those that ask what is synced say so by a patch of
    their own.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels are tested: a GPU where there is one, else their interpreter, on tensors of the
    CPU.
    """
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest) -> None:
    """A quicker one for kernels of a device, where there is none."""
    if request.node.get_closest_marker("gpu") and os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("interpreting")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """`make_checkpoint(folder, tensors, config=None)`: a checkpoint folder as `save_pretrained` leaves it.

    A relative `folder` lies in the test's own temporary directory. What tensors may be, `save_weights` says.
    """

    def make(folder: str | Path, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True)
        save_weights(tensors, path / "model.safetensors")
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """wandb offline, in a folder of the test's own; its service reads the environment once, so it is stopped
    afterwards.
    """
    import wandb

    wandb.teardown()
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        (tmp_path / "wandb").mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield tmp_path / "wandb"
    wandb.teardown()
