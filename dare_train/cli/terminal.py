"""What the commands share: arguments, tables and progress on a terminal, and exit codes."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import ConfigError, DareError, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    from ..parallel.ranks import Ranks

Base = Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")]
Tuned = Annotated[str, typer.Argument(help="Folder or Hub id of the fine-tuned model, or of a LoRA adapter.")]
Package = Annotated[str, typer.Argument(metavar="PKG", help="Folder or Hub id of a package.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to create.")]
CastBase = Annotated[
    bool, typer.Option("--cast-base", help="Round the base to the dtype of the fine-tuned weights first.")
]
CastBaseOrNot = Annotated[
    Optional[bool],
    typer.Option(
        "--cast-base/--no-cast-base",
        help="Round the base to the package's dtypes first; by default where they differ, saying so.",
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize", help="Read quantised checkpoints in full precision, where that is a formula."
    ),
]
Rename = Annotated[
    list[str], typer.Option("--rename", help="OLD=NEW: replace a part of the models' tensor names.")
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinity.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is already there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def pairs(option: str, texts: Iterable[str]) -> dict[str, str]:
    """`NAME=VALUE` of an option that may be given several times.

    Raises:
        ConfigError: there is no equals sign, or nothing before it.
    """
    split = [text.partition("=") for text in texts]
    for (name, equals, _), text in zip(split, texts, strict=True):
        if not name or not equals:
            raise ConfigError(f"--{option}", expected="NAME=VALUE", found=repr(text))
    return {name: value for name, _, value in split}


def settle_streams() -> None:
    """What was closed before this process began takes all that is written, and what a terminal cannot show is
    written as an escape.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for good
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(what: dict[str, Any] | RenderableType) -> None:
    if isinstance(what, dict):
        typer.echo(json.dumps(what, indent=2))
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, width=160)
    console.print(_Printable(what))


class _Printable:
    """A table whose words give the terminal no orders, whoever named what is in it."""

    def __init__(self, table: RenderableType) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._table, options):
            lines = segment.text.split("\n")
            yield segment._replace(text="\n".join(map(printable, lines)))


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes that a launcher started for this command, or this one alone. One error is told once, by
    the first of them.

    None of them leaves before all are done: the launcher would kill the others, and with them what they still
        clear up.
    """
    from ..errors import RankError
    from ..parallel.ranks import launched

    with launched() as ranks:
        try:
            yield ranks
        except (DareError, OSError) as error:
            if not ranks.lost:
                with suppress(RankError):
                    ranks.gather(None)
            if ranks.first or ranks.lost or debugging():
                raise
            raise typer.Exit(exit_code(error)) from error


@contextmanager
def progress_bar(
    what: str, ranks: Ranks | None = None, *, of_bytes: bool = True
) -> Iterator[Callable[[int, int], object] | None]:
    """A bar on the first rank's stderr, if it is a terminal, fed with what is done and all there is; nothing
    elsewhere.
    """
    if (ranks is not None and not ranks.first) or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    done = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(what, 100), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def expect_models() -> None:
    """Before a framework loads a model: the process is no longer settled for a small command, and the
    framework's own bars are for terminals.
    """
    gc.enable()
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def debugging() -> bool:
    """Whether tracebacks are wanted: `run --` may be followed by a `--debug` of another command."""
    return "--debug" in takewhile(_is_option, sys.argv[1:])


def first_word() -> str:
    """The name of the command."""
    return next((word for word in sys.argv[1:] if not _is_option(word)), "")


def _is_option(word: str) -> bool:
    return word.startswith("-")


def exit_code(error: DareError | OSError) -> int:
    return getattr(error, "exit_code", 1)
