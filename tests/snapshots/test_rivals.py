"""Two commands for one folder, whichever they are: one wins whole, the other is told who holds the place."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import base_state, moved, save

from dare_train import apply, extract, merge
from dare_train.errors import OutputExists
from dare_train.parallel.staged_folder import staged_folder
from dare_train.weights.files.checkpoint import Checkpoint

Act = Callable[[Path, bool], object]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Act]:
    place = tmp_path_factory.mktemp("inputs")
    base, tuned = save(base_state(), place / "base"), save(moved(base_state()), place / "tuned")
    package = extract(base, tuned, place / "package", p=0.5).path
    return {
        "extract": lambda out, over: extract(base, tuned, out, p=0.5, overwrite=over),
        "apply": lambda out, over: apply(base, package, out, overwrite=over),
        "merge": lambda out, over: merge(base, [tuned], out, weights=[0.5], overwrite=over),
        "merge --package": lambda out, over: merge(
            base, [tuned], out, weights=[0.5], package=True, overwrite=over
        ),
    }


def content(folder: Path) -> dict[str, Any]:
    """Of the files that do not say where the folder was to be."""
    unnamed = ("dare_merge.json", "dare_config.json", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in unnamed}


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_ten_threads_with_all_pairs_of_commands_one_wins(
    commands: dict[str, Act], tmp_path: Path, overwrite: bool
) -> None:
    alone = {}
    for name, act in commands.items():
        act(tmp_path / "alone" / name, False)
        alone[name] = content(tmp_path / "alone" / name)
    for number, pair in enumerate(itertools.combinations_with_replacement(commands, 2)):
        out = tmp_path / "rivals" / f"{number}"
        began = threading.Barrier(10)
        told: list[str] = []
        won: list[str] = []

        def compete(
            name: str, out: Path = out, began: threading.Barrier = began, told: list[str] = told,
            won: list[str] = won,
        ) -> None:  # fmt: skip
            began.wait()
            try:
                commands[name](out, overwrite)
                won.append(name)
            except OutputExists as error:
                told.append(str(error))

        threads = [threading.Thread(target=compete, args=(pair[turn % 2],)) for turn in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(told) + len(won) == 10
        assert len(won) == 1 or overwrite
        assert content(out) in [alone[name] for name in won]
        assert all("process" in text or "does not exist yet" in text for text in told)
        assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_each_command_is_told_who_holds_the_place(commands: dict[str, Act], tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as folder:
        (folder / "content").write_bytes(np.arange(9).tobytes())
        for act in commands.values():
            with pytest.raises(OutputExists, match=r"found process \d+ on"):
                act(tmp_path / "out", True)
    assert (tmp_path / "out" / "content").exists()


@pytest.mark.parametrize("name", ["apply", "merge"])
def test_a_checkpoint_that_cannot_be_read_back_does_not_replace_a_good_one(
    commands: dict[str, Act], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands[name](tmp_path / "out", False)
    before = content(tmp_path / "out")
    opened = Checkpoint.open

    def open_changed(where: Path) -> Checkpoint:
        checkpoint = opened(where)
        if ".partial" in str(where):
            checkpoint.tensors.popitem()
        return checkpoint

    monkeypatch.setattr(Checkpoint, "open", staticmethod(open_changed))
    with pytest.raises(Exception, match=f"{tmp_path / 'out'}: .*found none"):
        commands[name](tmp_path / "out", True)
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
