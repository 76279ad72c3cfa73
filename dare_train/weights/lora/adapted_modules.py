"""The modules that an adapter is about, and the tensors of the base's files that they are made of.

Where files name and cut tensors as modules do, the files' names are enough. Elsewhere the base's class
says it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..alignment import align, without_prefix
from ..files.config_file import config_beside
from ..live.layouts import Place
from ..protocol import TensorInfo, Weights
from ..skeletons import class_for_task, skeleton
from .lora_config import AdapterConfig

_BASE_LAYERS = re.compile(r"(\.base_layer)*$")


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Modules over a base.

    Attributes:
        base: under the names of the result's files.
        places: by these, where in the modules' tensors each lies.
        shapes: of the modules' tensors.
    """

    base: Weights
    places: Mapping[str, Place]
    shapes: Mapping[str, tuple[int, ...]]
    model: Any = None
    """Without weights; None where files are as modules are."""

    @property
    def label(self) -> str:
        return self.base.label

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Of the modules, in the dtypes of the files."""
        return {
            source: TensorInfo(self.base.tensors[file].dtype, self.shapes[source])
            for file, place in self.places.items()
            for source in place.sources
            if file in self.base.tensors
        }

    def transposed(self, module: str) -> bool | None:
        """Whether the weight of a module lies as [in, out]; None where only the shape can tell."""
        return None if self.model is None else type(self.model.get_submodule(module)).__name__ == "Conv1D"

    def parameter(self, wrapper: str, targets: Collection[str]) -> Parameter | None:
        """The parameter that a wrapper of PEFT's adapts, of which there is one around the other for each
        of the module's that are targets; None where there is none.
        """
        if self.model is None:
            return None
        name = _BASE_LAYERS.sub("", wrapper)
        depth = (len(wrapper) - len(name)) // len(".base_layer")
        module = self.model.get_submodule(name)
        own = [
            f"{name}.{parameter}"
            for parameter, _ in module.named_parameters(recurse=False)
            if any(f".{name}.{parameter}".endswith(f".{target}") for target in targets)
        ]
        if depth >= len(own):
            return None
        tensor = own[-1 - depth]  # the first lies innermost
        shape = self.shapes.get(tensor, ())
        count = shape[0] if len(shape) == 3 else 1
        turned = count > 1 and bool(getattr(module, "is_transposed", False))
        return Parameter(tensor, shape, count, turned)


@dataclass(frozen=True)
class Parameter:
    """One that is adapted by itself."""

    tensor: str
    shape: tuple[int, ...]
    experts: int
    """How many weights lie in it, one on the other."""
    transposed: bool
    """Whether these lie as [in, out]."""


def plain(base: Weights) -> Modules:
    """Of a base whose files are as its modules are."""
    shapes = {name: info.shape for name, info in base.tensors.items()}
    places = {name: Place.whole(name, shape) for name, shape in shapes.items()}
    return Modules(base=base, places=places, shapes=shapes)


def by_class(
    base: Weights, modules: Collection[str], config: AdapterConfig, label: str, *, own: bool = False
) -> Modules | None:
    """As the base's class has them, or the one that the adapter was trained on; None where no such class is
    known here, or where it does not have some of the modules.

    Args:
        own: ask the base's class alone.
    """
    fields = config_beside(base)
    named = fields.get("architectures")
    itself = named[0] if isinstance(named, list) and named else ""
    tasks = [class_for_task(name, fields) for name in config.classes]
    for name in dict.fromkeys((itself,) if own else (*config.classes, *tasks, itself)):
        model = skeleton(fields, name) if isinstance(name, str) else None
        if model is None:
            continue
        known = {of for of, _ in model.named_modules()}
        if all(_BASE_LAYERS.sub("", module) in known for module in modules):
            return of_model(base, model, label, own=name == itself)
    return None


def of_model(base: Weights, model: Any, label: str, *, own: bool = False) -> Modules:
    """As a model has them, which may have no weights.

    Args:
        label: what messages call the model.
        own: the files are of this class, and say what tensors are called.
    """
    from ..live.named_tensors import NamedTensors
    from ..live.sharding import held as held_of

    named = NamedTensors(model)
    held = held_of(named.tensors.items(), model)
    places = named.places(held)
    aligned, prefix = align(base, places.keys(), model=label)
    if own:
        aligned, places = base, {without_prefix(file, prefix): place for file, place in places.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    return Modules(base=aligned, places=places, shapes=shapes, model=model)
