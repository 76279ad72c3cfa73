"""What is read stays: an output takes the place of nothing that it is made from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import ConfigError


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """An output is none of what is read, and holds none of it, by whatever links. It may lie inside an input.
    Nor is it the working folder, or holds it: whoever stands there would be left in one that was removed.

    Raises:
        ConfigError: naming the input.
    """
    if not out.exists():
        return
    place = out.stat()
    here = _working_folder()
    if any(os.path.samestat(place, above.stat()) for above in here):
        raise ConfigError(
            "out",
            expected="another folder than the one that this process works in",
            found=f"{out}, which is that, or holds it: {here[0]}",
            remedy="choose another place for the result, or go elsewhere",
        )
    for given in inputs:
        if not given.exists():
            continue
        for path in _reaches(given):
            if any(
                os.path.samestat(place, above.stat()) for above in (path, *path.parents) if above.exists()
            ):
                where = "that, or one that holds it" if given.resolve() != out.resolve() else "that"
                raise ConfigError(
                    "out",
                    expected="another folder than those that are read",
                    found=f"{out}, which is {where}: {given}",
                    remedy="choose another place for the result",
                )


def _working_folder() -> list[Path]:
    """This process's, and all above it; none, if it was removed."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return []
    return [here, *here.parents]


def _reaches(given: Path) -> Iterator[Path]:
    """Where an input lies: by the path that was given, and by what it and the files in it lead to."""
    yield from _hops(given)
    if given.is_dir():
        for folder, folders, files in os.walk(given):
            for name in (*folders, *files):
                path = Path(folder, name)
                if path.is_symlink():
                    yield from _hops(path)


def _hops(path: Path) -> Iterator[Path]:
    """A path, each link that it leads to, and where it ends."""
    seen: set[str] = set()
    hop = os.path.abspath(path)  # noqa: PTH100 - as it is written: Path.absolute keeps `..`
    while hop not in seen:
        seen.add(hop)
        yield Path(hop)
        if os.path.islink(hop):  # noqa: PTH114
            hop = os.path.join(os.path.dirname(hop), Path(hop).readlink())  # noqa: PTH118, PTH120
    yield path.resolve()
