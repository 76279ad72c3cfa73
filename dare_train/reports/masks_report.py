"""What masks have in common: with each other, layer by layer, and one layer with another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from statistics import fmean
from typing import Any

from ..errors import ConfigError
from ..training.subnetwork import Masks, Overlap
from .document import Chart, Curve, HeatMap, Study, Table

Pairs = Mapping[tuple[str, str], Overlap]


def masks_study(
    given: Masks | Mapping[str, Masks],
    *,
    title: str = "What masks have in common",
    name: str = "masks",
    setup: Mapping[str, Any] | None = None,
) -> Study:
    """One mask, or several of the same tensors by name.

    Raises:
        ConfigError: there is none.
        TensorMismatch: they are of different tensors.
    """
    masks = {"mask": given} if isinstance(given, Masks) else dict(given)
    if not masks:
        raise ConfigError("masks", expected="at least one", found="none")
    layers = {label: mask.by_layer() for label, mask in masks.items()}
    pairs = {(first, second): masks[first].overlap(masks[second]) for first, second in combinations(masks, 2)}
    between = {label: _between(by_layer) for label, by_layer in layers.items()}
    charts: list[Chart | HeatMap] = [_densities(masks, layers, name)]
    if pairs:
        charts += [_matrix([*masks], pairs, name), _by_layer(pairs, name)]
    if all(between.values()):
        charts.append(_layers(between, name))
    return Study(
        name=name,
        title=title,
        question="Which layers do masks lie in, and what do they share beyond chance?",
        findings=(*_findings(pairs), *_densest(layers)),
        setup=setup or {},
        data={
            "masks": {
                label: {"density": mask.density, "layers": _density_of(layers[label])}
                for label, mask in masks.items()
            },
            "pairs": [
                {"masks": [*pair], **_told(overlap), "layers": _layers_of(overlap)}
                for pair, overlap in pairs.items()
            ],
            "between_layers": {
                label: [{"layers": [*pair], **_told(overlap)} for pair, overlap in overlaps.items()]
                for label, overlaps in between.items()
            },
        },
        tables=(_pairs(pairs),) if pairs else (),
        charts=tuple(charts),
    )


def _between(layers: Mapping[str, Masks]) -> Pairs:
    """Each layer with those that are built alike."""
    shapes = {layer: {name: mask.shape for name, mask in masks.items()} for layer, masks in layers.items()}
    alike = ((first, second) for first, second in combinations(layers, 2) if shapes[first] == shapes[second])
    return {(first, second): layers[first].overlap(layers[second]) for first, second in alike}


def _told(overlap: Overlap) -> dict[str, float]:
    return {"iou": overlap.iou, "chance": overlap.chance}


def _layers_of(overlap: Overlap) -> dict[str, dict[str, float]]:
    return {layer: _told(of_layer) for layer, of_layer in overlap.by_layer().items()}


def _density_of(layers: Mapping[str, Masks]) -> dict[str, float]:
    return {layer: masks.density for layer, masks in layers.items()}


def _findings(pairs: Pairs) -> list[str]:
    if not pairs:
        return []
    by_overlap = sorted(pairs, key=lambda pair: -pairs[pair].times_chance)
    return [
        f"{first} and {second} have {which} in common: IoU {pairs[first, second].iou:.4g}, "
        f"{pairs[first, second].times_chance:.3g} times that of chance."
        for which, (first, second) in zip(
            ("most", "least"), dict.fromkeys((by_overlap[0], by_overlap[-1])), strict=False
        )
    ]


def _densest(layers: Mapping[str, Mapping[str, Masks]]) -> list[str]:
    tops: dict[str, dict[str, float]] = {}
    for label, masks in layers.items():
        densities = _density_of(masks)
        top = max(densities, key=densities.__getitem__)
        tops.setdefault(top, {})[label] = densities[top]
    return [
        f"{', '.join(those)}: densest in layer {layer}, with {min(those.values()):.1%}"
        + (f" to {max(those.values()):.1%}" if len(those) > 1 else "")
        + " of its elements."
        for layer, those in tops.items()
    ]


def _pairs(pairs: Pairs) -> Table:
    return Table(
        title="Pairs",
        columns=("mask", "other", "IoU", "by chance", "times chance"),
        rows=tuple(
            (*pair, overlap.iou, overlap.chance, overlap.times_chance) for pair, overlap in pairs.items()
        ),
        note="IoU: elements that both keep over those that either keeps. By chance: if each "
        "tensor's kept elements lay anywhere in it.",
    )


def _densities(masks: Mapping[str, Masks], layers: Mapping[str, Mapping[str, Masks]], name: str) -> Chart:
    first = next(iter(layers.values()))
    curves = tuple(
        Curve(label=label, x=_places(by_layer), y=tuple(_density_of(by_layer).values()))
        for label, by_layer in layers.items()
    )
    return Chart(
        name=f"{name}-density",
        title="Which layers masks lie in",
        caption="The share of each layer's elements that a mask keeps.",
        x="layer",
        y="density",
        curves=curves,
        ticks=tuple(first),
        levels={"of all elements": next(iter(masks.values())).density} if len(masks) == 1 else {},
    )


def _places(layers: Mapping[str, Masks]) -> tuple[float, ...]:
    return tuple(map(float, range(len(layers))))


def _matrix(names: list[str], pairs: Pairs, name: str) -> HeatMap:
    return HeatMap(
        name=f"{name}-overlap",
        title="Overlap of masks, times chance",
        caption="IoU over what it would be if each tensor's kept elements lay anywhere in it.",
        x="mask",
        y="mask",
        columns=tuple(names),
        rows=tuple(names),
        values=_square(names, {pair: overlap.times_chance for pair, overlap in pairs.items()}),
    )


def _by_layer(pairs: Pairs, name: str) -> HeatMap:
    layers = {pair: overlap.by_layer() for pair, overlap in pairs.items()}
    return HeatMap(
        name=f"{name}-overlap-by-layer",
        title="Overlap of masks in each layer, times chance",
        caption="IoU of a layer's tensors over what it would be if each tensor's kept elements "
        "lay anywhere in it.",
        x="layer",
        y="masks",
        columns=tuple(next(iter(layers.values()))),
        rows=tuple(" and ".join(pair) for pair in layers),
        values=tuple(
            tuple(overlap.times_chance for overlap in overlaps.values()) for overlaps in layers.values()
        ),
        log=all(overlap.times_chance for overlaps in layers.values() for overlap in overlaps.values()),
    )


def _layers(between: Mapping[str, Pairs], name: str) -> HeatMap:
    pairs = next(iter(between.values()))
    names = list(dict.fromkeys(layer for pair in pairs for layer in pair))
    return HeatMap(
        name=f"{name}-layers",
        title="Overlap of one layer's mask with another's, times chance",
        caption="Of layers that are built alike, tensor by tensor: whether the same rows and columns are kept"
        + (f". Mean of {len(between)} masks." if len(between) > 1 else "."),
        x="layer",
        y="layer",
        columns=tuple(names),
        rows=tuple(names),
        values=_square(
            names, {pair: fmean(of_mask[pair].times_chance for of_mask in between.values()) for pair in pairs}
        ),
    )


def _square(
    names: list[str], values: Mapping[tuple[str, str], float]
) -> tuple[tuple[float | None, ...], ...]:
    return tuple(
        tuple(values.get((row, column), values.get((column, row))) for column in names) for row in names
    )
