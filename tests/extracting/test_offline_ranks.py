"""`extract` and `apply` on several processes: the files of one, byte for byte; and the failure of one is the
failure of all.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from rank_files import check_same, files
from safetensors.torch import load_file, save_file
from tiny import State, moved, random_tensor, save

from dare_train import DeltaPackage, apply, extract
from dare_train.cli import main as cli
from dare_train.errors import DareError, RankError, StorageError
from dare_train.extracting.assembly import Spool
from dare_train.extracting.encoding import Encoded
from dare_train.package.segments import Segment
from dare_train.package.writer import PackageWriter
from dare_train.parallel.ranks import Ranks, launched
from dare_train.parallel.threads import thread_share
from dare_train.weights.fingerprint import Fingerprint

SEGMENT, PART = 4096, 40_000
"""Elements and bytes, small enough that a tiny model has many segments and several parts."""


def shrink(change: Callable[[object, str, int], None] = setattr) -> None:
    for module in ("extracting.assembly", "applying.resolver"):
        change(sys.modules[f"dare_train.{module}"], "SEGMENT", SEGMENT)
    change(sys.modules["dare_train.package.writer"], "PART_LIMIT", PART)


@pytest.fixture(scope="module", autouse=True)
def _shrunk() -> Iterator[None]:
    """In this process too; ranks shrink their own."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield


def joined() -> Ranks:
    shrink()
    dist.init_process_group("gloo")
    return Ranks.joined()


def mixed() -> State:
    """fp32, bf16 and integers. Of two ranks both have a part of `b.embeddings`, and the second has all that
    follows.
    """
    return {
        "a.bias": random_tensor(700, seed=1).float(),
        "b.embeddings": random_tensor(300, 200, seed=2),
        "c.norm": random_tensor(64, seed=3).float(),
        "d.weight": random_tensor(100, 150, seed=4).float(),
        "e.count": torch.arange(5),
        "f.empty": torch.zeros(0, 3),
    }


def tuned_from(base: State) -> State:
    """Trained, grown, and with a head that the base has not."""
    state = {
        name: tensor + (0.02 * random_tensor(*tensor.shape, seed=9)).to(tensor.dtype)
        for name, tensor in base.items()
    }
    grown = torch.cat([state["b.embeddings"], random_tensor(30, 200, seed=10)])
    return {
        **state,
        "b.embeddings": grown,
        "e.count": base["e.count"] + 1,
        "head.weight": random_tensor(90, 100, seed=11),
    }


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    parts: int = 1
    """At least so many."""


