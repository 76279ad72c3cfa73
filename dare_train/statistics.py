"""What a model's own data says about its weights: the statistics that Fisher merging and RegMean average with.

Both are collected by ordinary passes over a few hundred examples. Weights, gradients and training flags stay as they were, and
no random number is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from . import engines, lora, tracking
from .engines import Held
from .errors import ConfigError
from .filenames import as_in_files, unwrapped
from .ranks import Ranks
from .shards import LiveWeights, checkpoint_tensors
from .statistics_file import Kind, beside, save_statistics

Labels = Literal["data", "model"]
"""Whose labels y a log-likelihood log p(y|x) is about: those of the data, or all that the model may give, by their probability."""

Batch = Mapping[str, Any]
"""Arguments of the model by name. Tensors have one row for each example."""

Tensors = dict[str, torch.Tensor]

_IGNORED = -100
"""The label that transformers' losses leave out."""


def collect_fisher(model: torch.nn.Module, batches: Iterable[Batch], *, examples: int | None = None, labels: Labels = "data") -> Tensors:
    """Diagonal of the Fisher information: the mean over examples x of E_y (∂ log p(y|x) / ∂θ)² (Fisher merging, arXiv 2111.09832).

    Each example goes through the model by itself: the square of a batch's mean gradient is not the mean of squares.

    Args:
        model: whole in this process, on any device, wrapped or not.
        batches: mappings that `model(**batch)` takes. Where `torch.distributed` is at work, all ranks call this together, each
            with examples of its own, and all of them get the mean over all examples.
        examples: how many of this process's examples count; all, by default.
        labels: "data": y is the batch's own, and log p(y|x) minus the loss that the model makes of it, which for a language
            model is the mean over the tokens of the example; examples whose labels are all -100 do not count. This is called
            the empirical Fisher. "model": the expectation is over the model's own p(y|x), as in the paper; for classifiers.

    Returns:
        float32 on the CPU, shaped as the tensors, by checkpoint name; nothing for parameters that need no gradient.

    Raises:
        ConfigError: the model is not whole in this process, or has adapters; a batch cannot be taken apart; there is no loss,
            it is not finite, or with "model" there are no classes.
        RankError: it failed on another rank.
    """
    _check(examples, labels)
    return _fisher(model, batches, examples, labels, Ranks.joined())[0]


