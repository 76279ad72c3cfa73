"""What a model's own data says about its weights: the statistics that Fisher merging and RegMean average
with.

Both are collected by ordinary passes over a few hundred examples. Weights, gradients and training flags stay
as they were, and no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError
from ...evaluation.linear_layers import (
    Batch,
    batch_part,
    batch_size,
    evaluating,
    examples_of,
    linear_layers,
    named_places,
    watch_inputs,
    width_of,
)
from ...parallel.ranks import Ranks
from ...weights.live.sharding import Held
from ...weights.live.wrapped import unwrapped

Labels = Literal["data", "model"]
"""Whose labels y a log-likelihood log p(y|x) is about: those of the data, or all that the model may give, by
their probability."""

Tensors = dict[str, torch.Tensor]

_IGNORED = -100
"""The label that transformers' losses leave out."""


def collect_fisher(
    model: torch.nn.Module, batches: Iterable[Batch], *, examples: int | None = None, labels: Labels = "data"
) -> Tensors:
    """Diagonal of the Fisher information: the mean over examples x of E_y (∂ log p(y|x) / ∂θ)² (Fisher
    merging, arXiv 2111.09832).

    Each example goes through the model by itself: the square of a batch's mean gradient is not the mean of
    squares.

    Args:
        model: whole in this process, on any device, wrapped or not.
        batches: mappings that `model(**batch)` takes. Where `torch.distributed` is at work, all ranks call
            this together, each with examples of its own, and all of them get the mean over all examples.
        examples: how many of this process's examples count; all, by default.
        labels: "data": y is the batch's own, and log p(y|x) minus the loss that the model makes of it, which
            for a language model is the mean over the tokens of the example; examples whose labels are all
            -100 do not count. This is called
            the empirical Fisher. "model": the expectation is over the model's own p(y|x), as in the paper;
            for classifiers.

    Returns:
        float32 on the CPU, shaped as the tensors, by checkpoint name; nothing for parameters that need no
        gradient.

    Raises:
        ConfigError: the model is not whole in this process, or has adapters; a batch cannot be taken apart;
            there is no loss, it is not finite, or with "model" there are no classes.
        RankError: it failed on another rank.
    """
    check_options(examples, labels)
    return fisher_and_count(model, batches, examples, labels, Ranks.joined())[0]


class Grams(Tensors):
    """Gram matrices by tensor name. `transposed` names the tensors that hold a layer as [in, out], as GPT-2
    does.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, transposed: Iterable[str] = ()) -> None:
        super().__init__(tensors)
        self.transposed = frozenset(transposed)


def collect_gram(model: torch.nn.Module, batches: Iterable[Batch], *, examples: int | None = None) -> Grams:
    """G = XᵀX / n of each linear layer, where X [n, in] holds its input at each of n tokens (RegMean, arXiv
    2212.09849).

    RegMean's W = (Σ Gᵢ)⁻¹ Σ Gᵢ Wᵢ, for Wᵢ [in, out], is where the layer's outputs are closest to those of all
    models. Layers are `torch.nn.Linear` and transformers' `Conv1D`. Where inputs have the positions of the
    batch's `attention_mask` [batch, seq], masked ones are left out. Models with LoRA adapters are seen as
    what they are when merged.

    Args:
        model, batches, examples: see `collect_fisher`. Labels may be missing.

    Returns:
        float32 [in, in] on the CPU by the checkpoint name of the layer's weight, from products and sums in
        float32. There is nothing for layers that never ran, and for weights that are not a linear layer's
        alone, such as a tied embedding.

    Raises:
        ConfigError: the model is not whole in this process; files hold a layer's weight in parts; a batch
            cannot be taken apart, or is a padded one for a model with encoder and decoder.
        RankError: it failed on another rank.
    """
    check_options(examples, "data")
    return gram_and_count(model, batches, examples, Ranks.joined())[0]


def check_options(examples: int | None, labels: str) -> None:
    """Refuses what `collect_fisher` does not take.

    Raises:
        ConfigError: naming the one that is wrong.
    """
    if examples is not None and (not isinstance(examples, int) or isinstance(examples, bool) or examples < 1):
        raise ConfigError("examples", expected="a positive number of examples, or None", found=repr(examples))
    if labels not in get_args(Labels):
        raise ConfigError("labels", expected='"data" or "model"', found=repr(labels))


# Fisher information.


def fisher_and_count(
    model: torch.nn.Module, batches: Iterable[Batch], examples: int | None, labels: Labels, ranks: Ranks
) -> tuple[Tensors, int]:
    """`collect_fisher`, and how many examples counted on all ranks."""
    model = unwrapped(model)
    places = named_places(model, adapters=False)
    trained = {
        id(piece.owner): piece.owner
        for held in places.values()
        for piece in held.pieces
        if piece.owner.requires_grad
    }
    if not trained:
        raise ConfigError(
            "model",
            expected="parameters that need gradients",
            found="none",
            remedy="call requires_grad_(True)",
        )
    sums = {
        key: torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False)
        for key, tensor in trained.items()
    }
    singles = (
        example for batch in examples_of(model, batches, examples) for example in _singles(model, batch)
    )
    if labels == "data":
        singles = (example for example in singles if not _is_without_labels(example))
    counted = ranks.each(lambda: _add_squares(model, singles, labels, [*trained.values()], [*sums.values()]))
    count = _total(ranks, sums.values(), [counted])[0]
    means = {key: total.div_(count).cpu() for key, total in sums.items()}
    with_mean = {
        name: held
        for name, held in places.items()
        if held.pieces and all(id(piece.owner) in means for piece in held.pieces)
    }
    return {name: _as_cut(held, means) for name, held in with_mean.items()}, count


def _add_squares(
    model: torch.nn.Module,
    singles: Iterable[Batch],
    labels: Labels,
    parameters: list[torch.Tensor],
    sums: list[torch.Tensor],
) -> int:
    """Add each example's expected squared gradient to `sums`; how many examples there were."""
    count = 0
    with evaluating(model), torch.enable_grad():
        for example in singles:
            chances, values = _log_likelihoods(model, example, labels)
            if not torch.isfinite(values).all():
                remedy = "leave out examples without labels; or has training diverged?"
                raise ConfigError(
                    "batches",
                    expected="finite log-likelihoods",
                    found=f"{values.tolist()} for one example",
                    remedy=remedy,
                )
            for number, (chance, value) in enumerate(zip(chances, values, strict=True), 1):
                gradients = torch.autograd.grad(
                    value, parameters, retain_graph=number < len(values), allow_unused=True
                )
                _add(sums, gradients, chance)
            count += 1
    return count


