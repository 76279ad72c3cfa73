"""A disk that is full, or that fails: one named error, nothing at the output, nothing beside it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import base_state, moved, random_tensor, save

from dare_train import DeltaPackage, apply, extract
from dare_train.errors import StorageError

_LIMITED = """
import json, resource, sys
from pathlib import Path
from dare_train import apply, extract

action, limit, base, other, place = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
# Writes beyond it fail with EFBIG, as they do with ENOSPC on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    (apply if action == "apply" else extract)(base, other, Path(place) / "out")
    outcome = "done"
except BaseException as error:
    outcome = f"{type(error).__name__}: {error}"
print(json.dumps([outcome, sorted(path.name for path in Path(place).iterdir())]))
"""


def _limited(action: str, limit: int, base: Path, other: Path, place: Path) -> tuple[str, list[str]]:
    """What was said and what is left when no file may grow beyond `limit` bytes."""
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _LIMITED, action, str(limit), str(base), str(other), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said, left = json.loads(done.stdout)
    return said, left


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Many tensors that hardly changed: the manifest is larger than the card, and the card than the part."""
    base = {**base_state(), **{f"layer.{number}": random_tensor(4, seed=number) for number in range(40)}}
    return save(base, tmp_path / "base"), save({**base, "a.weight": base["a.weight"] + 1}, tmp_path / "tuned")


@pytest.mark.parametrize("part", ["the part", "the card", "the manifest"])
def test_a_disk_that_fills_up_during_extract_is_named(
    models: tuple[Path, Path], tmp_path: Path, part: str
) -> None:
    whole = extract(*models, tmp_path / "whole")
    sizes = {
        "the part": whole.manifest.parts[0].bytes,
        "the card": 0,
        "the manifest": (whole.path / "dare_config.json").stat().st_size,
    }
    sizes["the card"] = (whole.path / "README.md").stat().st_size
    said, left = _limited("extract", sizes[part] - 1, *models, tmp_path / "place")
    assert said.startswith(f"StorageError: {tmp_path / 'place' / 'out'}: found File too large"), said
    assert "nothing was left behind; free some space and run again" in said
    assert left == []


def test_a_disk_that_fills_up_during_apply_is_named(models: tuple[Path, Path], tmp_path: Path) -> None:
    package = extract(*models, tmp_path / "package")
    size = (models[0] / "model.safetensors").stat().st_size
    for number, limit in enumerate((100, size - 1)):
        said, left = _limited("apply", limit, models[0], package.path, tmp_path / f"place-{number}")
        assert said.startswith(
            f"StorageError: {tmp_path / f'place-{number}' / 'out'}: found File too large"
        ), said
        assert left == []


def test_a_disk_that_is_large_enough_takes_the_same_output(models: tuple[Path, Path], tmp_path: Path) -> None:
    assert _limited("extract", 1 << 20, *models, tmp_path / "place") == ("done", ["out"])
    DeltaPackage.open(tmp_path / "place" / "out").verify(models[0])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", [0, 1, 5, 42])
def test_a_write_that_fails_during_apply_leaves_nothing(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int
) -> None:
    package, place, honest, calls = extract(*models, tmp_path / "package"), tmp_path / "place", os.pwrite, []
    place.mkdir()

    def failing(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > call:
            raise OSError(code, os.strerror(code))
        return honest(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(StorageError) as caught:
        apply(models[0], package, place / "out")
    assert f"{place / 'out'}: found {os.strerror(code)}" in str(caught.value)
    assert len(calls) > call
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_to_sync_leaves_nothing_and_keeps_the_old(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    old = extract(models[0], models[0], place / "out").manifest

    def failing(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match=os.strerror(code)):
        extract(*models, place / "out", overwrite=True)
    assert [path.name for path in place.iterdir()] == ["out"]
    assert DeltaPackage.open(place / "out").manifest == old


def test_writes_that_take_only_a_part_are_continued(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POSIX lets `write` take less than it is given; a header cut short would be found by nobody before the
    file is read.
    """
    package = extract(*models, tmp_path / "package")
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:7]))
    monkeypatch.setattr(
        os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, bytes(data)[:7], offset)
    )
    result = apply(models[0], package, tmp_path / "out")
    monkeypatch.undo()
    assert result == package.manifest.result
    again = extract(models[0], tmp_path / "out", tmp_path / "again", p=0)
    assert again.manifest.result == result


def test_a_failed_extract_leaves_no_new_folder_above_its_output(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match="nothing was left behind"):
        extract(models[0], moved(base_state()), tmp_path / "new" / "deep" / "out")
    assert not (tmp_path / "new").exists()
