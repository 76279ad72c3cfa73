"""A command that is asked to leave clears up what it was writing, whoever asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import base_state, moved, save

from dare_train import extract, merge

SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process was told to ignore
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from dare_train.applying.resolver import Resolver
from dare_train.cli.main import command
from dare_train.merging.merged_weights import Merged
honest, merged = Resolver.resolve, Merged.run
def resolve(*given, **named):
    time.sleep(0.3)
    return honest(*given, **named)
def run(*given):
    words = merged(*given)
    time.sleep(0.3)
    return words
Resolver.resolve, Merged.run = resolve, run
command()
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def asked(place: Path, number: signal.Signals, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command that gets a signal while it writes."""
    command = [sys.executable, "-c", SLOWLY, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        until = time.monotonic() + 60
        while not list(place.glob(".out.*.partial/*.safetensors")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_apply_leaves_nothing_and_says_which_signal_it_was(tmp_path: Path, number: signal.Signals) -> None:
    base, place = save(base_state(), tmp_path / "base"), tmp_path / "place"
    package = extract(base, moved(base_state()), tmp_path / "package").path
    place.mkdir()
    done = asked(place, number, "apply", base, package, "--out", place / "out")
    assert done.returncode == 128 + number
    assert list(place.iterdir()) == []
    assert "Traceback" not in done.stderr


def test_a_merge_can_be_gone_on_with_as_after_ctrl_c(tmp_path: Path) -> None:
    base, place = save(base_state(), tmp_path / "base"), tmp_path / "place"
    tuned = save(moved(base_state()), tmp_path / "tuned")
    place.mkdir()
    done = asked(place, signal.SIGTERM, "merge", base, tuned, "--out", place / "out")
    assert done.returncode == 128 + signal.SIGTERM
    assert [path.suffix for path in place.iterdir()] == [".partial"], (
        "the lock's file is gone, the work is not"
    )
    merge(base, [tuned], place / "out")
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As under `nohup`."""
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from dare_train.cli.leaving import leave_cleanly; leave_cleanly()\n"
        "assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
        "assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def test_a_program_that_imports_the_library_keeps_its_signals() -> None:
    code = (
        "import signal, dare_train; dare_train.extract, dare_train.apply\n"
        "import dare_train.cli.main\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
