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
    found: Masks | Mapping[str, Masks],
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
    masks = {"mask": found} if isinstance(found, Masks) else dict(found)
    if not masks:
        raise ConfigError("masks", expected="at least one", found="none")
    layers = {label: one.by_layer() for label, one in masks.items()}
    pairs = {(one, two): masks[one].overlap(masks[two]) for one, two in combinations(masks, 2)}
    between = {label: _between(own) for label, own in layers.items()}
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
                label: {"density": one.density, "layers": _density_of(layers[label])}
                for label, one in masks.items()
            },
            "pairs": [
                {"masks": [*pair], **_told(overlap), "layers": _layers_of(overlap)}
                for pair, overlap in pairs.items()
            ],
            "between_layers": {
                label: [{"layers": [*pair], **_told(overlap)} for pair, overlap in own.items()]
                for label, own in between.items()
            },
        },
        tables=(_pairs(pairs),) if pairs else (),
        charts=tuple(charts),
    )


def _between(layers: Mapping[str, Masks]) -> Pairs:
    """Each layer with those that are built alike."""
    shapes = {layer: {name: mask.shape for name, mask in own.items()} for layer, own in layers.items()}
    alike = ((one, two) for one, two in combinations(layers, 2) if shapes[one] == shapes[two])
    return {(one, two): layers[one].overlap(layers[two]) for one, two in alike}


def _told(overlap: Overlap) -> dict[str, float]:
    return {"iou": overlap.iou, "chance": overlap.chance}


def _layers_of(overlap: Overlap) -> dict[str, dict[str, float]]:
    return {layer: _told(own) for layer, own in overlap.by_layer().items()}


def _density_of(layers: Mapping[str, Masks]) -> dict[str, float]:
    return {layer: own.density for layer, own in layers.items()}


def _findings(pairs: Pairs) -> list[str]:
    if not pairs:
        return []
    by_overlap = sorted(pairs, key=lambda pair: -pairs[pair].times_chance)
    return [
        f"{one} and {two} have {which} in common: IoU {pairs[one, two].iou:.4g}, "
        f"{pairs[one, two].times_chance:.3g} times that of chance."
        for which, (one, two) in zip(
            ("most", "least"), dict.fromkeys((by_overlap[0], by_overlap[-1])), strict=False
        )
    ]


def _densest(layers: Mapping[str, Mapping[str, Masks]]) -> list[str]:
    found: dict[str, dict[str, float]] = {}
    for label, own in layers.items():
        densities = _density_of(own)
        top = max(densities, key=densities.__getitem__)
        found.setdefault(top, {})[label] = densities[top]
    return [
        f"{', '.join(those)}: densest in layer {layer}, with {min(those.values()):.1%}"
        + (f" to {max(those.values()):.1%}" if len(those) > 1 else "")
        + " of its elements."
        for layer, those in found.items()
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
        Curve(label=label, x=_places(own), y=tuple(_density_of(own).values()))
        for label, own in layers.items()
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
        values=tuple(tuple(overlap.times_chance for overlap in own.values()) for own in layers.values()),
        log=all(overlap.times_chance for own in layers.values() for overlap in own.values()),
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
            names, {pair: fmean(own[pair].times_chance for own in between.values()) for pair in pairs}
        ),
    )


def _square(
    names: list[str], values: Mapping[tuple[str, str], float]
) -> tuple[tuple[float | None, ...], ...]:
    return tuple(
        tuple(values.get((row, column), values.get((column, row))) for column in names) for row in names
    )
