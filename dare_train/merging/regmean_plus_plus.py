"""RegMean++: RegMean by the inputs that layers of the merged model get, which are known layer after layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..dtypes import Words
from ..errors import ConfigError, TensorMismatch
from ..evaluation.linear_layers import Batch, examples_of
from ..evaluation.model_loading import load_model
from ..parallel.ranks import Ranks
from ..parallel.scratch_folder import scratch_beside
from ..parallel.staged_folder import check_free, storage_errors
from ..weights.alignment import align, cast_to, without_prefix
from ..weights.heads import embeddings_in, heads_in
from ..weights.live.live import LiveWeights
from ..weights.live.wrapped import unwrapped
from ..weights.lora.opening import WeightsLike
from ..weights.protocol import SEGMENT, TensorInfo, Weights, runs, under
from .config.merge_identity import place_in
from .config.task import task_of
from .merge import run
from .merge_report import MergeReport
from .merged_weights import Statistics
from .methods.matrices import one_thread
from .models.inputs import Input
from .models.naming import ModelLike
from .prepared_merge import PreparedMerge, prepared
from .statistics.fisher_and_gram import Grams, check_options, grams_of
from .statistics.running_order import Block, blocks_in_order
from .statistics.statistics_file import Floats, StatisticsFile, save_statistics


def regmean_plus_plus(
    base: WeightsLike,
    models: Sequence[ModelLike],
    out: str | os.PathLike[str],
    batches: Sequence[Iterable[Batch]],
    *,
    model: torch.nn.Module | None = None,
    examples: int | None = None,
    package: bool = False,
    allow_nonfinite: bool = False,
    allow_unchanged: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> MergeReport:
    """Merge by RegMean++: as `merge(..., method="regmean")`, with Gram matrices of what goes into a layer
    after the layers before it have been merged.

        Xᵢ(l) = f(l-1)(Xᵢ(l-1))        W(l) = (Σᵢ wᵢGᵢ)⁻¹ Σᵢ wᵢGᵢWᵢ(l)

    f is the merged layer, Xᵢ(l) what model i's batches become on their way to layer l; there they go through
    model i's own, where Gᵢ is taken of what goes into each linear layer. Nguyen et al.,
    https://arxiv.org/abs/2508.03121. Layers are the members of lists of layers, and linear layers that lie in
    none, such as a head; what lies in no layer is averaged before the first.

    Each model's batches go through the model once for each layer, up to it. The Gram matrices stay beside the
    result, as `OUT.1.gram.safetensors` and so on, for which `merge(..., method="regmean", gram=[...])` with
    the same settings gives the same result again, and is refused with others.

    Args:
        base, models, out: see `merge`.
        batches: for each model, mappings that `model(**batch)` takes; see `collect_gram`.
        model: what they go through, such as `from_pretrained` of the base in float32 or on a GPU. Its weights
            are overwritten, in the end by the merged ones. By default the base, as its files have it.
        examples: how many of each model's count; all, by default.
        package, allow_nonfinite, allow_unchanged, overwrite: see `merge`.
        settings: options of `merge`, such as `weights` or `dequantize`, and parameters of `regmean`.

    Raises:
        As `merge`; ConfigError: batches and models are not as many, or the model's layers do not run one
        after another.
    """
    out = Path(out)
    task = task_of(base, models, method="regmean", **settings)
    if task.recipe.gram:
        raise ConfigError("gram", expected="none: they are collected", found=f"{len(task.recipe.gram)} files")
    check_options(examples, "data")
    if len(batches) != len(models):
        raise ConfigError(
            "batches", expected=f"those of each of {len(models)} models", found=str(len(batches))
        )
    check_free(out, overwrite)
    files = [out.with_name(f"{out.name}.{number}.gram.safetensors") for number in range(1, len(models) + 1)]
    ready = prepared(task, Ranks(), None, collected=False)
    with storage_errors(out), scratch_beside(out) as scratch:
        sequence = _Sequence(ready, model if model is not None else _base_of(ready), scratch)
        grams = sequence.collected([list(examples_of(sequence.model, own, examples)) for own in batches])
        for number, (path, own) in enumerate(zip(files, grams, strict=True)):
            save_statistics(path, "gram", own, examples=own.examples, merge=place_in(task.recipe, number))
    task = replace(task, recipe=replace(task.recipe, gram=tuple(map(str, files))))
    return run(
        task, out, package=package, allow_nonfinite=allow_nonfinite, allow_unchanged=allow_unchanged,
        overwrite=overwrite,
    )  # fmt: skip


def _base_of(ready: PreparedMerge) -> torch.nn.Module:
    if ready.base_folder is None:
        expected = "a model that batches go through, where the base lies in no folder"
        raise ConfigError("model", expected=expected, found="none", remedy="pass model=")
    return load_model(str(ready.base_folder))


class _Sequence:
    """A model in memory whose layers become the merged ones, one after another."""

    def __init__(self, ready: PreparedMerge, model: torch.nn.Module, scratch: Path) -> None:
        self.model: torch.nn.Module = unwrapped(model)
        self._merged = ready.merged
        self._scratch = scratch
        self._live = LiveWeights(self.model)
        if self._live.adapted:
            remedy = "pass the base's model, and the adapters as models"
            raise ConfigError("model", expected="one without adapters", found="a PEFT model", remedy=remedy)
        result, prefix = align(self._merged, self._live.tensors, model=self._live.label)
        shared = self._live.tensors.keys() & result.tensors.keys()
        self._names = {name: without_prefix(name, prefix) for name in sorted(shared)}
        """The merge's name of each tensor."""
        self._by_token = {*embeddings_in(self._live.tensors), *heads_in(self._live.tensors)}

    def collected(self, batches: Sequence[Sequence[Batch]]) -> list[_Grams]:
        """Each model's Gram matrices. Afterwards the model is the merged one."""
        if not all(batches):
            raise ConfigError("batches", expected="at least one of each model", found="none")
        order = blocks_in_order(self.model, [own[0] for own in batches])
        layers = [self._merged_layers(block) for block in order]
        if not any(layers):
            raise ConfigError(
                "model", expected="linear layers that models change and batches reach", found="none"
            )
        waiting = [block.tensors for block, some in zip(order, layers, strict=True) if some]
        self._put(self._names.keys() - frozenset().union(*waiting), self._merged)
        files: list[list[StatisticsFile]] = [[] for _ in batches]
        for number, (block, some) in enumerate(zip(order, layers, strict=True)):
            if some:
                until = order[number + 1].module if number + 1 < len(order) else None
                self._merged.gram = [*self._of_block(number, block, some, batches, until)]
                with one_thread():
                    self._put(block.tensors, self._merged)
                for own, statistics in zip(files, self._merged.gram, strict=True):
                    own.append(statistics.file)
        return [_Grams(own) for own in files]

    def _merged_layers(self, block: Block) -> list[tuple[str, Any]]:
        fates = self._merged.fates
        return [
            (name, layer)
            for name, layer in block.linear
            if name in self._names and fates[self._names[name]].how == "merged"
        ]

    def _of_block(
        self,
        number: int,
        block: Block,
        layers: Sequence[tuple[str, Any]],
        batches: Sequence[Sequence[Batch]],
        until: torch.nn.Module | None,
    ) -> Iterator[Statistics]:
        """The statistics of each model in a block, where its own layers are put in for a while."""
        for place, (model, own) in enumerate(zip(self._merged.inputs, batches, strict=True)):
            self._put(block.tensors, _Own(model, self._merged.base))
            grams, count = grams_of(self.model, own, layers, Ranks(), until)
            path = save_statistics(
                self._scratch / f"{number}.{place}.gram.safetensors",
                "gram",
                self._under_own_names(grams, model),
                examples=count,
            )
            yield Statistics.of(StatisticsFile.open(path, "gram"), model)

    def _under_own_names(self, grams: Grams, model: Input) -> Grams:
        own = {name: model.names[self._names[name]] for name in grams if self._names[name] in model.names}
        return Grams(
            {own[name]: grams[name] for name in own},
            transposed=[own[name] for name in own if name in grams.transposed],
        )

    def _put(self, names: Iterable[str], source: Weights) -> None:
        """Let weights, under the merge's names, take the place of some of the model's tensors."""
        known = {name: self._names[name] for name in sorted(names) if name in self._names}
        weights = cast_to(under(source, known), self._live.tensors)
        for name, info in weights.tensors.items():
            wanted = self._live.tensors[name]
            if not (info == wanted or (name in self._by_token and _has_rows_of(info, wanted))):
                remedy = "pass model=, of the class and the sizes that the base has"
                raise TensorMismatch(
                    name, expected=f"{wanted}, as in the model", found=str(info), remedy=remedy
                )
            for start, count in runs(wanted.numel, SEGMENT):
                self._live.overwrite(name, start, weights.read(name, start, count))
        self._live.settle()


def _has_rows_of(info: TensorInfo, wanted: TensorInfo) -> bool:
    """Whether a tensor begins with what is wanted: rows of added tokens come last, and no batch has any."""
    return (
        info.dtype == wanted.dtype
        and bool(wanted.shape)
        and info.shape[1:] == wanted.shape[1:]
        and info.shape[0] > wanted.shape[0]
    )


class _Own:
    """A model's own weights, and the base's where it has none. Implements `Weights`."""

    def __init__(self, model: Input, base: Weights) -> None:
        self.label = model.label
        self.tensors = {**base.tensors, **model.tensors}
        self._model = model
        self._base = base

    def read(self, name: str, start: int, count: int) -> Words:
        if name in self._model.tensors:
            return self._model.words(name, start, count)
        return self._base.read(name, start, count)


class _Grams(Mapping[str, Floats]):
    """Gram matrices of several files, read when they are asked for."""

    def __init__(self, files: Sequence[StatisticsFile]) -> None:
        self._files = {name: file for file in files for name in file.tensors}
        self.transposed = {name for name, file in self._files.items() if file.transposed(name)}
        self.examples = files[0].examples

    def __getitem__(self, name: str) -> Floats:
        return self._files[name].whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
