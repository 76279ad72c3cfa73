"""Subnetworks: masks as their definitions say, and their algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studying import tuned_model
from tiny import refusal
from training import save_base

from dare_train import extract, sparse_tuning, write_report
from dare_train.errors import ConfigError, TensorMismatch
from dare_train.package.masks import largest
from dare_train.reports.document import Chart, HeatMap
from dare_train.reports.masks_report import masks_study
from dare_train.training.subnetwork import Masks, at_random, by_movement, by_size, shuffled

KEY = "bert.encoder.layer.0.attention.self.key.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def deltas(base: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Fine-tuned weights and deltas of the body."""
    tuned, start = tuned_model(base).state_dict(), tuned_model(base, by=0.0).state_dict()
    own = {
        name: tensor.numpy()
        for name, tensor in tuned.items()
        if tensor.is_floating_point() and not name.startswith("classifier")
    }
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
    options: dict[str, Any] = {
        "seeded": dict(p=0.75, seed=3),
        "stored": dict(masks=by_hand),
        "all": dict(p=0.0),
    }[how]
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
    assert {layer: found.iou for layer, found in overlap.by_layer().items()} == {
        "0": pytest.approx(1 / 3),
        "1": pytest.approx(1 / 2),
    }
    assert overlap.by_layer()["0"].times_chance == pytest.approx((1 / 3) / (1 / 3))
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
    assert (
        extract(base, model, tmp_path / "package", masks=masks, whole=["classifier*"]).stats["density"] < 0.12
    )
    start = model.state_dict()[KEY].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with sparse_tuning(model, optimizer, p=0.5, masks=masks):
        model(input_ids=torch.arange(16).reshape(2, 8), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    moved = (model.state_dict()[KEY] != start).numpy()
    assert moved.any()
    assert not (moved & ~masks[KEY]).any()


def test_shuffled_masks_keep_as_many_of_each_tensor(base: Path) -> None:
    masks = by_size(base, tuned_model(base), density=0.2, scope="model")
    elsewhere = shuffled(masks)
    assert {name: mask.sum() for name, mask in elsewhere.items()} == {
        name: mask.sum() for name, mask in masks.items()
    }
    overlap = elsewhere.overlap(masks)
    assert overlap.iou == pytest.approx(overlap.chance, rel=0.05)
    assert shuffled(masks).overlap(elsewhere).iou == 1.0
    assert shuffled(masks, seed=1).overlap(elsewhere).iou < 0.5


def test_a_mask_of_the_whole_model_shows_which_layers_carry_the_delta() -> None:
    masks = Masks(
        {"h.10.a": np.zeros(4, bool), "h.2.a": np.array([True, False]), "h.2.b.0.c": np.ones(6, bool)}
    )
    layers = masks.by_layer()
    assert {layer: found.density for layer, found in layers.items()} == {"2": 7 / 8, "10": 0.0}
    assert [*layers] == ["2", "10"]
    assert [*layers["2"]] == ["h.*.a", "h.*.b.0.c"]


def test_the_report_compares_masks_and_layers(tmp_path: Path) -> None:
    """Two masks that are the same in layer 0 and apart in layer 1; in each, layer 1 keeps what layer 0 does
    not.
    """
    low, high = np.array([True, True, False, False]), np.array([False, False, True, True])
    masks = {
        "one": Masks({"h.0.a": low, "h.1.a": high, "head": np.ones(2, bool)}),
        "two": Masks({"h.0.a": low, "h.1.a": low, "head": np.ones(2, bool)}),
    }
    study = masks_study(masks)
    assert study.data["pairs"] == [
        {
            "masks": ["one", "two"],
            "iou": 4 / 8,
            "chance": pytest.approx(4 / 8),
            "layers": {
                "0": {"iou": 1.0, "chance": 1 / 3},
                "1": {"iou": 0.0, "chance": 1 / 3},
                "head": {"iou": 1.0, "chance": 1.0},
            },
        }
    ]
    assert study.data["masks"]["one"] == {"density": 0.6, "layers": {"0": 0.5, "1": 0.5, "head": 1.0}}
    assert study.data["between_layers"] == {
        "one": [{"layers": ["0", "1"], "iou": 0.0, "chance": 1 / 3}],
        "two": [{"layers": ["0", "1"], "iou": 1.0, "chance": 1 / 3}],
    }
    assert study.findings[-1] == "one, two: densest in layer head, with 100.0% to 100.0% of its elements."
    densities, matrix, by_layer, layers = study.charts
    assert isinstance(densities, Chart)
    assert densities.ticks == ("0", "1", "head")
    values = [chart.values for chart in (matrix, by_layer, layers) if isinstance(chart, HeatMap)]
    assert values == [((None, 1.0), (1.0, None)), ((3.0, 0.0, 1.0),), ((None, 1.5), (1.5, None))]
    assert write_report(masks, tmp_path / "several").name == "masks.html"
    write_report(masks["one"], tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").glob("*.png")) == [
        "masks-density.png",
        "masks-layers.png",
    ]
    with pytest.raises(ConfigError) as caught:
        write_report({"one": 1}, tmp_path / "none")  # type: ignore[dict-item]
    refusal(
        caught.value,
        ConfigError,
        "found: expected one of Sweep, Inside, Comparison, Continual, Tickets, Masks, FoundRate, or several",
    )


def test_what_means_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    for call, kind, text in (
        (
            lambda: by_size(base, model, density=0.0),
            ConfigError,
            "density and scope: expected a share in (0, 1], and tensor or model",
        ),
        (lambda: Masks({"a": np.ones(3)}), ConfigError, "masks['a']: expected bool, found float64"),
        (
            lambda: Masks({"a": np.ones(3, bool)}) & Masks({}),
            TensorMismatch,
            "a: expected in both masks, found in one of them",
        ),
        (
            lambda: Masks({"a": np.ones(3, bool)}) & Masks({"a": np.ones(2, bool)}),
            TensorMismatch,
            "a: expected shape [3], found [2]",
        ),
    ):
        with pytest.raises(kind) as caught:
            call()
        refusal(caught.value, kind, text)


def test_of_equal_scores_the_first_are_kept() -> None:
    scores = np.array([1.0, 3.0, np.nan, 1.0, 2.0, 1.0])
    assert largest(scores, 4 / 6).tolist() == [True, True, False, True, True, False]
    assert largest(scores, 0.0).tolist() == [False] * 6
    assert largest(scores, 1.0).all()
