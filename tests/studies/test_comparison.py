"""The comparison at equal bytes: each contender's weights and size are what its definition says."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import adapt
from commands import Done, dare_train
from safetensors.torch import load_file
from studying import Words, tuned_model
from tiny import refusal, save
from training import classifier, save_base, weights_print

from dare_train import DeltaPackage, apply, compare, extract, write_report
from dare_train.errors import ConfigError
from dare_train.evaluation.measurements import Key, Point
from dare_train.reports.comparison_report import beaten, comparison_study
from dare_train.studies.comparison import Comparison

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT reads it
KEY = "bert.encoder.layer.0.attention.self.key.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", dtype=torch.bfloat16)


class Seen:
    """An evaluation that remembers a matrix, and every weight's fingerprint."""

    def __init__(self) -> None:
        self.matrices: list[np.ndarray] = []
        self.prints: list[str] = []

    def __call__(self, model: torch.nn.Module) -> float:
        self.matrices.append(model.state_dict()[KEY].float().numpy().copy())
        self.prints.append(weights_print(model))
        return float(len(self.prints))


def test_each_contender_is_what_it_says(base: Path, tmp_path: Path) -> None:
    model, seen = tuned_model(base, dtype=torch.bfloat16), Seen()
    before = weights_print(model)
    model.save_pretrained(tmp_path / "tuned")
    options: dict[str, Any] = dict(p=[0.9], ranks=[1, 2, 64], seeds=2)
    found = compare(model, base, tmp_path / "tuned", seen, out=tmp_path / "out", **options)
    keys = [point.key for point in found.points]
    assert keys == [
        ("dense", 0.0, 0), ("base", 1.0, 0),
        *((name, 0.9, seed) for name in ("dare", "dare_int4", "dare_sign") for seed in (0, 1)),
        ("magnitude", 0.9, 0), ("svd", 1.0, 0), ("svd", 2.0, 0), ("svd", 64.0, 0), ("one_bit", 1.0, 0),
    ]  # fmt: skip
    matrix, bits = (
        dict(zip(keys, seen.matrices, strict=True)),
        {point.key: point.metrics["bits"] for point in found.points},
    )
    prints = dict(zip(keys, seen.prints, strict=True))
    assert weights_print(model) == before == prints["dense", 0.0, 0]
    start, end = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "tuned"))
    shared = {name: tensor for name, tensor in end.items() if not name.startswith("classifier")}
    assert found.parameters == sum(tensor.numel() for tensor in shared.values())
    prefixed = save({f"bert.{key}": tensor for key, tensor in start.items()}, tmp_path / "prefixed")
    for name, values in (("dare", "exact"), ("dare_int4", "int4"), ("dare_sign", "sign")):
        package = extract(prefixed, shared, tmp_path / name, p=0.9, seed=1, values=values)
        apply(prefixed, package, tmp_path / f"{name}-applied")
        (file,) = (tmp_path / f"{name}-applied").glob("*.safetensors")
        assert np.array_equal(load_file(file)[KEY].float().numpy(), matrix[name, 0.9, 1])
        assert bits[name, 0.9, 1] == pytest.approx(
            8 * DeltaPackage.open(package.path).stats["bytes"] / found.parameters, rel=0.02
        )
    was, now = (state[key].float().numpy() for state, key in ((start, KEY.removeprefix("bert.")), (end, KEY)))
    delta = now - was
    assert np.array_equal(matrix["base", 1.0, 0], was)
    kept = matrix["magnitude", 0.9, 0] != was
    assert kept.sum() == round(0.1 * delta.size)
    assert np.abs(delta[kept]).min() >= np.abs(delta[~kept]).max()
    assert np.array_equal(matrix["magnitude", 0.9, 0][kept], now[kept])
    left, sizes, right = np.linalg.svd(delta)
    low = (left[:, :2] * sizes[:2]) @ right[:2]
    np.testing.assert_allclose(matrix["svd", 2.0, 0] - was, low, atol=1e-3)
    assert np.array_equal(matrix["svd", 64.0, 0], now), "a rank that saves nothing keeps the delta whole"
    scale = np.abs(delta).mean(1, keepdims=True)
    np.testing.assert_allclose(matrix["one_bit", 1.0, 0] - was, np.where(delta < 0, -scale, scale), atol=1e-3)
    whole = sum(tensor.numel() for tensor in shared.values() if tensor.dim() != 2)
    matrices = [tensor for tensor in shared.values() if tensor.dim() == 2]
    expected = 16 * whole + sum(tensor.numel() + 16 * len(tensor) for tensor in matrices)
    assert bits["one_bit", 1.0, 0] == pytest.approx(expected / found.parameters)
    assert bits["svd", 1.0, 0] == pytest.approx(
        (16 * whole + 16 * sum(sum(tensor.shape) for tensor in matrices)) / found.parameters
    )
    assert bits["dare", 0.9, 0] < bits["dense", 0.0, 0]