class Grams(Tensors):
    """Gram matrices by tensor name. `transposed` names the tensors that hold a layer as [in, out], as GPT-2 does."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, transposed: Iterable[str] = ()) -> None:
        super().__init__(tensors)
        self.transposed = frozenset(transposed)


def collect_gram(model: torch.nn.Module, batches: Iterable[Batch], *, examples: int | None = None) -> Grams:
    """G = XᵀX / n of each linear layer, where X [n, in] holds its input at each of n tokens (RegMean, arXiv 2212.09849).

    RegMean's W = (Σ Gᵢ)⁻¹ Σ Gᵢ Wᵢ, for Wᵢ [in, out], is where the layer's outputs are closest to those of all models. Layers are
    `torch.nn.Linear` and transformers' `Conv1D`. Where inputs have the positions of the batch's `attention_mask` [batch, seq],
    masked ones are left out. Models with LoRA adapters are seen as what they are when merged.

    Args:
        model, batches, examples: see `collect_fisher`. Labels may be missing.

    Returns:
        float32 [in, in] on the CPU by the checkpoint name of the layer's weight, from products and sums in float32. There is
        nothing for layers that never ran, and for weights that are not a linear layer's alone, such as a tied embedding.

    Raises:
        ConfigError: the model is not whole in this process; files hold a layer's weight in parts; a batch cannot be taken
            apart, or is a padded one for a model with encoder and decoder.
        RankError: it failed on another rank.
    """
    _check(examples, "data")
    return _gram(model, batches, examples, Ranks.joined())[0]


class StatisticsCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the statistics of the trained model when training ends, beside the package that a `DareCallback` writes then.

        Trainer(..., callbacks=[DareCallback(p=0.9), StatisticsCallback()])

    The files are `{output_dir}/{name}/final.fisher.safetensors` and `final.gram.safetensors`.

    Args:
        kinds: which statistics; see `collect_fisher` and `collect_gram`.
        examples: how many examples of the Trainer's training data they are taken from, on all ranks together; rounded up to the
            same number on each.
        labels: see `collect_fisher`.
        name: of the folder; that of the `DareCallback`.

    Attributes:
        files: what this run wrote, by kind.
        seconds: for which collecting and writing took place.

    Raises:
        ConfigError: at construction, for values that are wrong; at train begin, for a model that statistics cannot be taken of.
    """

    def __init__(
        self, kinds: Kind | Sequence[Kind] = ("fisher", "gram"), examples: int = 256, *, labels: Labels = "data", name: str = "dare"
    ) -> None:
        self.kinds: tuple[Kind, ...] = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if not self.kinds or len({*self.kinds}) < len(self.kinds) or not {*self.kinds} <= {*get_args(Kind)}:
            raise ConfigError("kinds", expected=f"some of {', '.join(get_args(Kind))}", found=repr(kinds))
        _check(examples or 0, labels)
        if not name or Path(name).name != name:
            raise ConfigError("name", expected="the name of a folder", found=repr(name))
        self.examples, self.labels, self.name = examples, labels, name
        self.files: dict[Kind, Path] = {}
        self.seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        _places(unwrapped(model), adapters="fisher" not in self.kinds)
        if "gram" in self.kinds and _has_two_sequences(model):
            remedy = 'kinds="fisher"; or collect_gram on batches without padding'
            raise ConfigError("kinds", expected="no gram for a model with encoder and decoder", found=repr(self.kinds), remedy=remedy)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        begin, ranks = time.perf_counter(), Ranks.joined()
        share = -(-self.examples // ranks.world)
        with torch.random.fork_rng(devices=[]):  # a data loader's iterator draws from torch's generator, which is the user's
            batches: list[Batch] = ranks.each(lambda: list(_examples_of(model, train_dataloader, share)))
        count = [self._write(kind, model, batches, Path(args.output_dir) / self.name / "final", ranks) for kind in self.kinds][-1]
        self.seconds = time.perf_counter() - begin
        run = tracking.active_run()
        if run is not None and ranks.first:
            figures = {"dare/statistics_examples": count, "dare/statistics_seconds": self.seconds}
            run.log({**figures, "train/global_step": state.global_step})

    def _write(self, kind: Kind, model: Any, batches: list[Batch], package: Path, ranks: Ranks) -> int:
        """Collect and write statistics of one kind; how many examples counted."""
        found, count = _fisher(model, batches, None, self.labels, ranks) if kind == "fisher" else _gram(model, batches, None, ranks)
        self.files[kind] = path = beside(package, kind)
        ranks.together(lambda: str(save_statistics(path, kind, found, examples=count)) if ranks.first else "")
        return count


def _check(examples: int | None, labels: str) -> None:
    if examples is not None and (not isinstance(examples, int) or isinstance(examples, bool) or examples < 1):
        raise ConfigError("examples", expected="a positive number of examples, or None", found=repr(examples))
    if labels not in get_args(Labels):
        raise ConfigError("labels", expected='"data" or "model"', found=repr(labels))


# Fisher information.


def _fisher(model: torch.nn.Module, batches: Iterable[Batch], examples: int | None, labels: Labels, ranks: Ranks) -> tuple[Tensors, int]:
    """`collect_fisher`, and how many examples counted on all ranks."""
    model = unwrapped(model)
    places = _places(model, adapters=False)
    trained = {id(piece.tensor): piece.tensor for one in places.values() for piece in one.pieces if piece.tensor.requires_grad}
    if not trained:
        raise ConfigError("model", expected="parameters that need gradients", found="none", remedy="call requires_grad_(True)")
    sums = {key: torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False) for key, tensor in trained.items()}
    singles = (one for batch in _examples_of(model, batches, examples) for one in _singles(model, batch))
    if labels == "data":
        singles = (one for one in singles if not _is_without_labels(one))
    counted = ranks.each(lambda: _add_squares(model, singles, labels, [*trained.values()], [*sums.values()]))
    count = _total(ranks, sums.values(), [counted])[0]
    means = {key: total.div_(count).cpu() for key, total in sums.items()}
    found = {name: one for name, one in places.items() if one.pieces and id(one.pieces[0].tensor) in means}
    return {name: _as_cut(one, means[id(one.pieces[0].tensor)]) for name, one in found.items()}, count


def _add_squares(
    model: torch.nn.Module, singles: Iterable[Batch], labels: Labels, parameters: list[torch.Tensor], sums: list[torch.Tensor]
) -> int:
    """Add each example's expected squared gradient to `sums`; how many examples there were."""
    count = 0
    with _evaluating(model), torch.enable_grad():
        for example in singles:
            chances, values = _log_likelihoods(model, example, labels)
            if not torch.isfinite(values).all():
                remedy = "leave out examples without labels; or has training diverged?"
                raise ConfigError("batches", expected="finite log-likelihoods", found=f"{values.tolist()} for one example", remedy=remedy)
            for number, (chance, value) in enumerate(zip(chances, values, strict=True), 1):
                gradients = torch.autograd.grad(value, parameters, retain_graph=number < len(values), allow_unused=True)
                _add(sums, gradients, chance)
            count += 1
    return count


