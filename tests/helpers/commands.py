"""The `dare-train` command in a process of its own, forked from one that has imported everything.

`tests/cli/test_cli.py` starts it as a person does, which takes seconds each time.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from engines import run_ranks

from dare_train.cli import main as cli

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def dare_train(*words: object, cwd: Path) -> Done:
    """What `dare-train WORDS` says and returns, in the folder `cwd`."""
    [done] = run_ranks(_command, 1, cwd, [str(word) for word in words])
    return done


def _command(_rank: int, folder: Path, words: list[str]) -> Done:
    for name in LAUNCHERS:
        del os.environ[name]
    os.chdir(folder)
    sys.argv = ["dare-train", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = cli.main()
        except Exception:  # noqa: BLE001 - as the interpreter does
            traceback.print_exc()
            code = 1
    return Done(code, out.getvalue(), err.getvalue())
