"""Merges in a process of its own, to be killed.

`merge_driver.py slowly SECONDS OUT OPTIONS BASE MODEL...` takes so long for each run and prints the names of
those that it did; `merge_driver.py everywhere PLACE OLD OPTIONS BASE MODEL...` forks a child for every
operation on files that a merge does, which dies right before it, merges again, and prints one JSON object for
each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dare_train import merge
from dare_train.merging.merged_weights import Merged

_EVENTS = ("open", "os.", "shutil.", "mmap.")


def slowly(seconds: str, out: str, options: str, base: str, *models: str) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # shells start what runs in the background with it ignored
    run = Merged.run

    def slow(self: Merged, name: str, start: int, count: int) -> Any:
        time.sleep(float(seconds))
        words = run(self, name, start, count)
        sys.stdout.write(f"{name}\n")  # at once: print writes the end of the line by itself
        sys.stdout.flush()
        return words

    Merged.run = slow  # type: ignore[method-assign]
    merge(base, models, out, **json.loads(options))
    print("done", flush=True)


def content(folder: Path) -> dict[str, int] | None:
    return (
        {str(path.relative_to(folder)): hash(path.read_bytes()) for path in folder.rglob("*")}
        if folder.exists()
        else None
    )


def die_at(moment: int) -> None:
    left = [moment]

    def count(event: str, _: object) -> None:
        if event.startswith(_EVENTS):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def everywhere(place: str, old: str, options: str, base: str, *models: str) -> None:
    def act(out: Path) -> None:
        merge(base, models, out, overwrite=True, **json.loads(options))

    out, finished = Path(place) / "out", Path(place).with_name("finished")
    act(finished)  # everything is compiled and warm before the first fork
    for moment in range(1, 2000):
        shutil.rmtree(place)
        Path(place).mkdir()
        if old:
            shutil.copytree(old, out)
        process = os.fork()
        if not process:
            die_at(moment)
            act(out)
            os._exit(0)
        status = os.waitpid(process, 0)[1]
        found, left = content(out), sorted(path.name for path in Path(place).iterdir() if path.name != "out")
        states = {"absent": None, "new": content(finished), **({"old": content(Path(old))} if old else {})}
        state = next((name for name, whole in states.items() if found == whole), "half")
        act(out)
        after = sorted(path.name for path in Path(place).iterdir())
        print(
            json.dumps(
                dict(status=status, state=state, left=left, after=after, new=content(out) == states["new"])
            )
        )
        if status == 0:
            return


{"slowly": slowly, "everywhere": everywhere}[sys.argv[1]](*sys.argv[2:])