def _add(sums: list[torch.Tensor], gradients: Sequence[torch.Tensor | None], chance: float) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            wide = gradient.to_dense().float()
            total.addcmul_(wide, wide, value=chance)


def _log_likelihoods(
    model: torch.nn.Module, example: Batch, labels: Labels
) -> tuple[list[float], torch.Tensor]:
    """How likely each label is that counts, and log p of it, which can be differentiated."""
    if labels == "data":
        return [1.0], -_loss(model(**example)).reshape(1)
    logits = getattr(
        model(**{name: value for name, value in example.items() if name != "labels"}), "logits", None
    )
    _check_classes(model, logits)
    logarithms = torch.log_softmax(logits[0].float(), dim=-1)  # type: ignore[index]
    return logarithms.detach().exp().tolist(), logarithms


def _loss(output: Any) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ConfigError(
            "batches",
            expected="an output with a loss, one number",
            found="none" if loss is None else f"{loss!r}",
            remedy='pass batches with labels; or labels="model" for a classifier',
        )
    return loss


def _check_classes(model: Any, logits: Any) -> None:
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else None
    exclusive = kind not in ("regression", "multi_label_classification")
    if shape is None or len(shape) != 2 or shape[0] != 1 or shape[1] < 2 or not exclusive:
        raise ConfigError(
            'labels="model"',
            expected="logits [1, classes] of an example",
            found=f"shape {shape}" if exclusive else f"those of {kind}",
            remedy='use labels="data"',
        )


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

    def see(self, name: str, rows: torch.Tensor) -> None:
        rows = rows.float()
        self.sums[name].addmm_(rows.T, rows)
        self.tokens[name] += rows.shape[0]


def gram_and_count(
    model: torch.nn.Module, batches: Iterable[Batch], examples: int | None, ranks: Ranks
) -> tuple[Grams, int]:
    """`collect_gram`, and how many examples counted on all ranks."""
    model = unwrapped(model)
    return grams_of(model, examples_of(model, batches, examples), linear_layers(model), ranks)


def grams_of(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[tuple[str, Any]],
    ranks: Ranks,
    until: torch.nn.Module | None = None,
) -> tuple[Grams, int]:
    """`collect_gram` for some of a model's layers, by the names of their weights, and how many examples
    counted on all ranks. `until`: as for `watch_inputs`.
    """
    inputs = _Inputs(sums={}, tokens=dict.fromkeys((name for name, _ in layers), 0))
    for name, layer in layers:
        inputs.sums[name] = torch.zeros(
            width_of(layer), width_of(layer), dtype=torch.float32, device=layer.weight.device
        )
    counted = ranks.each(lambda: watch_inputs(model, batches, layers, inputs.see, until))
    count, *tokens = _total(ranks, inputs.sums.values(), [counted, *inputs.tokens.values()])
    means = {
        name: inputs.sums[name].div_(seen).cpu()
        for name, seen in zip(inputs.tokens, tokens, strict=True)
        if seen
    }
    transposed = [name for name, layer in layers if isinstance(layer, Conv1D) and name in means]
    return Grams(means, transposed=transposed), count


# What both need.


def _as_cut(held: Held, values: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Of values shaped as parameters, by whose they are, those of a tensor of the files that lies in them."""
    parts = []
    for piece in held.pieces:
        of = values[id(piece.owner)]
        if piece.parent is None:
            parts.append(replace(piece, tensor=of).flat())
        else:
            parts.append(of.reshape(-1)[torch.from_numpy(piece.places(np.arange(piece.length)))])
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(held.shape)


def _singles(model: torch.nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    size = batch_size(model, batch)
    for row in range(size):
        yield batch_part(batch, row, row + 1, size)


def _total(ranks: Ranks, sums: Iterable[torch.Tensor], counts: list[int]) -> list[int]:
    """Make `sums` those over all ranks, where they lie; the counts, of which that of examples is the first,
    over all ranks.
    """
    if ranks.world > 1:
        for tensor in sums:
            torch.distributed.all_reduce(tensor)
    totals = [sum(column) for column in zip(*ranks.gather(counts), strict=True)]
    if not totals[0]:
        raise ConfigError("batches", expected="at least one example that counts", found="none")
    return totals
