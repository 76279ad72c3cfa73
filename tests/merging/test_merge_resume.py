"""A merge that is killed, interrupted or fails: nothing half done at its place, and what is done is not done
again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import files_of, state_of, write_state

from dare_train import extract, merge
from dare_train.errors import DareError, StorageError
from dare_train.merging.merged_weights import Merged

NAMES = [f"layers.{number:02}.w" for number in range(12)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base in two files, a checkpoint and a package."""
    place = tmp_path_factory.mktemp("inputs")
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(40, 50, generator=generator) for name in NAMES}
    models = [
        {name: tensor + torch.randn(40, 50, generator=generator) * 0.1 for name, tensor in base.items()}
        for _ in range(2)
    ]
    folder = write_state({name: base[name] for name in NAMES[:5]}, place / "base", {"hidden_size": 50})
    from safetensors.torch import save_file

    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({name: base[name] for name in NAMES[5:]}, folder / "model-00002-of-00002.safetensors")
    weight_map = {
        name: f"model-0000{1 + (number >= 5)}-of-00002.safetensors" for number, name in enumerate(NAMES)
    }
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    package = extract(folder, models[1], place / "package", p=0.5).path
    return [folder, write_state(models[0], place / "model"), package]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the tensors that merges work out from now on, in the order in which they do."""
    done: list[str] = []
    honest = Merged.run

    def run(self: Merged, name: str, start: int, count: int) -> Any:
        words = honest(self, name, start, count)
        done.append(name)
        return words

    monkeypatch.setattr(Merged, "run", run)
    return done


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let merges fail when they work out tensor number `after`."""
    honest = Merged.run

    def run(self: Merged, name: str, start: int, count: int) -> Any:
        if name == NAMES[after]:
            raise error
        return honest(self, name, start, count)

    monkeypatch.setattr(Merged, "run", run)


def interrupted(
    inputs: list[Any],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    error: BaseException,
    **options: Any,
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, after, error)
        with pytest.raises(type(error)):
            merge(inputs[0], inputs[1:], out, **options)


def begun(place: Path) -> Path:
    """The folder that an interrupted merge left."""
    (folder,) = place.glob(".out.*.partial")
    return folder


def journal(place: Path) -> list[str]:
    return [line.split()[1] for line in (begun(place) / "merge-journal.0").read_text().splitlines()]


