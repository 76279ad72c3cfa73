"""How much there is to drop: the largest rate that holds, for all layers or for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studying import tuned_model
from tiny import refusal
from training import save_base, weights_print

from dare_train import DeltaPackage, extract, write_report
from dare_train.errors import ConfigError
from dare_train.evaluation.measurements import Journal, Point
from dare_train.reports.document import Chart
from dare_train.reports.rates_report import rates_study
from dare_train.studies.drop_rates import largest_rate, largest_rates, sensitivity, spread
from dare_train.weights.fingerprint import weights_fingerprint
from dare_train.weights.layer_names import layer_of
from dare_train.weights.live.live import LiveWeights

KEY = "bert.encoder.layer.0.attention.self.key.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def test_the_largest_rate_is_where_the_metric_breaks(base: Path, tmp_path: Path) -> None:
    """A metric that is 1 while half of the delta's elements or more are there, and 0 below."""
    model, calls = tuned_model(base), []
    start = tuned_model(base, by=0.0).state_dict()[KEY]
    before = weights_print(model)

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        calls.append(1)
        share = float((model.state_dict()[KEY] != start).float().mean())
        return {"metric": 1.0 if share > 0.2 else share}

    found = largest_rate(model, base, evaluate, out=tmp_path, seeds=2, steps=7)
    assert 0.7 < found.p < 0.85
    assert found.retained[found.p] == 1.0
    assert weights_print(model) == before
    count = len(calls)
    assert count == 2 + 7 * 2
    assert largest_rate(model, base, evaluate, out=tmp_path, seeds=2, steps=7) == found
    assert len(calls) == count
    assert (
        largest_rate(
            model,
            base,
            lambda model: float(len(calls) and evaluate(model)["metric"] > 0.999),
            out=tmp_path / "b",
            steps=3,
        ).p
        > 0
    )


