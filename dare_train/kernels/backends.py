"""Which kernels work on a tensor: those of the device it lies on, unless DARE_TRAIN_KERNELS says
otherwise.
"""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import ConfigError, brief

if TYPE_CHECKING:
    import torch

VARIABLE = "DARE_TRAIN_KERNELS"
CHOICES = ("torch", "cpu", "cuda")
"""torch's own operations where tensors lie (`cuda_in_torch`), Numba (`cpu`), Triton (`cuda`)."""

_OLDER_NAMES = {"reference": "torch"}
"""Still taken in this release. `kernels.reference` is something else, the definition of all of them."""


def asked_for() -> str | None:
    """What the user wants everywhere, if anything.

    Raises:
        ConfigError: there is no such set of kernels.
    """
    return checked(os.environ.get(VARIABLE) or None, VARIABLE)


def checked(asked: str | None, name: str) -> str | None:
    """The name of a set of kernels, or None for whichever works where tensors lie.

    Raises:
        ConfigError: there is no such set.
    """
    if asked is None:
        return None
    choice = _OLDER_NAMES.get(asked, asked) if isinstance(asked, str) else None
    if choice not in CHOICES:
        raise ConfigError(name, expected=f"one of {', '.join(CHOICES)}", found=brief(asked))
    return choice


def kernels_for(device: torch.device, asked: str | None = None) -> ModuleType | None:
    """What works on tensors where they lie, `kernels.cuda` or `kernels.cuda_in_torch`; None: they are copied
    to the CPU, and Numba does.

    `asked` goes before the environment.

    Raises:
        ConfigError: the user asks for kernels that cannot run there.
    """
    asked = checked(asked, "kernels") or asked_for()
    if asked == "cpu" or (asked is None and device.type == "cpu"):
        return None
    if asked == "torch":
        return _in_torch()
    problem = _without_triton(device)
    if problem is None:
        from . import cuda

        return cuda
    if asked == "cuda":
        remedy = (
            "ask for no kernels by name; or pip install triton, and use an NVIDIA GPU or, "
            "to try the kernels out, TRITON_INTERPRET=1"
        )
        raise ConfigError("kernels", expected=f"Triton for tensors on {device}", found=problem, remedy=remedy)
    _say(f"{problem}: torch's own operations are used on {device}, which is slower")
    return _in_torch()


def _in_torch() -> ModuleType:
    from . import cuda_in_torch

    return cuda_in_torch


def _without_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None where they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton has no kernels for {device.type}"
    return None


@functools.cache
def _say(sentence: str) -> None:
    print(f"dare_train: {sentence}", file=sys.stderr)
