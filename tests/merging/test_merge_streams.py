"""`merge` run by run against whole tensors at once: every method, dtype, kind of input, number of threads and
of processes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_merge import RUN, State, base_state, check_equal, expected, result, shrink, tuned_from
from numpy.typing import NDArray
from rank_files import check_same
from torch_words import words_of

from dare_train import DeltaPackage, extract, merge, save_statistics
from dare_train.dtypes import Words
from dare_train.merging.config.task import task_of
from dare_train.merging.merge import merged_weights
from dare_train.merging.merged_weights import Merged
from dare_train.merging.methods.registry import MERGE_METHODS
from dare_train.parallel.threads import ordered_map


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs; and one thread where a test does not say otherwise, since starting them is most of such
    work.
    """
    shrink(monkeypatch.setattr)
    monkeypatch.setattr("dare_train.parallel.threads.thread_count", lambda: 1)


# Every method.

W = [1.0, 0.5, -0.25]
CASES: dict[str, list[dict[str, Any]]] = {
    "average": [{"weight": [1.0, 0.5, 2.0]}, {"weight": [0.5, 0.2, 0.1], "normalize": False}, {"p": 0.4}],
    "task_arithmetic": [
        {},
        {"weight": W, "lambda": 0.7},
        {"normalize": True},
        {"weight": [1.0, 1.0, 0.3], "p": [0.0, 0.5, 0.9]},
    ],
    "ties": [
        {},
        {"weight": W, "density": [0.1, 0.5, 1.0]},
        {"normalize": False, "lambda": 0.4, "density": 0.6},
        {"p": 0.5},
    ],
    "fisher": [{"weight": [1.0, 0.5, 2.0]}, {"p": 0.5, "lambda": 0.4, "floor": 0.5}],
    "regmean": [{"weight": [1.0, 0.5, 2.0]}, {"p": 0.5, "lambda": 0.4, "shrink": 0.2}],
    "dare_linear": [{"weight": W}, {"p": 0.4, "lambda": 0.5}],
    "dare_ties": [{}, {"weight": W, "p": [0.0, 0.5, 0.9]}, {"normalize": True, "lambda": 0.5}],
    "drop_only": [{}, {"weight": W, "p": 0.5}],
    "magnitude": [{}, {"density": [0.001, 0.5, 0.0], "weight": W}],
    "breadcrumbs": [{"density": 0.6, "gamma": 0.1}, {"density": 0.9, "gamma": 0.3, "weight": W, "p": 0.2}],
    "breadcrumbs_ties": [{"density": 0.6, "gamma": 0.1}, {"density": 0.2, "gamma": 0.0, "normalize": False}],
    "della": [{}, {"density": [0.5, 0.6, 1.0], "epsilon": [0.4, 0.1, 0.0], "weight": W}],
    "della_linear": [{}, {"density": 0.5, "epsilon": 0.2, "weight": W, "p": 0.3}],
    "model_stock": [{}, {"p": 0.5}],
    "slerp": [{}, {"t": 0.3, "p": 0.5}],
    "nuslerp": [{"weight": [1.0, 3.0]}, {"of": "weights", "weight": [1.0, 3.0], "p": [0.0, 0.5]}],
    "karcher": [{}, {"weight": [1.0, 0.5, 2.0], "max_iter": 3, "p": 0.5}],
    "sce": [{}, {"select_topk": 0.3}, {"select_topk": 0.05, "p": 0.5, "lambda": 0.5}],
    "consensus_ta": [{}, {"weight": W, "mask_threshold": 1.0, "agree": 1, "p": 0.5}],
    "consensus_ties": [{}, {"weight": W, "density": 0.5, "normalize": False, "agree": 3}],
    "nearswap": [{"t": 0.1}, {"t": 0.3, "p": 0.5, "lambda": 0.5}],
    "arcee_fusion": [{}, {"p": 0.5}],
    "multislerp": [
        {},
        {"weight": [1.0, 0.5, 2.0], "of": "weights"},
        {"weight": [1.0, 0.5, -0.25], "normalize_weights": False, "p": 0.5},
    ],
    "emr": [{}, {"p": [0.0, 0.5, 0.9], "lambda": 0.5}],
    "tsv": [{}, {"p": 0.5, "lambda": 0.5}],
    "iso_c": [{}, {"p": 0.5, "lambda": 0.5}],
    "iso_cts": [{}, {"p": 0.5, "lambda": 0.5, "common_space_fraction": 0.5}],
    "wudi": [{"steps": 3}, {"p": 0.5, "lambda": 0.5, "steps": 5, "learning_rate": 1e-3}],
    "ram": [{}, {"epsilon": 0.2, "p": 0.5, "lambda": 0.5}],
    "ramplus_tl": [{}, {"r": 0.5, "alpha": 1.0, "epsilon": 0.2, "p": [0.0, 0.5, 0.9]}],
}


