"""Manifests that are well sealed and say something impossible."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forge import MANIFEST, Forgery, checked, refused, sealed

from dare_train import DeltaPackage
from dare_train.errors import PackageError
from dare_train.package.manifest_reader import LARGEST_MANIFEST, load

_STRANGE: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    2,
    1.5,
    2**64,
    -(2**70),
    10**400,
    math.nan,
    math.inf,
    "",
    "x",
    "é" * 64,
    "\ud800",
    "\0\n",
]
_STRANGE += [
    [],
    {},
    [None],
    [[]],
    [True],
    [-1],
    [math.nan],
    ["x"],
    [{}],
    [2**70],
    {"x": {}},
    [[[[1]]]],
    "0" * 32,
    "F" * 32,
    "0" * 64,
    "\ud800" * 64,
]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a JSON document lies."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def _with(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(document))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


def _without(document: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    copy = place = json.loads(json.dumps(document))
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return copy


def test_no_value_of_another_type_anywhere_is_anything_but_a_package_error(forgery: Forgery) -> None:
    """Every field in turn holds every strange value, under a digest that fits."""
    del forgery.manifest["tensors"][3:]
    forgery.write_manifest()
    paths = [path for path in _paths(forgery.manifest) if path != ("digest",)]
    path_on_disk = forgery.folder / MANIFEST
    refusals, accepted, crashes = 0, [], []
    for path in paths:
        for value in _STRANGE:
            path_on_disk.write_bytes(sealed(_with(forgery.manifest, path, value)))
            try:
                load(path_on_disk)
                accepted.append((path, value))
            except PackageError as error:
                refusals += 1
                crashes += [(path, value, str(error))] if "\n" in str(error) or len(str(error)) > 1000 else []
            except Exception as error:  # noqa: BLE001 - whatever else comes out is what this test looks for
                crashes.append((path, value, repr(error)))
    assert len(paths) > 60
    assert crashes == []
    assert refusals + len(accepted) == len(paths) * len(_STRANGE)
    assert [(path, value) for path, value in accepted if not _plausible(path, value)] == []
    assert len(accepted) > 50


def _plausible(path: tuple[Any, ...], value: Any) -> bool:
    """Whether a reader of the manifest alone may believe the value."""
    field = next(key for key in path[::-1] if isinstance(key, str))
    if field in ("written_by", "base_model", "prefix", "file", "sha256"):
        return isinstance(value, str)
    if field in ("seed", "bytes", "threshold", "changed", "kept"):
        return type(value) is int and value >= 0
    if field in ("base_only", "files", "parts"):
        return value == [] or (field == "base_only" and value == ["x"])
    number = type(value) in (int, float) and math.isfinite(value)
    return number and value >= 0 and (field != "p" or value < 1)


def test_a_field_that_is_left_out_is_named(forgery: Forgery) -> None:
    fields = [path for path in _paths(forgery.manifest) if isinstance(path[-1], str) and path != ("digest",)]
    for path in fields:
        (forgery.folder / MANIFEST).write_bytes(sealed(_without(forgery.manifest, path)))
        with pytest.raises(PackageError) as caught:
            load(forgery.folder / MANIFEST)
        checked(caught.value)
        optional = path[0] == "tensors" and path[-1] in ("base_rows", "base", "result")
        assert optional or path[-1] in str(caught.value).replace(" ", "_")
    assert len(fields) > 70


_WRONG = [
    (("landed",), {"rounding": "stochastic", "rescale": "paper"}, "rescale carried where elements landed"),
    (("landed",), {"rounding": "up", "rescale": "paper"}, "'rounding'"),
    (("landed",), {"rounding": "nearest"}, "'rescale'"),
    (("landed",), "stochastic", "'landed'"),
    (("format",), "dare", "dare_train"),
    (("format_version",), 2, "format version 1"),
    (("format_version",), True, "format version 1"),
    (("format_version",), 1.0, "format version 1"),
    (("format_version",), "1", "update dare_train"),
    (("seed",), -1, "'seed'"),
    (("seed",), 2**64, "'seed'"),
    (("seed",), True, "'seed'"),
    (("seed",), 1.0, "'seed'"),
    (("rescale",), "twice", "one of paper, none, carried"),
    (("parent", "continues"), "nothing", "one of base, package"),
    (("parent",), [], "'parent'"),
    (("delta",), {"p50": "x"}, "delta"),
    (("delta",), {"p50": math.nan}, "delta"),
    (("delta",), {"p50": [1]}, "delta"),
    (("base_only",), [1], "'base_only'"),
    (("files",), {}, "'files'"),
    (("files", 0, "bytes"), True, "'bytes'"),
    (("parts", 0, "bytes"), -1, "'bytes'"),
    (("tensors", 0, "name"), 5, "'name'"),
    (("tensors", 0, "kind"), "half", "one of base, delta, whole"),
    (("tensors", 0, "mask"), "random", "one of all, seeded, stored"),
    (("tensors", 0, "values"), "int3", "one of exact, rounded, int8, int4, sign"),
    (("tensors", 0, "values"), "whole", "'values'"),
    (("tensors", 0, "dtype"), "BF17", "'dtype'"),
    (("tensors", 0, "dtype"), "I16", "floating-point dtype"),
    (("tensors", 0, "dtype"), "F8_E4M3", "floating-point dtype"),
    (("tensors", 0, "threshold"), 65536, "'threshold'"),
    (("tensors", 0, "threshold"), -1, "'threshold'"),
    (("tensors", 0, "kept"), 1321, "'kept'"),
    (("tensors", 0, "kept"), -1, "'kept'"),
    (("tensors", 0, "kept"), True, "'kept'"),
    (("tensors", 0, "changed"), 658, "'changed'"),
    (("tensors", 0, "p"), math.nan, "'p'"),
    (("tensors", 0, "p"), 1.5, "'p'"),
    (("tensors", 0, "p"), -0.5, "'p'"),
    (("tensors", 0, "p"), math.inf, "'p'"),
    (("tensors", 0, "p"), True, "'p'"),
    (("tensors", 0, "p"), 10**400, "'p'"),
    (("tensors", 0, "delta"), [0.1, math.nan, 0.2], "'delta'"),
    (("tensors", 0, "delta"), [0.1], "'delta'"),
    (("tensors", 0, "delta"), [0.1, True, 0.2], "'delta'"),
    (("tensors", 0, "delta"), [0.1, 10**400, 0.2], "'delta'"),
    (("tensors", 0, "shape"), [-40, -33], "a shape"),
    (("tensors", 0, "shape"), [True, 33], "a shape"),
    (("tensors", 0, "shape"), [2**62], "a shape"),
    (("tensors", 0, "shape"), [2**31, 2**31, 2**31], "a shape"),
    (("tensors", 2, "shape"), [0, 2**70], "a shape"),
    (("tensors", 0, "shape"), [40.0, 33], "'shape'"),
    (("tensors", 0, "shape"), "40", "'shape'"),
    (("tensors", 0, "base"), "0" * 31, "32 hexadecimal digits"),
    (("tensors", 0, "base"), "A" * 32, "32 hexadecimal digits"),
    (("tensors", 0, "base"), "-" + "0" * 31, "32 hexadecimal digits"),
    (("tensors", 0, "result"), None, "32 hexadecimal digits"),
    (("tensors", 0, "result"), "٣" * 32, "32 hexadecimal digits"),
    (("tensors", 1, "base_rows"), 9, "'base_rows'"),
    (("tensors", 1, "base_rows"), 10, "'base_rows'"),
    (("tensors", 1, "base_rows"), -1, "'base_rows'"),
    (("tensors", 1, "base_rows"), True, "'base_rows'"),
    (("tensors", 1, "shape"), [], "'base_rows'"),
    (("tensors", 2, "base_rows"), 3, "base_rows"),
]


@pytest.mark.parametrize(
    ("path", "value", "text"), _WRONG, ids=[f"{'.'.join(map(str, p))}={v!r:.40}" for p, v, _ in _WRONG]
)
def test_a_field_with_a_wrong_value_is_refused_by_name(
    forgery: Forgery, base: Path, path: tuple[Any, ...], value: Any, text: str
) -> None:
    forgery.manifest = _with(forgery.manifest, path, value)
    forgery.write_manifest(derive=False)
    name = (
        [forgery.tensor(("dense", "embed", "head")[path[1]])["name"]]
        if path[0] == "tensors" and path[2] != "name"
        else []
    )
    refused(forgery.folder, base, str(forgery.folder / MANIFEST), text, *name)


@pytest.mark.parametrize("field", ["parent", "result"])
def test_fingerprints_that_the_tensors_contradict_are_refused(
    forgery: Forgery, base: Path, field: str
) -> None:
    if field == "parent":
        forgery.manifest["parent"]["fingerprint"] = "0" * 64
    else:
        forgery.manifest["result"] = "0" * 64
    forgery.write_manifest(derive=False)
    refused(forgery.folder, base, MANIFEST, "as its tensors say", "found 000000000000…")


def test_a_tensor_that_appears_twice_is_named(forgery: Forgery, base: Path) -> None:
    forgery.manifest["tensors"].append(forgery.tensor("head"))
    forgery.write_manifest()
    refused(forgery.folder, base, MANIFEST, "expected each tensor once", "head")


@pytest.mark.parametrize("name", ["__metadata__", "\ud800", ""])
def test_a_name_that_no_checkpoint_can_hold_is_refused(forgery: Forgery, base: Path, name: str) -> None:
    """`__metadata__` would take the place of the header's metadata: the result could not be opened."""
    forgery.tensor("head")["name"] = name
    forgery.write_manifest(derive="\ud800" not in name)
    refused(forgery.folder, base, MANIFEST)


