"""A mixture of experts from dense models: their MLPs side by side, a router, and the base for the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from ..config import check_seed
from ..dtypes import DTYPES, DType, Words, cast, code_named, from_float, to_float
from ..errors import CheckpointError, TensorMismatch
from ..package.companion_files import copy_companions
from ..package.masks import generator_of
from ..parallel.staged_folder import staged_folder, storage_errors
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.config_file import CONFIG, config_beside
from ..weights.files.full_precision import check_full_precision
from ..weights.files.module_folders import places_of
from ..weights.fingerprint import model_fingerprint
from ..weights.lora.opening import open_checkpoint
from ..weights.protocol import SEGMENT, TensorInfo
from ..weights.skeletons import skeleton
from .expert_gates import Gates, alike, gates_for
from .expert_recipe import Expert, ExpertRecipe, read_experts
from .expert_shapes import Shape, config_for, is_in_mlp, notes_on, shape_for
from .models.layers import layer_counts
from .stacking import Readable, layout_of, write_tensors

RECIPE = "dare_moe.yml"
_CARD = """\
---
library_name: transformers
tags:
- moe
- merge
- dare_train
---

# A mixture of experts

{shape}, made by `dare_train` of {models}. This makes it again:

```bash
dare-train moe {recipe} --out model
```
"""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What `mixture_of_experts` wrote."""

    out: str
    shape: str
    experts: int
    per_token: int
    tensors: Mapping[str, TensorInfo]
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        experts = f"{self.experts} experts, {self.per_token} for each token"
        return f"{self.shape}: {experts}, {len(self.tensors)} tensors"