def test_every_method_is_tested_here() -> None:
    assert CASES.keys() == MERGE_METHODS.keys()


BASE = base_state()
MODELS = tuned_from(BASE)


def statistics_of(method: str, base: State) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(9)
    if method == "fisher":
        return [
            {name: rng.random(tuple(tensor.shape)).astype(np.float32) for name, tensor in base.items()}
            for _ in range(3)
        ]
    inputs = [{name: rng.normal(size=(99, 60)) for name in base if name.endswith("weight")} for _ in range(3)]
    return [{name: (x.T @ x / 99).astype(np.float32) for name, x in own.items()} for own in inputs]


def given_to(method: str, told: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Arguments of `merge`, and the statistics in them."""
    options = {{"weight": "weights", "lambda": "lambda_"}.get(key, key): value for key, value in told.items()}
    kind = MERGE_METHODS[method].needs
    if kind not in ("fisher", "gram"):
        return {"method": method, **options}, []
    statistics = statistics_of(method, BASE)
    paths = [
        save_statistics(folder / f"{n}.{kind}.safetensors", kind, one, examples=99)
        for n, one in enumerate(statistics)
    ]
    return {"method": method, kind: paths, **options}, statistics


def models_for(method: str) -> list[State]:
    return MODELS[: MERGE_METHODS[method].models[1] or len(MODELS)]


SUMS = {"slerp", "nuslerp", "multislerp", "model_stock", "karcher", "sce"}
"""What they do follows from float64 sums over a tensor, whose order is not the same here."""


def check_words(method: str, name: str, found: Words, wanted: Words) -> None:
    if method in SUMS and name.startswith("F64"):
        np.testing.assert_allclose(found.view(np.float64), wanted.view(np.float64), rtol=1e-11)
    else:
        assert np.array_equal(found, wanted), name


ALL_CASES = [(method, number) for method, cases in CASES.items() for number in range(len(cases))]


@pytest.mark.parametrize(("method", "case"), ALL_CASES)
def test_runs_give_what_the_whole_gives(method: str, case: int, tmp_path: Path) -> None:
    told = CASES[method][case]
    options, statistics = given_to(method, told, tmp_path)
    models = models_for(method)
    found, report = result(BASE, models, tmp_path / "out", seed=11, **options)
    wanted = expected(method, told, BASE, models, 11, statistics)
    assert found.keys() == wanted.keys()
    for name, words in wanted.items():
        assert found[name].shape == BASE[name].shape
        check_words(method, name, words_of(found[name]), words)
    assert report.counts() == {"merged": len(BASE), "copied": 0, "carried": 0}


# Threads, packages, processes.

SMALL = base_state("BF16", "F64")
TUNED = tuned_from(SMALL)
P, SEED = 0.6, 7


def first_case(method: str, folder: Path) -> dict[str, Any]:
    return given_to(method, CASES[method][0], folder)[0]


def small_models(method: str) -> list[State]:
    return TUNED[: MERGE_METHODS[method].models[1] or len(TUNED)]


def test_readers_of_one_run_wait_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is worked out once, and what is remembered is bounded by its size."""
    made, honest = list[tuple[str, int]](), Merged.run

    def run(self: Merged, name: str, start: int, count: int) -> Words:
        made.append((name, start))
        time.sleep(0.1)
        return honest(self, name, start, count)

    monkeypatch.setattr(Merged, "run", run)
    merged = merged_weights(task_of(SMALL, small_models("slerp"), method="slerp"))
    numel = merged.tensors["BF16.weight"].numel
    parts = [(begin, min(100, numel - begin)) for begin in range(0, numel, 100)]
    words = np.concatenate(
        list(ordered_map(lambda part: merged.read("BF16.weight", *part), parts, threads=8))
    )
    assert sorted(made) == [("BF16.weight", start) for start in range(0, numel, RUN)]
    assert np.array_equal(words, merged.read("BF16.weight", 0, numel))
    assert sum(one.size for one in merged._last.values()) <= 4 * RUN


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_any_number_of_threads_gives_the_same_files(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = first_case(method, tmp_path)
    base = {name: tensor for name, tensor in SMALL.items() if name.startswith("BF16")}
    models = [{name: one[name] for name in base} for one in small_models(method)]
    for threads in (1, 2, 5):
        monkeypatch.setattr("dare_train.parallel.threads.thread_count", lambda threads=threads: threads)
        merge(base, models, tmp_path / str(threads), **options)
    check_same(tmp_path / "1", tmp_path / "2")
    check_same(tmp_path / "1", tmp_path / "5")


def packages_of(folder: Path, p: float) -> list[Path]:
    """Of each model, with the seed that it has in a merge: one whose segments are longer than runs, one of
    many to a run.
    """
    found = []
    for number, (one, length) in enumerate(zip(TUNED, [1 << 20, 200, 900], strict=True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dare_train.extracting.assembly.SEGMENT", length)
            found.append(
                extract(SMALL, one, folder / str(number), p=p, seed=SEED + number, values="exact").path
            )
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return packages_of(tmp_path_factory.mktemp("packages"), P)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return packages_of(tmp_path_factory.mktemp("complete"), 0.0)


LOST = {"della", "della_linear", "consensus_ta", "consensus_ties"}
"""They want to know what a package has dropped."""


def test_packages_have_segments_of_several_lengths(packages: list[Path]) -> None:
    counts = [len(list(DeltaPackage.open(path).frames("BF16.weight", 0, 1740))) for path in packages]
    assert counts == [1, 9, 2]


@pytest.mark.parametrize("method", sorted(MERGE_METHODS.keys() - LOST))
def test_packages_give_what_their_checkpoints_give(method: str, packages: list[Path], tmp_path: Path) -> None:
    """The same p and seeds; but `drop_only` finds packages that have rescaled already."""
    options, models = first_case(method, tmp_path), small_models(method)
    found, _ = result(SMALL, packages[: len(models)], tmp_path / "packages", **options)
    wanted = "dare_linear" if method == "drop_only" else method
    check_equal(
        found, result(SMALL, models, tmp_path / "models", p=P, seed=SEED, **{**options, "method": wanted})[0]
    )


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_packages_of_all_elements_give_what_their_checkpoints_give(
    method: str, complete: list[Path], tmp_path: Path
) -> None:
    """Of these nothing was dropped, so that every method may drop, and knows all it wants to."""
    options, models = first_case(method, tmp_path), small_models(method)
    found, _ = result(SMALL, complete[: len(models)], tmp_path / "packages", seed=3, **options)
    check_equal(found, result(SMALL, models, tmp_path / "models", seed=3, **options)[0])


def test_nine_models_of_few_elements_give_what_the_whole_gives(tmp_path: Path) -> None:
    """The sums that numpy makes of nine numbers depend on how they lie in memory, which would move elements
    across a border.
    """
    rng = np.random.default_rng(0)
    base = {f"F32.{n}": torch.zeros(300) for n in range(20)}
    models = [{name: torch.from_numpy(rng.normal(size=300)).float() for name in base} for _ in range(9)]
    found, _ = result(base, models, tmp_path / "out", method="sce", p=0.97, select_topk=0.4, seed=3)
    for name, words in expected("sce", {"p": 0.97, "select_topk": 0.4}, base, models, 3, []).items():
        assert np.array_equal(words_of(found[name]), words), name
