"""The rooms of `dare_train`, read from its imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import dare_train

PACKAGE = Path(dare_train.__file__).parent


def modules() -> dict[str, Path]:
    """Every module but the public face, by its name within the package."""
    names = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts): path for path, parts in names.items() if parts[-1] != "__init__"}


def room_of(module: str) -> str:
    """The folder that a module lies in; itself where it lies in none."""
    return module.rpartition(".")[0] or module


def imported(tree: ast.AST, parents: list[str]) -> Iterator[str]:
    """Full names of what is imported from this package, anywhere in the text of a module in a folder."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = parents[: len(parents) - node.level + 1]
            base = [*start, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
            yield ".".join(base)


def edges() -> dict[str, set[str]]:
    """What each module imports of this package."""
    known = modules()
    trees = {name: ast.parse(path.read_text()) for name, path in known.items()}
    return {name: {*imported(tree, name.split(".")[:-1])} & known.keys() for name, tree in trees.items()}


def between_rooms(imports: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    pairs = {(room_of(name), room_of(other)) for name, others in imports.items() for other in others}
    return {(room, other) for room, other in pairs if room != other}


def arrows_up(rooms: list[list[str]], arrows: set[tuple[str, str]]) -> list[tuple[str, str]]:
    floor = {room: number for number, floor in enumerate(rooms) for room in floor}
    return sorted((room, other) for room, other in arrows if floor[other] >= floor[room])


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports; none where there is no circle."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def floors(arrows: set[tuple[str, str]], rooms: set[str]) -> list[list[str]]:
    """The rooms, each on the lowest floor that is above all that it imports from."""
    below = {room: {other for name, other in arrows if name == room} for room in rooms}
    number: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        number[room] = 1 + max((number[other] for other in below[room]), default=-1)
    return [sorted(room for room in rooms if number[room] == n) for n in range(max(number.values()) + 1)]