def test_sensitivity_drops_one_layer_at_a_time(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[set[str]] = []

    def evaluate(model: torch.nn.Module) -> float:
        seen.append(
            {
                layer_of(name)
                for name, tensor in model.state_dict().items()
                if not torch.equal(tensor, dense[name])
            }
        )
        return float(len(seen))

    found = sensitivity(model, base, evaluate, out=tmp_path, p=0.5, seeds=2)
    assert set(found) == {"embeddings", "0", "1", "pooler"}
    assert seen == [{layer} for layer in found for _ in range(2)]
    assert list(found.values()) == [1.5, 3.5, 5.5, 7.5]


NAMES = ("dense", "base", "dare", "layer", "3fa9c1d20b77")


class NamedLikeVariants(torch.nn.Module):
    """Modules whose names are also those of variants, or look like a digest."""

    def __init__(self, by: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in NAMES:
            layer = torch.nn.Linear(8, 8, bias=False)
            layer.weight.data = torch.randn(8, 8, generator=generator)
            layer.weight.data += by * torch.randn(8, 8, generator=generator)
            self.add_module(name, layer)


class Changed:
    """An evaluation that tells which tensors are not those of the fine-tuned model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.seen: list[set[str]] = []

    def __call__(self, model: torch.nn.Module) -> float:
        state = model.state_dict()
        self.seen.append(
            {layer_of(name) for name in state if not torch.equal(state[name], self._tuned[name])}
        )
        return float(len(self.seen))


def test_layers_may_be_called_like_variants(tmp_path: Path) -> None:
    model, start = NamedLikeVariants(by=0.1), NamedLikeVariants(by=0.0)
    changed = Changed(model)
    found = sensitivity(model, start, changed, out=tmp_path, p=0.5, seeds=2)
    assert {*found} == {*NAMES}
    assert changed.seen == [{layer} for layer in found for _ in range(2)]


def test_rates_of_layers_called_like_variants(tmp_path: Path) -> None:
    model, start = NamedLikeVariants(by=0.1), NamedLikeVariants(by=0.0)
    lost = dict(zip(NAMES, (10.0, 1.0, 1.0, 1.0, 1.0), strict=True))
    tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def evaluate(model: torch.nn.Module) -> float:
        state = model.state_dict()
        moved = {name: float((state[name] - tuned[name]).square().mean()) for name in tuned}
        return 1.0 - sum(lost[layer_of(name)] * square for name, square in moved.items())

    found = largest_rates(model, start, evaluate, out=tmp_path, seeds=2, steps=7, tolerance=0.5)
    assert found.by_layer.keys() == {*NAMES}
    assert found.by_layer["dense"] < min(found.by_layer[name] for name in NAMES[1:]) - 0.1


def test_what_an_older_version_measured_of_layers_is_not_misread(tmp_path: Path) -> None:
    """A layer's name alone, where now it has a tag."""
    model, start = NamedLikeVariants(by=0.1), NamedLikeVariants(by=0.0)
    journal = Journal(
        tmp_path / "sensitivity.jsonl",
        weights_fingerprint(LiveWeights(start)),
        weights_fingerprint(LiveWeights(model)),
        None,
    )
    journal.read()
    for layer in NAMES:
        for seed in range(2):
            journal.add(Point(variant=layer, p=0.5, seed=seed, metrics={"metric": -100.0}))
    found = sensitivity(model, start, Changed(model), out=tmp_path, p=0.5, seeds=2)
    assert list(found.values()) == [1.5, 3.5, 5.5, 7.5, 9.5]


def test_a_layer_that_matters_keeps_more(base: Path, tmp_path: Path) -> None:
    """A metric that falls with what is dropped of layer 0, and hardly with the rest."""
    model = tuned_model(base)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = tuned_model(base, by=0.0).state_dict()
    body = [name for name in dense if not name.startswith("classifier")]
    weights = {name: 10.0 if layer_of(name) == "0" else 0.1 for name in body}

    def evaluate(model: torch.nn.Module) -> float:
        now = model.state_dict()
        lost = {
            name: float(
                (now[name] - dense[name]).square().mean() / (start[name] - dense[name]).square().mean()
            )
            for name in body
        }
        return 1.0 - sum(weights[name] * one for name, one in lost.items()) / sum(weights.values()) / 100

    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"seeds": 2, "steps": 7, "tolerance": 0.5}
    found = largest_rates(
        model,
        base,
        evaluate,
        out=tmp_path,
        progress=lambda done, total: told.append((done, total)),
        **options,
    )
    assert told[-1] == (8, 8)
    assert found.by_layer.keys() == {"embeddings", "0", "1", "pooler"}
    assert found.by_layer["0"] < min(rate for layer, rate in found.by_layer.items() if layer != "0") - 0.1
    one = largest_rate(model, base, evaluate, out=tmp_path, **options)
    assert found.p > one.p
    study = rates_study({"one rate": one, "by layer": found})
    assert [table.rows for table in study.tables] == [
        (("one rate", one.p, one.retained[one.p]), ("by layer", found.p, found.retained[found.p])),
        tuple((layer, found.by_layer[layer]) for layer in found.by_layer),
    ]
    assert study.setup["rates"]["by layer"] == {**study.setup["rates"]["one rate"], "at": 0.9}
    assert [*study.data["rates"]["one rate"]["retained"]] == sorted(map(str, one.retained))
    search, layers = study.charts
    assert isinstance(search, Chart)
    assert isinstance(layers, Chart)
    assert [len(curve.x) for curve in search.curves] == [7, 7]
    assert layers.curves[0].y == tuple(1 - rate for rate in found.by_layer.values())
    assert write_report(one, tmp_path / "report").name == "rates.html"
    assert found.retained[found.p] >= 0.5
    sizes = {
        layer: sum(dense[name].numel() for name in body if layer_of(name) == layer)
        for layer in found.by_layer
    }
    assert sum(sizes[layer] * rate for layer, rate in found.by_layer.items()) / sum(
        sizes.values()
    ) == pytest.approx(found.p)
    extract(base, model, tmp_path / "package", p=found.by_tensor, whole=["classifier*"])
    records = {
        one.name: one.p
        for one in DeltaPackage.open(tmp_path / "package").manifest.tensors
        if one.kind == "delta"
    }
    assert records[KEY] == found.by_layer["0"]
    assert largest_rates(model, base, evaluate, out=tmp_path, **options) == found


@pytest.mark.parametrize("density", [0.05, 0.4, 0.9, 1.0])
def test_densities_add_up_and_none_is_above_one(density: float) -> None:
    weights, sizes = {"a": 1.0, "b": 10.0, "c": 0.1}, {"a": 100, "b": 50, "c": 400}
    found = spread(weights, sizes, density)
    assert sum(sizes[layer] * one for layer, one in found.items()) == pytest.approx(density * 550)
    assert max(found.values()) <= 1
    below = [layer for layer, one in found.items() if one < 1]
    assert np.ptp([found[layer] / weights[layer] for layer in below] or [0.0]) < 1e-9


@pytest.mark.parametrize("search", [largest_rate, largest_rates])
def test_what_means_nothing_is_refused(base: Path, tmp_path: Path, search: Any) -> None:
    model = tuned_model(base)
    for options, text in (
        (
            dict(evaluate=lambda _: 1.0),
            "evaluate: expected a metric that fine-tuning moved, found 1.0 with the delta and without",
        ),
        (
            dict(evaluate=lambda _: 1.0, steps=0),
            "steps: expected at least 1, found 0",
        ),
        (dict(evaluate=lambda _: 1.0, seeds=0), "seeds: expected 1 to 10,000, found 0"),
        (dict(evaluate=lambda _: 1.0, tolerance=1), "tolerance: expected a share in (0, 1), found 1"),
        (dict(evaluate=lambda _: 1.0, metric="f1"), "metric: expected one of metric, found f1"),
    ):
        with pytest.raises(ConfigError) as caught:
            search(model, base, out=tmp_path, **options)
        refusal(caught.value, ConfigError, text)