def test_an_adapter_comes_with_its_own_head_and_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    """Adapters of a rank are numbered, and what was measured of one is not taken for another's."""
    model = tuned_model(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "tuned")
    merged = {}
    for name, rank in (("one", 2), ("two", 2), ("three", 3)):
        fresh = classifier(base, dtype=torch.bfloat16)
        with torch.no_grad():
            fresh.classifier.bias.add_(len(merged))
        adapted = adapt(fresh, tmp_path / name, task_type="SEQ_CLS", r=rank, target_modules=["query"])
        merged[name] = weights_print(adapted.merge_and_unload())
    assert len({*merged.values()}) == 3

    def run(*names: str) -> tuple[list[Key], list[str]]:
        """Which points there are of adapters, and what was measured for them now."""
        seen = Seen()
        folders = [tmp_path / name for name in names]
        found = compare(
            model,
            base,
            tmp_path / "tuned",
            seen,
            out=tmp_path / "out",
            p=[0.9],
            ranks=[],
            seeds=1,
            adapters=folders,
        )
        for point in found.points[-len(names) :]:
            factors = 2 * int(point.p) * (32 + 32)  # two layers, A and B
            assert point.metrics["bits"] == pytest.approx(16 * factors / found.parameters)
        return [point.key for point in found.points if point.variant == "lora"], [
            one for one in seen.prints if one in merged.values()
        ]

    assert run("one", "three") == ([("lora", 2.0, 0), ("lora", 3.0, 0)], [merged["one"], merged["three"]])
    assert run("two", "one") == ([("lora", 2.0, 0), ("lora", 2.0, 1)], [merged["two"]])
    assert weights_print(model) == weights_print(tuned_model(base, dtype=torch.bfloat16))


def points(*given: tuple[str, float, list[float], float]) -> Comparison:
    """Of (contender, setting, the metric with each mask, bits)."""
    made = [
        Point(variant=name, p=p, seed=seed, metrics={"loss": value, "bits": bits})
        for name, p, values, bits in given
        for seed, value in enumerate(values)
    ]
    return Comparison(base="b", tuned="t", parameters=1000, points=tuple(made))


def test_rivals_are_beaten_by_packages_of_no_more_bytes() -> None:
    found = points(
        ("dense", 0.0, [1.0], 5.0), ("base", 1.0, [3.0], 0.0), ("dare", 0.9, [1.1, 1.3], 0.3),
        ("dare_sign", 0.99, [2.0], 0.02),
        ("svd", 4.0, [1.5], 0.4), ("svd", 1.0, [1.9], 0.1), ("one_bit", 1.0, [1.15], 1.0),
        ("magnitude", 0.9, [2.9], 0.01),
    )  # fmt: skip
    won, lost = beaten(found, "loss")
    assert won == ["truncated SVD at 0.4 bits"]
    assert lost == [
        "magnitude pruning, no rescale at 0.01 bits",
        "truncated SVD at 0.1 bits",
        "1 bit and a scale per row at 1 bits",
    ]
    study = comparison_study(found)
    assert study.findings[1].startswith(
        "loss: a DARE package of no more bytes is at least as good as 1 of the 4 rival points; not as "
    )
    assert [curve.label for curve in study.charts[0].curves][:2] == [
        "DARE, exact values",
        "DARE, 1-bit values",
    ]
    assert study.charts[0].curves[0].x == (0.3,)
    assert ("DARE, exact values", "p = 0.9", 0.3, "1.2 ± 1.3") in study.tables[0].rows


def test_what_means_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base, dtype=torch.bfloat16)
    for options, text in (
        (dict(ranks=[0]), "ranks: expected 1 to 1,048,576, found 0"),
        (dict(ranks=[10**400]), "ranks: expected 1 to 1,048,576, found a huge number"),
        (dict(seeds=10**20), "seeds: expected 1 to 10,000, found 10000000000"),
    ):
        with pytest.raises(ConfigError) as caught:
            compare(model, base, model, lambda model: 0.0, out=tmp_path / "out", **options)
        refusal(caught.value, ConfigError, text)


@pytest.mark.parametrize("rank", ["1.5", "nan", "inf", "1,", "9" * 5000])
def test_a_rank_that_is_no_whole_number_is_refused(tmp_path: Path, rank: str) -> None:
    (tmp_path / "t.txt").write_text("one\n")
    words = ("compare", "base", "tuned", "--data", "t.txt", "--rank", rank, "--out", "out")
    done = dare_train(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "dare-train: --rank: expected whole numbers with commas between them, found "
    )
    assert len(done.stderr) < 300


def test_the_command_measures_once(base: Path, tmp_path: Path) -> None:
    tuned_model(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "tuned")
    Words.save(tmp_path / "tuned")
    (tmp_path / "texts.csv").write_text(
        "text,label\n" + "\n".join(f"w{n} w{n + 1},{n % 3}" for n in range(30))
    )
    words = [
        "base",
        "tuned",
        "--data",
        "texts.csv",
        "--p",
        "0.9",
        "--rank",
        "1,2",
        "--seeds",
        "2",
        "--dtype",
        "float32",
        "--out",
    ]

    def started(*more: str) -> Done:
        return dare_train("compare", *words, *more, cwd=tmp_path)

    def run(out: str) -> str:
        done = started(out)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run("one")
    assert "| DARE, exact values | p = 0.9 |" in first
    journal = (tmp_path / "one/compare.jsonl").read_bytes()
    assert run("one") == first
    assert (tmp_path / "one/compare.jsonl").read_bytes() == journal
    anew = [sys.executable, "-m", "dare_train", "compare", *words, "two"]  # where sets have another order
    subprocess.run(anew, check=True, cwd=tmp_path)
    for name in ("compare.json", "compare.html", "compare-accuracy.png", "compare-loss.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    found = json.loads((tmp_path / "one/compare.json").read_text())
    assert len(found["points"]) == 2 + 3 * 2 + 1 + 2 + 1
    fewer = started("one", "--examples", "10")
    assert (fewer.returncode, fewer.stderr.count("\n")) == (1, 1)
    assert (
        "expected measurements with examples 10, found some without examples; choose another folder"
        in fewer.stderr
    )
    assert found["setup"]["data_sha256"] == hashlib.sha256((tmp_path / "texts.csv").read_bytes()).hexdigest()
    write_report(
        points(("dense", 0.0, [1.0], 5.0), ("base", 1.0, [3.0], 0.0), ("dare", 0.9, [1.1], 0.3)),
        tmp_path / "three",
    )
