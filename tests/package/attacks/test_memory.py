"""Small files that claim to be large: refused before the memory is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from forge import MANIFEST, PART, Forgery, checked, compressed

from dare_train import DeltaPackage
from dare_train.errors import PackageError

_BOUND = 96 << 20  # bytes; the smallest bomb below would take ten times that

_PROBE = """
import json, sys
from pathlib import Path
from dare_train import DeltaPackage, apply
from dare_train.applying.apply import rehearse
from dare_train.errors import PackageError

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

base, good, *bombs = sys.argv[1:]
rehearse(base, [good])
for bomb in bombs:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    try:
        package = DeltaPackage.open(bomb)
        package.verify()
        rehearse(base, [package])
        outcome = "accepted"
    except PackageError as error:
        outcome = str(error) if len(str(error)) < 1000 else f"a message of {len(str(error))} characters"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps([peak() - before, outcome]))
"""


def _probe(base: Path, good: Path, bombs: list[Path], program: str = _PROBE) -> list[tuple[int, str]]:
    """(bytes by which the peak of the process's memory rose, what was said) of each package."""
    command = [
        "bash",
        "-c",
        'ulimit -v 6000000; exec "$@"',
        "-",
        sys.executable,
        "-c",
        program,
        str(base),
        str(good),
        *map(str, bombs),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@cache
def _gigabyte(*, sized: bool) -> bytes:
    return compressed(bytes(1 << 30), write_content_size=sized)


def _gigabyte_frame(forgery: Forgery) -> None:
    forgery.set_frame("head", _gigabyte(sized=True))


def _gigabyte_behind_a_modest_header(forgery: Forgery) -> None:
    small = _gigabyte(sized=False)
    forgery.set_frame(
        "head", small[:4] + b"\x20\x64" + small[6:]
    )  # declares 100 bytes, as the table promises


def _gigabyte_without_a_size(forgery: Forgery) -> None:
    forgery.set_frame("head", _gigabyte(sized=False))


def _terabyte_frame(forgery: Forgery) -> None:
    forgery.set_frame("dense", b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00")


def _gigabyte_length(forgery: Forgery) -> None:
    """The manifest and the table agree on a tensor of a gigabyte in one segment."""
    forgery.tensor("head")["shape"] = [1 << 29]
    forgery.rows[forgery.segment("head")][2:5] = [1 << 29] * 3
    forgery.set_frame("head", _gigabyte(sized=True))


def _many_groups(forgery: Forgery) -> None:
    forgery.tensor("dense").update(values="int8", threshold=0)
    forgery.rows[forgery.segment("dense")][1] = 1 << 60


def _header_of_many_tensors(forgery: Forgery) -> Path:
    """11 MB of JSON that name 200,000 empty tensors, where two are expected."""
    header = {
        f"t{number}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(200_000)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    forgery.write_part(raw=len(text).to_bytes(8, "little") + text)
    forgery.write_manifest()
    return forgery.folder


@pytest.fixture(scope="module")
def bombs(good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    makers = [
        _gigabyte_frame,
        _gigabyte_behind_a_modest_header,
        _gigabyte_without_a_size,
        _terabyte_frame,
        _gigabyte_length,
        _many_groups,
    ]
    folder, made = tmp_path_factory.mktemp("bombs"), {}
    for make in makers:
        forgery = Forgery(good, folder / make.__name__)
        make(forgery)
        made[make.__name__] = forgery.seal()
        assert (made[make.__name__] / PART).stat().st_size < 1 << 20
    for name, length in (
        ("_header_of_a_gigabyte", 1 << 30),
        ("_header_of_everything", (1 << 64) - 1),
        ("_header_of_the_file", 1 << 26),
    ):
        forgery = Forgery(good, folder / name)
        forgery.write_part(
            raw=length.to_bytes(8, "little")
            + b'{"data":'
            + b" " * ((1 << 26) - 8 if length == 1 << 26 else 100)
        )
        forgery.write_manifest()
        made[name] = forgery.folder
    made["_header_of_many_tensors"] = _header_of_many_tensors(
        Forgery(good, folder / "_header_of_many_tensors")
    )
    return made


def test_bombs_are_refused_at_bounded_memory(bombs: dict[str, Path], base: Path, good: Path) -> None:
    outcomes = dict(zip(bombs, _probe(base, good, list(bombs.values())), strict=True))
    assert len(outcomes) == 10
    for name, (rise, said) in outcomes.items():
        assert "expected" in said, (name, said)
        assert rise < _BOUND, (name, rise, said)


def test_the_probe_can_tell(base: Path, good: Path) -> None:
    """A process that does take the memory is seen to take it."""
    greedy = _PROBE.replace("    try:\n", "    _ = bytes([1]) * (200 << 20)\n    try:\n", 1)
    ((rise, said),) = _probe(base, good, [good], greedy)
    assert rise > _BOUND
    assert said == "accepted"


@pytest.mark.parametrize("numel", [1 << 40, 1 << 60])
def test_a_whole_tensor_larger_than_what_its_frames_can_hold_is_refused(forgery: Forgery, numel: int) -> None:
    """Only `verify` is tried: `apply` of a package that it believed would write terabytes."""
    forgery.tensor("head")["shape"] = [numel]
    forgery.seal()
    with pytest.raises(PackageError) as caught:
        DeltaPackage.open(forgery.folder).verify()
    checked(caught.value, "head")


def test_added_rows_beyond_what_their_frames_can_hold_are_refused(forgery: Forgery) -> None:
    forgery.tensor("embed")["shape"] = [1 << 40, 16]
    forgery.seal()
    with pytest.raises(PackageError) as caught:
        DeltaPackage.open(forgery.folder).verify()
    checked(caught.value, "embed")


def test_an_empty_tensor_of_absurd_shape_is_refused(forgery: Forgery) -> None:
    """No element, but a header that no safetensors reader opens."""
    forgery.tensor("head")["shape"] = [0, 1 << 70]
    del forgery.rows[forgery.segment("head")], forgery.frames[2]
    forgery.write_manifest()
    with pytest.raises(PackageError) as caught:
        DeltaPackage.open(forgery.folder)
    checked(caught.value, MANIFEST, "head", "a shape")


def test_a_table_that_is_larger_than_the_file_is_refused(forgery: Forgery) -> None:
    header = {"segments": {"dtype": "I64", "shape": [1 << 40, 6], "data_offsets": [0, 48 << 40]}}
    header["data"] = {"dtype": "U8", "shape": [0], "data_offsets": [48 << 40, 48 << 40]}
    text = json.dumps(header).encode()
    forgery.write_part(raw=len(text).to_bytes(8, "little") + text + np.zeros(60, np.uint8).tobytes())
    forgery.write_manifest()
    with pytest.raises(PackageError) as caught:
        DeltaPackage.open(forgery.folder).verify()
    checked(caught.value, PART, "a safetensors file")
