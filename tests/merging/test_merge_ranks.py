"""`merge` on several processes: the files of one, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from dense_merge import base_state, shrink, tuned_from
from engines import run_ranks
from rank_files import check_same
from safetensors.torch import save_file

from dare_train import extract, merge
from dare_train.parallel.ranks import Ranks


def joined() -> Ranks:
    shrink()
    dist.init_process_group("gloo")
    return Ranks.joined()


MERGE_METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weights": [0.5, 1.0, 0.25]},
    "ties": {"p": 0.4},
    "karcher": {},
    "sce": {"select_topk": 0.5},
    "della": {"package": True},
    "ramplus_tl": {"p": 0.3},
    "iso_cts": {"p": 0.3},
    "emr": {"task": 3, "package": True},
}


def merge_all(ranks: Ranks | None, base: Path, models: list[Path], out: Path) -> list[str]:
    """Into checkpoints and into a package; the fingerprints."""
    return [
        merge(base, models, out / method, method=method, ranks=ranks, **options).fingerprint
        for method, options in MERGE_METHODS.items()
    ]


def merge_on_ranks(_: int, base: Path, models: list[Path], out: Path) -> list[str]:
    return merge_all(joined(), base, models, out)


def test_two_processes_give_the_files_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints and packages."""
    shrink(monkeypatch.setattr)
    base, models = base_state("BF16", "F64"), tuned_from(base_state("BF16", "F64"))
    for name, state in {"base": base, "first": models[0], "second": models[1]}.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    package = extract(base, models[2], tmp_path / "third", p=0.5, seed=2).path
    given = tmp_path / "base", [tmp_path / "first", tmp_path / "second", package]
    alone = merge_all(None, *given, tmp_path / "one")
    assert run_ranks(merge_on_ranks, 2, *given, tmp_path / "two") == [alone, alone]
    for method in MERGE_METHODS:
        check_same(tmp_path / "one" / method, tmp_path / "two" / method)