def driver(*arguments: object) -> list[str]:
    return [sys.executable, str(Path(__file__).parents[1] / "helpers/merge_driver.py"), *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_what_was_done_before_a_kill_is_not_done_again(
    inputs: list[Path], tmp_path: Path, work: list[str], stop: signal.Signals
) -> None:
    place, options = tmp_path / "place", dict(weights=[0.5, 0.25])
    place.mkdir()
    command = driver("slowly", 0.05, place / "out", json.dumps(options), *inputs)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        for _ in range(7):
            assert process.stdout.readline().strip() in NAMES
        process.send_signal(stop)
        process.wait(timeout=30)
        assert "done" not in process.stdout.read()
    assert process.returncode == -stop
    assert {path.name for path in place.iterdir()} - {".out.lock"} == {begun(place).name}
    finished = journal(place)
    assert 3 <= len(finished) < len(NAMES)
    told: list[tuple[int, int]] = []
    report = merge(inputs[0], inputs[1:], place / "out", progress=lambda *done: told.append(done), **options)
    assert sorted([*finished, *work]) == NAMES
    assert told[-1] == (len(work) * 8000, len(work) * 8000)
    assert [path.name for path in place.iterdir()] == ["out"]
    whole = merge(inputs[0], inputs[1:], tmp_path / "whole", **options)
    assert report.fingerprint == whole.fingerprint
    assert files_of(place / "out") == files_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tensors in one file: fewer moments to be killed at."""
    place, base = tmp_path_factory.mktemp("few"), {name: torch.ones(9) for name in NAMES[:2]}
    folder = write_state(base, place / "base", {"hidden_size": 9})
    return [folder, write_state({name: tensor * 2 for name, tensor in base.items()}, place / "model")]


def test_a_kill_at_any_moment_leaves_nothing_or_everything(few: list[Path], tmp_path: Path) -> None:
    kills = killed_everywhere(few, tmp_path, None)
    assert sum(kill["status"] == signal.SIGKILL for kill in kills) > 20
    assert {kill["state"] for kill in kills} == {"absent", "new"}
    assert any(kill["left"] for kill in kills)
    assert all(kill["after"] == ["out"] and kill["new"] for kill in kills)


def test_a_kill_while_replacing_never_loses_the_old(few: list[Path], tmp_path: Path) -> None:
    merge(few[0], few[1:], tmp_path / "old", weights=[1])
    kills = killed_everywhere(few, tmp_path, tmp_path / "old")
    assert {kill["state"] for kill in kills} >= {"old", "new"}
    lost = [kill for kill in kills if kill["state"] not in ("old", "new")]
    assert lost == []
    assert all(kill["after"] == ["out"] and kill["new"] for kill in kills)


def killed_everywhere(inputs: list[Path], tmp_path: Path, old: Path | None) -> list[dict[str, Any]]:
    (tmp_path / "place").mkdir()
    command = driver("everywhere", tmp_path / "place", old or "", json.dumps(dict(weights=[0.5])), *inputs)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_interrupt_keeps_what_is_done(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str]
) -> None:
    interrupted(inputs, tmp_path / "out", monkeypatch, 7, KeyboardInterrupt())
    assert journal(tmp_path) == NAMES[:6]  # a tensor is finished when the next one comes
    work.clear()
    interrupted(inputs, tmp_path / "out", monkeypatch, 9, KeyboardInterrupt())
    assert journal(tmp_path) == NAMES[:8]
    assert not set(work) & set(NAMES[:6])
    work.clear()
    merge(inputs[0], inputs[1:], tmp_path / "out")
    assert sorted(work) == sorted(NAMES[8:])
    merge(inputs[0], inputs[1:], tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a method of one's own"), OSError(28, "full"), DareError("x"), MemoryError()],
    ids=repr,
)
def test_an_error_keeps_nothing(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, 7, error)
        with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
            merge(inputs[0], inputs[1:], tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_after_an_interrupt_keeps_nothing(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(inputs, tmp_path / "out", monkeypatch, 7, KeyboardInterrupt())
    interrupted(inputs, tmp_path / "out", monkeypatch, 9, RuntimeError())
    assert list(tmp_path.iterdir()) == []


# What is not trusted


def damaged_header(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"layers.08.w"', b'"layers.08.v"'))


def flipped(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1  # of the last tensor in the file
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-8000])


def lost(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def no_header(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(bytes(100) + path.read_bytes()[100:])


def no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def lying_journal(folder: Path) -> None:
    """It claims a tensor that was never written, and half a line."""
    with (folder / "merge-journal.0").open("a") as file:
        file.write(f"{'0' * 32} layers.11.w\n{'f' * 32} lay")


def empty_journal(folder: Path) -> None:
    (folder / "merge-journal.0").write_text("")


DAMAGES = {
    "a flipped bit": flipped,
    "a cut file": cut,
    "a lost file": lost,
    "a name": damaged_header,
    "no header": no_header,
}
DAMAGES |= {"no index": no_index, "a journal that lies": lying_journal, "an empty journal": empty_journal}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_was_damaged_meanwhile_is_not_trusted(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str], damage: Any
) -> None:
    interrupted(inputs, tmp_path / "out", monkeypatch, 7, KeyboardInterrupt())
    damage(begun(tmp_path))
    work.clear()
    merge(inputs[0], inputs[1:], tmp_path / "out")
    redone = {flipped: {NAMES[4]}, lying_journal: set()}.get(damage, set(NAMES[:6]))
    assert sorted(work) == sorted({*redone, *NAMES[6:]})
    merge(inputs[0], inputs[1:], tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


OTHERS: list[dict[str, Any]] = [
    {"weights": [1.0, 0.5]}, {"seed": 1}, {"p": 0.5}, {"rescale": "norm"}, {"method": "ties"},
    {"out_dtype": "BF16"}, {"exclude": "*.03.*"},
    {"take": {"*.03.*": 0}}, {"lambda_": 0.5}, {"rename": {"x": "y"}}, {"cast_base": True},
    {"tokenizer": "base"},
]  # fmt: skip


@pytest.mark.parametrize("options", OTHERS, ids=repr)
def test_another_merge_begins_anew(
    inputs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: list[str],
    options: dict[str, Any],
) -> None:
    interrupted(inputs, tmp_path / "out", monkeypatch, 7, KeyboardInterrupt())
    work.clear()
    merge(inputs[0], inputs[1:], tmp_path / "out", **options)
    assert sorted(work) == NAMES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", ["weights", "time", "another file", "order"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_inputs_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str], change: str, which: int
) -> None:
    import shutil

    base = {name: torch.ones(4) for name in NAMES}
    folders = [
        write_state(base, tmp_path / "in/base"),
        write_state({name: tensor * 2 for name, tensor in base.items()}, tmp_path / "in/model"),
    ]
    folders.append(extract(folders[0], folders[1], tmp_path / "in/package", p=0).path)
    out = tmp_path / "out"
    interrupted(folders, out, monkeypatch, 7, KeyboardInterrupt())
    if change == "weights":
        file = next(folders[which].glob("*.safetensors"))
        file.write_bytes(file.read_bytes())
    elif change == "time":
        os.utime(next(folders[which].glob("*.safetensors")), ns=(1, 1))
    elif change == "another file":
        (folders[which] / "tokenizer_config.json").write_text("{}")
    elif which:
        folders[1:] = folders[2:0:-1]
    else:
        folders[0] = shutil.copytree(folders[0], tmp_path / "in/copy")
    work.clear()
    merge(folders[0], folders[1:], out)
    assert sorted(work) == NAMES
    assert set(state_of(out)) == set(NAMES)


@pytest.mark.parametrize("which", [0, 1])
def test_another_later_module_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str], which: int
) -> None:
    base = {name: torch.ones(4) for name in NAMES}
    folders = [write_state(base, tmp_path / "in/base"), write_state(base, tmp_path / "in/model")]
    for folder in folders:
        write_state({"weight": torch.ones(4)}, folder / "1_Dense")
        (folder / "modules.json").write_text('[{"path": "", "name": "0"}, {"path": "1_Dense", "name": "1"}]')
    interrupted(folders, tmp_path / "out", monkeypatch, 7, KeyboardInterrupt())
    os.utime(folders[which] / "1_Dense/model.safetensors", ns=(1, 1))
    work.clear()
    merge(folders[0], folders[1:], tmp_path / "out", allow_unchanged=True)
    assert sorted(work) == ["1.weight", *NAMES]


def test_what_changed_in_memory_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str]
) -> None:
    """The object is the same, its weights are not."""
    base = {name: torch.ones(4) for name in NAMES}
    model = {name: tensor * 2 for name, tensor in base.items()}
    interrupted([base, model], tmp_path / "out", monkeypatch, 7, KeyboardInterrupt())
    for tensor in model.values():
        tensor += 1
    work.clear()
    merge(base, [model], tmp_path / "out")
    assert sorted(work) == NAMES
    assert all(torch.equal(tensor, model[name]) for name, tensor in state_of(tmp_path / "out").items())


def test_the_old_result_stays_until_the_new_one_is_complete(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str]
) -> None:
    merge(inputs[0], inputs[1:], tmp_path / "out", weights=[1, 1])
    old = files_of(tmp_path / "out")
    for error in (KeyboardInterrupt(), RuntimeError()):
        interrupted(inputs, tmp_path / "out", monkeypatch, 7, error, overwrite=True)
        assert files_of(tmp_path / "out") == old
    interrupted(inputs, tmp_path / "out", monkeypatch, 7, KeyboardInterrupt(), overwrite=True)
    with pytest.raises(DareError, match="overwrite=True"):
        merge(inputs[0], inputs[1:], tmp_path / "out")
    work.clear()
    interrupted(inputs, tmp_path / "out", monkeypatch, 9, KeyboardInterrupt(), overwrite=True)
    merge(inputs[0], inputs[1:], tmp_path / "out", overwrite=True)
    merge(inputs[0], inputs[1:], tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_package_begins_anew(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str]
) -> None:
    interrupted(inputs, tmp_path / "out", monkeypatch, 7, KeyboardInterrupt(), package=True)
    assert list(tmp_path.iterdir()) == []
    interrupted(inputs, tmp_path / "out", monkeypatch, 7, KeyboardInterrupt())
    work.clear()
    merge(inputs[0], inputs[1:], tmp_path / "out", package=True)
    assert sorted(set(work)) == NAMES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_neighbours_are_left_alone(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (".other.partial", ".other.replaced", "out.partial", ".out"):
        (tmp_path / name).mkdir()
    interrupted(inputs, tmp_path / "out", monkeypatch, 7, KeyboardInterrupt())
    merge(inputs[0], inputs[1:], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.partial",
        ".other.replaced",
        ".out",
        "out",
        "out.partial",
    ]