def mixture_of_experts(
    config: Union[str, os.PathLike[str]],
    out: Union[str, os.PathLike[str]],
    *,
    seed: int = 0,
    allow_same: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> Mixture:
    """Write a mixture of experts of dense models, as a configuration of `mergekit-moe` asks for.

    Args:
        config: the file.
        out: folder to create.
        seed: of gates and noise that are drawn.
        allow_same: take one model for all experts, which is of use only if the result is trained.
        allow_nonfinite: write NaN and infinity.
        overwrite: replace a folder that is already there.

    Raises:
        ConfigError: the configuration or the seed is wrong, or there is no architecture for it.
        CheckpointError: a model cannot be read, or is quantised.
        TensorMismatch: models differ in shapes, or have tensors that the result cannot have.
        NonFiniteDelta, OutputExists, StorageError.
    """
    check_seed(seed)
    recipe = read_experts(Path(config), allow_same=allow_same)
    names = [recipe.base, *(expert.model for expert in (*recipe.experts, *recipe.shared))]
    models = {name: open_checkpoint(name) for name in dict.fromkeys(names)}
    for model in models.values():
        check_full_precision(model, purpose="of which experts can be made", option=False)
    shape = shape_for(recipe, models)
    base = models[recipe.base]
    dtype = _dtype(recipe, base)
    layers, width = _sizes(base)
    fields = config_for(shape, recipe, base, dtype.code)
    pieces = dict(_copied(recipe, shape, models, dtype, seed))
    if shape.biased:
        pieces |= _missing_biases(pieces, fields, layers, dtype)
    gates = gates_for(recipe, base, layers=layers, width=width, seed=seed)
    pieces |= _routers(gates, recipe, shape, dtype)
    pieces = dict(sorted(pieces.items()))
    tensors = {name: piece.info for name, piece in pieces.items()}
    _check_loads(fields, tensors)
    layout = layout_of(tensors)
    inputs = [place for model in models.values() for place in places_of(model.folder)]
    with (
        staged_folder(Path(out), overwrite=overwrite, inputs=inputs, read_back=layout.read_back) as staging,
        storage_errors(Path(out)),
    ):
        prints = write_tensors(pieces, layout, staging, allow_nonfinite=allow_nonfinite)
        copy_companions(base.folder, staging)
        (staging / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        (staging / RECIPE).write_text(recipe.text)
        listed = ", ".join(Path(name).name for name in models)
        (staging / "README.md").write_text(_CARD.format(shape=shape.name, models=listed, recipe=RECIPE))
    rows = [(name, info.dtype.code, info.shape, prints[name]) for name, info in tensors.items()]
    return Mixture(
        out=str(out),
        shape=shape.name,
        experts=len(recipe.experts),
        per_token=recipe.per_token,
        tensors=tensors,
        fingerprint=model_fingerprint(rows),
        notes=(*notes_on(shape, recipe.experts), *_told_apart(gates)),
    )


def _told_apart(gates: Gates) -> list[str]:
    layers = alike(gates)
    which = "all layers" if len(layers) == len(gates) else f"layers {', '.join(map(str, layers))}"
    return [f"gates of {which} are nearly alike: some experts will get few tokens"] if layers else []


def _dtype(recipe: ExpertRecipe, base: Checkpoint) -> DType:
    """As the recipe says, or the base's configuration, or its embedding."""
    if recipe.dtype is not None:
        return DTYPES[recipe.dtype]
    config = config_beside(base)
    code = code_named(config.get("dtype", config.get("torch_dtype")))
    if code is not None:
        return DTYPES[code]
    return next(info.dtype for info in base.tensors.values() if info.dtype.can_be_delta)


def _sizes(base: Checkpoint) -> tuple[int, int]:
    """How many layers there are, and how wide their hidden states are."""
    counts = layer_counts(base.tensors)
    embedding = base.tensors.get("model.embed_tokens.weight")
    if set(counts) != {"model.layers"} or embedding is None:
        expected = "model.embed_tokens.weight and model.layers, as in a causal language model"
        raise CheckpointError(base.label, expected=expected, found=", ".join(sorted(counts)) or "no layers")
    return counts["model.layers"], embedding.shape[1]


@dataclass(frozen=True, kw_only=True)
class _Copied:
    """A tensor of a dense model; as an expert's, with noise and a factor."""

    model: Checkpoint
    name: str
    info: TensorInfo
    noise: float = 0.0
    factor: float = 1.0
    seed: int = 0
    drawn_for: str = ""

    @property
    def label(self) -> str:
        return self.model.label

    def words(self, start: int, count: int) -> Words:
        words = self.model.read(self.name, start, count)
        dtype = self.model.tensors[self.name].dtype
        if self.noise == 0 and self.factor == 1:
            return cast(words, dtype, self.info.dtype)
        values = to_float(words, dtype)
        if self.noise:
            generator = generator_of(self.seed, f"noise of {self.drawn_for} {start // SEGMENT}")
            before = start % SEGMENT
            drawn = generator.standard_normal(before + count)[before:]
            values = values + (drawn * self.noise).astype(values.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            return from_float(values * values.dtype.type(self.factor), self.info.dtype)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A tensor that no dense model has."""

    values: NDArray[np.float32]
    info: TensorInfo
    label: str

    def words(self, start: int, count: int) -> Words:
        return from_float(self.values.reshape(-1)[start : start + count], self.info.dtype)


def _copied(
    recipe: ExpertRecipe, shape: Shape, models: Mapping[str, Checkpoint], dtype: DType, seed: int
) -> Iterator[tuple[str, Readable]]:
    base = models[recipe.base]
    for name, info in base.tensors.items():
        if not is_in_mlp(name):
            yield name, _Copied(model=base, name=name, info=_in(info, dtype))
            continue
        for number, expert in enumerate(recipe.experts):
            yield _expert(shape.expert(name, number), name, info, expert, models, dtype, seed)
        for expert in recipe.shared:
            yield _expert(shape.in_shared(name), name, info, expert, models, dtype, seed)


def _expert(
    result: str,
    name: str,
    of_base: TensorInfo,
    expert: Expert,
    models: Mapping[str, Checkpoint],
    dtype: DType,
    seed: int,
) -> tuple[str, Readable]:
    model = models[expert.model]
    info = model.tensors.get(name)
    if info is None or info.shape != of_base.shape:
        expected = f"shape {list(of_base.shape)}, as in the base"
        found = f"{list(info.shape) if info is not None else 'none'} in {model.label}"
        raise TensorMismatch(name, expected=expected, found=found, remedy="are they models of one size?")
    factor = expert.residual if ".down_proj." in name else 1.0
    return result, _Copied(
        model=model, name=name, info=_in(info, dtype), noise=expert.noise, factor=factor, seed=seed,
        drawn_for=result,
    )  # fmt: skip


def _in(info: TensorInfo, dtype: DType) -> TensorInfo:
    return TensorInfo(dtype, info.shape) if info.dtype.can_be_delta else info


def _missing_biases(
    pieces: Mapping[str, Readable], fields: Mapping[str, Any], layers: int, dtype: DType
) -> dict[str, Readable]:
    """Zeros where queries, keys and values of the base have no bias, and the architecture has one."""
    found: dict[str, Readable] = {}
    for layer in range(layers):
        for which in "qkv":
            name = f"model.layers.{layer}.self_attn.{which}_proj"
            weight = pieces.get(f"{name}.weight")
            if weight is not None and f"{name}.bias" not in pieces:
                rows = weight.info.shape[0]
                info = TensorInfo(dtype, (rows,))
                found[f"{name}.bias"] = _Held(values=np.zeros(rows, np.float32), info=info, label="zeros")
    return found


def _routers(gates: Gates, recipe: ExpertRecipe, shape: Shape, dtype: DType) -> dict[str, Readable]:
    count = len(recipe.experts)
    found: dict[str, Readable] = {}
    for layer, of_layer in enumerate(gates):
        parts = {shape.router(layer): of_layer[:count]}
        if shape.shared == "gated":
            parts[shape.shared_router(layer)] = of_layer[count:]
        for name, values in parts.items():
            found[name] = _Held(values=values, info=TensorInfo(dtype, values.shape), label="the gates")
    return found


def _check_loads(fields: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """
    Raises:
        TensorMismatch: the architecture has other tensors than the result, as far as transformers knows it.
    """
    module = skeleton(fields)
    if module is None:
        return
    from ..weights.live.checkpoint_names import file_places

    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tied = {*getattr(module, "all_tied_weights_keys", ())}
    wanted = {name: place.shape for name, place in file_places(module, shapes).items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors and name in tied:
            continue
        found = tensors[name].shape if name in tensors else None
        if found != wanted.get(name):
            expected = f"shape {list(wanted[name])}" if name in wanted else "no such tensor"
            remedy = f"{type(module).__name__} cannot be made of these models"
            raise TensorMismatch(
                name, expected=expected, found="none" if found is None else str(list(found)), remedy=remedy
            )
