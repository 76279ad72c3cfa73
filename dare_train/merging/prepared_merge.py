"""A merge before the first of its arithmetic: models are opened, fates settled, statistics found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Union

from ..dtypes import DTYPES
from ..errors import CheckpointError, ConfigError
from ..extracting.completeness import notes_on_new_modules
from ..hub.download import locate
from ..parallel.ranks import Ranks
from ..parallel.threads import thread_share
from ..weights.files.full_precision import check_full_precision
from ..weights.files.module_folders import places_of
from ..weights.protocol import Weights
from .config.in_vain import said_in_vain
from .config.merge_identity import place_in
from .config.recipe import Recipe
from .config.task import MergeTask
from .merged_weights import Merged, Statistics
from .methods.registry import Method, method_of
from .models.added_tokens import Growth, Tokenizer, other_tokenizer
from .models.chat_templates import check_template
from .models.chosen_vocabulary import BASE, UNION, ChosenVocabulary, Wanted, on_one_vocabulary
from .models.inputs import CheckpointInput, Input, PackageInput
from .models.layers import layer_counts
from .models.matching import Choices, fates
from .models.naming import open_models, package_of
from .models.references import adapters_of, folder_of, open_reference, parts_of
from .models.tokenizer_files import read_tokens
from .placed_layers import InPlaces, in_places, opened
from .statistics.statistics_file import StatisticsFile, StatisticsKind, statistics_path

if TYPE_CHECKING:
    import torch

    from .devices import Devices

_PURPOSE = "since weights are added up"
DeviceLike = Union[str, "torch.device"]


@dataclass(frozen=True, kw_only=True)
class PreparedMerge:
    """A merge before the first of its arithmetic."""

    merged: Merged
    base: Weights
    base_folder: Path | None
    prefix: str
    growth: Growth
    chosen: ChosenVocabulary | None = None
    """Where the result has tokens of its own."""
    numbers: tuple[int, ...] | None = None
    """By layer of the result, its number in the base's model, where layers moved."""
    notes: tuple[str, ...] = ()
    """Sentences on what was asked for and found nothing."""
    beside: tuple[Path, ...] = ()
    """Folders that are read besides those of base and models: of adapters in them, and of a tokenizer."""

    @property
    def folders(self) -> list[Path]:
        models = (model.folder for model in self.merged.inputs)
        return [folder for folder in (self.base_folder, *models, *self.beside) if folder is not None]

    @property
    def inputs(self) -> list[Path]:
        """All places that are read."""
        statistics = [found.file.path for found in (*self.merged.fisher, *self.merged.gram)]
        packages = [
            path
            for model in self.merged.inputs
            if isinstance(model, PackageInput)
            for path in model.package.paths
        ]
        return [*(place for folder in self.folders for place in places_of(folder)), *statistics, *packages]


