"""Tasks made of what is on every machine: the text of Python's standard library.

The same on every call. Whole files are held out: no file has rows in two splits.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Literal
from zlib import crc32

Split = Literal["train", "validation", "test"]
Row = dict[str, str]
"""A label by name and a text; or a prompt and the text that follows; or a text."""
Splits = dict[Split, list[Row]]

PARTS: tuple[Split, ...] = ("test", "validation", "train", "train", "train")
"""Of five files of a package."""
DOMAINS = {
    "networks": ("email", "http", "urllib", "wsgiref"),
    "concurrency": ("asyncio", "concurrent", "multiprocessing"),
    "formats": ("encodings", "json", "re", "xml"),
    "machinery": ("ctypes", "importlib", "logging", "unittest"),
}
"""Packages that are about the same."""
EXCEPTIONS = (
    "AttributeError",
    "ImportError",
    "NotImplementedError",
    "OSError",
    "RuntimeError",
    "TypeError",
    "ValueError",
)
RAISED = re.compile(
    rf"""raise (?P<name>{"|".join(EXCEPTIONS)})"""
    r"""\(\s*f?(?P<quote>["'])(?P<message>.{10,}?)(?P=quote)""",
)
VERBS = ("add", "close", "find", "get", "is", "make", "parse", "read", "send", "set", "visit", "write")
LINES = 3
"""Of a snippet."""
PIECE = 400
"""Characters of plain text in a row."""
MOST_ROWS = 1500
"""Of a label in a split, and of a split without labels."""
PARSED = 30_000
"""Characters of the longest file whose syntax is looked at: the others would take longer than all these."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """A file of the standard library."""

    package: str
    """Its top-level package; empty for a module that is in none."""
    name: str
    part: Split
    text: str

    @property
    def tree(self) -> ast.Module:
        return _parsed(self.name, self.text)

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


@cache
def _parsed(name: str, text: str) -> ast.Module:
    return ast.parse(text, name)


@cache
def source_files() -> tuple[SourceFile, ...]:
    """Modules, and packages but their tests; of each package the files are dealt out to the splits."""
    root = Path(sysconfig.get_paths()["stdlib"])
    places: dict[str, Iterable[Path]] = {"": root.glob("*.py")}
    for name in sorted(name for names in DOMAINS.values() for name in names):
        places[name] = (path for path in (root / name).rglob("*.py") if not {"test", "tests"} & {*path.parts})
    return tuple(
        SourceFile(
            package,
            path.relative_to(root).as_posix(),
            part,
            path.read_text(encoding="utf-8", errors="ignore"),
        )
        for package, paths in places.items()
        for path, part in _dealt(path for path in paths if path.stat().st_size > PIECE)
    )


def _dealt(paths: Iterable[Path]) -> Iterator[tuple[Path, Split]]:
    """In an order that does not put files of similar names side by side."""
    ordered = sorted(paths, key=lambda path: (crc32(path.name.encode()), path))
    for number, path in enumerate(ordered):
        yield path, PARTS[number % len(PARTS)]


@cache
def parsed_files() -> tuple[SourceFile, ...]:
    """Those whose syntax is looked at. Encodings are tables."""
    return tuple(file for file in source_files() if file.package != "encodings" and len(file.text) < PARSED)


# Texts and labels.


def packages(file: SourceFile) -> Iterator[Row]:
    """Which package a few lines come from."""
    if file.package:
        yield from ({"text": text, "label": file.package} for text in snippets(file.text.splitlines()))


def code_or_prose(file: SourceFile) -> Iterator[Row]:
    """Lines of code, and paragraphs that are about code."""
    yield from ({"text": text, "label": "code"} for text in snippets(code_lines(file)))
    for text in docstrings(file):
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        yield from ({"text": paragraph, "label": "prose"} for paragraph in paragraphs if len(paragraph) > 40)


def exceptions(file: SourceFile) -> Iterator[Row]:
    """Which exception is raised with a message."""
    for match in RAISED.finditer(file.text):
        yield {"text": match["message"], "label": match["name"]}


def verbs(file: SourceFile) -> Iterator[Row]:
    """With which verb the name of a function begins that does this."""
    for function in file.functions():
        verb, separator, rest = function.name.strip("_").partition("_")
        if verb in VERBS and (separator or function.body):
            yield {"text": f"{rest} ({ast.unparse(function.args)}): {body(function)[:PIECE]}", "label": verb}


LABELLED: Mapping[str, Callable[[SourceFile], Iterator[Row]]] = {
    task.__name__: task for task in (code_or_prose, packages, exceptions, verbs)
}


def labelled(name: str) -> Splits:
    """A task of `LABELLED`: which of several labels a text has. Those that need no syntax have all files."""
    files = source_files() if name in ("packages", "exceptions") else parsed_files()
    return _collected((file.part, LABELLED[name](file)) for file in files)


# Prompts and what follows them.


def describe(file: SourceFile) -> Iterator[Row]:
    """The first line of a function's docstring."""
    for function, line in documented(file):
        yield asked(f"What does {header(function)} do?", line)


def define(file: SourceFile) -> Iterator[Row]:
    """The first line of a function that has a given purpose."""
    for function, line in documented(file):
        yield asked(f"Define a function: {line}", header(function))


def implement(file: SourceFile) -> Iterator[Row]:
    """What a short function does, in Python."""
    for function in file.functions():
        text = body(function)
        if 20 < len(text) < PIECE:
            yield asked(f"Implement {header(function)}.", text)


SPOKEN: Mapping[str, Callable[[SourceFile], Iterator[Row]]] = {
    task.__name__: task
    for task in (
        describe,
        define,
        implement,
    )
}


def spoken(name: str) -> Splits:
    """A task of `SPOKEN`: a small instruction, and the answer."""
    return _collected((file.part, SPOKEN[name](file)) for file in parsed_files())


def asked(question: str, answer: str) -> Row:
    return {"prompt": f"Question: {question}\nAnswer: ", "text": answer}


# Plain texts.


def source(file: SourceFile) -> str:
    """Code without what is said about it."""
    return "\n".join(code_lines(file))


def comments(file: SourceFile) -> str:
    lines = (line.strip() for line in file.text.splitlines())
    return "\n".join(line.lstrip("# ") for line in lines if line.startswith("# "))


def documentation(file: SourceFile) -> str:
    return "\n".join(docstrings(file))


def tables(file: SourceFile) -> str:
    """What bytes mean in old encodings."""
    return file.text.partition("decoding_table")[2] if file.package == "encodings" else ""


STYLES = ("manual", "source", "tables", "documentation", "comments")
"""The manual is Python's reference, as `help` knows it."""


def style(name: str) -> Splits:
    """Pieces of a text of `STYLES`."""
    if name == "manual":
        return _collected((part, pieces(text)) for part, text in topics())
    told = {"source": source, "tables": tables, "documentation": documentation, "comments": comments}[name]
    files = source_files() if name == "tables" else parsed_files()
    return _collected((file.part, pieces(told(file))) for file in files)


def topics() -> Iterator[tuple[Split, str]]:
    """Pages of the manual, dealt out to the splits."""
    from pydoc_data.topics import topics as pages

    for number, name in enumerate(sorted(pages)):
        yield PARTS[number % len(PARTS)], pages[name]


def texts(characters: int = 400_000) -> list[str]:
    """About so many characters to pretrain on, code and prose in turn; nothing that tasks hold out."""
    prose = [text for part, text in topics() if part == "train"]
    code = [file.text for file in parsed_files() if file.part == "train"]
    turns = [text for pair in zip(prose, code, strict=False) for text in pair]
    lengths = accumulate(map(len, turns))
    count = sum(1 for _ in takewhile(lambda length: length < characters, lengths))
    return turns[:count]


def domains() -> dict[str, Splits]:
    """Of each of `DOMAINS`, which package a few lines come from."""
    rows = labelled("packages")
    return {
        domain: {part: [row for row in some if row["label"] in names] for part, some in rows.items()}
        for domain, names in DOMAINS.items()
    }  # fmt: skip


# Parts of a file.


def snippets(lines: Iterable[str]) -> Iterator[str]:
    """A few lines in a row, as one."""
    filled = [line.strip() for line in lines if line.strip()]
    return (" ".join(filled[start : start + LINES]) for start in range(0, len(filled) - LINES + 1, LINES))


def pieces(text: str) -> Iterator[Row]:
    return ({"text": text[start : start + PIECE]} for start in range(0, len(text) - PIECE, PIECE))


def docstrings(file: SourceFile) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, Function | ast.ClassDef | ast.Module):
            yield ast.get_docstring(node) or ""


def code_lines(file: SourceFile) -> Iterator[str]:
    """Without docstrings and lines of comment."""
    skipped = set[int]()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    for number, line in enumerate(file.text.splitlines(), 1):
        if number not in skipped and line.strip() and not line.lstrip().startswith("#"):
            yield line


def documented(file: SourceFile) -> Iterator[tuple[Function, str]]:
    """Functions with the first lines of their docstrings."""
    for function in file.functions():
        lines = (ast.get_docstring(function) or "").splitlines()
        if lines and len(lines[0]) > 10:
            yield function, lines[0]


def header(function: Function) -> str:
    return f"{function.name}({ast.unparse(function.args)})"


def body(function: Function) -> str:
    """Without the docstring."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return "\n".join(map(ast.unparse, statements))


def _collected(documents: Iterable[tuple[Split, Iterable[Row]]]) -> Splits:
    """Rows of each split, shuffled; of each label the first `MOST_ROWS`, and no row twice."""
    rows: Splits = {"test": [], "validation": [], "train": []}
    for part, some in documents:
        rows[part].extend(some)
    return {part: _chosen(some) for part, some in rows.items()}


def _chosen(rows: list[Row]) -> list[Row]:
    counts: dict[str, int] = {}
    chosen = dict[tuple[str, ...], Row]()
    for row in random.Random(0).sample(rows, len(rows)):
        label = row.get("label", "")
        values = tuple(row.values())
        if values not in chosen and counts.get(label, 0) < MOST_ROWS:
            counts[label] = counts.get(label, 0) + 1
            chosen[values] = row
    return [*chosen.values()]
