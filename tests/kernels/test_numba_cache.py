"""How kernels become machine code that later processes load: cached, checked, and without Numba."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dare_train.kernels import numba_cache as compiled
from dare_train.kernels.code_folder import CodeFolder, Unsafe, check_owner
from dare_train.kernels.numba_cache import inlined, kernel

USE = """
import sys
import numpy as np
from dare_train.kernels import cpu
print(cpu.fingerprint(np.arange(5, dtype=np.uint16), 0), "numba" in sys.modules)
"""


def use(cache: Path) -> tuple[str, bool, str]:
    """The fingerprint that a new process finds, whether it imported Numba, and what it said."""
    env = {**os.environ, "DARE_TRAIN_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=env, check=True)
    found, imported = done.stdout.strip().rsplit(" ", 1)
    return found, imported == "True", done.stderr


Used = tuple[str, bool, str]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Used]:
    """The cache that a first process leaves, and what that found and said."""
    cache = tmp_path_factory.mktemp("first") / "cache"
    return cache, use(cache)


@pytest.fixture
def cache(first: tuple[Path, Used], tmp_path: Path) -> Path:
    """Such a cache, for a test to damage."""
    return Path(shutil.copytree(first[0], tmp_path / "cache"))


def only_file(cache: Path) -> Path:
    [path] = cache.glob("kernels/*/*")
    return path


def test_later_processes_load_what_the_first_one_compiled(first: tuple[Path, Used], cache: Path) -> None:
    found, *compiling = first[1]
    assert compiling == [
        True,
        "dare_train: compiling CPU kernels, once on this machine (a few seconds) ...\n",
    ]
    assert use(cache) == (found, False, "")


@pytest.mark.parametrize(
    "damage",
    [lambda code: code[:-1], lambda code: code[:40] + bytes([code[40] ^ 1]) + code[41:], lambda _: b""],
)
def test_damaged_code_is_compiled_again(first: tuple[Path, Used], cache: Path, damage) -> None:
    path = only_file(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert use(cache)[:2] == (first[1][0], True)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said(first: tuple[Path, Used], tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file where a folder should be")
    found, imported, said = use(tmp_path)
    assert imported
    assert "cannot keep compiled kernels" in said
    assert "Set DARE_TRAIN_CACHE to a folder that only you can write." in said
    assert found == first[1][0]


@inlined
def _tripled(x):
    return x + x + x


@kernel
def _sum_of_triples(values, start) -> int:
    total = start
    for i in range(values.size):
        total += _tripled(np.int64(values[i]))
    return total


def test_a_kernel_per_combination_of_types() -> None:
    assert _sum_of_triples(np.arange(4, dtype=np.uint8), 5) == 23
    assert _sum_of_triples(np.arange(4, dtype=np.float32), -5) == 13
    assert _sum_of_triples(np.array([-1]), np.int64(0)) == -3
    assert sorted(_sum_of_triples._natives) == [("pf4", "i8"), ("pi8", "i8"), ("pu1", "i8")]


@kernel
def _allocating(values) -> int:
    return np.zeros(values.size).size


def test_kernels_that_allocate_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"allocating_pu1 allocates or may raise: it calls .*NRT_Free"):
        _allocating(np.zeros(3, np.uint8))


@pytest.mark.parametrize("values", [np.zeros(6, np.uint8)[::2], np.zeros((2, 3), np.uint8)])
def test_only_contiguous_arrays_of_one_dimension(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"contiguous arrays of one dimension, found shape \("):
        _sum_of_triples(values, 0)


@kernel
def _count_to(limit, out) -> int:
    while out[0] < limit:
        out[0] += 1
    return out[0]


def test_threads_may_need_the_same_kernel_at_once() -> None:
    results: list[int] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        results.append(_count_to(100_000, np.zeros(1, np.int64)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [100_000] * 4


def test_the_cache_follows_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DARE_TRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled._cache_folder() == tmp_path / "dare_train"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiled._cache_folder() == tmp_path / ".cache/dare_train"


WIDE = """
import sys
import llvmlite.binding as llvm
from numba import config
from dare_train.kernels import fingerprints, numba_compile

class Features:
    def flatten(self):
        return sys.argv[1]

llvm.get_host_cpu_features = Features
config.CPU_NAME = "sapphirerapids"
seen, honest = [], numba_compile._drop_error_paths
numba_compile._drop_error_paths = lambda module, machine: (seen.append(str(module)), honest(module, machine))
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
numba_compile.object_code(fingerprints._fingerprint, ("pu4", "u8", "pu4", "pu8"), "symbol")
print("<8 x i64>" in seen[0], config.CPU_FEATURES)
"""


@pytest.mark.parametrize(("newest", "wide"), [("+avx512vbmi2", "True"), ("+avx512cd", "False")])
def test_vectors_are_wide_where_that_is_no_slower(newest: str, wide: str) -> None:
    """Of Intel's processors that have vectors of 512 bits, all but the first; and Numba's own settings stay
    as they were.
    """
    features = f"+sse2,+avx,+avx2,+avx512f,+avx512bw,+avx512dq,+avx512vl,{newest}"
    done = subprocess.run([sys.executable, "-c", WIDE, features], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [wide, "None"]


def test_what_is_kept_is_for_this_user_alone_whatever_the_umask(
    first: tuple[Path, Used], tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        use(tmp_path / "above" / "cache")
    finally:
        os.umask(before)
    kept = [tmp_path / "above", *(tmp_path / "above").rglob("*")]
    assert len(kept) == 5
    assert {path.stat().st_mode & 0o077 for path in kept} == {0}


@pytest.mark.parametrize("place", [".", "kernels", "kernels/*", "kernels/*/*.o"])
def test_what_others_may_have_written_is_not_run(first: tuple[Path, Used], cache: Path, place: str) -> None:
    [path] = cache.glob(place) if place != "." else [cache]
    path.chmod(path.stat().st_mode | 0o020)
    before = only_file(cache).read_bytes()
    found, imported, said = use(cache)
    assert (found, imported) == (first[1][0], True)
    assert f"others may write to {path}" in said
    assert said.count("cannot keep compiled kernels") == 1
    assert only_file(cache).read_bytes() == before


def test_code_that_lies_under_another_name_is_compiled_again(first: tuple[Path, Used], cache: Path) -> None:
    path = only_file(cache)
    kept = CodeFolder(cache, path.parent.name)
    kept.keep("another.o", kept.read(path.name) or b"")
    (path.parent / "another.o").replace(path)
    assert kept.read(path.name) is None
    assert use(cache)[:2] == (first[1][0], True)


def test_a_folder_in_the_place_of_code_is_done_without(first: tuple[Path, Used], cache: Path) -> None:
    path = only_file(cache)
    path.unlink()
    path.mkdir()
    found, imported, said = use(cache)
    assert (found, imported) == (first[1][0], True)
    assert f"{path} is no file" in said


def test_code_of_another_user_is_not_run(cache: Path) -> None:
    path = only_file(cache)
    kept = CodeFolder(cache, path.parent.name)
    status = os.stat_result((0o100600, 1, 1, 1, os.getuid() + 1, 0, 0, 0, 0, 0))
    assert kept.read(path.name)
    with pytest.raises(Unsafe, match=f"belongs to user {os.getuid() + 1}"):
        check_owner(path, status)


def test_without_a_home_kernels_are_compiled_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "DARE_TRAIN_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without an entry in passwd
    assert compiled._cache_folder() is None
    assert "there is no home folder" in capsys.readouterr().err
