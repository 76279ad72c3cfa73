"""What may lie in the place of a file."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dare_train.errors import CheckpointError, ConfigError
from dare_train.reading.plain_files import content


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert content(tmp_path / "a", at_most=3) == content(tmp_path / "link", at_most=4) == b"abc"


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "round").symlink_to(tmp_path / "round")
    found = {"pipe": "a pipe", "folder": "a folder", "none": "no such file", "round": "Too many levels"}
    for name, text in found.items():
        with pytest.raises(CheckpointError, match=f"{name}: expected a file, found {text}"):
            content(tmp_path / name, at_most=3)
    with pytest.raises(CheckpointError, match="expected a file, found a device"):
        content(Path("/dev/zero"), at_most=3)


def test_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(CheckpointError, match="expected a file, found"):
            content(tmp_path / "socket", at_most=3)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "a/" * 5000])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a file, found"):
        content(tmp_path / name, at_most=3, error=ConfigError)


def test_files_that_are_too_large(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"a: expected at most 5 bytes, found 1,099,511,627,776"):
        content(tmp_path / "a", at_most=5)