def test_a_tensor_said_to_be_as_in_the_base_with_another_result_is_refused(
    forgery: Forgery, base: Path
) -> None:
    forgery.tensor("idle").update(kind="base", result="0" * 32)
    forgery.write_manifest()
    refused(forgery.folder, base, MANIFEST, "idle")


@pytest.mark.parametrize("name", ["head", "dense"])
def test_a_tensor_without_the_fingerprints_it_needs_is_refused(
    forgery: Forgery, base: Path, name: str
) -> None:
    forgery.tensor(name).pop("base" if name == "dense" else "result")
    forgery.write_manifest(derive=False)
    refused(forgery.folder, base, MANIFEST, name, "fingerprints of base and result")


@pytest.mark.parametrize(("kept", "changed"), [(1320, 535), (657, 657), (600, 535), (657, 0)])
def test_counts_that_the_part_contradicts_are_refused(
    forgery: Forgery, base: Path, kept: int, changed: int
) -> None:
    forgery.tensor("dense").update(kept=kept, changed=changed)
    forgery.write_manifest()
    refused(forgery.folder, base, "dense")


_NO_MANIFESTS = [
    b"",
    b"null",
    b"[]",
    b"5",
    b'"x"',
    b"{}",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"{" * 9,
    b'{"format": "dare_train"',
    b"1" * 9999,
]
_NO_MANIFESTS += [b'{"format": "dare_train", "format_version": 1, "digest": "' + b"\\ud800" * 64 + b'"}']


