"""Layers of models stacked into another model (mergekit's `passthrough`): copied in any order, repeated,
scaled; nothing is merged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..dtypes import DTYPE_NAMES, DTYPES, DType, Words, cast, from_float, to_float
from ..errors import ConfigError, NonFiniteDelta, TensorMismatch
from ..hub.download import locate
from ..kernels import cpu
from ..package.companion_files import copy_companions
from ..package.model_config import Facts, settle_config
from ..parallel.staged_folder import staged_folder, storage_errors
from ..parallel.threads import ordered_map
from ..weights.files.checkpoint import INDEX, SINGLE
from ..weights.files.checkpoint_writer import CheckpointWriter, Layout
from ..weights.files.config_file import CONFIG, read_config
from ..weights.files.full_precision import check_full_precision
from ..weights.files.module_folders import places_of
from ..weights.fingerprint import Fingerprint, model_fingerprint, total
from ..weights.heads import embeddings_in, heads_in
from ..weights.protocol import SEGMENT, TensorInfo, runs
from .config.in_vain import cases_in_vain
from .config.stack import Stack, StackedLayers
from .models.chat_templates import write_template
from .models.layers import comes_before_layers, layer_of, stack_of, with_layers
from .models.references import Placed, adapters_of, open_placed, parts_of
from .models.tokenizer_files import read_tokens, tokenizer_files
from .output_files import RECIPE

_LARGEST_FILE = 5 << 30
_CARD = """\
---
library_name: transformers
tags:
- merge
- dare_train
---

# Stacked layers

Made by `dare_train` of layers of {models}. This makes it again:

