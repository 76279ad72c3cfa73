"""Where the recipes' rows come from, and the one place that decides it.

A task is one of

* a name: of a task made of the standard library's text, or of a public data set, which is read from the
  folder of local copies that `--data` or `DARE_TRAIN_DATA` names, and else from the Hub;
* a file (.jsonl, .json, .csv, .txt) or a folder of them. Files called train, validation and test are splits;
* a Hub id, `owner/name` or `owner/name:config`.

`--columns` says what columns are called in the latter two. By default tasks are the standard library's:
those are on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import public_data
import standard_library
from public_data import LOCAL, LOCAL_TEXTS, ON_HUB, HubSet, completed, from_hub, split, texts_from_hub
from standard_library import Row, Split, Splits

from dare_train import errors, read_rows

__all__ = ["Rows", "Split", "Splits", "documents", "domains", "labelled", "spoken", "style", "write_rows"]

VARIABLE = "DARE_TRAIN_DATA"
READABLE = (".csv", ".json", ".jsonl", ".txt")
Rows = list[Row]
Columns = Sequence[tuple[str, str]]
"""What is in a column (text, label, prompt), and what it is called."""
Found = TypeVar("Found")


# The command line.


def data_arguments(parser: argparse.ArgumentParser) -> None:
    folder = os.environ.get(VARIABLE)
    parser.add_argument(
        "--data",
        type=_folder,
        default=folder,
        help=f"folder with copies of the public data sets (default: {VARIABLE}, now {folder or 'not set'})",
    )
    parser.add_argument(
        "--columns",
        type=_column,
        nargs="+",
        default=[],
        metavar="ROLE=NAME",
        help="names of the columns text, label and prompt in files and Hub data sets of your own",
    )


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        sys.exit(f"no folder {text}, which --data or {VARIABLE} names")
    return Path(text)


def _column(text: str) -> tuple[str, str]:
    role, _, name = text.partition("=")
    if role not in ("text", "label", "prompt") or not name:
        raise argparse.ArgumentTypeError(f"expected text=NAME, label=NAME or prompt=NAME, found {text}")
    return role, name


def usual(public: Iterable[str], standard: Iterable[str], options: argparse.Namespace) -> tuple[str, ...]:
    """Names of tasks: public ones with `--full` or a folder of local copies, else the standard library's."""
    return tuple(public if options.full or options.data else standard)


def short(task: str) -> str:
    """What a task is called in folders and tables."""
    if task in ON_HUB or Path(task).exists():
        return Path(task).stem
    return task.partition(":")[0].rpartition("/")[2]


# Rows.


@dataclass(frozen=True)
class Kind:
    """Of rows: where those with names come from, and what each has."""

    public: Sequence[str]
    standard: Collection[str]
    make: Callable[[str], Splits]
    roles: Sequence[str]
    optional: Sequence[str] = ()


TEXTS_WITH_LABELS = Kind(
    public_data.LABELLED,
    standard_library.LABELLED,
    standard_library.labelled,
    roles=("text", "label"),
)
QUESTIONS = Kind(
    public_data.SPOKEN,
    standard_library.SPOKEN,
    standard_library.spoken,
    roles=("prompt", "text"),
    optional=("prompt",),
)


def labelled(task: str, data: Path | None = None, columns: Columns = ()) -> Splits:
    """Texts with labels."""
    return _rows(TEXTS_WITH_LABELS, task, data, dict(columns))


def spoken(task: str, data: Path | None = None, columns: Columns = ()) -> Splits:
    """Prompts and what follows them."""
    return _rows(QUESTIONS, task, data, dict(columns))


def style(task: str, data: Path | None = None, columns: Columns = (), *, most: int | None = None) -> Splits:
    """Pieces of plain text in a row, at most so many."""
    if task in standard_library.STYLES:
        return standard_library.style(task)
    pieces = standard_library.pieces("\n".join(documents(task, data, columns)))
    return split([*islice(pieces, most)])


def documents(task: str, data: Path | None = None, columns: Columns = ()) -> list[str]:
    """Plain texts, whole."""
    names = dict(columns)
    if task in public_data.PLAIN:
        place = data / LOCAL_TEXTS[task] if data else None
        if place and place.is_dir():
            return [*_contents(place)]
        return _asked_of_hub(task, texts_from_hub, ON_HUB[task], place)
    if Path(task).exists():
        return [*_contents(Path(task), names.get("text", "text"))]
    if _is_id(task):
        return _asked_of_hub(task, texts_from_hub, _entry(task, ("text",), names))
    missing(task, _unknown((*public_data.PLAIN, *standard_library.STYLES)))


