"""Sparse tuning: only the elements that a mask keeps are trained, and the optimizer has state for no others.

For the length of a step the optimizer works on a short vector of kept elements in place of each tensor; after
it the tensor gets its elements. Between steps nothing is to be seen of that but the state, which is as short
as the vector. What was trained is exactly sparse: with the same p and seed, `extract(..., rescale="none",
values="exact")` loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import DareConfig, threshold_of
from ..errors import ConfigError
from ..package.masks import Mask, key_of
from ..weights.live.live import LiveWeights
from ..weights.live.named_tensors import checkpoint_tensors
from ..weights.live.sharding import Piece, has_dtensors_or_fsdp1
from ..weights.live.wrapped import unwrapped

Masks = Mapping[str, "torch.Tensor | NDArray[np.bool_]"]

_at_work: WeakKeyDictionary[torch.optim.Optimizer, SparseTuning] = WeakKeyDictionary()


class SparseTuning:
    """Makes an optimizer train kept elements only, until it is closed.

    Args:
        model: on one device, under DDP, or under DeepSpeed ZeRO.
        optimizer: any of torch's that steps without a closure, wrapped by accelerate or DeepSpeed or not.
            State that it has already is kept, as far as it belongs to kept elements.
        p: share of each tensor's elements that stay as they are, drawn as in a package; or a mapping from
            name patterns to it, first match wins: `{"classifier*": 0, "*": 0.9}` trains a new head whole.
        seed: selects the elements.
        masks: bool by checkpoint name, in the tensors' shapes, 1 for what is trained; these tensors have no
            need of `p`.

    Attributes:
        trained: how many elements are trained, in this process.
        elements: of how many.

    Raises:
        ConfigError: a value is wrong; a mask does not fit; the optimizer is none of torch's, or does not
            train this model; the model is under FSDP, whose gradients do not pass where they could be masked
            before they are clipped.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        *,
        p: float | Mapping[str, float] = 0.9,
        seed: int = 0,
        masks: Masks | None = None,
    ) -> None:
        if has_dtensors_or_fsdp1(model):
            expected = "one on one device, under DDP, or under DeepSpeed ZeRO"
            raise ConfigError(
                "model",
                expected=expected,
                found="one under FSDP, or with DTensors",
                remedy="use ZeRO to spread it",
            )
        self._optimizer, targets = _innermost(optimizer)
        if self._optimizer in _at_work:
            _at_work[self._optimizer].close()
        kept = _Kept(DareConfig(p=p, seed=seed), masks or {})
        live = LiveWeights(model)
        kept.check(live)
        self._short = _shortened(targets, live, kept)
        if not self._short and not any(kept.whole(name) for name in live.tensors):
            raise ConfigError("optimizer", expected="parameters of this model", found="none of them")
        shortened = sum(short.tensor.numel() - short.places.numel() for short in self._short)
        self.elements = sum(target.numel() for target in targets)
        self.trained = self.elements - shortened
        for short in (short for short in self._short if short.tensor in self._optimizer.state):
            state = self._optimizer.state[short.tensor]
            self._optimizer.state[short.tensor] = {
                name: short.of_kept(value) for name, value in state.items()
            }
        self._undo = [
            *(hook.remove for hook in _masked_gradients(model, live, kept)),
            self._optimizer.register_step_pre_hook(self._before).remove,
            self._optimizer.register_step_post_hook(self._after).remove,
        ]
        _at_work[self._optimizer] = self

    def close(self) -> None:
        """The optimizer trains whole tensors again, and begins anew with those that were trained in part."""
        for undo in self._undo:
            undo()
        for short in self._short:
            self._optimizer.state.pop(short.tensor, None)
        self._short = []
        self._undo = []
        _at_work.pop(self._optimizer, None)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """For the length of a step the optimizer has kept elements in place of tensors."""
        if any(closure is not None for closure in (*args[1:], named.get("closure"))):
            raise ConfigError(
                "optimizer",
                expected="steps without a closure",
                found="a closure",
                remedy="use another optimizer",
            )
        for short in self._short:
            gradient = short.tensor.grad
            short.values.copy_(short.tensor.take(short.places))
            short.values.grad = None if gradient is None else gradient.take(short.places)
        self._exchange({id(short.tensor): (short.tensor, short.values) for short in self._short})

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self._exchange({id(short.values): (short.values, short.tensor) for short in self._short})
        for short in self._short:
            if short.values.grad is not None:
                short.tensor.put_(short.places, short.values)
                short.values.grad = None

    def _exchange(self, pairs: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """In the optimizer's groups and in its state, the second of each pair comes for the first."""
        state = self._optimizer.state
        for group in self._optimizer.param_groups:
            group["params"] = [
                pairs[id(tensor)][1] if id(tensor) in pairs else tensor for tensor in group["params"]
            ]
        for old, new in pairs.values():
            if old in state:
                state[new] = state.pop(old)


class SparseTuningCallback(TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer train kept elements only.

        Trainer(..., callbacks=[SparseTuningCallback(p=0.9), DareCallback(p=0.9, rescale="none",
        values="exact")])

    Args:
        p, seed, masks: see `SparseTuning`.

    Attributes:
        trained, elements: see `SparseTuning`; of the last training.

    Raises:
        ConfigError: when training begins; see `SparseTuning`.
    """

    def __init__(
        self, p: float | Mapping[str, float] = 0.9, *, seed: int = 0, masks: Masks | None = None
    ) -> None:
        DareConfig(p=p, seed=seed)
        self._options: dict[str, Any] = {"p": p, "seed": seed, "masks": masks}
        self._tuning: SparseTuning | None = None
        self.trained = self.elements = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._tuning = SparseTuning(model, optimizer, **self._options)
        self.trained = self._tuning.trained
        self.elements = self._tuning.elements

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._tuning is not None:
            self._tuning.close()
            self._tuning = None


@contextmanager
def sparse_tuning(
    model: torch.nn.Module,
    optimizer: Any,
    *,
    p: float | Mapping[str, float] = 0.9,
    seed: int = 0,
    masks: Masks | None = None,
) -> Iterator[SparseTuning]:
    """A block in which the optimizer trains kept elements only; see `SparseTuning`."""
    tuning = SparseTuning(model, optimizer, p=p, seed=seed, masks=masks)
    try:
        yield tuning
    finally:
        tuning.close()


class _Kept:
    """Which elements are trained, by checkpoint name."""

    def __init__(self, config: DareConfig, masks: Masks) -> None:
        self._config = config
        self._masks = {
            name: np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask)
            for name, mask in masks.items()
        }

    def check(self, live: LiveWeights) -> None:
        for name, mask in self._masks.items():
            info = live.tensors.get(name)
            if info is None or mask.dtype != np.bool_ or mask.shape != info.shape:
                expected = f"bool {list(info.shape)}" if info is not None else "a tensor of the model"
                raise ConfigError(
                    f"masks[{name!r}]", expected=expected, found=f"{mask.dtype} {list(mask.shape)}"
                )

    def whole(self, name: str) -> bool:
        return name not in self._masks and threshold_of(self._config.drop_rate(name)) == 0

    def positions(self, name: str, start: int, length: int) -> NDArray[np.int64]:
        """Relative to `start`, of the elements of a run that are trained."""
        if name in self._masks:
            return np.flatnonzero(self._masks[name].reshape(-1)[start : start + length])
        threshold = threshold_of(self._config.drop_rate(name))
        return Mask(kind="seeded", key=key_of(self._config.seed, name), threshold=threshold).positions(
            start, length
        )


class _Short:
    """A tensor that the optimizer worked on, and what it works on instead."""

    def __init__(self, tensor: torch.Tensor, places: torch.Tensor) -> None:
        self.tensor = tensor
        self.places = places
        self.values = torch.nn.Parameter(tensor.detach().take(places))

    def of_kept(self, value: Any) -> Any:
        """Of a state of the whole tensor, that of the kept elements."""
        return (
            value.take(self.places)
            if isinstance(value, torch.Tensor) and value.shape == self.tensor.shape
            else value
        )


def _innermost(optimizer: Any) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """The optimizer of torch inside what accelerate and DeepSpeed put around it, and the tensors that it
    works on.
    """
    by_turns: list[torch.Tensor] = []
    while hasattr(optimizer, "optimizer"):
        by_turns += getattr(
            optimizer, "fp32_partitioned_groups_flat", []
        )  # ZeRO-3 gives it one of them at a time
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "optimizer", expected="one of torch.optim, or one that wraps it", found=type(optimizer).__name__
        )
    return optimizer, by_turns or [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _shortened(targets: list[torch.Tensor], live: LiveWeights, kept: _Kept) -> list[_Short]:
    """What the optimizer is to work on in place of those of its tensors that are trained in part."""
    places: dict[int, list[NDArray[np.int64]]] = {id(target): [] for target in targets}
    whole = dict.fromkeys(places, True)
    for name in live.tensors:
        held = live.holding(name)
        for piece in held.pieces if held.masters is None else held.masters:
            target = next((candidate for candidate in targets if _lies_in(piece, candidate)), None)
            if target is not None:
                begin = int(piece.owner.storage_offset() - target.storage_offset())
                positions = kept.positions(name, piece.start, piece.length)
                places[id(target)].append(begin + piece.places(positions))
                whole[id(target)] &= kept.whole(name)
    return [
        _Short(target, torch.from_numpy(np.sort(np.concatenate(places[id(target)]))).to(target.device))
        for target in targets
        if places[id(target)] and not whole[id(target)]
    ]


def _lies_in(piece: Piece, target: torch.Tensor) -> bool:
    """Whether a piece of the model is a piece of what the optimizer works on."""
    if piece.owner is target:
        return True
    if (
        piece.tensor.device != target.device
        or piece.tensor.untyped_storage().data_ptr() != target.untyped_storage().data_ptr()
    ):
        return False
    begin = int(piece.owner.storage_offset() - target.storage_offset())
    first, last = begin + piece.places(np.array([0, piece.length - 1]))
    return piece.tensor.dtype == target.dtype and bool(first >= 0 and last < target.numel())


def _masked_gradients(model: torch.nn.Module, live: LiveWeights, kept: _Kept) -> Iterator[Any]:
    """Gradients are zero where nothing is trained, so that their norm, by which they are clipped, is of what
    is trained.
    """
    parameters = {id(parameter) for parameter in unwrapped(model).parameters() if parameter.requires_grad}
    places: dict[int, list[NDArray[np.int64]]] = {}
    tensors: dict[int, torch.Tensor] = {}
    # By ZeRO-3, for backward.
    gathered = {name: tensor for name, tensor in checkpoint_tensors(model) if hasattr(tensor, "ds_tensor")}
    for name, info in live.tensors.items():
        whole = (Piece(0, info.numel, gathered[name]),) if name in gathered else None
        for piece in whole or live.holding(name).pieces:
            owner = piece.owner
            if id(owner) in parameters and not kept.whole(name):
                tensors[id(owner)] = owner
                positions = kept.positions(name, piece.start, piece.length)
                places.setdefault(id(owner), []).append(piece.places(positions))
    for key, tensor in tensors.items():
        hooked: Any = tensor
        yield hooked.register_hook(
            _only(torch.from_numpy(np.sort(np.concatenate(places[key]))).to(tensor.device))
        )


def _only(places: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient with zeros elsewhere."""
    return lambda gradient: torch.zeros_like(gradient).put_(places, gradient.take(places))
