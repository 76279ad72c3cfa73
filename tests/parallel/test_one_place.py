"""Two at one place: one wins whole, the other is told who holds it; a kill frees the place."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dare_train.errors import ConfigError, OutputExists, StorageError
from dare_train.parallel import exchange, litter, place_lock, staged_folder
from dare_train.parallel.staged_file import write_whole

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
HOLDING = """
import sys, time
from pathlib import Path
from dare_train.parallel.staged_folder import staged_folder
with staged_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("at work", flush=True)
    time.sleep(60)
"""


def write(out: Path, content: str = "new", *, overwrite: bool = False, **options: object) -> None:
    with staged_folder.staged_folder(out, overwrite=overwrite, **options) as folder:  # type: ignore[arg-type]
        (folder / "content").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_folder, "exchange", lambda first, second: False)


def test_the_second_writer_is_told_who_is_at_work_and_a_kill_frees_the_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLDING, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        with pytest.raises(OutputExists, match=f"found process {process.pid} on .*wait until it is done"):
            write(out, overwrite=True)
        process.send_signal(signal.SIGKILL)
    assert len(names(tmp_path)) == 2, "what the killed one wrote, and its lock's file"
    write(out)
    assert names(tmp_path) == ["out"]


def test_of_threads_in_one_process_one_wins(tmp_path: Path) -> None:
    began = threading.Barrier(10)
    told: list[str] = []

    def compete(number: int) -> None:
        began.wait()
        try:
            with staged_folder.staged_folder(tmp_path / "out") as folder:
                for part in range(5):
                    (folder / f"{part}").write_text(f"{number}")
                    time.sleep(0.01)
        except OutputExists as error:
            told.append(str(error))

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 9
    assert all(f"process {os.getpid()}" in text or "does not exist yet" in text for text in told)
    assert len({path.read_text() for path in (tmp_path / "out").iterdir()}) == 1
    assert names(tmp_path) == ["out"]


def test_where_there_are_no_locks_each_result_is_whole(tmp_path: Path, without_locks: None) -> None:
    """The last one that may replace the other stays; one that may not is told when it is done."""
    out = tmp_path / "out"
    with staged_folder.staged_folder(out) as first:
        (first / "content").write_text("first")
        write(out, "second")
        assert (out / "content").read_text() == "second"
        with pytest.raises(OutputExists), staged_folder.staged_folder(out) as third:
            (third / "content").write_text("third")
        assert first.is_dir(), "a living writer's folder is no litter"
        (out / "content").unlink()
        out.rmdir()
    assert (out / "content").read_text() == "first"
    with staged_folder.staged_folder(out, overwrite=True) as last:
        (last / "content").write_text("last")
        write(out, "between", overwrite=True)
    assert (out / "content").read_text() == "last"
    assert names(tmp_path) == ["out"]


def test_without_locks_a_result_that_came_first_is_not_replaced(tmp_path: Path, without_locks: None) -> None:
    out = tmp_path / "out"

    def overtaken() -> None:
        with staged_folder.staged_folder(out) as first:
            (first / "content").write_text("first")
            write(out, "second")

    with pytest.raises(OutputExists, match="does not exist yet"):
        overtaken()
    assert (out / "content").read_text() == "second"
    assert names(tmp_path) == ["out"]


def test_without_locks_litter_of_dead_processes_alone_is_removed(tmp_path: Path, without_locks: None) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    here = litter.machine()
    dead, living = f".out.{here}-{gone.pid}-00000000.partial", f".out.{here}-{os.getppid()}-00000000.partial"
    elsewhere = ".out.00000000-1-00000000.partial"
    for name in (dead, living, elsewhere):
        (tmp_path / name).mkdir()
    write(tmp_path / "out")
    assert names(tmp_path) == sorted([living, elsewhere, "out"])


def test_with_locks_everything_under_the_places_name_is_litter(tmp_path: Path) -> None:
    for owner in ("00000000-1-00000000.", f"{litter.machine()}-{os.getppid()}-00000000.", ""):
        for kind in ("partial", "replaced", "removed"):
            (tmp_path / f".out.{owner}{kind}").mkdir()
    (tmp_path / ".out.lock").write_text("process 1 on another machine")
    others = [".out.more.partial", ".other.partial", "out.partial", ".out"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names(tmp_path) == sorted([*others, "out"])


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    assert exchange.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/content").read_text() == "b"
    assert (tmp_path / "b/content").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        exchange.exchange(tmp_path / "a", tmp_path / "nothing")


def test_where_names_cannot_be_exchanged_the_old_one_is_put_back(
    tmp_path: Path, without_exchange: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two renames there is a moment without a result: a kill then leaves the old one under a hidden
    name, and the next writer puts it back, whatever becomes of itself.
    """
    out = tmp_path / "out"
    write(out, "old")
    write(out, "newer", overwrite=True)
    assert names(tmp_path) == ["out"]
    out.rename(tmp_path / ".out.00000000-1-00000000.replaced")

    def fail(_: Path) -> None:
        raise ConfigError("as another reader would")

    with pytest.raises(ConfigError, match="as another reader would"):
        write(out, overwrite=True, read_back=fail)
    assert names(tmp_path) == ["out"]
    assert (out / "content").read_text() == "newer"


def test_a_rename_that_fails_leaves_the_old_one(
    tmp_path: Path, without_exchange: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, "old")
    honest = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return honest(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match=os.strerror(errno.EIO)):
        write(out, "new", overwrite=True)
    monkeypatch.undo()
    assert (out / "content").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_what_its_reader_refuses_is_not_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "good")

    def refuse(folder: Path) -> None:
        raise ConfigError(str(folder / "content"), expected="better")

    with pytest.raises(ConfigError) as caught:
        write(out, "bad", overwrite=True, read_back=refuse)
    assert str(caught.value) == f"{out / 'content'}: expected better"
    assert (out / "content").read_text() == "good"
    assert names(tmp_path) == ["out"]