def prepared(
    task: MergeTask, ranks: Ranks, device: DeviceLike | None, *, collected: bool = True
) -> PreparedMerge:
    """Open what a task is about, and check it.

    Args:
        collected: False where Gram matrices are yet to be collected.

    Raises:
        As `merge`.
    """
    recipe = task.recipe
    method = method_of(recipe.method)
    _check(recipe, method)
    base = open_reference(task.base, dequantize=recipe.dequantize, rounded=True)
    check_full_precision(base, purpose=_PURPOSE)
    folder = folder_of(base)
    places = {model.model: number for number, model in enumerate(recipe.models)}
    choices = Choices(
        exclude=recipe.exclude, take={pattern: places[model] for pattern, model in recipe.take.items()}
    )
    placed = in_places(task, base)
    chosen = _chosen(task, placed)
    opening = open_models(
        chosen.base if chosen else placed.base,
        chosen.models if chosen else placed.models,
        rename=recipe.rename,
        cast_base=recipe.cast_base,
        dequantize=recipe.dequantize,
        known=choices.decide,
    )
    named, inputs = opening.base, opening.inputs
    one_of_two = "base" if chosen else _one_of_two(recipe.tokenizer)
    growth = Growth(named, folder, inputs, one_of_two, decided=choices.decide)
    inputs = growth.padded()
    values = recipe.resolver(layer_counts(named.tensors))
    out_dtype = DTYPES[recipe.out_dtype] if recipe.out_dtype else None
    merged = Merged(
        recipe,
        method,
        named,
        inputs,
        fates(named, inputs, choices, growth.rows, out_dtype, values.takes_part),
        values=values,
        fisher=_statistics("fisher", recipe.fisher, inputs, needed=method.needs == "fisher"),
        gram=_statistics(
            "gram",
            recipe.gram,
            inputs,
            needed=collected and (method.needs == "gram" or (recipe.rescale == "q" and not gives_q(recipe))),
        ),
        threads=thread_share(ranks),
        devices=_devices(device, named),
        untied=opening.untied,
    )
    _check_merge(merged)
    beside = [place for given in (task.base, *task.models) for place in adapters_of(given)]
    return PreparedMerge(
        merged=merged, base=base, base_folder=folder, prefix=opening.prefix, growth=growth, chosen=chosen,
        numbers=placed.numbers,
        notes=tuple(_notes(recipe, named, inputs)),
        beside=tuple([*beside, chosen.folder] if chosen else beside),
    )  # fmt: skip


def _notes(recipe: Recipe, base: Weights, inputs: Sequence[Input]) -> Iterator[str]:
    names = {*base.tensors, *(name for model in inputs for name in model.tensors)}
    yield from said_in_vain(recipe, names, {name for model in inputs for name in model.names.values()})
    yield from _twice(inputs)
    yield from _without_configuration(base, inputs)


def _twice(inputs: Sequence[Input]) -> Iterator[str]:
    """Models that are given several times: their deltas count as often."""
    labels = [model.label for model in inputs if model.folder is not None]
    for label in dict.fromkeys(labels):
        if labels.count(label) > 1:
            yield f"{label}: given {labels.count(label)} times, so that it counts as often"


def _without_configuration(base: Weights, inputs: Sequence[Input]) -> Iterator[str]:
    """Modules that an adapter alone has."""
    for model in inputs:
        if isinstance(model, CheckpointInput):
            yield from notes_on_new_modules(model.folder, base.tensors, model.tensors, model.label)


def check_for_package(task: MergeTask, ready: PreparedMerge) -> None:
    """
    Raises:
        ConfigError: the result cannot be a package on the base.
    """
    if len(parts_of(task.base)) > 1:
        remedy = "write base and adapter as one model first, with passthrough"
        raise ConfigError("base", expected="one checkpoint under a package", found=task.base, remedy=remedy)
    if ready.numbers is not None:
        raise ConfigError("slices", expected="layers in their places, for a package", found="others")
    if ready.chosen is not None:
        expected = "the base's, with the ids that it has there, for a package"
        raise ConfigError("tokenizer", expected=expected, found="other tokens, ids or rows")


def _asks_for_vocabulary(recipe: Recipe) -> bool:
    """Whether the result's tokens are not the base's, nor those of all models as they are."""
    return recipe.tokenizer not in (None, BASE, UNION) or bool(recipe.tokens or recipe.pad_to_multiple_of)


def _unites_models(recipe: Recipe) -> bool:
    """Whether tokens of models are united of which one is the base, so that no ids come before others."""
    return recipe.tokenizer == UNION and recipe.base in [model.model for model in recipe.models]


def _moves_tokens(task: MergeTask, base: Path | None) -> bool:
    """Whether the base's tokenizer is asked for, or a union without a base apart from the models, and a model
    has the base's tokens under other ids.
    """
    if base is None or not (task.recipe.tokenizer == BASE or _unites_models(task.recipe)):
        return False
    for given in task.models:
        if package_of(given) is not None:
            continue
        named = parts_of(given)
        folder = locate(named[0]) if named else folder_of(given)
        if folder is not None and folder.is_dir() and other_tokenizer(folder, base):
            own, of_base = read_tokens(folder) or {}, read_tokens(base) or {}
            if any(own.get(token, id) != id for token, id in of_base.items()):
                return True
    return False


