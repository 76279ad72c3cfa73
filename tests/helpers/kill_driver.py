"""Runs one action again and again in children that are killed, each at another moment, and looks at what they
leave.

Arguments: action, base, tuned, package, place, old (a complete output to be replaced, or ""). Prints one JSON
object for each kill. The moments are every audited operation on files (open, mkdir, rename, remove ...), in
order, and then instants in between.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from dare_train import apply, extract

_EVENTS = ("open", "os.", "shutil.", "mmap.")


def act(action: str, base: str, tuned: str, package: str, out: Path) -> None:
    if action == "extract":
        extract(base, tuned, out, overwrite=True)
    else:
        apply(base, package, out, overwrite=True)


def child(moment: int, delay: float, *arguments: object) -> int:
    """Fork; the child dies before its `moment`-th operation on files, or after `delay` seconds. Returns how
    it ended.
    """
    process = os.fork()
    if process:
        if delay:
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
        return os.waitpid(process, 0)[1]
    if moment:
        die_at(moment)
    act(*arguments)  # type: ignore[arg-type]
    os._exit(0)


def die_at(moment: int) -> None:
    left = [moment]

    def count(event: str, _: object) -> None:
        if event.startswith(_EVENTS):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def content(folder: Path) -> dict[str, int] | None:
    return (
        {str(path.relative_to(folder)): hash(path.read_bytes()) for path in folder.rglob("*")}
        if folder.exists()
        else None
    )


def names(folder: str, *, besides: str = "") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir() if path.name != besides)


def main(action: str, base: str, tuned: str, package: str, place: str, old: str) -> None:
    out, finished = Path(place) / "out", Path(place).with_name("finished")
    act(action, base, tuned, package, finished)  # everything is compiled and warm before the first fork
    began = time.perf_counter()
    act(action, base, tuned, package, finished)
    took = time.perf_counter() - began
    moments = [(number, 0.0) for number in range(1, 1000)] + [(0, took * part / 10) for part in range(1, 11)]
    completed = False
    for moment, delay in moments:
        if completed and moment:
            continue
        shutil.rmtree(place)
        Path(place).mkdir()
        if old:
            shutil.copytree(old, out)
        status = child(moment, delay, action, base, tuned, package, out)
        completed = completed or bool(moment and status == 0)
        found = content(out)
        states = {"absent": None, "new": content(finished), **({"old": content(Path(old))} if old else {})}
        state = next((name for name, whole in states.items() if found == whole), "half")
        kill = {"moment": moment, "status": status, "state": state, "left": names(place, besides="out")}
        act(action, base, tuned, package, out)
        print(json.dumps(kill | {"after": names(place), "new": content(out) == states["new"]}))


main(*sys.argv[1:])