def domains(data: Path | None, public: bool) -> dict[str, Splits]:
    """Labelled rows in groups that are about the same: clinc150's, or packages of the standard library."""
    if not public:
        return standard_library.domains()
    rows = labelled("clinc150", data)
    return {
        domain: {part: [row for row in some if row["label"] in intents] for part, some in rows.items()}
        for domain, intents in public_data.DOMAINS.items()
    }


def _rows(kind: Kind, task: str, data: Path | None, columns: Mapping[str, str]) -> Splits:
    if task in kind.standard:
        return kind.make(task)
    if task in kind.public:
        folder, read = LOCAL[task]
        place = data / folder if data else None
        if place and place.is_dir():
            return read(place)
        return _asked_of_hub(task, from_hub, ON_HUB[task], place)
    if Path(task).exists():
        return _from_files(kind, Path(task), columns)
    if _is_id(task):
        return _asked_of_hub(task, from_hub, _entry(task, kind.roles, columns))
    missing(task, _unknown((*kind.public, *kind.standard)))


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


# Files.


def _from_files(kind: Kind, place: Path, columns: Mapping[str, str]) -> Splits:
    """Of a folder, train.jsonl is the training split, and so on; without such names, all rows are split."""
    files = sorted(path for path in place.iterdir() if path.suffix in READABLE) if place.is_dir() else [place]
    rows = {path.stem: [_row(str(path), row, kind, columns) for row in _readable(path)] for path in files}
    if not any(rows.values()):
        missing(str(place), f"no rows in a file that ends in {', '.join(READABLE)}")
    if place.is_dir() and "train" in rows:
        return completed({part: rows[part] for part in ("train", "validation", "test") if part in rows})
    return split([row for some in rows.values() for row in some])


def _readable(path: Path) -> list[dict[str, Any]]:
    try:
        return read_rows(path)
    except errors.CheckpointError as error:
        sys.exit(str(error))


def _row(label: str, row: Mapping[str, Any], kind: Kind, columns: Mapping[str, str]) -> Row:
    return {role: _cell(label, row, role, columns, needed=role not in kind.optional) for role in kind.roles}


def _cell(
    file: str,
    row: Mapping[str, Any],
    role: str,
    columns: Mapping[str, str],
    needed: bool = True,
) -> str:
    name = columns.get(role, role)
    if name not in row and (needed or role in columns):
        there = ", ".join(row)
        sys.exit(f"{file}: no column {name}, but {there}; say which it is with --columns {role}=NAME")
    return str(row.get(name, ""))


def _contents(place: Path, column: str = "text") -> Iterator[str]:
    """The text of every file below, in the order of their names. A .jsonl file has many."""
    files = sorted(path for path in place.rglob("*") if path.suffix in (".txt", ".md", ".jsonl"))
    for path in files if place.is_dir() else [place]:
        if path.stem.startswith("LICENSE"):
            continue
        if path.suffix == ".jsonl":
            yield from (_cell(str(path), row, "text", {"text": column}) for row in _readable(path))
        else:
            yield path.read_text(encoding="utf-8")


# The Hub.


def _is_id(task: str) -> bool:
    owner, _, name = task.partition("/")
    looks_like_a_file = task.startswith((".", "~")) or Path(task).suffix in READABLE
    return bool(owner and name) and "/" not in name and not looks_like_a_file


def _entry(task: str, roles: Sequence[str], columns: Mapping[str, str]) -> HubSet:
    """A Hub data set that is not in the table."""
    name, _, config = task.partition(":")
    return HubSet(
        id=name,
        config=config or None,
        text=columns.get("text", "text"),
        label=columns.get("label", "label") if "label" in roles else None,
        prompt=(columns.get("prompt", "prompt"),) if "prompt" in roles else (),
    )


def _asked_of_hub(
    task: str,
    fetch: Callable[[HubSet], Found],
    entry: HubSet,
    folder: Path | None = None,
) -> Found:
    """What the Hub has, or a line that says why it cannot be had."""
    looked = f"not in {folder.parent} (no folder {folder.name}), and " if folder else ""
    try:
        return fetch(entry)
    except ImportError:
        missing(task, f'{looked}the Hub needs the library datasets (pip install -e ".[data]")')
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        missing(task, f"{looked}the Hub did not give {entry.id} ({type(error).__name__}: {reason})")


def _unknown(names: Sequence[str]) -> str:
    return f"neither a file, nor a Hub id (owner/name), nor one of {', '.join(names)}"


def missing(task: str, why: str) -> NoReturn:
    ways = f"give another's Hub id (owner/name), or a folder that has it with {VARIABLE}=FOLDER"
    sys.exit(f"no data set {task}: {why}; {ways}")
