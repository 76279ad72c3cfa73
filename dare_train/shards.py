"""Live weights: a module or a state dict seen as flat words under checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Union

import numpy as np
import torch

from .dtypes import DTYPES, DType, Words
from .errors import CheckpointError, ConfigError, TensorMismatch
from .weights import TensorInfo

Live = Union[torch.nn.Module, Mapping[str, torch.Tensor]]

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class LiveWeights:
    """Implements `Weights` over tensors in memory. Words of contiguous CPU tensors are views: nothing is copied.

    Raises:
        ConfigError: the tensors are spread over several processes, or have no storage.
        CheckpointError: a tensor's dtype is not supported.
    """

    def __init__(self, live: Live, *, label: str = "model in memory") -> None:
        self.label = label
        self._tensors = dict(checkpoint_tensors(live))
        self.tensors = {name: TensorInfo(_dtype_of(name, tensor), tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str, start: int, count: int) -> Words:
        flat = self._tensors[name].detach().reshape(-1)[start : start + count].cpu()
        raw = flat.view(torch.uint8).numpy() if count else np.empty(0, np.uint8)
        return raw.view(self.tensors[name].dtype.word)

    def words(self, name: str) -> Words:
        """All words of a tensor: a writable view where it lies contiguous on the CPU, else a copy."""
        return self.read(name, 0, self.tensors[name].numel)

    def store(self, name: str, words: Words) -> None:
        """Make `words` the tensor's content; free of cost when they are the view that `words()` returned."""
        tensor = self._tensors[name].detach()
        if tensor.numel() and words.ctypes.data != tensor.data_ptr():
            tensor.copy_(torch.from_numpy(words.view(np.uint8)).view(tensor.dtype).reshape(tensor.shape))


def checkpoint_tensors(live: Live) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, tensor) as `save_pretrained` writes them: tied tensors once, persistent buffers included."""
    if isinstance(live, Mapping):
        for name, tensor in live.items():
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(str(name), expected="a tensor", found=f"a {type(tensor).__name__}")
            yield name, tensor
        return
    tied = set(getattr(live, "all_tied_weights_keys", None) or ())
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    named = {_clean(name): tensor for name, tensor in live.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in sorted(named.items(), key=lambda item: item[0] in tied):
        _check_local(name, tensor)
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        yield name, tensor


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _check_local(name: str, tensor: torch.Tensor) -> None:
    if hasattr(tensor, "ds_id") or type(tensor).__name__ == "DTensor":
        engine = "DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") else "FSDP"
        raise ConfigError(
            name, expected="a tensor held whole by this process", found=f"one sharded by {engine}", remedy="run on one process"
        )
    if tensor.is_meta:
        raise ConfigError(name, expected="a tensor with storage", found="one on the meta device", remedy="load the weights first")


def _dtype_of(name: str, tensor: torch.Tensor) -> DType:
    if tensor.dtype not in _CODES:
        raise CheckpointError(name, expected=f"one of {', '.join(_CODES.values())}", found=str(tensor.dtype))
    return DTYPES[_CODES[tensor.dtype]]


def check_same_tensors(found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], *, what: str, remedy: str) -> None:
    """Both hold the same names and shapes.

    Raises:
        TensorMismatch: naming the first tensor that is missing, extra or of another shape.
    """
    for name, info in expected.items():
        if name not in found:
            raise TensorMismatch(name, expected=f"in {what}", found="missing", remedy=remedy)
        if found[name].shape != info.shape:
            raise TensorMismatch(name, expected=f"shape {info.shape}", found=f"{found[name].shape} in {what}", remedy=remedy)
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise TensorMismatch(extra[0], expected=f"not in {what}", found="extra", remedy=remedy)
