"""A package made in bf16, and a base that lies there in fp32: rounded, proved, and said in one line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engines import run_ranks
from safetensors.torch import load_file
from tiny import State, apply_refused, moved, random_tensor, save

from dare_train import DeltaPackage, apply, apply_, extract, verify
from dare_train.applying.apply import rehearse
from dare_train.errors import BaseMismatch, ChainError, DtypeMismatch
from dare_train.parallel.ranks import Ranks

LINE = "rounded from F32 to BF16 (2 tensors), as the package needs it"


def wide_state(*, by: float = 0.0) -> State:
    """Numbers that bf16 has not, and a buffer that is no number of the model's."""
    wide = {name: torch.linspace(-1, 1, 600) / 3 + by for name in ("a.weight", "b.weight")}
    return {**wide, "c.count": torch.arange(4)}


def narrow(state: State) -> State:
    return {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(wide_state(), tmp_path / "base")


@pytest.fixture
def package(base: Path, tmp_path: Path) -> DeltaPackage:
    return extract(base, moved(narrow(wide_state())), tmp_path / "package", p=0.5, cast_base=True)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.name == "dare_train"]
    caplog.clear()
    return lines


def test_the_base_is_rounded_and_one_line_says_so(
    base: Path, package: DeltaPackage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert apply(base, package, tmp_path / "by itself") == package.manifest.result
    assert said(caplog) == [f"{base}: {LINE}"]
    apply(base, package, tmp_path / "asked for", cast_base=True)
    assert said(caplog) == []
    files = [tmp_path / name / "model.safetensors" for name in ("by itself", "asked for")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_file(files[0])["a.weight"].dtype == torch.bfloat16


def test_a_base_that_fits_as_it_is_is_not_spoken_of(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = extract(base, moved(wide_state()), tmp_path / "package", p=0.5)
    apply(base, package, tmp_path / "out")
    package.verify(base)
    assert said(caplog) == []


def test_verify_rounds_too(base: Path, package: DeltaPackage, caplog: pytest.LogCaptureFixture) -> None:
    for check in (lambda: verify(package, base), lambda: package.verify(base)):
        check()
        assert said(caplog) == [f"{base}: {LINE}"]
    assert rehearse(wide_state(), [package]) == package.manifest.result
    assert said(caplog) == [f"model in memory: {LINE}"]
    with pytest.raises(DtypeMismatch, match="cast_base=True"):
        verify(package, base, cast_base=False)


def test_each_way_of_rounding_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mixed = {**wide_state(), "d.weight": random_tensor(7).half()}
    folder = save(mixed, tmp_path / "base")
    package = extract(folder, moved(narrow(mixed)), tmp_path / "package", cast_base=True)
    apply(folder, package, tmp_path / "out")
    ways = "rounded from F16 to BF16 (1 tensor), from F32 to BF16 (2 tensors), as the package needs it"
    assert said(caplog) == [f"{folder}: {ways}"]


def test_another_base_is_refused_after_rounding_and_nothing_is_said(
    package: DeltaPackage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save(wide_state(by=1.0), tmp_path / "other")
    texts = (f"{other}: a.weight", "after rounding it from F32 to BF16", "not the base the package was made")
    apply_refused(other, package, BaseMismatch, *texts)
    with pytest.raises(BaseMismatch, match="after rounding it from F32 to BF16"):
        verify(package, other)
    assert said(caplog) == []


def test_a_base_without_the_digits_is_refused(package: DeltaPackage, tmp_path: Path) -> None:
    """Widened, bf16 is not the fp32 that a package was made from."""
    folder = save(wide_state(), tmp_path / "wide")
    fine = extract(folder, moved(wide_state()), tmp_path / "fine", p=0.5)
    coarse = save(narrow(wide_state()), tmp_path / "coarse")
    apply_refused(coarse, fine, BaseMismatch, "a.weight", "after rounding it from BF16 to F32")


def test_what_is_no_floating_point_number_is_not_rounded(package: DeltaPackage, tmp_path: Path) -> None:
    other = save({**wide_state(), "c.count": torch.arange(4).float()}, tmp_path / "other")
    apply_refused(other, package, DtypeMismatch, "c.count: expected I64", "found F32")


def test_a_chain_on_a_rounded_base(
    base: Path, package: DeltaPackage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apply(base, package, tmp_path / "first", cast_base=True)
    first = load_file(tmp_path / "first/model.safetensors")
    second = extract(tmp_path / "first", moved(first), tmp_path / "second", p=0.5)
    said(caplog)
    chained = apply(base, [package, second], tmp_path / "both")
    assert said(caplog) == [f"{base}: {LINE}"]
    assert chained == second.manifest.result
    assert chained == apply(base, [package, second], tmp_path / "again", cast_base=True)


def test_packages_of_one_rounded_base_add_up(base: Path, package: DeltaPackage, tmp_path: Path) -> None:
    other = extract(
        base, moved(narrow(wide_state()), 0.25), tmp_path / "other", p=0.5, seed=1, cast_base=True
    )
    results = {apply(base, [package, other], tmp_path / f"{cast}", cast_base=cast) for cast in (None, True)}
    assert len(results) == 1


def test_packages_in_different_dtypes_are_of_different_bases(
    base: Path, package: DeltaPackage, tmp_path: Path
) -> None:
    wide = extract(base, moved(wide_state()), tmp_path / "wide", p=0.5)
    for number, pair in enumerate(([package, wide], [wide, package])):
        place = save(wide_state(), tmp_path / f"{number}" / "base")
        apply_refused(place, pair, ChainError, "the same base as the others")


def test_a_live_model_keeps_its_dtype(package: DeltaPackage) -> None:
    model = wide_state()
    with pytest.raises(DtypeMismatch, match="load it with dtype BF16"):
        apply_(model, package)
    assert all(torch.equal(tensor, model[name]) for name, tensor in wide_state().items())


def test_on_several_ranks_the_first_says_it(base: Path, package: DeltaPackage, tmp_path: Path) -> None:
    assert run_ranks(_lines_of_a_rank, 2, base, package.path, tmp_path / "out") == [[f"{base}: {LINE}"], []]


def _lines_of_a_rank(_rank: int, base: Path, package: Path, out: Path) -> list[str]:
    dist.init_process_group("gloo")
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dare_train").addHandler(handler)
    apply(base, package, out, ranks=Ranks.joined())
    dist.destroy_process_group()
    return told
