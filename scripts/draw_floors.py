"""A picture of the rooms of `dare_train`, floor by floor, and of what they stand on: see `scripts/floors`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from rooms import between_rooms, edges, floors, modules, room_of

WIDTH = 2.6
"""Of a room, in inches."""
HEIGHT = 0.95
"""Of a floor."""
LINES = "#9aa5ae"
FRAME = "#1f5fa8"


def direct(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without those that others imply: of a → b → c and a → c, the first two."""
    below: dict[str, set[str]] = {}
    for room, other in arrows:
        below.setdefault(room, set()).add(other)

    def all_below(room: str) -> set[str]:
        return set().union(*({other} | all_below(other) for other in below.get(room, ())))

    implied = {(room, deeper) for room in below for other in below[room] for deeper in all_below(other)}
    return arrows - implied


def places(by_floor: list[list[str]]) -> dict[str, tuple[float, float]]:
    """The middle of each room, in inches; a floor's rooms side by side, around the middle."""
    return {
        room: (WIDTH * (number - (len(rooms) - 1) / 2), HEIGHT * floor)
        for floor, rooms in enumerate(by_floor)
        for number, room in enumerate(rooms)
    }


def draw(path: Path) -> None:
    names = modules()
    arrows = between_rooms(edges())
    by_floor = floors(arrows, {room_of(name) for name in names})
    middle = places(by_floor)
    widest = max(map(len, by_floor))
    figure, axes = plt.subplots(figsize=(WIDTH * widest, HEIGHT * len(by_floor)), layout="constrained")
    for room, other in sorted(direct(arrows)):
        axes.annotate(
            "",
            xy=middle[other],
            xytext=middle[room],
            arrowprops={"arrowstyle": "-|>", "color": LINES, "lw": 1.0, "shrinkA": 18, "shrinkB": 18},
        )
    for room, (x, y) in middle.items():
        inside = [name for name in names if room_of(name) == room]
        label = room if inside == [room] else f"{room}\n{len(inside)} files"
        box = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": FRAME, "lw": 1.0}
        axes.text(x, y, label, ha="center", va="center", fontsize=9, bbox=box)
    axes.set_xlim(-WIDTH * widest / 2, WIDTH * widest / 2)
    axes.set_ylim(-HEIGHT / 2, HEIGHT * (len(by_floor) - 0.5))
    axes.axis("off")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
