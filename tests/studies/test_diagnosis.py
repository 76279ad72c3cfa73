"""The answer of `diagnose`, against numbers worked out by hand, and what the pictures and tables are made
of.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save

from dare_train import diagnose, extract
from dare_train.errors import DtypeMismatch
from dare_train.package.magnitudes import Magnitudes
from dare_train.reports.package_tables import inspect_json, rows
from dare_train.weights.layer_names import kind_of, layer_of


def pair(
    scale: float, shape: tuple[int, ...] = (200, 300)
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    return {"layers.0.weight": base}, {
        "layers.0.weight": base + scale * torch.randn(shape, generator=generator)
    }


def test_the_expected_error_is_what_dropping_does_on_average() -> None:
    base, tuned = pair(0.02)
    layer = diagnose(base, tuned).layers[0]
    delta, weight = (tuned["layers.0.weight"] - base["layers.0.weight"]), tuned["layers.0.weight"]
    inputs = torch.randn(300, 400, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    errors = []
    for _ in range(10):
        kept = torch.rand(delta.shape, generator=generator) >= 0.9
        errors.append(float(((delta * kept / 0.1 - delta) @ inputs).norm() / (weight @ inputs).norm()))
    assert layer.error(0.9) == pytest.approx(np.mean(errors), rel=0.02)
    assert layer.error(0.9) == pytest.approx(3 * float(delta.norm() / weight.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("scale", "safe", "text"),
    [(0.005, 0.99, "p = 0.99 is safe"), (0.03, 0.9, "p = 0.9 is safe"), (0.5, None, "will not work here")],
)
def test_the_verdict_follows_the_size_of_the_delta(scale: float, safe: float | None, text: str) -> None:
    diagnosis = diagnose(*pair(scale))
    assert diagnosis.safe_drop_rate() == safe
    assert text in diagnosis.verdict


def test_no_delta_is_said_to_be_none() -> None:
    base, _ = pair(0)
    assert diagnose(base, base).verdict == "Nothing changed: there is no delta to drop."


def test_new_tensors_and_other_dtypes_are_named() -> None:
    base, tuned = pair(0.01)
    assert diagnose(base, {**tuned, "head.weight": torch.ones(3, 3)}).new == ("head.weight",)
    half = {name: tensor.bfloat16() for name, tensor in tuned.items()}
    with pytest.raises(DtypeMismatch, match=r"layers\.0\.weight: expected BF16, found F32 .*--cast-base"):
        diagnose(base, half)
    assert diagnose(base, half, cast_base=True).layers


def test_percentiles_are_right_within_a_bin() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(100_000)).astype(np.float32)
    sizes = Magnitudes.of(values)
    for q in (0.1, 0.5, 0.9, 0.99):
        assert sizes.percentile(q) == pytest.approx(float(np.quantile(values, q)), rel=0.065)
    assert sizes.largest == values.max()
    assert sizes.share_below(0.6745) == pytest.approx(0.5, abs=0.04)
    counts, edges = sizes.histogram(32)
    assert (sum(counts), len(edges)) == (100_000, len(counts) + 1)


def test_magnitudes_leave_out_what_is_not_finite() -> None:
    assert Magnitudes.of(np.array([1.0, np.nan, np.inf, 0.0], np.float32)).total == 2
    assert not math.isnan(Magnitudes.of(np.array([np.nan], np.float32)).percentile(0.5))


def test_layers_and_kinds_are_read_off_the_names() -> None:
    assert [
        layer_of(name)
        for name in ("model.layers.10.mlp.weight", "bert.embeddings.word.weight", "lm_head.weight")
    ] == [
        "10",
        "embeddings",
        "lm_head",
    ]
    assert kind_of("model.layers.10.experts.3.weight") == "model.layers.*.experts.*.weight"


def test_rows_account_for_every_element_and_byte(tmp_path: Path) -> None:
    base, tuned = pair(0.01)
    more = {f"layers.{n}.weight": tensor.clone() for n in (10, 2) for tensor in base.values()}
    package = extract(
        save({**base, **more}, tmp_path / "b"), save({**tuned, **more}, tmp_path / "t"), tmp_path / "p"
    )
    assert [row.label for row in rows(package, key=layer_of)] == ["0", "2", "10"]
    data = inspect_json(package)
    assert sum(entry["elements"] for entry in data["per_tensor"]) == data["parameters"] == 180_000
    frames = sum(entry["bytes"] for entry in data["per_tensor"])
    assert frames == sum(size for name in package.records for size in [package.compressed_bytes(name)])
    assert data["per_tensor"][0]["kept"] / 60_000 == pytest.approx(0.1, abs=0.01)
