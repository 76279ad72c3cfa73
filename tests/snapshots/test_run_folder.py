"""What a run forgets of its packages, and how: by age, never the newest, and never by halves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny import base_state, moved

from dare_train import DeltaPackage, extract
from dare_train.parallel import litter, staged_folder
from dare_train.parallel.place_lock import locked
from dare_train.parallel.waiting_folder import clear_waiting, remove_waiting, waiting_folder
from dare_train.snapshots.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "dare", "")


def written(folder: RunFolder, *steps: int) -> None:
    """Packages of these steps, one after another; an attempt before may have come further."""
    for step in steps:
        extract(base_state(), moved(base_state()), folder.of_step(step), p=0.0, overwrite=True)


def steps(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


def test_stale_higher_numbers_are_not_newer(folder: RunFolder) -> None:
    written(folder, 14, 16, 2)
    folder.forget_old(2, folder.of_step(2), None, step=2)
    assert steps(folder) == ["step-14", "step-16", "step-2"]
    written(folder, 4, 6)
    folder.forget_old(2, folder.of_step(6), None, step=6)
    assert steps(folder) == ["step-14", "step-16", "step-4", "step-6"]


def test_stale_lower_numbers_are_older(folder: RunFolder) -> None:
    """A step that only the attempt before had lies between two of this one."""
    written(folder, 10, 8, 12)
    folder.forget_old(2, folder.of_step(12), None, step=12)
    assert steps(folder) == ["step-12", "step-8"]


def test_the_last_package_forgets_no_newer_steps(folder: RunFolder) -> None:
    written(folder, 28, 30, 6, 8)
    final = extract(base_state(), moved(base_state()), folder.path / "final", p=0.0).path
    folder.forget_old(2, final, None, step=8)
    assert steps(folder) == ["final", "step-28", "step-30", "step-6", "step-8"]


def test_what_is_forgotten_is_gone_by_its_name_before_its_files_are(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(folder, 2, 4)
    seen: list[list[str]] = []
    honest = shutil.rmtree

    def rmtree(path: Path) -> None:
        seen.append(sorted(entry.name for entry in folder.path.glob("step-*")))
        DeltaPackage.open(path).check_integrity()
        honest(path)

    monkeypatch.setattr(litter.shutil, "rmtree", rmtree)
    folder.forget_old(1, folder.of_step(4), None, step=4)
    assert seen == [["step-4"]]
    assert steps(folder) == ["step-4"]


def test_half_forgotten_packages_are_swept(folder: RunFolder) -> None:
    written(folder, 4)
    half = folder.path / ".step-2.00000000-1-00000000.removed"
    half.mkdir()
    (half / "dare_delta.safetensors").write_text("half")
    (folder.path / ".step-6.lock").write_text("process 1 on another machine")
    staged_folder.sweep_folder(folder.path)
    assert steps(folder) == ["step-4"]


def test_what_another_is_writing_is_not_swept(folder: RunFolder) -> None:
    folder.path.mkdir()
    begun = folder.path / ".step-2.00000000-1-00000000.partial"
    begun.mkdir()
    with locked(folder.of_step(2)):
        staged_folder.sweep_folder(folder.path)
        assert begun.is_dir()
    staged_folder.sweep_folder(folder.path)
    assert steps(folder) == []


def test_what_waits_beside_a_living_trainings_packages_stays(tmp_path: Path) -> None:
    """In a fork, which lives on while this process looks."""
    read, wrote = os.pipe()
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        os.close(wrote)
        waiting_folder(tmp_path)
        os.write(told, b"x")
        os.read(read, 1)
        os._exit(0)
    os.read(ready, 1)
    mine = waiting_folder(tmp_path)
    clear_waiting(tmp_path)
    assert not mine.exists(), "of a training before, in this process"
    assert len(list(tmp_path.iterdir())) == 1
    os.close(wrote)
    os.waitpid(child, 0)
    clear_waiting(tmp_path)
    assert list(tmp_path.iterdir()) == []
    again = waiting_folder(tmp_path)
    remove_waiting(again)
    assert list(tmp_path.iterdir()) == []