```bash
dare-train merge {recipe} --out model
```
"""


@dataclass(frozen=True, kw_only=True)
class StackedModel:
    """What `stack` wrote."""

    out: str
    tensors: Mapping[str, TensorInfo]
    layers: int
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        return f"{self.layers} layers in {len(self.tensors)} tensors, copied"


@dataclass(frozen=True, kw_only=True)
class _Copied:
    """A tensor of the result, and where it comes from."""

    model: Placed
    name: str
    scale: float
    info: TensorInfo

    @property
    def label(self) -> str:
        return self.model.label

    def words(self, start: int, count: int) -> Words:
        words = self.model.read(self.name, start, count)
        dtype = self.model.tensors[self.name].dtype
        if self.scale != 1:
            with np.errstate(over="ignore", invalid="ignore"):
                values = to_float(words, dtype)
                return from_float(values * values.dtype.type(self.scale), self.info.dtype)
        return cast(words, dtype, self.info.dtype)


def stack(what: Stack, out: Path, *, allow_nonfinite: bool = False, overwrite: bool = False) -> StackedModel:
    """Write a model whose layers are those of others.

    Raises:
        CheckpointError: a model cannot be read, or is quantised.
        ConfigError: a model has no such layers, or several stacks of them.
        TensorMismatch: layers of two models do not have the same form.
        NonFiniteDelta, OutputExists, StorageError.
    """
    models = {each.model: open_placed(each.model) for each in what.layers}
    described = models.get(what.described_by) or open_placed(what.described_by)
    for model in models.values():
        check_full_precision(model, purpose="of which layers can be stacked", option=False)
    copied = dict(sorted(_copied(what, models)))
    _check_forms(copied)
    tensors = {name: each.info for name, each in copied.items()}
    numbers = [number for _, number in _sources(what, models)]
    layout = layout_of(tensors)
    inputs = [place for model in (described, *models.values()) for place in places_of(model.folder)]
    inputs += [place for name in models for place in adapters_of(name)]
    with (
        staged_folder(out, overwrite=overwrite, inputs=inputs, read_back=layout.read_back) as staging,
        storage_errors(out),
    ):
        prints = write_tensors(copied, layout, staging, allow_nonfinite=allow_nonfinite)
        notes = _write_files(what, models, described, copied, numbers, staging)
    rows = [(name, info.dtype.code, info.shape, prints[name]) for name, info in tensors.items()]
    return StackedModel(
        out=str(out),
        tensors=tensors,
        layers=len(numbers),
        fingerprint=model_fingerprint(rows),
        notes=(*what.notes, *dict.fromkeys(_in_vain(what, models)), *notes),
    )


def _sources(what: Stack, models: Mapping[str, Placed]) -> list[tuple[StackedLayers, int]]:
    """By layer of the result: the slice that it comes from, and its number there."""
    found = []
    for each in what.layers:
        _, count = stack_of(models[each.model])
        last = count if each.last is None else each.last
        if last > count:
            expected = f"at most {count}, as many as {each.model} has"
            raise ConfigError(
                f"layer_range of {each.model}", expected=expected, found=f"[{each.first}, {last}]"
            )
        found += [(each, number) for number in range(each.first, last)]
    if not found:
        raise ConfigError("slices", expected="at least one layer", found="none")
    return found


def _in_vain(what: Stack, models: Mapping[str, Placed]) -> Iterator[str]:
    """Sentences on filters that fit no tensor of any model that they are given for."""
    given = {id(settings): settings for each in what.layers for settings in each.settings}
    for key, settings in given.items():
        users = {each.model for each in what.layers if key in map(id, each.settings)}
        names = {name for model in users for name in models[model].tensors}
        yield from cases_in_vain(settings, names, f" of {users.pop()!r}" if len(users) == 1 else "")


def _copied(what: Stack, models: Mapping[str, Placed]) -> Iterator[tuple[str, _Copied]]:
    out = DTYPES[what.out_dtype] if what.out_dtype is not None else None
    sources = _sources(what, models)
    prefix, _ = stack_of(models[what.layers[0].model])
    for place, (each, number) in enumerate(sources):
        model = models[each.model]
        begin = f"{stack_of(model)[0]}.{number}."
        count = (each.last or len(sources)) - each.first
        share = (number - each.first) / (count - 1) if count > 1 else 1.0
        for name in model.tensors:
            if name.startswith(begin):
                result = f"{prefix}.{place}.{name.removeprefix(begin)}"
                yield result, _of(model, name, each.scale(name, share), out)
    for before, each in ((True, what.layers[0]), (False, what.layers[-1])):
        model = models[each.model]
        for name in model.tensors:
            if layer_of(name) is None and comes_before_layers(name) == before:
                yield name, _of(model, name, each.scale(name, 0.0), out)


def _of(model: Placed, name: str, scale: float, out: DType | None) -> _Copied:
    info = model.tensors[name]
    if out is not None and info.dtype.can_be_delta:
        info = TensorInfo(out, info.shape)
    return _Copied(model=model, name=name, scale=scale if info.dtype.can_be_delta else 1.0, info=info)


def _check_forms(copied: Mapping[str, _Copied]) -> None:
    """Layers of all models have the tensors of the first, in its shapes."""
    forms: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, each in copied.items():
        place = layer_of(name)
        if place is not None:
            within = name.removeprefix(f"{place[0]}.{place[1]}.")
            forms.setdefault(place[1], {})[within] = each.info.shape
    first = forms[0]
    for number, form in sorted(forms.items()):
        for within in sorted(first.keys() | form.keys()):
            if first.get(within) != form.get(within):
                raise TensorMismatch(
                    f"layer {number}: {within}",
                    expected=f"shape {list(first[within])}" if within in first else "no such tensor",
                    found=str(list(form[within])) if within in form else "none",
                    remedy="stack layers of models of one architecture and size",
                )


class Readable(Protocol):
    """A tensor of a result, worked out run by run."""

    @property
    def info(self) -> TensorInfo: ...

    @property
    def label(self) -> str:
        """What messages call the model that it comes from."""

    def words(self, start: int, count: int) -> Words: ...


def write_tensors(
    copied: Mapping[str, Readable], layout: Layout, staging: Path, *, allow_nonfinite: bool
) -> dict[str, Fingerprint]:
    """The fingerprints of what was written.

    Raises:
        NonFiniteDelta: NaN or infinity, which is not allowed.
    """
    work = [
        (name, start, count)
        for name, each in copied.items()
        for start, count in runs(each.info.numel, SEGMENT)
    ]
    shares: dict[str, list[Fingerprint]] = {name: [] for name in copied}
    with CheckpointWriter(staging, layout) as writer:

        def write(run: tuple[str, int, int]) -> tuple[str, Fingerprint]:
            name, start, count = run
            words = copied[name].words(start, count)
            dtype = copied[name].info.dtype
            if not allow_nonfinite and dtype.can_be_delta and cpu.has_nonfinite(words, dtype.exponent_mask):
                remedy = "allow_nonfinite=True (--allow-nonfinite) writes it"
                found = f"NaN or infinity of {copied[name].label}"
                raise NonFiniteDelta(name, expected=f"finite {dtype.code}", found=found, remedy=remedy)
            writer.write(name, start, np.ascontiguousarray(words))
            return name, Fingerprint.of(words, start)

        with closing(ordered_map(write, work)) as done:
            for name, share in done:
                shares[name].append(share)
    return {name: total(several) for name, several in shares.items()}


def layout_of(tensors: Mapping[str, TensorInfo]) -> Layout:
    """One file, or as many of some gigabytes as it takes."""
    files: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if files[-1] and size + info.nbytes > _LARGEST_FILE:
            files.append({})
            size = 0
        files[-1][name] = info
        size += info.nbytes
    if len(files) == 1:
        return Layout(files={SINGLE: files[0]})
    stem = SINGLE.removesuffix(".safetensors")
    named = {f"{stem}-{n + 1:05}-of-{len(files):05}.safetensors": held for n, held in enumerate(files)}
    return Layout(files=named, index=INDEX)


def _write_files(
    what: Stack,
    models: Mapping[str, Placed],
    described: Placed,
    copied: Mapping[str, _Copied],
    numbers: list[int],
    staging: Path,
) -> list[str]:
    """Configuration, tokenizer, card and recipe. Returns what there is to say."""
    copy_companions(described.folder, staging)
    if what.tokenizer != what.described_by:
        _take_tokenizer(what.tokenizer, described.folder, staging)
    config = read_config(staging / CONFIG)
    if config:
        settled = with_layers(config, stack_of(described)[1], numbers)
        (staging / CONFIG).write_text(json.dumps(settled, indent=2) + "\n")
    tensors = {name: each.info for name, each in copied.items()}
    dtype = DTYPE_NAMES[what.out_dtype] if what.out_dtype is not None else None
    notes = settle_config(staging, Facts(tensors=tensors, untied=_is_untied(copied), dtype=dtype))
    if what.chat_template:
        folders = [described.folder, *(model.folder for model in models.values())]
        write_template(what.chat_template, folders, staging)
    (staging / RECIPE).write_text(what.text)
    names = ", ".join(Path(name).name for name in models)
    (staging / "README.md").write_text(_CARD.format(models=names, recipe=RECIPE))
    return notes


def _take_tokenizer(model: str, described: Path, staging: Path) -> None:
    """Put another model's tokenizer in the place of the one that lies there.

    Raises:
        ConfigError: it has other tokens, so that rows would have others' meanings.
    """
    folder = locate(parts_of(model)[0])
    if read_tokens(folder) != read_tokens(described):
        raise ConfigError(
            "tokenizer_source",
            expected=f"a tokenizer with the tokens of {described.name}, since rows are copied",
            found=f"that of {model}",
            remedy=f"merge_method: linear gives the result of this the rows of {model}'s tokenizer",
        )
    for name in tokenizer_files(staging, None):
        (staging / name).unlink()
    for name, path in tokenizer_files(folder, None).items():
        shutil.copyfile(path, staging / name)


def _is_untied(copied: Mapping[str, _Copied]) -> bool:
    """Whether the head is another tensor than the embedding."""
    heads, embeddings = heads_in(copied), embeddings_in(copied)
    if len(heads) != 1 or len(embeddings) != 1:
        return False
    head, embedding = copied[heads[0]], copied[embeddings[0]]
    if head.info != embedding.info:
        return True
    return any(
        not np.array_equal(head.words(*run), embedding.words(*run)) for run in runs(head.info.numel, SEGMENT)
    )