@pytest.mark.parametrize("raw", _NO_MANIFESTS, ids=range(len(_NO_MANIFESTS)))
def test_what_is_not_a_manifest_is_refused(forgery: Forgery, base: Path, raw: bytes) -> None:
    (forgery.folder / MANIFEST).write_bytes(raw)
    refused(forgery.folder, base, str(forgery.folder / MANIFEST))


def test_deep_nesting_is_refused_at_every_depth(forgery: Forgery) -> None:
    path, depths = forgery.folder / MANIFEST, [*range(800, 1010), 10_000, 1_000_000]
    for depth in depths:
        for nested in (
            "[" * depth + "]" * depth,
            json.dumps(forgery.manifest)[:-1] + ', "seed": ' + "[" * depth + "]" * depth + "}",
        ):
            path.write_text(_sealed_text(nested))
            with pytest.raises(PackageError):
                load(path)
    assert len(depths) > 200


def _sealed_text(text: str) -> str:
    digest = re.search(r'"digest": "(\w{64})"', text)
    if digest is None:
        return text
    import hashlib

    blank = text.replace(digest[1], "0" * 64, 1)
    return blank.replace("0" * 64, hashlib.sha256(blank.encode()).hexdigest(), 1)


def test_a_manifest_beyond_the_limit_is_not_read(forgery: Forgery, base: Path) -> None:
    with (forgery.folder / MANIFEST).open("r+b") as file:
        file.truncate(LARGEST_MANIFEST + 1)
    refused(forgery.folder, base, MANIFEST, "at most", f"{LARGEST_MANIFEST + 1:,}")


def test_a_manifest_that_says_a_field_twice_is_refused(forgery: Forgery, base: Path) -> None:
    """Two readers may believe different ones."""
    (forgery.folder / MANIFEST).write_text(
        _sealed_text(json.dumps(forgery.manifest)[:-1] + ', "base_model": "another"}')
    )
    refused(forgery.folder, base, MANIFEST, "base_model")


def test_fields_that_a_later_writer_adds_are_ignored(forgery: Forgery) -> None:
    forgery.manifest["invented"] = forgery.tensor("dense")["invented"] = {"x": 1}
    forgery.write_manifest()
    assert DeltaPackage.open(forgery.folder).manifest.seed == 0
