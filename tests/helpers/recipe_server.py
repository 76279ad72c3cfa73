"""A process that runs recipes in forks of itself: it has imported the libraries and parsed the standard
library, which takes each recipe longer than what it measures.

It is told of one run a line, as JSON, and answers with its exit code. A recipe is the main module of a
process of its own all the same, with its own arguments, environment and streams.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

PRELOADED = (
    "torch",
    "torch._dynamo",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "accelerate",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "peft",
    "trl.trainer.sft_trainer",
    "rich.markdown",
    "dare_train.cli.main",
    "worked_out_once",
)
ROOT = Path(__file__).parents[2]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print when they are imported is no answer
    sys.path[0] = str(ROOT / "recipes")
    sys.path.append(str(ROOT / "tests/helpers"))
    for name in PRELOADED:
        importlib.import_module(name)
    standard_library = importlib.import_module("standard_library")
    assert all(file.tree for file in standard_library.parsed_files())
    gc.freeze()  # what was imported is not looked through again, which each Trainer would do twice
    os.fsync = os.fstat  # no test cuts the power
    for line in sys.stdin:
        run = json.loads(line)
        child = os.fork()
        if child == 0:
            _recipe(**run)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _recipe(recipe: str, options: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """As the interpreter runs a file. It ends by `os._exit`: what exiting undoes is the server's."""
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [recipe, *options]
    code: object = 0
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - printed, as the interpreter does
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
