"""What drop rates hold: one for all layers, or one for each."""

from __future__ import annotations

from collections.abc import Mapping

from ..studies.drop_rates import FoundRate
from .document import Chart, Curve, Study, Table


def rates_study(
    found: FoundRate | Mapping[str, FoundRate],
    *,
    title: str = "How much there is to drop",
    name: str = "rates",
) -> Study:
    """One search, or several by name."""
    rates = {"DARE": found} if isinstance(found, FoundRate) else dict(found)
    return Study(
        name=name,
        title=title,
        question="What is the largest share of the delta that can be dropped, and how much of "
        "it in each layer?",
        findings=tuple(
            f"{label}: {1 - one.p:.3g} of the elements are enough (p = {one.p:.4g})."
            for label, one in rates.items()
        ),
        setup={"rates": {label: dict(one.setup) for label, one in rates.items()}},
        data={"rates": {label: one.as_json() for label, one in rates.items()}},
        tables=(_table(rates), *_by_layer(rates)),
        charts=(_search(rates, name), *_layers(rates, name)),
    )


def _table(rates: Mapping[str, FoundRate]) -> Table:
    rows = tuple((label, one.p, one.retained.get(one.p, 1.0)) for label, one in rates.items())
    return Table(title="Largest drop rates", columns=("rates", "p of all elements", "gain left"), rows=rows)


def _by_layer(rates: Mapping[str, FoundRate]) -> list[Table]:
    own = {label: one.by_layer for label, one in rates.items() if one.by_layer}
    layers = dict.fromkeys(layer for one in own.values() for layer in one)
    rows = tuple((layer, *(one.get(layer, "") for one in own.values())) for layer in layers)
    return [Table(title="Drop rate of each layer", columns=("layer", *own), rows=rows)] if own else []


def _search(rates: Mapping[str, FoundRate], name: str) -> Chart:
    curves = []
    for label, one in rates.items():
        points = sorted((1 - p, share) for p, share in one.retained.items())
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
    own = {label: one.by_layer for label, one in rates.items() if one.by_layer}
    if not own:
        return []
    ticks = tuple(next(iter(own.values())))
    curves = (
        Curve(
            label=label, x=tuple(map(float, range(len(ticks)))), y=tuple(1 - layers[layer] for layer in ticks)
        )
        for label, layers in own.items()
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
