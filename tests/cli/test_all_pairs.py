"""Every command that writes a folder against every other at one `--out`, each in a process of its own: the
first wins whole, and the second is told in one line who holds the place. (`push` writes nothing here.)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from commands import LAUNCHERS, Done
from engines import run_ranks
from gguf_models import write_gguf
from studying import Words, tuned_model
from training import classifier, make_trainer, save_base

from dare_train import DareCallback, DeltaPackage, extract
from dare_train.cli import main as cli
from dare_train.errors import DareError
from dare_train.package import sharing

MEASURED = ["--data", "texts.jsonl", "--p", "0.5", "--seeds", "1"]
SEARCHED = ["--search", "weight.0=0.5,1", "--eval", "scores:of_size"]
COMMANDS = {
    "extract": ["extract", "base", "tuned", "--p", "0.5", "--overwrite"],
    "apply": ["apply", "base", "package", "--overwrite"],
    "merge": ["merge", "base", "tuned", "--weight", "0.5", "--overwrite"],
    "merge --package": ["merge", "base", "tuned", "--weight", "0.5", "--package", "--overwrite"],
    "merge --search": ["merge", "base", "tuned", *SEARCHED, "--overwrite"],
    "lora": ["lora", "base", "tuned", "--rank", "2", "--overwrite"],
    "dequantize": ["dequantize", "tiny.gguf", "--overwrite"],
    "pull": ["pull", "me/package", "--overwrite"],
    "sweep": ["sweep", "base", "tuned", *MEASURED, "--variants", "dare"],
    "inside": ["inside", "base", "tuned", *MEASURED, "--masks", "2", "--tokens", "16"],
    "compare": ["compare", "base", "tuned", *MEASURED, "--rank", "1"],
    "training": [],
}
"""Without `--out`; what a training writes its packages into is a folder, too."""
MOMENTS = {"pwrite": tuple(COMMANDS), "fsync": ("apply", "sweep", "training")}
"""When the first of two is stopped: it has taken the place; and what it writes is on its way to the disk. And
who then comes second."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    save_base(place / "base", layers=1)
    tuned_model(place / "base").save_pretrained(place / "tuned")
    Words.save(place / "tuned")
    extract(place / "base", place / "tuned", place / "package", p=0.5)
    write_gguf(place / "tiny.gguf")
    rows = [{"text": f"w{number} w{number + 1} w7", "label": number % 3} for number in range(8)]
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "scores.py").write_text(
        "from pathlib import Path\n\n\ndef of_size(folder):\n"
        "    return sum(path.stat().st_size for path in Path(folder).iterdir())\n"
    )
    return place


def run(name: str, inputs: Path, out: Path) -> Done:
    """A command, or a training, in this process."""
    words = [name, *COMMANDS[name][1:], "--out", str(out)]
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(io.StringIO()) as told,
        contextlib.chdir(inputs),
        patch.object(sys, "argv", ["dare-train", *COMMANDS[name][:1], *words[1:]]),
        patch.object(sys, "path", [*sys.path]),
        patch.object(sharing, "_inside", lambda _: {"": DeltaPackage.open(inputs / "package")}),
    ):
        code = _trained(inputs, out) if name == "training" else cli.main()
    return Done(code, said.getvalue(), told.getvalue())


def _trained(inputs: Path, out: Path) -> int:
    callback = DareCallback(p=0.5, when=(1, "end"), name=out.name)
    model = classifier(inputs / "base")
    trainer = make_trainer(model, out.parent, callback, max_steps=2, save_strategy="no")
    try:
        trainer.train()
    except DareError as error:
        print(f"dare-train: {error}", file=sys.stderr)
        return 2
    assert callback.failures == []
    return 0


def run_with_stops(_rank: int, name: str, inputs: str, out: str) -> Done:
    """The same, stopped by itself at each of the moments."""
    for variable in LAUNCHERS:
        del os.environ[variable]

    def stopping(call: Callable[..., Any]) -> Callable[..., Any]:
        waited = False

        def stop_once(*arguments: Any) -> Any:
            nonlocal waited
            result = call(*arguments)
            if not waited:
                waited = True
                os.kill(os.getpid(), signal.SIGSTOP)
            return result

        return stop_once

    with contextlib.ExitStack() as stack:
        for moment in MOMENTS:
            stack.enter_context(patch.object(os, moment, stopping(getattr(os, moment))))
        return run(name, Path(inputs), Path(out))


def content(folder: Path) -> dict[str, bytes | None]:
    """Names of files, and what weights and packages hold."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.suffix == ".safetensors" else None
        for path in files
    }


def stopped(lock: Path, running: Future[Done]) -> int:
    """The process that has a lock, once it has stopped."""
    while not running.done():
        with contextlib.suppress(FileNotFoundError):
            found = re.match(r"process (\d+) ", lock.read_text())
            if found and Path(f"/proc/{found[1]}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return int(found[1])
        time.sleep(0.005)
    raise AssertionError(f"nobody stopped with {lock}: {running.result()}")


@contextlib.contextmanager
def going_on(process: int) -> Iterator[None]:
    """After the block, whatever becomes of it."""
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.parametrize("first", sorted(COMMANDS))
def test_the_second_at_a_place_is_told_who_is_the_first(first: str, inputs: Path, tmp_path: Path) -> None:
    alone = run(first, inputs, tmp_path / "alone" / "out")
    assert alone.returncode == 0, alone.stderr
    out = tmp_path / "shared" / "out"
    with ThreadPoolExecutor(1) as pool:
        winner = pool.submit(run_with_stops_apart, first, inputs, out)
        for seconds in MOMENTS.values():
            holder = stopped(out.with_name(f".{out.name}.lock"), winner)
            with going_on(holder):
                for second in seconds:
                    told = run(second, inputs, out)
                    (line,) = [one for one in told.stderr.splitlines() if one.startswith("dare-train: ")]
                    assert told.returncode == 2, (second, line)
                    assert f"found process {holder} on " in line, second
        assert winner.result().returncode == 0, winner.result().stderr
    assert content(out) == content(tmp_path / "alone" / "out")
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def run_with_stops_apart(name: str, inputs: Path, out: Path) -> Done:
    [done] = run_ranks(run_with_stops, 1, name, str(inputs), str(out))
    return done
