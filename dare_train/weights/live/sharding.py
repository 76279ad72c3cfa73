"""Where the elements of live parameters lie: which flat range this process holds, and in what tensor.

Nothing here communicates. Known: plain modules, DDP, `torch.compile`, modules split or offloaded to CPU
memory by `device_map`, FSDP2 and other DTensors cut along dimension 0, FSDP1 with `use_orig_params=True`,
DeepSpeed ZeRO-1, -2 and -3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError
from . import offloaded

SUPPORTED = (
    "plain modules, DDP, FSDP1 (use_orig_params=True), FSDP2 (cut along dimension 0) "
    "and DeepSpeed ZeRO-1, -2, -3"
)


@dataclass(frozen=True)
class Piece:
    """A run of one parameter that this process holds: elements [start, start + length) of its flat order."""

    start: int
    length: int
    tensor: torch.Tensor
    """What holds it, of any shape."""
    offset: int = 0
    """Where in the tensor's own flat order it begins."""
    parent: torch.Tensor | None = None
    """The parameter on which the tensor is a view, if it is one."""

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def owner(self) -> torch.Tensor:
        """What is trained where it lies."""
        return self.tensor if self.parent is None else self.parent

    def within(self, start: int, stop: int) -> Piece | None:
        """The part of it that lies in [start, stop)."""
        begin = max(start, self.start)
        end = min(stop, self.stop)
        if begin >= end:
            return None
        return Piece(begin, end - begin, self.tensor, self.offset + begin - self.start, self.parent)

    def flat(self) -> torch.Tensor:
        """Its elements, 1-D: a view where the tensor is contiguous."""
        return _flat(self.tensor.detach(), self.offset, self.length)

    def places(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in its owner's flat order elements lie that are counted from its first."""
        within = positions + self.offset
        if self.parent is None:
            return within
        found = np.full(within.shape, self.tensor.storage_offset() - self.parent.storage_offset())
        for count, stride in zip(reversed(self.tensor.shape), reversed(self.tensor.stride()), strict=True):
            within, along = np.divmod(within, count)
            found += along * stride
        return found


def _flat(tensor: torch.Tensor, offset: int, length: int) -> torch.Tensor:
    """Elements [offset, offset + length) in flat order; of what is not contiguous, no more rows than it takes
    are copied.
    """
    if tensor.is_contiguous() or tensor.ndim < 2:
        return tensor.reshape(-1)[offset : offset + length]
    size = tensor.numel() // tensor.shape[0]
    first, last = offset // size, -(-(offset + length) // size)
    if last - first == 1:
        return _flat(tensor[first], offset - first * size, length)
    rows = tensor[first:last].reshape(-1)
    return rows[offset - first * size : offset - first * size + length]


@dataclass(frozen=True)
class Held:
    """One parameter or buffer as this process sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    masters: tuple[Piece, ...] | None = None
    """The fp32 values here that an optimizer works on; None where no engine keeps any beside the weights."""


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of parameters and persistent buffers, without wrappers' parts of names.

    Aliases come every time.
    """
    kept = offloaded.maps(module)
    for prefix, part in module.named_modules(remove_duplicate=False):
        passing = part._non_persistent_buffers_set
        persistent = {name: buffer for name, buffer in part._buffers.items() if name not in passing}
        for name, tensor in (*part._parameters.items(), *persistent.items()):
            if tensor is not None:
                whole_name = f"{prefix}.{name}" if prefix else name
                yield clean(whole_name), offloaded.behind(tensor, whole_name, kept)


_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def clean(name: str) -> str:
    """A parameter's name without what wrapping modules put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def reshard(module: torch.nn.Module) -> None:
    """Put FSDP2 modules back into shards: after an evaluation the root's parameters stay whole."""
    if hasattr(torch.distributed, "fsdp"):
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def has_dtensors_or_fsdp1(module: torch.nn.Module) -> bool:
    """Whether parameters get their gradients from FSDP (of either kind) or as DTensors, not from autograd."""
    return any(map(is_dtensor, module.parameters())) or any(_is_fsdp1(part) for part in module.modules())


def held(tensors: Iterable[tuple[str, torch.Tensor]], module: torch.nn.Module | None) -> dict[str, Held]:
    """What this process holds of each named tensor.

    Raises:
        ConfigError: a tensor is laid out in a way that is not known.
    """
    flattened = _fsdp1(module) if module is not None else {}
    return {name: flattened.get(id(tensor)) or _held(name, tensor) for name, tensor in tensors}


def _held(name: str, tensor: torch.Tensor) -> Held:
    if hasattr(tensor, "ds_tensor"):
        return _zero3(tensor)
    if is_dtensor(tensor):
        return _dtensor(name, tensor)
    shape = tuple(tensor.shape)
    if tensor.is_meta:
        return Held(shape, tensor.dtype, ())
    pieces = (Piece(0, tensor.numel(), tensor),) if tensor.numel() else ()
    return Held(shape, tensor.dtype, pieces, _zero12_masters(tensor))


def is_dtensor(tensor: torch.Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _dtensor(name: str, tensor: Any) -> Held:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    known = all(_is_known(placement) for placement in tensor.placements)
    if not known or sum(placement.is_shard() for placement in tensor.placements) > 1:
        found = f"placements {tensor.placements} on a mesh of shape {tuple(tensor.device_mesh.shape)}"
        remedy = "extract from the saved checkpoint instead"
        raise ConfigError(name, expected=SUPPORTED, found=found, remedy=remedy)
    local = tensor.to_local()
    shape = tuple(tensor.shape)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    start = offset[0] * (tensor.numel() // shape[0]) if local.numel() and shape else 0
    pieces = (Piece(start, local.numel(), local),) if local.numel() else ()
    return Held(shape, tensor.dtype, pieces)


def _is_known(placement: Any) -> bool:
    """Whether it is a copy, or a plain cut along dimension 0."""
    if placement.is_replicate():
        return True
    return type(placement).__name__ == "Shard" and bool(placement.dim == 0)


def _zero3(tensor: Any) -> Held:
    """ZeRO-3 cuts each parameter into equal partitions; the last ones end in padding, or are nothing else."""
    part = tensor.ds_tensor.ds_numel
    start = tensor.ds_zero_partition_rank * part
    length = max(0, min(part, tensor.ds_numel - start))
    pieces = (Piece(start, length, tensor.ds_tensor),) if length else ()
    return Held(tuple(tensor.ds_shape), tensor.ds_tensor.dtype, pieces, _zero3_masters(tensor, start, length))


def _zero3_masters(tensor: Any, start: int, length: int) -> tuple[Piece, ...] | None:
    optimizer = getattr(tensor, "_z3_optimizer", None)
    if optimizer is None or not tensor.requires_grad:
        return None
    return (Piece(start, length, optimizer.get_local_fp32_param(tensor)),) if length else ()


def _zero12_masters(tensor: Any) -> tuple[Piece, ...] | None:
    if not hasattr(tensor, "_hp_mapping"):
        return None
    mapping = tensor._hp_mapping
    if mapping is None:  # those of this parameter lie on other ranks
        return ()
    address = mapping.lp_fragment_address
    return (Piece(address.start, address.numel, mapping.hp_fragment),)


def _is_fsdp1(part: torch.nn.Module) -> bool:
    return type(part).__name__ == "FullyShardedDataParallel"


def _fsdp1(module: torch.nn.Module) -> Mapping[int, Held]:
    """By `id` of the original parameter: its place in the flat parameter that FSDP1 made of several."""
    if not any(_is_fsdp1(part) for part in module.modules()):
        return {}
    from torch.distributed.fsdp._traversal_utils import _get_fsdp_handles

    held_by_id: dict[int, Held] = {}
    for handle in _get_fsdp_handles(module):
        flat: Any = handle.flat_param
        # Before the first forward pass the parameter itself is the shard.
        local = getattr(flat, "_local_shard", flat)
        if not handle._use_orig_params:
            remedy = "set it to True, or use FSDP2"
            raise ConfigError("FSDP1", expected=SUPPORTED, found="use_orig_params=False", remedy=remedy)
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            pieces: tuple[Piece, ...] = ()
            if info.in_shard:
                piece = Piece(info.intra_param_start_idx, info.numel_in_shard, local, info.offset_in_shard)
                pieces = (piece,)
            held_by_id[id(parameter)] = Held(tuple(shape), flat.dtype, pieces)
    return held_by_id
