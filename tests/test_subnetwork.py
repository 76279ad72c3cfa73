"""Subnetworks: masks as their definitions say, their algebra, and how much there is to drop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studying import tuned_model
from tiny import refusal
from training import save_base, weights_print

from dare_train import extract, sparse_tuning
from dare_train.errors import ConfigError, TensorMismatch
from dare_train.report import layer_of
from dare_train.subnetwork import Masks, at_random, by_movement, by_size, largest_rate, sensitivity

KEY = "bert.encoder.layer.0.attention.self.key.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def deltas(base: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Fine-tuned weights and deltas of the body."""
    tuned, start = tuned_model(base).state_dict(), tuned_model(base, by=0.0).state_dict()
    own = {name: tensor.numpy() for name, tensor in tuned.items() if tensor.is_floating_point() and not name.startswith("classifier")}
    return own, {name: tensor - start[name].numpy() for name, tensor in own.items()}


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_the_largest_of_each_tensor_or_of_all(base: Path, density: float) -> None:
    own, delta = deltas(base)
    each = by_size(base, tuned_model(base), density=density)
    assert each.keys() == own.keys()
    for name, mask in each.items():
        assert mask.sum() == round(density * mask.size)
        assert np.abs(delta[name][mask]).min(initial=np.inf) >= np.abs(delta[name][~mask]).max(initial=0)
    together = by_size(base, tuned_model(base), density=density, scope="model")
    assert together.density == pytest.approx(density, abs=1e-4)
    kept = np.concatenate([np.abs(delta[name][mask]) for name, mask in together.items()])
    left = np.concatenate([np.abs(delta[name][~mask]) for name, mask in together.items()])
    assert kept.min() >= left.max(initial=0)


def test_what_moved_away_from_zero(base: Path) -> None:
    own, delta = deltas(base)
    for name, mask in by_movement(base, tuned_model(base), density=0.25).items():
        score = own[name] * delta[name]
        assert score[mask].min() >= score[~mask].max()


@pytest.mark.parametrize("how", ["seeded", "stored", "all"])
def test_masks_of_packages(base: Path, tmp_path: Path, how: str) -> None:
    model = tuned_model(base)
    by_hand = by_size(base, model, density=0.2)
    options: dict[str, Any] = {"seeded": dict(p=0.75, seed=3), "stored": dict(masks=by_hand), "all": dict(p=0.0)}[how]
    found = Masks.of_package(extract(base, model, tmp_path / "package", whole=["classifier*"], **options))
    expected = {"seeded": at_random(model, density=0.25, seed=3), "stored": by_hand, "all": None}[how]
    assert found.keys() == by_hand.keys()
    for name, mask in found.items():
        assert np.array_equal(mask, expected[name] if expected is not None else np.ones_like(mask)), name


def test_masks_combine_and_compare() -> None:
    one = Masks({"h.0.a": np.array([True, True, False, False]), "h.1.b": np.array([[True], [False]])})
    two = Masks({"h.0.a": np.array([True, False, True, False]), "h.1.b": np.array([[True], [True]])})
    assert (one & two)["h.0.a"].tolist() == [True, False, False, False]
    assert (one | two)["h.0.a"].tolist() == [True, True, True, False]
    assert (one - two)["h.0.a"].tolist() == [False, True, False, False]
    assert (one.density, two.density, len(one)) == (0.5, pytest.approx(4 / 6), 2)
    overlap = one.overlap(two)
    assert overlap.iou == pytest.approx(2 / 5)
    assert overlap.by_layer() == {"0": pytest.approx(1 / 3), "1": pytest.approx(1 / 2)}
    both = 2 * 2 / 4 + 1 * 2 / 2
    assert overlap.chance == pytest.approx(both / (3 + 4 - both))
    assert one.overlap(one).iou == 1.0


def test_random_masks_overlap_by_chance(base: Path) -> None:
    like = tuned_model(base)
    overlap = at_random(like, density=0.3, seed=0).overlap(at_random(like, density=0.3, seed=1))
    assert overlap.iou == pytest.approx(overlap.chance, rel=0.05)


def test_masks_go_where_masks_are_taken(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    masks = by_size(base, model, density=0.1)
    assert extract(base, model, tmp_path / "package", masks=masks, whole=["classifier*"]).stats["density"] < 0.12
    start = model.state_dict()[KEY].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with sparse_tuning(model, optimizer, p=0.5, masks=masks):
        model(input_ids=torch.arange(16).reshape(2, 8), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    moved = (model.state_dict()[KEY] != start).numpy()
    assert moved.any()
    assert not (moved & ~masks[KEY]).any()


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
        largest_rate(model, base, lambda model: float(len(calls) and evaluate(model)["metric"] > 0.999), out=tmp_path / "b", steps=3).p > 0
    )


def test_sensitivity_drops_one_layer_at_a_time(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[set[str]] = []

    def evaluate(model: torch.nn.Module) -> float:
        seen.append({layer_of(name) for name, tensor in model.state_dict().items() if not torch.equal(tensor, dense[name])})
        return float(len(seen))

    found = sensitivity(model, base, evaluate, out=tmp_path, p=0.5, seeds=2)
    assert set(found) == {"embeddings", "0", "1", "pooler"}
    assert seen == [{layer} for layer in found for _ in range(2)]
    assert list(found.values()) == [1.5, 3.5, 5.5, 7.5]


def test_what_means_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    for call, kind, text in (
        (lambda: by_size(base, model, density=0.0), ConfigError, "density and scope: expected a share in (0, 1], and tensor or model"),
        (lambda: Masks({"a": np.ones(3)}), ConfigError, "masks['a']: expected bool, found float64"),
        (lambda: Masks({"a": np.ones(3, bool)}) & Masks({}), TensorMismatch, "a: expected in both masks, found in one of them"),
        (lambda: Masks({"a": np.ones(3, bool)}) & Masks({"a": np.ones(2, bool)}), TensorMismatch, "a: expected shape [3], found [2]"),
        (lambda: largest_rate(model, base, lambda m: 1.0, out=tmp_path), ConfigError, "evaluate: expected a metric that fine-tuning moved"),
        (lambda: largest_rate(model, base, lambda m: 1.0, out=tmp_path, steps=0), ConfigError, "tolerance, seeds and steps: expected"),
    ):
        with pytest.raises(kind) as caught:
            call()
        refusal(caught.value, kind, text)
