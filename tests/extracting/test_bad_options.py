"""Options that are wrong or conflict, and packages in the wrong company."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import apply_refused, base_state, extract_refused, moved, random_tensor, refusal, save

from dare_train import DareConfig, DeltaPackage, apply, extract
from dare_train.errors import (
    BaseMismatch,
    ChainError,
    ConfigError,
    OutputExists,
    PackageError,
    TensorMismatch,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(base_state(), tmp_path / "base")


@pytest.fixture
def package(base: Path, tmp_path: Path) -> DeltaPackage:
    return extract(base, moved(base_state()), tmp_path / "package", p=0.5)


# Options.

_NOT_A_RATE = [
    -0.1,
    1,
    1.0,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
    "0.9",
    "",
    None,
    [0.5],
    b"0.5",
    1j,
]


@pytest.mark.parametrize("p", _NOT_A_RATE, ids=repr)
def test_a_drop_rate_outside_its_range_is_refused(base: Path, tmp_path: Path, p: Any) -> None:
    extract_refused(
        base, base_state(), tmp_path / "p", ConfigError, "p: expected a number in [0, 1)", f"found {p!r}", p=p
    )
    with pytest.raises(ConfigError, match=r"p\['a\*'\]: expected a number in \[0, 1\)"):
        extract(base, base_state(), tmp_path / "p" / "out", p={"a*": p, "*": 0.5})


@pytest.mark.parametrize("p", [0.0, 0, 0.5, 1 - 2**-16, np.float64(0.5), np.float32(0.5)], ids=repr)
def test_a_drop_rate_in_its_range_is_accepted(base: Path, tmp_path: Path, p: Any) -> None:
    assert extract(base, moved(base_state()), tmp_path / "package", p=p).records["a.weight"].p == float(p)


_BAD_OPTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"p": 1 - 2**-18}, ("p: expected at most 1 - 2**-16",)),
    ({"p": {}}, ("p: expected at least one pattern",)),
    ({"p": {"nothing*": 0.5}}, ("p for a.weight", 'add "*"')),
    ({"p": {5: 0.5}}, ("p", "5")),
    ({"seed": -1}, ("seed: expected an integer in [0, 2**64)", "found -1")),
    ({"seed": 2**64}, ("seed",)),
    ({"seed": True}, ("seed", "found True")),
    ({"seed": 0.0}, ("seed", "found 0.0")),
    ({"seed": "0"}, ("seed", "found '0'")),
    ({"rescale": "norm"}, ("rescale: expected one of paper, none", "found 'norm'")),
    ({"rescale": []}, ("rescale",)),
    ({"values": "int3"}, ("values: expected one of auto, exact, rounded, int8, int4, sign", "found 'int3'")),
    ({"values": None}, ("values", "found None")),
    ({"include": [5]}, ("include: expected a list of name patterns",)),
    ({"include": 5}, ("include: expected a list of name patterns", "found 5")),
    ({"exclude": None}, ("exclude: expected a list of name patterns", "found None")),
    ({"whole": 7}, ("whole: expected a list of name patterns", "found 7")),
    (
        {"masks": {"nothing": np.ones(3, bool)}},
        ("masks['nothing']: expected the name of a tensor", "found none of that name"),
    ),
    (
        {"masks": {"a.weight": np.ones(600, bool)}},
        ("masks['a.weight']: expected bool [20, 30]", "found bool [600]"),
    ),
    (
        {"masks": {"a.weight": np.ones((20, 30))}},
        ("masks['a.weight']: expected bool [20, 30]", "found float64 [20, 30]"),
    ),
    ({"masks": {"a.weight": np.ones((20, 30), bool)}, "whole": ["a.*"]}, ("masks['a.weight']", "whole")),
    ({"masks": {"a.weight": np.ones((20, 30), bool)}, "exclude": ["a.*"]}, ("masks['a.weight']", "exclude")),
    ({"masks": {"c.count": np.ones(4, bool)}}, ("masks['c.count']", "I64")),
    ({"masks": 5}, ("masks",)),
    ({"whole": ["a.weight"], "exclude": ["a.weight"]}, ("a.weight", "whole", "exclude")),
]


@pytest.mark.parametrize(
    ("options", "texts"), _BAD_OPTIONS, ids=[repr(options)[:60] for options, _ in _BAD_OPTIONS]
)
def test_an_option_that_is_wrong_or_conflicts_is_refused(
    base: Path, tmp_path: Path, options: Any, texts: tuple[str, ...]
) -> None:
    extract_refused(base, moved(base_state()), tmp_path / "p", ConfigError, *texts, **options)


@pytest.mark.parametrize("option", ["include", "exclude", "whole"])
def test_one_pattern_need_not_be_put_in_a_list(base: Path, tmp_path: Path, option: str) -> None:
    """A string is one pattern, not a list of letters of which a star would match everything."""
    one = extract(base, moved(base_state()), tmp_path / "one", **{option: "a.*"})  # type: ignore[arg-type]
    listed = extract(base, moved(base_state()), tmp_path / "listed", **{option: ["a.*"]})  # type: ignore[arg-type]
    assert [record.kind for record in one.manifest.tensors] == [
        record.kind for record in listed.manifest.tensors
    ]


# Packages in the wrong company.


@pytest.fixture
def chain(base: Path, tmp_path: Path) -> list[DeltaPackage]:
    first = extract(base, moved(base_state()), tmp_path / "first", p=0.5)
    apply(base, first, tmp_path / "middle")
    second = extract(tmp_path / "middle", moved(base_state(), 0.5), tmp_path / "second", p=0.5)
    return [first, second]


def test_a_chain_out_of_order_is_refused(chain: list[DeltaPackage], base: Path) -> None:
    first, second = chain
    texts = (
        first.name,
        "in the order it was written",
        f"{second.name}, which gives {second.manifest.result[:12]}…",
    )
    apply_refused(base, [second, first], ChainError, *texts)


def test_a_chain_without_its_beginning_is_a_wrong_base(chain: list[DeltaPackage], base: Path) -> None:
    apply_refused(base, chain[1], BaseMismatch, "a.weight")


def test_a_chain_cannot_be_weighted(chain: list[DeltaPackage], base: Path) -> None:
    apply_refused(
        base,
        chain,
        ChainError,
        "weights: expected 1 for each package of a chain",
        "found [1.0, 0.5]",
        weights=[1.0, 0.5],
    )


def test_packages_of_different_bases_are_refused(package: DeltaPackage, base: Path, tmp_path: Path) -> None:
    other = extract(moved(base_state(), 3), moved(base_state(), 4), tmp_path / "other")
    apply_refused(base, [package, other], ChainError, other.name, package.name, "packages of one base")


_WEIGHTS: list[tuple[Any, str]] = [
    ([], "found 0"), ([1, 1], "found 2"), ([math.nan], "finite"), ([math.inf], "finite"), (["x"], "'x'"),
    ([None], "None"),
    (0.5, "0.5"), ("1", "'1'"), ([1j], "1j"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "text"), _WEIGHTS, ids=[repr(weights) for weights, _ in _WEIGHTS])
def test_weights_of_the_wrong_number_or_kind_are_refused(
    package: DeltaPackage, base: Path, weights: Any, text: str
) -> None:
    apply_refused(base, [package], ConfigError, "weights: expected", text, weights=weights)


def test_no_package_at_all_is_refused(base: Path) -> None:
    apply_refused(base, [], ConfigError, "packages: expected at least one")


def test_packages_that_carry_the_same_tensor_whole_and_differently_are_refused(
    base: Path, tmp_path: Path
) -> None:
    packages = [
        extract(base, {**base_state(), "head": random_tensor(5, seed=seed)}, tmp_path / f"{seed}")
        for seed in (1, 2)
    ]
    apply_refused(
        base, packages, TensorMismatch, "head: expected the same content as in", "exclude the tensor"
    )


@pytest.mark.parametrize("what", ["a folder that is a checkpoint", "nothing"])
def test_what_is_no_package_is_refused(base: Path, what: str) -> None:
    where = base if what != "nothing" else base / "nothing"
    apply_refused(base, where, PackageError, str(where), "expected a package")


def test_an_output_that_exists_is_refused_and_kept(package: DeltaPackage, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    for call in (lambda: apply(base, package, out), lambda: extract(base, base_state(), out)):
        with pytest.raises(OutputExists) as caught:
            call()
        refusal(
            caught.value,
            OutputExists,
            str(out),
            "expected a path that does not exist yet",
            "overwrite=True (--overwrite)",
        )
    assert (out / "mine").read_text() == "kept"
    apply(base, package, out, overwrite=True)
    assert not (out / "mine").exists()
    assert (out / "model.safetensors").exists()


def test_any_sequence_of_strings_is_a_list_of_patterns() -> None:
    class ListConfig(Sequence[str]):
        """As Hydra's, which is no `list`."""

        def __getitem__(self, index: Any) -> Any:
            return ("*norm*", "*.bias")[index]

        def __len__(self) -> int:
            return 2

    assert DareConfig(exclude=ListConfig()).exclude == ("*norm*", "*.bias")
