"""Everything that was ever found, and some hundred inputs of each kind; `scripts/fuzz` tries millions."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from changes import OUTSIDE
from corpus import CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import KINDS, WRITTEN_OUTSIDE, Input, build, make_good, tried
from made_up import inputs


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_what_was_found(name: str, good: Path, tmp_path: Path) -> None:
    for number, given_ in enumerate(CORPUS[name]):
        tried(given_, good, tmp_path / str(number))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_inputs_of_a_kind(kind: str, good: Path, tmp_path: Path) -> None:
    numbers = count()

    @settings(max_examples=60)
    @given(inputs(kind))
    def try_one(one: Input) -> None:
        tried(one, good, tmp_path / str(next(numbers)))

    try_one()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_change_is_written_through_a_link(kind: str, good: Path, tmp_path: Path) -> None:
    """Whoever runs this may write to more than an input's folder."""
    for number, file in enumerate(KINDS[kind].files):
        changes = (
            ("kind", file, "link"),
            ("cut", file, 3),
            ("put", file, 1, "[", 9),
            ("set", file, 0, "zero"),
            ("at", file, [""], 1),
        )
        place = tmp_path / str(number)
        build(Input(kind, changes), good, place)
        assert (place / KINDS[kind].changed / file).is_symlink()
        assert (place / OUTSIDE).read_bytes() == WRITTEN_OUTSIDE


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_good_files_are_taken(kind: str, good: Path, tmp_path: Path) -> None:
    """What is refused is so for what was changed."""
    for action in range(len(KINDS[kind].actions)):
        assert tried(Input(kind, (), action=action), good, tmp_path / "place")


@given(st.sampled_from(sorted(KINDS)).flatmap(inputs))
def test_inputs_can_be_written_down(one: Input) -> None:
    assert Input.read(one.written()) == one
