"""What a look inside says: curves, tables and sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median

import numpy as np

from ..package.magnitudes import Magnitudes, merged
from ..studies.inside import Inside, LayerErrors
from ..studies.variants import DROP_VARIANTS
from ..weights.layer_names import kind_of, layer_of, natural
from .document import Cell, Chart, Curve, Study, Table, with_interval

_BOUNDS = tuple(2.0**power for power in range(-40, 6))
_KINDS = 8
"""How many kinds of tensors are drawn: those with most elements."""


def inside_study(inside: Inside, *, title: str = "What happens inside", name: str = "inside") -> Study:
    p = inside.mean_p
    charts = (
        _similarity_by_rate(inside, name),
        _similarity_by_layer(inside, name, p),
        _errors(inside, name, p),
        _means(inside, name),
        _histograms(inside, name),
        _sizes(inside, name),
    )
    return Study(
        name=name,
        title=title,
        question="What does dropping do to a model's embeddings and layers, and is it what was calculated?",
        findings=tuple(_findings(inside)),
        setup=inside.setup,
        data=inside.as_json(),
        tables=(_similarity_table(inside), _error_table(inside)),
        charts=charts,
    )


def _findings(inside: Inside) -> Iterable[str]:
    p = inside.mean_p
    last = {name: [each[-1] for each in by_rate[p]] for name, by_rate in inside.similarity.items()}
    said = "; ".join(
        f"{with_interval(values)} with {DROP_VARIANTS[name].label}" for name, values in last.items()
    )
    yield f"At p = {p:g} the last embeddings have a cosine similarity to the fine-tuned model's of {said}."
    ratios = [layer.ratio(p) for layer in inside.layers]
    low, high = np.quantile(ratios, [0.05, 0.95])
    yield (
        f"The squared error of a layer's output is {median(ratios):.3f} times p/(1 - p)·Σδ²x² "
        f"in the median of {len(ratios)} layers, "
        f"and between {low:.3f} and {high:.3f} times in nine of ten."
    )
    n = max(inside.expected_mean_error)
    dare = inside.mean_error["dare"][n]
    only = inside.mean_error["drop_only"][n]
    yield (
        f"The mean output over {n} masks is {dare:.2%} away from the fine-tuned layer's with "
        f"DARE ({inside.expected_mean_error[n]:.2%} is "
        f"expected of an unbiased one), and {only:.2%} with drop only, which no number of masks "
        "makes smaller."
    )


def _similarity_by_rate(inside: Inside, name: str) -> Chart:
    curves = [
        Curve.over(
            DROP_VARIANTS[variant].label, {p: [each[-1] for each in seeds] for p, seeds in by_rate.items()}
        )
        for variant, by_rate in inside.similarity.items()
    ]
    return Chart(
        name=f"{name}-similarity",
        title="Last embeddings after dropping",
        caption="Cosine similarity to the fine-tuned model's last hidden states, mean over "
        "tokens. Bands: 95 % confidence over masks.",
        x="drop rate p",
        y="cosine similarity",
        curves=tuple(curves),
    )


def _similarity_by_layer(inside: Inside, name: str, p: float) -> Chart:
    curves = []
    for variant, by_rate in inside.similarity.items():
        columns = zip(*by_rate[p], strict=True)
        curves.append(
            Curve.over(
                DROP_VARIANTS[variant].label,
                {float(number): list(values) for number, values in enumerate(columns)},
            )
        )
    return Chart(
        name=f"{name}-similarity-by-layer",
        title=f"Embeddings layer by layer, p = {p:g}",
        caption="Cosine similarity to the fine-tuned model's hidden states, in the mean over "
        "tokens: 0 is what goes into the first layer.",
        x="layers that came before",
        y="cosine similarity",
        curves=tuple(curves),
    )


def _errors(inside: Inside, name: str, p: float) -> Chart:
    places = range(len(inside.layers))
    measured = Curve.over(
        "measured",
        {float(place): list(layer.measured[p]) for place, layer in zip(places, inside.layers, strict=True)},
    )
    calculated = _line(
        "calculated: sqrt(p/(1-p)·Σδ²x²) / ‖Wx‖", (layer.calculated[p] for layer in inside.layers)
    )
    without = _line(
        "diagnose, without data: sqrt(p/(1-p))·‖δ‖ / ‖W‖", (layer.without_data[p] for layer in inside.layers)
    )
    return Chart(
        name=f"{name}-errors",
        title=f"Relative error of layer outputs, p = {p:g}",
        caption="‖(Ŵ - W)x‖ / ‖Wx‖ of each linear layer, x being what the fine-tuned model "
        "gives it. Bands: 95 % confidence over masks.",
        x="linear layer",
        y="relative error",
        curves=(measured, calculated, without),
        ticks=tuple(_short(layer.name) for layer in inside.layers) if len(inside.layers) <= 40 else (),
    )


def _line(label: str, values: Iterable[float]) -> Curve:
    heights = tuple(values)
    return Curve(label=label, x=tuple(map(float, range(len(heights)))), y=heights, dashed=True)


def _short(name: str) -> str:
    """A layer's number and its place there, or the last parts of its name."""
    parts = name.removesuffix(".weight").split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), max(len(parts) - 2, 0))
    return ".".join(parts[number:])


