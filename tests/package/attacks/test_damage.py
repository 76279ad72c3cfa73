"""Bytes lost or changed on the way: found before anything is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from forge import MANIFEST, PART, Forgery, checked, refused

from dare_train import DeltaPackage, apply
from dare_train.applying.apply import rehearse
from dare_train.errors import DareError, PackageError
from dare_train.package.manifest_reader import load
from dare_train.weights.files.checkpoint import Checkpoint


def _survivors(path: Path, damaged: list[bytes]) -> list[int]:
    """Numbers of the damaged manifests that were believed, or refused in a message that does not help."""
    survivors = []
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        try:
            load(path)
            survivors.append(number)
        except PackageError as error:
            survivors += [number] if str(path) not in str(error) or "\n" in str(error) else []
    return survivors


@pytest.mark.parametrize("bit", [0x01, 0x20])
def test_each_flipped_byte_of_the_manifest_is_found(forgery: Forgery, bit: int) -> None:
    path = forgery.folder / MANIFEST
    good = path.read_bytes()
    flipped = [good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :] for place in range(len(good))]
    assert len(flipped) == len(good) > 2000
    assert _survivors(path, flipped) == []


def test_a_manifest_cut_short_anywhere_is_found(forgery: Forgery) -> None:
    path = forgery.folder / MANIFEST
    good = path.read_bytes()
    cuts = [good[:length] for length in range(len(good))]
    assert len(cuts) > 2000
    assert _survivors(path, cuts) == []


@pytest.mark.parametrize(
    "change", [lambda raw: raw + b"\n", lambda raw: b" " + raw, lambda raw: raw.replace(b": ", b":", 1)]
)
def test_whitespace_that_json_does_not_mind_is_found_by_the_digest(forgery: Forgery, change: object) -> None:
    path = forgery.folder / MANIFEST
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(
        PackageError, match=r"expected digest [0-9a-f]{12}…, found [0-9a-f]{12}…; it was changed or damaged"
    ):
        load(path)


def test_the_unharmed_manifest_is_believed(forgery: Forgery) -> None:
    assert len(load(forgery.folder / MANIFEST).tensors) == 6


def test_flipped_bytes_of_a_part_are_found(forgery: Forgery, base: Path, tmp_path: Path) -> None:
    part = forgery.folder / PART
    good = part.read_bytes()
    places = range(0, len(good), 5)
    for place in places:
        part.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with pytest.raises(PackageError) as caught:
            DeltaPackage.open(forgery.folder).verify()
        checked(caught.value, str(part), "expected SHA-256", "found", "fetch the package again")
    assert len(places) > 200
    refused(forgery.folder, base, str(part), "SHA-256")


def test_damage_under_a_checksum_that_fits_never_gives_other_weights(forgery: Forgery, base: Path) -> None:
    """Each byte of the part is flipped in turn and its SHA-256 corrected: one named error, or the very same
    weights.
    """
    forgery.seal()
    good = (forgery.folder / PART).read_bytes()
    expected, checkpoint = forgery.manifest["result"], Checkpoint.open(base)
    refusals, harmless = [], 0
    for place in range(0, len(good), 2):
        forgery.write_part(raw=good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        forgery.write_manifest(derive=False)
        try:
            assert rehearse(checkpoint, [forgery.folder]) == expected
            harmless += 1
        except DareError as error:
            refusals.append(str(error))
    assert len(refusals) + harmless > 600
    assert harmless < 60
    assert [message for message in refusals if "\n" in message or len(message) > 1000] == []


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_a_part_cut_short_is_refused(forgery: Forgery, base: Path, length: int) -> None:
    part = forgery.folder / PART
    good = part.read_bytes()
    part.write_bytes(good[:length])
    refused(
        forgery.folder,
        base,
        str(part),
        f"expected {len(good)} bytes",
        f"found {len(good[:length])}",
        "fetch the package again",
    )


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_a_part_cut_short_under_a_checksum_that_fits_is_refused(
    forgery: Forgery, base: Path, length: int
) -> None:
    forgery.write_part(raw=(forgery.folder / PART).read_bytes()[:length])
    forgery.write_manifest()
    refused(forgery.folder, base, PART, "expected a safetensors file")


def test_a_part_with_bytes_appended_is_refused(forgery: Forgery, base: Path) -> None:
    forgery.write_part(raw=(forgery.folder / PART).read_bytes() + b"more")
    forgery.write_manifest()
    refused(forgery.folder, base, PART)


@pytest.mark.parametrize("name", [PART, "config.json"])
def test_a_listed_file_that_is_missing_is_refused(forgery: Forgery, base: Path, name: str) -> None:
    (forgery.folder / name).unlink()
    refused(forgery.folder, base, str(forgery.folder / name), "found no such file", "fetch the package again")


@pytest.mark.parametrize("name", [PART, "config.json"])
def test_a_folder_in_the_place_of_a_file_is_refused(forgery: Forgery, base: Path, name: str) -> None:
    (forgery.folder / name).unlink()
    (forgery.folder / name).mkdir()
    refused(forgery.folder, base, str(forgery.folder / name))


def test_a_changed_companion_file_is_refused(forgery: Forgery, base: Path) -> None:
    path = forgery.folder / "config.json"
    path.write_bytes(path.read_bytes().replace(b"tuned", b"other"))
    refused(forgery.folder, base, str(path), "SHA-256")


def test_a_folder_without_a_manifest_is_no_package(forgery: Forgery, base: Path) -> None:
    (forgery.folder / MANIFEST).unlink()
    refused(forgery.folder, base, str(forgery.folder), MANIFEST, "found none", "never completed")


def test_a_folder_in_the_place_of_the_manifest_is_refused(forgery: Forgery, base: Path) -> None:
    (forgery.folder / MANIFEST).unlink()
    (forgery.folder / MANIFEST).mkdir()
    refused(forgery.folder, base, MANIFEST)


def test_a_file_in_the_place_of_the_package_is_refused(forgery: Forgery, base: Path) -> None:
    refused(forgery.folder / PART, base, PART)


def test_damage_done_after_opening_is_found_when_applying(
    forgery: Forgery, base: Path, tmp_path: Path
) -> None:
    package = DeltaPackage.open(forgery.folder)
    part = forgery.folder / PART
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    with pytest.raises(PackageError, match="SHA-256"):
        apply(base, package, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_forged_package_is_good_until_something_in_it_is_changed(
    forgery: Forgery, base: Path, tmp_path: Path
) -> None:
    assert apply(base, forgery.seal(), tmp_path / "out") == forgery.manifest["result"]
