"""Names that are orders: to rich, to the terminal, or to matplotlib. Tables show them as they are written."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from forge import Forgery
from rich.console import Console
from rich.table import Table

from dare_train import DeltaPackage
from dare_train.cli.main import main
from dare_train.cli.terminal import show
from dare_train.reports.package_tables import inspect_table

NAMES = ["a[/x]b", "a[red]b", "a:smile:b", "a\x1b[2Jb", "a\x1b]0;title\x07b", "a\r\nb", "a\u202eb", "a$\\b$"]
SHOWN = [
    "a[/x]b",
    "a[red]b",
    "a:smile:b",
    r"a\x1b[2Jb",
    r"a\x1b]0;title\x07b",
    r"a\r\nb",
    r"a\u202eb",
    "a$\\b$",
]


@pytest.fixture(params=range(len(NAMES)), ids=ascii)
def named(request: pytest.FixtureRequest, forgery: Forgery) -> tuple[Path, str]:
    """A package with such names of a tensor and of its base, and how they are to be shown."""
    forgery.tensor("dense")["name"] = NAMES[request.param]
    forgery.manifest["base_model"] = NAMES[request.param]
    return forgery.seal(), SHOWN[request.param]


@pytest.mark.parametrize("options", [[], ["--tensors"]])
def test_inspect_shows_names_and_obeys_none(
    named: tuple[Path, str],
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package, shown = named
    monkeypatch.setattr(sys, "argv", ["dare-train", "inspect", str(package), *options])
    assert main() == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.count(shown) == 2
    assert all(line.isprintable() for line in told.out.split("\n"))


def test_tables_show_names_on_any_console(named: tuple[Path, str]) -> None:
    package, shown = named
    console = Console(file=io.StringIO(), width=160)
    console.print(inspect_table(DeltaPackage.open(package), every_tensor=True))
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert told.count(shown) == 2
    assert all(line.isprintable() for line in told.split("\n"))


def test_names_in_pictures_are_no_formulas(named: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn with it")
    from dare_train.reports.package_tables import plot

    package, _ = named
    plot(DeltaPackage.open(package), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 0


def test_other_tables_give_no_orders_either(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    for name in NAMES:
        table.add_row(name)
    show(table)
    told = capsys.readouterr().out
    assert "a[/x]b" in told
    assert "a:smile:b" in told
    assert all(line.isprintable() for line in told.split("\n"))