def _chosen(task: MergeTask, placed: InPlaces) -> ChosenVocabulary | None:
    """Base and models with the rows of the vocabulary that the recipe asks for; None where it asks for none
    in particular.
    """
    recipe = task.recipe
    if not _asks_for_vocabulary(recipe) and not _moves_tokens(task, folder_of(placed.base)):
        return None
    models = opened(
        replace(task, models=placed.models), placed.base, "where the result has a tokenizer of its own"
    )
    wanted = Wanted(
        source=recipe.tokenizer or BASE, tokens=recipe.tokens, pad_to_multiple_of=recipe.pad_to_multiple_of
    )
    named = zip([model.model for model in recipe.models], models, strict=True)
    base = recipe.base if placed.numbers is None else f"{recipe.base}, layer by layer"
    return on_one_vocabulary(wanted, (base, placed.base), [*named])


def _one_of_two(tokenizer: str | None) -> Tokenizer | None:
    return None if tokenizer is None else "union" if tokenizer == UNION else "base"


def _devices(given: DeviceLike | None, base: Weights) -> Devices | None:
    """None where nothing is known of devices: weights in files need no torch."""
    if given is None and not hasattr(base, "lying"):
        return None
    try:
        from .devices import Devices
    except ImportError as error:
        remedy = 'pip install "dare_train[train]", or leave it out'
        raise ConfigError(
            "device", expected="torch, which works there", found="not installed", remedy=remedy
        ) from error
    return Devices(given, base)


def _check(recipe: Recipe, method: Method) -> None:
    recipe.check_parameters(method.parameters)
    if recipe.chat_template:
        check_template(recipe.chat_template)
    least, most = method.models
    together = [sum(each is not None for each in layers.models) for layers in recipe.layers]
    together = together or [len(recipe.models)]
    wrong = [count for count in together if count < least or (most is not None and count > most)]
    if wrong:
        wanted = (
            f"{least} to {most}"
            if most not in (None, least)
            else f"exactly {least}"
            if most
            else f"at least {least}"
        )
        raise ConfigError("models", expected=f"{wanted} for {method.name}", found=str(wrong[0]))


def gives_q(recipe: Recipe) -> bool:
    """Whether the recipe says what q is, so that no Gram matrices are asked for it."""
    return "q" in recipe.parameters or all("q" in model.parameters for model in recipe.models)


def _statistics(
    kind: StatisticsKind, given: Sequence[str], inputs: Sequence[Input], *, needed: bool
) -> list[Statistics]:
    return (
        [_statistics_of(kind, model, given[number] if given else None) for number, model in enumerate(inputs)]
        if needed
        else []
    )


def _statistics_of(kind: StatisticsKind, model: Input, given: str | None) -> Statistics:
    if given is None and model.folder is None:
        raise ConfigError(
            kind, expected=f"a file of {model.label}'s statistics", found="none", remedy=f"pass {kind}=[...]"
        )
    path = Path(given) if given is not None else statistics_path(model.folder or "", kind)
    if not path.is_file():
        remedy = (
            f"collect_{kind} gathers them and save_statistics writes them, or "
            "StatisticsCallback does both after training"
        )
        raise CheckpointError(
            str(path), expected=f"{kind} statistics of {model.label}", found="no such file", remedy=remedy
        )
    return Statistics.of(StatisticsFile.open(path, kind), model)


def _check_merge(merged: Merged) -> None:
    """Of inputs that come through merged layers, Gram matrices are those of this merge, model by model."""
    files = [statistics.file for statistics in merged.gram]
    if not any(file.merge for file in files):
        return
    for number, file in enumerate(files):
        if file.merge != place_in(merged.recipe, number):
            raise CheckpointError(
                str(file.path),
                expected=f"Gram matrices of model {number + 1}, of what comes through this merge's layers",
                found="those of another model or merge"
                if file.merge
                else "those of inputs of its own layers",
                remedy="collect them anew: dare_train.regmean_plus_plus",
            )
