"""`dare-train run -- COMMAND`: what it starts, what it adds to Trainers, and what it says afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import refusal
from training import save_base

from dare_train import DeltaPackage
from dare_train.errors import DareError, SnapshotError
from dare_train.integrations.run_order import VARIABLE, Note
from dare_train.integrations.running import check_outcome

HELPERS = Path(__file__).parents[1] / "helpers"
PYTHON = sys.executable

TRAINS = f"""
import sys
sys.path.insert(0, {str(HELPERS)!r})
from pathlib import Path
from training import classifier, make_trainer
from dare_train import DareCallback
from dare_train.integrations.added_callback import Witness

def trainer(out, *callbacks):
    return make_trainer(classifier(Path("base")), Path(out), *callbacks)

def callbacks_of(made):
    return [one for one in made.callback_handler.callbacks if isinstance(one, (DareCallback, Witness))]
"""


def started(*words: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [PYTHON, "-m", "dare_train", "run", *words]
    return subprocess.Popen(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(*words: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    process = started(*words, cwd=cwd, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def path_with(folder: Path) -> str:
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(folder), *([before] if before else [])])


def told(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("dare-train: ")]


def test_options_are_checked_before_anything_starts(tmp_path: Path) -> None:
    code, _, err = run("--dare", "q=0.9", "--", "touch", "started", cwd=tmp_path)
    assert code == 2
    assert len(told(err)) == 1
    assert not (tmp_path / "started").exists()


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    code, _, err = run("--", "no-such-command", cwd=tmp_path)
    assert code == 2
    assert told(err) == ["dare-train: no-such-command: expected a program to run, found none of that name"]


def test_a_command_without_a_trainer(tmp_path: Path) -> None:
    code, out, err = run("--", PYTHON, "-c", "print('hello')", cwd=tmp_path)
    assert (code, out) == (1, "hello\n")
    assert len(err.splitlines()) == 1
    assert "expected a Trainer of transformers, found none made" in err


def test_the_exit_code_is_handed_on(tmp_path: Path) -> None:
    assert run("--", PYTHON, "-c", "raise SystemExit(7)", cwd=tmp_path) == (7, "", "")


def test_a_signal_that_ends_the_command(tmp_path: Path) -> None:
    assert run("bash", "-c", "kill -KILL $$", cwd=tmp_path) == (128 + signal.SIGKILL, "", "")


def test_a_signal_reaches_the_command(tmp_path: Path) -> None:
    script = "trap 'echo cleared; exit 3' TERM; touch ready; while :; do sleep 0.05; done"
    process = started("--", "bash", "-c", script, cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (3, "cleared\n")


def test_the_command_has_its_arguments_and_its_environment(tmp_path: Path) -> None:
    show = "import sys, os; print(sys.argv[1:], os.environ.get('OPENBLAS_NUM_THREADS')); sys.exit(4)"
    words = ("--p", "1", "--", "--debug", "--help")
    environment = {"OPENBLAS_NUM_THREADS": "5"}
    assert run("--", PYTHON, "-c", show, *words, cwd=tmp_path, **environment)[1] == f"{[*words]} 5\n"
    code = "from dare_train.cli.main import command; command()"
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(
        [PYTHON, "-c", code, "run", "--", PYTHON, "-c", show], capture_output=True, text=True, env=env
    )
    assert done.stdout == "[] None\n"


def test_one_run_around_a_command(tmp_path: Path) -> None:
    code, _, err = run("--", "true", cwd=tmp_path, **{VARIABLE: "{}"})
    assert code == 2
    assert "found another around it" in err


def test_a_sitecustomize_that_was_there_has_its_turn(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/sitecustomize.py").write_text("import builtins; builtins.mine = __file__\n")
    show = "import sys, sitecustomize; print(mine, sitecustomize.__file__, 'dare_train' in sys.modules)"
    for options in ([], ["-W", "error"]):
        _, out, err = run(
            "--", PYTHON, *options, "-c", show, cwd=tmp_path, PYTHONPATH=path_with(tmp_path / "mine")
        )
        place = str(tmp_path / "mine/sitecustomize.py")
        assert out.split() == [place, place, "False"], err


def test_a_python_without_dare_train_says_so(tmp_path: Path) -> None:
    package = tmp_path / "path/transformers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "trainer.py").write_text("class Trainer: pass\n")
    code, _, err = run(
        "--", PYTHON, "-S", "-c",
        "import sys, sitecustomize; sys.modules['dare_train'] = None; import transformers.trainer",
        cwd=tmp_path, PYTHONPATH=path_with(tmp_path / "path"),
    )  # fmt: skip
    assert code == 1
    assert "has no dare_train: install it there" in err.splitlines()[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_base(folder / "base")
    return folder


def test_trainers_of_a_script_and_of_what_it_starts(place: Path) -> None:
    """A module, a script and a process started by another one; two Trainers in one process."""
    (place / "trains.py").write_text(TRAINS)
    (place / "script.py").write_text(
        "from trains import *\n"
        "first, second = trainer('first'), trainer('second')\n"
        "first.train(), second.train()\n"
        "assert [type(one).__name__ for one in callbacks_of(first)] == ['DareCallback', 'Witness']\n"
    )
    starts = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', 'script']))"
    code, _, err = run("--dare", "p=0.5", "--dare", "when=end", "--", PYTHON, "-c", starts, cwd=place)
    assert code == 0, err
    for out in ("first", "second"):
        package = DeltaPackage.open(place / out / "dare/final")
        package.verify(place / "base")
        assert {record.p for record in package.manifest.tensors if record.kind == "delta"} == {0.5}
        assert [path.name for path in (place / out / "dare").iterdir()] == ["final"]


def test_a_callback_of_the_commands_own_stays_the_only_one(place: Path) -> None:
    (place / "trains.py").write_text(TRAINS)
    (place / "own.py").write_text(
        "from trains import *\n"
        "given, added = trainer('given', DareCallback(p=0.25)), trainer('added')\n"
        "added.add_callback(DareCallback(p=0.25))\n"
        "for made in (given, added):\n"
        "    made.train()\n"
        "    assert sorted(type(one).__name__ for one in callbacks_of(made)) == ['DareCallback', 'Witness']\n"
    )
    code, _, err = run("--dare", "p=0.5", "--", PYTHON, "own.py", cwd=place)
    assert code == 0, err
    assert told(err) == ["dare-train: the command has a DareCallback of its own; --dare was not for it"]
    for out in ("given", "added"):
        manifest = DeltaPackage.open(place / out / "dare/final").manifest
        assert {record.p for record in manifest.tensors if record.kind == "delta"} == {0.25}


def test_a_trainer_that_never_trains(place: Path) -> None:
    (place / "trains.py").write_text(TRAINS)
    (place / "idle.py").write_text("from trains import *\ntrainer('idle').evaluate()\n")
    code, _, err = run("--", PYTHON, "idle.py", cwd=place)
    assert code == 1
    (line,) = told(err)
    assert "expected a training, found Trainer made, and never trained" in line


OUTCOMES = {
    "none made": [],
    "never trained": [Note("made", "SFTTrainer")],
    "did not end": [Note("made", "SFTTrainer"), Note("began", "SFTTrainer")],
    "none was due": [Note("made", "T"), Note("began", "T"), Note("ended", "T")],
    "3 failures": [Note("made", "T"), Note("began", "T"), Note("ended", "T", failures=3)],
}


@pytest.mark.parametrize("text", OUTCOMES)
def test_outcomes_that_are_refused(text: str) -> None:
    with pytest.raises(DareError) as caught:
        check_outcome(OUTCOMES[text], "trl sft")
    refusal(caught.value, SnapshotError, "run trl sft: expected", text)


def test_outcomes_that_are_right() -> None:
    check_outcome([Note("made", "T"), Note("began", "T"), Note("ended", "T", packages=1, failures=1)], "x")
    check_outcome([Note("own", "T"), Note("began", "T"), Note("ended", "T")], "x")