def _means(inside: Inside, name: str) -> Chart:
    curves = [
        Curve(label=DROP_VARIANTS[variant].label, x=tuple(map(float, means)), y=tuple(means.values()))
        for variant, means in inside.mean_error.items()
    ]
    expected = inside.expected_mean_error
    curves.append(
        Curve(
            label="expected of an unbiased one",
            x=tuple(map(float, expected)),
            y=tuple(expected.values()),
            dashed=True,
        )
    )
    return Chart(
        name=f"{name}-bias",
        title=f"Mean over masks: E[ĥ] = E[h], p = {inside.mean_p:g}",
        caption="How far the mean over masks of layer outputs is from the fine-tuned layers' "
        "own: ‖mean(ĥ) - h‖ / ‖h‖ over all linear "
        "layers. Without a bias it falls with the square root of the number of masks.",
        x="masks that the mean is over",
        y="relative distance",
        curves=tuple(curves),
        log_x=True,
        log_y=True,
    )


def _histograms(inside: Inside, name: str) -> Chart:
    curves = []
    for kind, sizes in _by_kind(inside)[:_KINDS]:
        pairs = [
            (bound, sizes.share_below(bound * 2**0.5) - sizes.share_below(bound / 2**0.5))
            for bound in _BOUNDS
        ]
        shown = [(bound, share) for bound, share in pairs if share > 1e-5]
        curves.append(
            Curve(label=kind, x=tuple(bound for bound, _ in shown), y=tuple(share for _, share in shown))
        )
    return Chart(
        name=f"{name}-magnitudes",
        title="Sizes of the delta by kind of layer",
        caption="Share of the elements whose |δ| lies within an octave around each value; what "
        "did not change lies beyond the scale.",
        x="|δ|, fine-tuned minus base weight",
        y="share of elements",
        curves=tuple(curves),
        log_x=True,
    )


def _by_kind(inside: Inside) -> list[tuple[str, Magnitudes]]:
    groups: dict[str, list[Magnitudes]] = defaultdict(list)
    for layer in inside.diagnosis.layers:
        groups[kind_of(layer.name)].append(layer.magnitudes)
    together = [(kind, merged(parts)) for kind, parts in groups.items()]
    return sorted(together, key=lambda pair: -pair[1].total)


def _sizes(inside: Inside, name: str) -> Chart:
    groups: dict[str, list[Magnitudes]] = defaultdict(list)
    for layer in inside.diagnosis.layers:
        groups[layer_of(layer.name)].append(layer.magnitudes)
    labels = sorted(groups, key=natural)
    sizes = [merged(groups[label]) for label in labels]
    places = tuple(map(float, range(len(labels))))
    curves = [
        Curve(label=label, x=places, y=tuple(magnitudes.percentile(q) for magnitudes in sizes))
        for label, q in (("99 % are below", 0.99), ("90 % are below", 0.9), ("median", 0.5))
    ]
    return Chart(
        name=f"{name}-magnitudes-by-layer",
        title="Sizes of the delta layer by layer",
        caption="Quantiles of |δ| over the matrices of each layer. The paper finds DARE at work "
        "where most of them are below 0.002.",
        x="layer",
        y="|δ|",
        curves=tuple(curves),
        levels={"0.002": 0.002},
        ticks=tuple(labels),
        log_y=all(magnitudes.percentile(0.5) > 0 for magnitudes in sizes),
    )


def _similarity_table(inside: Inside) -> Table:
    rates = [*next(iter(inside.similarity.values()))]
    rows = [
        (
            f"{p:g}",
            *(with_interval([each[-1] for each in by_rate[p]]) for by_rate in inside.similarity.values()),
            *_first_and_mean(inside, p),
        )
        for p in rates
    ]
    labels = [DROP_VARIANTS[name].label for name in inside.similarity]
    return Table(
        title="Cosine similarity of embeddings",
        columns=(
            "p",
            *(f"last, {label}" for label in labels),
            *(f"mean over layers, {label}" for label in labels),
        ),
        rows=tuple(rows),
        note="To those of the fine-tuned model, in the mean over tokens; ± half of the 95 % "
        "confidence interval over masks.",
    )


def _first_and_mean(inside: Inside, p: float) -> list[str]:
    return [with_interval([fmean(each[1:]) for each in by_rate[p]]) for by_rate in inside.similarity.values()]


def _error_table(inside: Inside) -> Table:
    groups: dict[str, list[LayerErrors]] = defaultdict(list)
    for layer in inside.layers:
        groups[kind_of(layer.name)].append(layer)
    rates = [*inside.layers[0].calculated]
    rows: list[tuple[Cell, ...]] = [
        (kind, len(layers), *_mean_errors(layers, rates)) for kind, layers in groups.items()
    ]
    heads = [f"{what}, p = {p:g}" for p in rates for what in ("measured", "calculated", "ratio of squares")]
    return Table(
        title="Relative error of layer outputs by kind of layer",
        columns=("layers", "how many", *heads),
        rows=tuple(rows),
        note="Means over the layers of a kind, over masks and tokens.",
    )


def _mean_errors(layers: Sequence[LayerErrors], rates: Sequence[float]) -> list[float]:
    return [
        value
        for p in rates
        for value in (
            fmean(fmean(layer.measured[p]) for layer in layers),
            fmean(layer.calculated[p] for layer in layers),
            fmean(layer.ratio(p) for layer in layers),
        )
    ]