def _add(sums: list[torch.Tensor], gradients: Sequence[torch.Tensor | None], chance: float) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            wide = gradient.to_dense().float()
            total.addcmul_(wide, wide, value=chance)


def _log_likelihoods(model: torch.nn.Module, example: Batch, labels: Labels) -> tuple[list[float], torch.Tensor]:
    """How likely each label is that counts, and log p of it, which can be differentiated."""
    if labels == "data":
        return [1.0], -_loss(model(**example)).reshape(1)
    logits = getattr(model(**{name: value for name, value in example.items() if name != "labels"}), "logits", None)
    _check_classes(model, logits)
    logarithms = torch.log_softmax(logits[0].float(), dim=-1)  # type: ignore[index]
    return logarithms.detach().exp().tolist(), logarithms


def _loss(output: Any) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        found = "none" if loss is None else f"{loss!r}"
        remedy = 'pass batches with labels; or labels="model" for a classifier'
        raise ConfigError("batches", expected="an output with a loss, one number", found=found, remedy=remedy)
    return loss


def _check_classes(model: Any, logits: Any) -> None:
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else None
    exclusive = kind not in ("regression", "multi_label_classification")
    if shape is None or len(shape) != 2 or shape[0] != 1 or shape[1] < 2 or not exclusive:
        found = f"shape {shape}" if exclusive else f"those of {kind}"
        raise ConfigError('labels="model"', expected="logits [1, classes] of an example", found=found, remedy='use labels="data"')


def _is_without_labels(example: Batch) -> bool:
    labels = example.get("labels")
    return isinstance(labels, torch.Tensor) and bool((labels == _IGNORED).all())


# Inputs of linear layers.


