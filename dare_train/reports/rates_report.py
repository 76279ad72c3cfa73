"""What drop rates hold: one for all layers, or one for each."""

from __future__ import annotations

from collections.abc import Mapping

from ..studies.drop_rates import FoundRate
from .document import Chart, Curve, Study, Table


def rates_study(
    given: FoundRate | Mapping[str, FoundRate],
    *,
    title: str = "How much there is to drop",
    name: str = "rates",
) -> Study:
    """One search, or several by name."""
    rates = {"DARE": given} if isinstance(given, FoundRate) else dict(given)
    return Study(
        name=name,
        title=title,
        question="What is the largest share of the delta that can be dropped, and how much of "
        "it in each layer?",
        findings=tuple(
            f"{label}: {1 - rate.p:.3g} of the elements are enough (p = {rate.p:.4g})."
            for label, rate in rates.items()
        ),
        setup={"rates": {label: dict(rate.setup) for label, rate in rates.items()}},
        data={"rates": {label: rate.as_json() for label, rate in rates.items()}},
        tables=(_table(rates), *_by_layer(rates)),
        charts=(_search(rates, name), *_layers(rates, name)),
    )


def _table(rates: Mapping[str, FoundRate]) -> Table:
    rows = tuple((label, rate.p, rate.retained.get(rate.p, 1.0)) for label, rate in rates.items())
    return Table(title="Largest drop rates", columns=("rates", "p of all elements", "gain left"), rows=rows)


def _by_layer(rates: Mapping[str, FoundRate]) -> list[Table]:
    by_layer = {label: rate.by_layer for label, rate in rates.items() if rate.by_layer}
    if not by_layer:
        return []
    layers = dict.fromkeys(layer for rates_of in by_layer.values() for layer in rates_of)
    rows = tuple((layer, *(rates_of.get(layer, "") for rates_of in by_layer.values())) for layer in layers)
    return [Table(title="Drop rate of each layer", columns=("layer", *by_layer), rows=rows)]


def _search(rates: Mapping[str, FoundRate], name: str) -> Chart:
    curves = []
    for label, rate in rates.items():
        points = sorted((1 - p, share) for p, share in rate.retained.items())
        curves.append(
            Curve(
                label=label, x=tuple(density for density, _ in points), y=tuple(share for _, share in points)
            )
        )
    return Chart(
        name=f"{name}-search",
        title="What is left of what fine-tuning gained",
        caption="Each point is a step of the bisection, in the mean over masks. Far below the "
        "border a model may be worse than its base.",
        x="share of the delta's elements that is kept",
        y="share of the gain",
        curves=tuple(curves),
        log_x=True,
        y_range=(0.0, 1.05),
    )


def _layers(rates: Mapping[str, FoundRate], name: str) -> list[Chart]:
    by_layer = {label: rate.by_layer for label, rate in rates.items() if rate.by_layer}
    if not by_layer:
        return []
    ticks = tuple(next(iter(by_layer.values())))
    curves = (
        Curve(
            label=label, x=tuple(map(float, range(len(ticks)))), y=tuple(1 - layers[layer] for layer in ticks)
        )
        for label, layers in by_layer.items()
    )
    return [
        Chart(
            name=f"{name}-layers",
            title="What each layer needs",
            caption="The share of each layer's elements that is kept where every layer has the "
            "drop rate that suits it.",
            x="layer",
            y="share that is kept",
            curves=tuple(curves),
            ticks=ticks,
            log_y=True,
        )
    ]
