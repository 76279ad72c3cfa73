"""What several processes wrote, beside what one wrote."""

from __future__ import annotations

from pathlib import Path


def files(folder: Path) -> dict[str, bytes]:
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert found, f"nothing in {folder}"
    return found


def check_same(one: Path, other: Path) -> None:
    left, right = files(one), files(other)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []
