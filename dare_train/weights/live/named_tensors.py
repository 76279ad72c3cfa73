"""Which tensors of a module or a state dict a checkpoint has, by the names of the model inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Union

import torch

from ...errors import CheckpointError, ConfigError
from ..wrapper_names import without_wrappers
from . import sharding as engines
from .checkpoint_names import Places, places_in_files
from .layouts import Place
from .live_lora import MergedNames, is_adapted
from .packed import packed_modules
from .sharding import Held
from .wrapped import Inner, inner_model

Live = Union[torch.nn.Module, Mapping[str, torch.Tensor]]


class NamedTensors:
    """The tensors of a module or state dict by the names of the model inside, as `save_pretrained` gives
    them: tied ones once, persistent buffers too; under adapters, those of the model that merging would give.

    Attributes:
        tensors: by name.
        inner: the model, and its place in the module.
        adapted: whether there are adapters.
        trained_whole: see `LiveWeights`.
        packed: modules whose weights are quantised, and how; they have no tensors here.
    """

    def __init__(self, live: Live) -> None:
        self.inner = Inner(None, "")
        self.adapted = False
        self.trained_whole: set[str] = set()
        self.packed: dict[str, str] = {}
        self._outside: set[str] = set()
        """Names of tensors that are not the inner model's: a wrapper's own head."""
        if isinstance(live, torch.nn.Module):
            self.inner = inner_model(live)
            self.adapted = is_adapted(live)
            self.packed = self._packed(live)
            self.tensors = self._each_once(self._of_module(live))
            if self.adapted:
                self._check_ties()
        else:
            self.tensors = dict(_of_state_dict(live))

    def places(self, held: Mapping[str, Held]) -> Places:
        """By its name in files: where in the model's tensors each lies."""
        apart = held.keys() if self.inner.model is None else self._outside
        inside = {name: tensor for name, tensor in held.items() if name not in apart}
        of_files = places_in_files(self.inner.model, inside) if inside else {}
        return {**of_files, **{name: Place.whole(name, held[name].shape) for name in held if name in apart}}

    def _packed(self, module: torch.nn.Module) -> dict[str, str]:
        found = {}
        for name, how in packed_modules(module):
            found[name.removeprefix(self.inner.path).removesuffix(".base_layer")] = how
        return found

    def _of_module(self, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        merged = MergedNames(module, self.inner.path) if self.adapted else None
        left_out = set(getattr(self.inner.model, "_keys_to_ignore_on_save", None) or ())
        for name, tensor in engines.named_tensors(module):
            within = name.removeprefix(self.inner.path)
            plain: str | None = within if merged is None else merged.plain(within)
            if plain is None or plain.rpartition(".")[0] in self.packed:
                continue
            if not name.startswith(self.inner.path):
                self._outside.add(plain)
            elif plain in left_out:
                continue
            yield plain, tensor
        if merged is not None:
            self.trained_whole = merged.trained_whole

    def _each_once(self, named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One name for each of the tensors: not one that is tied to another, where there is a choice."""
        aliases = tied(self.inner.model)
        seen: set[tuple[object, ...]] = set()
        tensors = {}
        for name, tensor in sorted(dict(named).items(), key=lambda item: item[0] in aliases):
            place = _place(tensor)
            if place not in seen:
                seen.add(place)
                tensors[name] = tensor
        return tensors

    def _check_ties(self) -> None:
        """A checkpoint has no tensor for what is tied; so an adapter must not have trained the two apart."""
        for name, source in tied(self.inner.model).items():
            if name in self.tensors and source in self.tensors:
                expected = f"tied to {source}, as in checkpoints of this model"
                remedy = (
                    "ensure_weight_tying=True in the LoraConfig trains both as one; or load the model with "
                    "tie_word_embeddings=False"
                )
                raise ConfigError(name, expected=expected, found="trained apart from it", remedy=remedy)


def checkpoint_tensors(live: Live) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of `NamedTensors`."""
    yield from NamedTensors(live).tensors.items()


def _of_state_dict(live: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in live.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(str(name), expected="a tensor", found=f"a {type(tensor).__name__}")
    for name, given in without_wrappers(live).items():
        yield name, live[given]


def tied(model: Any) -> Mapping[str, str]:
    """Names of tensors that are others' under another name, and whose."""
    keys = getattr(model, "all_tied_weights_keys", None)
    return keys if isinstance(keys, Mapping) else {}


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for tensors that share their elements."""
    if engines.is_dtensor(tensor) or hasattr(tensor, "ds_tensor") or not tensor.numel() or tensor.is_meta:
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