CASES = {
    "auto": Case(),
    "lossless": Case({"p": 0.0}, parts=3),
    "masks": Case({"masks": {"d.weight": (random_tensor(100, 150, seed=12) > 0.5).numpy()}}),
    "int8": Case({"values": "int8", "p": {"d.*": 0.5, "*": 0.9}}),
    "whole": Case({"whole": ["b.*"], "exclude": ["d.*"]}, parts=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and tuned; the latter has a tokenizer of its own, so that a file travels along."""
    folder = tmp_path_factory.mktemp("models")
    pair = save(mixed(), folder / "base"), save(tuned_from(mixed()), folder / "tuned")
    for path in pair:
        (path / "config.json").write_text("{}")
    (pair[1] / "tokenizer.json").write_text('{"added": ["tokens"]}')
    return pair


# What succeeds.

Prints = dict[str, tuple[str, str]]
"""By case: the fingerprints that `extract` put on record and at which `apply` arrived."""


def write_all(ranks: Ranks | None, base: Path, tuned: Path, out: Path) -> Prints:
    prints = {}
    for name, case in CASES.items():
        package = extract(base, tuned, out / name / "package", ranks=ranks, **case.options)
        prints[name] = package.manifest.result, apply(base, package, out / name / "result", ranks=ranks)
    tiny = {"only.weight": random_tensor(20, 30)}
    extract(tiny, moved(tiny), out / "tiny", ranks=ranks)
    by = [
        extract(mixed(), moved(mixed(), distance), out / f"by-{distance}", ranks=ranks)
        for distance in (0.5, 1.5)
    ]
    two = sharded(mixed(), out / "sharded") if ranks is None else out.with_name("alone") / "sharded"
    apply(two, by, out / "sum", weights=[0.5, 0.25], ranks=ranks)
    apply(two, by, out / "sum", weights=[2, 1], overwrite=True, ranks=ranks)
    return prints


def sharded(state: State, folder: Path) -> Path:
    """Two files and an index, as `save_pretrained` writes large models."""
    folder.mkdir()
    names = {
        tensor: f"model-{1 + (number > 2):05d}-of-00002.safetensors" for number, tensor in enumerate(state)
    }
    for name in set(names.values()):
        save_file({tensor: state[tensor] for tensor in state if names[tensor] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.fixture(scope="module")
def alone(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prints]:
    folder = tmp_path_factory.mktemp("written")
    return folder / "alone", write_all(None, *models, folder / "alone")


def write_on_ranks(_: int, base: Path, tuned: Path, out: Path) -> Prints:
    return write_all(joined(), base, tuned, out)


@pytest.mark.parametrize("world", [2, 3])
def test_files_are_those_of_one_process(
    models: tuple[Path, Path], alone: tuple[Path, Prints], world: int
) -> None:
    """The tiny model has fewer segments than there are ranks; the sum lies in two files."""
    out = alone[0].with_name(f"{world}-ranks")
    assert run_ranks(write_on_ranks, world, *models, out) == [alone[1]] * world
    for folder in (*CASES, "tiny", "by-0.5", "by-1.5", "sum"):
        check_same(alone[0] / folder, out / folder)
    assert len(files(out / "sum")) == 3
    assert sorted(path.name for path in out.iterdir()) == sorted([*CASES, "tiny", "by-0.5", "by-1.5", "sum"])


@pytest.mark.parametrize("name", CASES)
def test_the_cases_are_what_they_are_called(
    models: tuple[Path, Path], alone: tuple[Path, Prints], name: str
) -> None:
    package = DeltaPackage.open(alone[0] / name / "package")
    assert len(package.manifest.parts) >= CASES[name].parts
    assert {record.info.dtype.code for record in package.manifest.tensors} == {"F32", "BF16", "I64"}
    assert {"package/tokenizer.json", "result/tokenizer.json"} < files(alone[0] / name).keys()
    assert alone[1][name][0] == alone[1][name][1]
    record = package.records["d.weight"]
    assert (record.kind, record.mask, record.values) == {
        "auto": ("delta", "seeded", "rounded"), "lossless": ("delta", "all", "exact"),
        "masks": ("delta", "stored", "rounded"),
        "int8": ("delta", "seeded", "int8"), "whole": ("base", "all", "exact"),
    }[name]  # fmt: skip


def stacked(
    rank: int, state: tuple[State, State], out: Path, seen: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """`extract` from weights in memory, and what it says of its progress."""
    extract(
        *state,
        out,
        ranks=joined() if rank >= 0 else None,
        progress=lambda done, total: seen.append((done, total)),
    )
    return seen


def test_each_rank_tells_of_its_own_progress(tmp_path: Path) -> None:
    state = mixed(), moved(mixed())
    whole = stacked(-1, state, tmp_path / "one", [])[-1]
    ends = [told[-1] for told in run_ranks(stacked, 3, state, tmp_path / "several", [])]
    check_same(tmp_path / "one", tmp_path / "several")
    assert all(done == everything for done, everything in [whole, *ends])
    assert sum(done for done, _ in ends) == whole[0] == sum(tensor.nbytes for tensor in mixed().values())


@given(sizes=st.lists(st.integers(0, 50), max_size=30), world=st.integers(1, 7))
def test_shares_are_consecutive_and_balanced(sizes: list[int], world: int) -> None:
    work = list(enumerate(sizes))
    shares = [Ranks(rank, world).share(work, size=lambda item: item[1]) for rank in range(world)]
    assert [item for share in shares for item in share] == work
    assert all(
        sum(size for _, size in share) <= sum(sizes) / world + max(sizes, default=0) for share in shares
    )


def test_neighbours_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dare_train.parallel.threads.thread_count", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [thread_share(Ranks(0, 8)), thread_share(Ranks(0, 1))] == [3, 12]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert thread_share(Ranks(0, 100)) == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert thread_share(Ranks(0, 8)) == 12


# What fails.

Refusal = tuple[str, str, int, list[str]]
"""Type, message and exit code of an error, and what is left where the output should be."""


def refusal(ranks: Ranks, place: Path, action: Callable[[Path], object]) -> Refusal:
    place.mkdir(exist_ok=True)
    try:
        action(place / "out")
    except DareError as error:
        ranks.gather("all of them have left")
        return (
            type(error).__name__,
            str(error),
            error.exit_code,
            sorted(path.name for path in place.iterdir()),
        )
    return "nothing", "", 0, []


def on_a_disk(full: bool, action: Callable[[Path], object]) -> Callable[[Path], object]:
    """Where it is full, no file grows beyond 100 bytes: more is refused with EFBIG, much as with ENOSPC."""

    def act(out: Path) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            action(out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return act


def fail(rank: int, base: Path, tuned: Path, folder: Path) -> dict[str, Refusal]:
    """One failure after the other: ranks that have failed together can go on together."""
    ranks = joined()
    package = folder / "package"
    actions: dict[str, Callable[[Path], object]] = {
        "a base wrong on one": lambda out: apply(folder / "wrong-d.weight", package, out, ranks=ranks),
        "a base wrong on both": lambda out: apply(folder / "wrong-b.embeddings", package, out, ranks=ranks),
        "a damaged package": lambda out: apply(base, folder / "damaged", out, ranks=ranks),
        "no base on one": lambda out: extract(base / "none" if rank else base, tuned, out, ranks=ranks),
        "a place that is taken": lambda _: apply(base, package, package, ranks=ranks),
    }
    for failing in (0, 1):
        actions[f"extract: disk of {failing} full"] = on_a_disk(
            rank == failing, lambda out: extract(base, tuned, out, ranks=ranks)
        )
        actions[f"apply: disk of {failing} full"] = on_a_disk(
            rank == failing, lambda out: apply(base, package, out, ranks=ranks)
        )
    found = {name: refusal(ranks, folder / "place", action) for name, action in actions.items()}
    apply(base, package, folder / "place" / "out", ranks=ranks)
    return found


def change(state: State, name: str) -> State:
    changed = state[name].clone()
    changed.view(-1)[5] += 1
    return {**state, name: changed}


@pytest.fixture(scope="module")
def refusals(
    models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Refusal, Refusal]]:
    folder = tmp_path_factory.mktemp("failures")
    package = extract(*models, folder / "package")
    for name in ("d.weight", "b.embeddings"):
        save(change(load_file(models[0] / "model.safetensors"), name), folder / f"wrong-{name}")
    damaged = Path(shutil.copytree(package.path, folder / "damaged")) / "dare_delta.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    first, second = run_ranks(fail, 2, *models, folder)
    assert (folder / "place/out/model.safetensors").exists()
    return {name: (first[name], second[name]) for name in first}


def test_failures_leave_nothing(refusals: dict[str, tuple[Refusal, Refusal]]) -> None:
    assert len(refusals) == 9
    assert all(left == [] for _, _, _, left in (end for ends in refusals.values() for end in ends))


@pytest.mark.parametrize(
    ("name", "failing", "kind", "text", "code"),
    [
        ("a base wrong on one", 1, "BaseMismatch", "wrong-d.weight: d.weight: expected fingerprint", 1),
        ("no base on one", 1, "CheckpointError", "none: expected a folder or a Hub id", 1),
        ("a place that is taken", 0, "ConfigError", "expected another folder than those that are read", 2),
        ("extract: disk of 0 full", 0, "StorageError", "place/out: found File too large", 1),
        ("extract: disk of 1 full", 1, "StorageError", "place/out: found File too large", 1),
        (
            "apply: disk of 0 full",
            0,
            "StorageError",
            "nothing was left behind; free some space and run again",
            1,
        ),
        (
            "apply: disk of 1 full",
            1,
            "StorageError",
            "nothing was left behind; free some space and run again",
            1,
        ),
    ],
)
def test_the_failure_of_one_is_told_to_the_other(
    refusals: dict[str, tuple[Refusal, Refusal]], name: str, failing: int, kind: str, text: str, code: int
) -> None:
    own, told = refusals[name][failing], refusals[name][1 - failing]
    assert (own[0], own[2]) == (kind, code)
    assert text in own[1]
    assert told[:3] == ("RankError", f"rank {failing} failed: {own[1]}", code)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("a base wrong on both", "BaseMismatch", "wrong-b.embeddings: b.embeddings: expected fingerprint"),
        ("a damaged package", "PackageError", "expected SHA-256"),
    ],
)
def test_what_both_see_both_say(
    refusals: dict[str, tuple[Refusal, Refusal]], name: str, kind: str, text: str
) -> None:
    first, second = refusals[name]
    assert first == second
    assert first[0] == kind
    assert text in first[1]


def test_frames_that_a_machine_does_not_see(tmp_path: Path) -> None:
    """As a file system might show them that is not one."""
    spool = Spool(tmp_path, 1)
    segment = Segment(tensor=0, start=0, length=4, kept=4, changed=4, size=8)
    spool.write([Encoded(index=0, result=Fingerprint(1, 2), segment=segment, frame=bytes(8))])
    (tmp_path / ".frames-1").write_bytes(bytes(5))
    with pytest.raises(
        StorageError,
        match=r"\.frames-1: expected 8 bytes more, found 5; does the file system show all machines the same",
    ):
        spool.move_to(PackageWriter(tmp_path))


def test_the_exit_code_of_another_rank_travels_along() -> None:
    error = pickle.loads(pickle.dumps(RankError("rank 1 failed: p: expected a number", exit_code=2)))
    assert (type(error), str(error), error.exit_code) == (RankError, "rank 1 failed: p: expected a number", 2)


def test_a_launcher_that_says_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        RankError,
        match=r"launcher: expected 4 processes, as WORLD_SIZE says, found .*RANK .*; start them "
        r"with torchrun",
    ):
        launched().__enter__()


def test_without_torch_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("dare_train.parallel.ranks.find_spec", lambda _: None)
    with launched() as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)


# The command line.


def command(rank: int, *line: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command on this rank."""
    sys.argv = ["dare-train", *map(str, line)]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main()
    assert not dist.is_initialized()
    return code, out.getvalue(), err.getvalue()


def test_only_the_first_rank_speaks(models: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = run_ranks(command, 2, "extract", *models, "--out", tmp_path / "package")
    assert (first[0], first[2], second) == (0, "", (0, "", ""))
    assert first[1].count("\n") == first[1].count("bits per parameter") == 1


@pytest.mark.parametrize(
    ("taken", "code", "message"),
    [(True, 2, "OUT: expected a path that"), (False, 1, "rank 1 failed: WRONG: d.weight: ")],
)
def test_an_error_is_told_once(
    models: tuple[Path, Path], tmp_path: Path, taken: bool, code: int, message: str
) -> None:
    package, out = extract(*models, tmp_path / "package").path, tmp_path / "out"
    wrong = save(change(mixed(), "d.weight"), tmp_path / "wrong")
    if taken:
        save(mixed(), out)
    first, second = run_ranks(command, 2, "apply", wrong, package, "--out", out)
    assert (first[0], first[1], second) == (code, "", (code, "", ""))
    assert first[2].startswith("dare-train: " + message.replace("OUT", str(out)).replace("WRONG", str(wrong)))
    assert first[2].count("\n") == 1
    assert out.exists() == taken


def torchrun(*arguments: object) -> str:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dare_train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun(models: tuple[Path, Path], tmp_path: Path) -> None:
    said = torchrun("extract", *models, "--out", tmp_path / "package", "--p", "0.5")
    assert said.count("bits per parameter") == said.count("\n") == 1
    said = torchrun("apply", models[0], tmp_path / "package", "--out", tmp_path / "result")
    assert said.count("as on record") == said.count("\n") == 1
    alone = [
        ["extract", *map(str, models), "--p", "0.5"],
        ["apply", str(models[0]), str(tmp_path / "package")],
    ]
    for line, out in zip(alone, ("package", "result"), strict=True):
        subprocess.run(
            [sys.executable, "-m", "dare_train", *line, "--out", str(tmp_path / "alone" / out)],
            check=True,
            capture_output=True,
        )
        check_same(tmp_path / "alone" / out, tmp_path / out)


@pytest.mark.parametrize("world", [None, "1"])
def test_one_process_loads_no_torch(models: tuple[Path, Path], tmp_path: Path, world: str | None) -> None:
    arguments = ["dare-train", "extract", *map(str, models), "--out", str(tmp_path / "package")]
    code = (
        f"import sys; sys.argv = {arguments!r}\nfrom dare_train.cli.main import main\nassert "
        "main() == 0\nassert 'torch' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | (
        {"WORLD_SIZE": world} if world else {}
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