def symlink(path: Path) -> None:
    path.symlink_to(path.with_name("precious"))


@pytest.mark.parametrize("plant", [symlink, os.mkfifo, Path.mkdir], ids=["a link", "a pipe", "a folder"])
def test_what_a_neighbour_puts_at_the_locks_name_is_not_written_to(
    tmp_path: Path, plant: Callable[[Path], object]
) -> None:
    (tmp_path / "precious").write_text("thesis")
    plant(tmp_path / ".out.lock")
    with pytest.raises(StorageError, match="found something else; remove it"):
        write(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "thesis"


def test_a_hard_link_at_the_locks_name_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("thesis")
    (tmp_path / ".out.lock").hardlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="found something else"):
        write(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "thesis"


def test_a_child_that_was_forked_meanwhile_holds_nothing(tmp_path: Path) -> None:
    read, wrote = os.pipe()
    with place_lock.locked(tmp_path / "out"):
        child = os.fork()
        if not child:
            os.close(wrote)
            os.read(read, 1)  # until the parent is done
            os._exit(0)
    with place_lock.locked(tmp_path / "out") as alone:
        assert alone
    os.close(wrote)
    os.waitpid(child, 0)
    os.close(read)
    assert names(tmp_path) == []


def test_a_place_that_is_kept_is_passed_by_its_own_thread_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    told: list[str] = []

    def compete() -> None:
        try:
            write(out, overwrite=True)
        except OutputExists as error:
            told.append(str(error))

    with place_lock.kept(tmp_path / "link"):
        rival = threading.Thread(target=compete)
        rival.start()
        rival.join()
        with place_lock.kept(out):
            write(out, "mine", overwrite=True)
        assert names(tmp_path) == [".out.lock", "link", "out"]
    assert [f"found process {os.getpid()} on" in text for text in told] == [True]
    assert names(tmp_path) == ["link", "out"]
    with place_lock.occupied(tmp_path / "link"):
        compete()
    assert len(told) == 2
    compete()
    assert len(told) == 2


def test_nothing_is_locked_where_nobody_can_take_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with place_lock.kept(tmp_path / "mounted"):
        assert names(tmp_path) == ["mounted"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_whole(path, b"old")

    def failing(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(StorageError, match="free some space"):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["record.json"]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


# An output takes nothing away that is read.


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    """Who runs as root could lose /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    for name, found in (("pipe", "a pipe"), ("link", "a pipe"), ("folder", "a folder")):
        with pytest.raises(OutputExists, match=f"{name}: expected a file there, or nothing, found {found}"):
            write_whole(tmp_path / name, b"x")
    (tmp_path / "broken").symlink_to("nothing")
    write_whole(tmp_path / "broken", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "folder", "link", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "link").stat().st_mode)


def test_an_output_may_lie_in_an_input_but_not_hold_one(tmp_path: Path) -> None:
    base = tmp_path / "models/base"
    base.mkdir(parents=True)
    (base / "weights").write_text("w")
    write(base / "out", inputs=[base])
    for out in (base, base.parent, tmp_path):
        with pytest.raises(ConfigError, match="another folder than those that are read"):
            write(out, overwrite=True, inputs=[base])
    assert (base / "weights").read_text() == "w"
    write(tmp_path / "models" / "new", inputs=[tmp_path / "models/new/../base"])


def test_the_working_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "note").write_text("n")
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), Path(".."), tmp_path):
        with pytest.raises(ConfigError, match="another folder than the one that this process works in"):
            write(out, overwrite=True)
    assert names(tmp_path) == ["here", "note"]
    (tmp_path / "here").rmdir()
    with pytest.raises(ConfigError, match="expected a working folder that is there, found new in one that"):
        write(Path("new"))
    write(tmp_path / "new")
    write(tmp_path / "new", overwrite=True)


def test_a_place_where_nothing_can_be_made_is_an_error_not_a_wait() -> None:
    with pytest.raises(StorageError, match="/proc/self/new: found No such file"):
        write(Path("/proc/self/new"))


def test_a_lock_that_is_never_the_file_of_its_name_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place_lock, "_still_there", lambda descriptor, path: False)
    with place_lock.locked(tmp_path / "out") as alone:
        assert not alone


def test_links_do_not_hide_an_input(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for folder in (data, out / "blobs", tmp_path / "base"):
        folder.mkdir(parents=True)
    (out / "blobs/weights").write_text("w")
    (tmp_path / "base/weights").symlink_to(out / "blobs/weights")
    (tmp_path / "named").symlink_to(out / "blobs")
    (out / "hop").symlink_to(data)
    (tmp_path / "through").symlink_to(out / "hop")
    (tmp_path / "same").symlink_to(tmp_path)
    for given in ("base", "named", "through", "same/out/blobs"):
        with pytest.raises(ConfigError, match="another folder than those that are read"):
            write(out, overwrite=True, inputs=[tmp_path / given])
    assert (out / "blobs/weights").read_text() == "w"
    write(out, overwrite=True, inputs=[data])


def test_a_lock_whose_file_could_not_be_removed_is_not_published(tmp_path: Path) -> None:
    with staged_folder.staged_folder(tmp_path / "out") as folder:
        (folder / "content").write_text("new")
        (folder / ".record.lock").touch()
    assert names(tmp_path / "out") == ["content"]


def test_a_lock_whose_file_cannot_be_removed_is_free_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with place_lock.locked(tmp_path / "out"):
            pass
    assert "could not be removed: Read-only file system" in caplog.text
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
