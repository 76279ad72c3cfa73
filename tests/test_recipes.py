"""The recipes for many devices, started as their users start them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from engines import ENVIRONMENT

from dare_train import DeltaPackage

ROOT = Path(__file__).parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHERS = {1: (sys.executable,), 2: TORCHRUN}


def started(world: int, recipe: str, out: Path, *options: str) -> list[str]:
    """The lines that a recipe prints which say what it made: on one process only."""
    command = [*LAUNCHERS[world], f"recipes/{recipe}", "--out", str(out), *options]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [line.replace(str(out), "OUT") for line in done.stdout.splitlines() if line.startswith((str(out), "applied to"))]


def checked(out: Path, name: str, parts: int) -> DeltaPackage:
    """A package that arrives on the base, of as many parts as processes wrote."""
    package = DeltaPackage.open(out / "dare" / name)
    package.verify(out / "base")
    assert len(package.manifest.parts) == parts
    assert {record.kind for record in package.manifest.tensors} == {"delta"}
    assert sum(record.changed for record in package.manifest.tensors) > 1000
    assert 0.09 < package.stats["density"] < 0.11
    return package


def is_summary(lines: list[str], packages: list[str]) -> None:
    *each, last = lines
    took = r"[\d,]+ bytes, \d\.\d{3} bits per parameter; training waited \d+\.\d{3} s"
    assert len(each) == len(packages), lines
    assert all(re.fullmatch(f"OUT/dare/{name}: {took}", line) for name, line in zip(packages, each, strict=True)), lines
    assert re.fullmatch(r"applied to OUT/base: OUT/received, fingerprint \w{12}, the one on record", last)


EVERY_FOUR = ("--every", "4")


def test_a_loop_of_ones_own_resumes_to_the_same_package(tmp_path: Path) -> None:
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    is_summary(started(1, "accelerate_loop.py", through, "--steps", "8", *EVERY_FOUR), ["step-4", "step-8"])
    started(1, "accelerate_loop.py", resumed, "--steps", "4", *EVERY_FOUR)
    is_summary(started(1, "accelerate_loop.py", resumed, "--steps", "8", "--resume", *EVERY_FOUR), ["step-8"])
    expected, found = checked(through, "step-8", 1), checked(resumed, "step-8", 1)
    assert (expected.manifest.parent, expected.manifest.result) == (found.manifest.parent, found.manifest.result)


def test_a_loop_of_ones_own_on_two_processes(tmp_path: Path) -> None:
    is_summary(started(2, "accelerate_loop.py", tmp_path, "--steps", "4", *EVERY_FOUR), ["step-4"])
    is_summary(started(2, "accelerate_loop.py", tmp_path, "--steps", "8", "--resume", *EVERY_FOUR), ["step-8"])
    assert checked(tmp_path, "step-4", 2).manifest.parent == checked(tmp_path, "step-8", 2).manifest.parent
    assert sorted(path.name for path in (tmp_path / "dare").iterdir()) == ["step-4", "step-8"]


def test_zero3_with_a_configuration_file(tmp_path: Path) -> None:
    is_summary(started(2, "deepspeed_zero3.py", tmp_path, "--steps", "10"), ["step-10", "final"])
    assert checked(tmp_path, "step-10", 2).manifest.result == checked(tmp_path, "final", 2).manifest.result
    assert len(list(tmp_path.glob("checkpoint-10/global_step10/*_optim_states.pt"))) == 2, "ZeRO-3 was at work"


def test_three_tasks_are_merged_with_dare_and_without(tmp_path: Path) -> None:
    data = ROOT.parent / "shared" / "data"
    assert (data / "clinc150").is_dir(), f"this test needs {data}"
    few = ("--steps", "2", "--validation", "8", "--test", "8", "--statistics", "4")
    command = [sys.executable, "recipes/merge_tasks.py", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json"), *few]
    done = subprocess.run(
        [*command, "--methods", "average", "ties"], cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    names = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert names[-4:] == ["average", "average + DARE", "ties", "ties + DARE"]


def test_recipes_are_all_here() -> None:
    found = {path.name for path in (ROOT / "recipes").iterdir() if path.is_file()}
    assert found == {"quickstart.py", "counting.py", "merge_tasks.py", "accelerate_loop.py", "deepspeed_zero3.py", "deepspeed_zero3.json"}