@dataclass(kw_only=True)
class _Inputs:
    """What has gone into linear layers so far."""

    sums: Tensors
    """Σ x xᵀ by name of the layer's weight."""
    tokens: dict[str, int]
    """How many x those are sums over."""
    mask: torch.Tensor | None = None
    """bool [batch, seq] of the batch that is going through the model: the positions that count."""

    def see(self, name: str, layer: torch.nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A forward pre-hook of one layer."""
        inputs: torch.Tensor = (*args, *named.values())[0]
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        if self.mask is not None and inputs.shape[:-1] in (self.mask.shape, (self.mask.numel(),)):
            rows = rows[self.mask.reshape(-1)]
        rows = rows.float()
        self.sums[name].addmm_(rows.T, rows)
        self.tokens[name] += rows.shape[0]


def _gram(model: torch.nn.Module, batches: Iterable[Batch], examples: int | None, ranks: Ranks) -> tuple[Grams, int]:
    """`collect_gram`, and how many examples counted on all ranks."""
    model = unwrapped(model)
    layers = _linear_layers(model)
    inputs = _Inputs(sums={}, tokens=dict.fromkeys((name for name, _ in layers), 0))
    for name, layer in layers:
        inputs.sums[name] = torch.zeros(_width(layer), _width(layer), dtype=torch.float32, device=layer.weight.device)
    counted = ranks.each(lambda: _run(model, _examples_of(model, batches, examples), layers, inputs))
    count, *tokens = _total(ranks, inputs.sums.values(), [counted, *inputs.tokens.values()])
    found = {name: inputs.sums[name].div_(seen).cpu() for name, seen in zip(inputs.tokens, tokens, strict=True) if seen}
    return Grams(found, transposed=[name for name, layer in layers if isinstance(layer, Conv1D) and name in found]), count


def _run(model: torch.nn.Module, batches: Iterable[Batch], layers: list[tuple[str, Any]], inputs: _Inputs) -> int:
    """Let the model run while `inputs` looks on; how many examples there were."""
    count = 0
    with _evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for name, layer in layers:
            hooks.callback(layer.register_forward_pre_hook(partial(inputs.see, name), with_kwargs=True).remove)
        for batch in batches:
            inputs.mask = _mask(model, batch)
            model(**batch)
            count += _size(model, batch)
    return count


def _mask(model: torch.nn.Module, batch: Batch) -> torch.Tensor | None:
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    if _has_two_sequences(model):
        remedy = "pass batches of one example each, without padding"
        raise ConfigError("attention_mask", expected="no padding, with encoder and decoder", found="padding", remedy=remedy)
    return mask.bool()


def _has_two_sequences(model: Any) -> bool:
    """Whether it has encoder and decoder: the mask of one says nothing about the other."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _linear_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """(checkpoint name of the weight, layer), layers that share a weight one after another.

    Raises:
        ConfigError: files hold a layer's weight in parts.
    """
    names: dict[int, list[tuple[str, Held]]] = {}
    for name, one in _places(model).items():
        for piece in one.pieces:
            names.setdefault(id(piece.tensor), []).append((name, one))
    linear = {part: isinstance(part, (torch.nn.Linear, Conv1D)) for part in model.modules()}
    elsewhere = {id(tensor) for part, is_linear in linear.items() if not is_linear for tensor in part.parameters(recurse=False)}
    found = []
    for layer in (part for part, is_linear in linear.items() if is_linear):
        weight: Any = layer.weight
        places = names.get(id(weight), []) if weight.dtype.is_floating_point and id(weight) not in elsewhere else []
        for name, one in places:
            if one.shape != tuple(weight.shape):
                remedy = "use a model whose modules hold this tensor as its files do"
                raise ConfigError(name, expected=f"shape {tuple(weight.shape)}, as in the model", found=str(one.shape), remedy=remedy)
            found.append((name, layer))
    return found


def _width(layer: Any) -> int:
    """Number of inputs."""
    return int(layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1])


# What both need: names, examples, a quiet model, sums over ranks.


def _places(model: Any, *, adapters: bool = True) -> dict[str, Held]:
    """Where each tensor of the model's files lies: in one of its parameters or buffers, or in a run of one.

    Raises:
        ConfigError: they are not whole in this process; or there are adapters where there should be none.
    """
    live = LiveWeights(model)
    if live.adapted and not adapters:
        found, remedy = "a PEFT model", "merge_and_unload() first, and collect from what it returns; gram needs no merging"
        raise ConfigError("model", expected="no adapters: the Fisher information is that of merged weights", found=found, remedy=remedy)
    tensors: Mapping[str, torch.Tensor] = dict(checkpoint_tensors(model))
    if live.adapted:
        tensors, _ = lora.base_tensors(model, tensors)
    held, own = engines.held(tensors.items(), model), {id(tensor) for tensor in tensors.values()}
    if not live.whole or any(id(piece.tensor) not in own for one in held.values() for piece in one.pieces):
        remedy = "save the model, load it with from_pretrained in one process or under DDP, and collect there"
        raise ConfigError("model", expected="weights that are whole in this process", found="shards (FSDP, ZeRO-3)", remedy=remedy)
    return as_in_files(model.get_base_model() if live.adapted else model, held)


def _as_cut(one: Held, values: torch.Tensor) -> torch.Tensor:
    """Of values shaped as a parameter, those of a tensor of the files that lies in it."""
    return replace(one.pieces[0], tensor=values).flat().reshape(one.shape)


def _examples_of(model: torch.nn.Module, batches: Iterable[Batch], examples: int | None) -> Iterator[dict[str, Any]]:
    """The first so many examples, in the batches they come in, on the model's device; no batch is asked for without need."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    left = examples
    for batch in batches:
        size = _size(model, batch)
        rows = size if left is None else min(size, left)
        yield {name: value.to(device) if hasattr(value, "to") else value for name, value in _part(batch, 0, rows, size).items()}
        if left is not None:
            left -= rows
            if not left:
                return


def _singles(model: torch.nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    size = _size(model, batch)
    for row in range(size):
        yield _part(batch, row, row + 1, size)


def _size(model: Any, batch: Batch) -> int:
    """How many examples a batch holds."""
    if not isinstance(batch, Mapping):
        raise ConfigError("batches", expected="mappings from arguments of the model to tensors", found=f"a {type(batch).__name__}")
    main = batch.get(getattr(model, "main_input_name", "input_ids"))
    tensors = [value for value in (main, *batch.values()) if isinstance(value, torch.Tensor) and value.dim()]
    if not tensors:
        raise ConfigError("batches", expected="mappings from arguments of the model to tensors", found=f"{sorted(batch)} and no tensor")
    return int(tensors[0].shape[0])


def _part(batch: Batch, start: int, stop: int, size: int) -> dict[str, Any]:
    """Examples [start, stop) of a batch of `size`."""
    if stop - start == size:
        return dict(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] != size:
            expected, found = f"{size} rows, one for each example", f"shape {tuple(value.shape)}"
            raise ConfigError(f"batches: {name}", expected=expected, found=found, remedy="pass batches of one example each")
    return {name: value[start:stop] if isinstance(value, torch.Tensor) and value.dim() else value for name, value in batch.items()}


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A block in which all modules are in evaluation mode; afterwards each is in its own again."""
    flags = [(part, part.training) for part in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _total(ranks: Ranks, sums: Iterable[torch.Tensor], counts: list[int]) -> list[int]:
    """Make `sums` those over all ranks, where they lie; the counts, of which that of examples is the first, over all ranks."""
    if ranks.world > 1:
        for tensor in sums:
            torch.distributed.all_reduce(tensor)
    totals = [sum(column) for column in zip(*ranks.gather(counts), strict=True)]
    if not totals[0]:
        raise ConfigError("batches", expected="at least one example that counts", found="none")
    return totals
