"""One hostile input, tried: whatever it is, the answer is a result that is right, or one error of the
project's own that can be read.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_lines
import format_reader
import good_files
import numpy as np
from changes import OUTSIDE, Change, apply_changes
from resealing import change_part, reseal
from rich.console import Console

from dare_train import DeltaPackage, apply, diagnose, extract, merge, verify
from dare_train.errors import DareError
from dare_train.evaluation.measurements import Journal, MeasurementRecord
from dare_train.merging.config.mergekit import read
from dare_train.merging.config.task import MergeTask
from dare_train.merging.expert_recipe import read_experts
from dare_train.merging.merge import run as merged
from dare_train.merging.statistics.statistics_file import StatisticsFile
from dare_train.reports.package_tables import diagnosis_table, inspect_json, inspect_table
from dare_train.weights.lora.opening import open_weights

_LONGEST_MESSAGE = 1000
WRITTEN_OUTSIDE = b"of somebody else"
"""What a link leads to holds this, before and after."""


class Wrong(Exception):
    """An answer that must not be."""


@dataclass(frozen=True)
class Input:
    """Good files, what is changed in them, and what is then done with them."""

    kind: str
    """One of `KINDS`."""
    changes: tuple[Change, ...]
    sealed: bool = True
    """Whether digests are made right again, of packages."""
    action: int = 0
    """Which of the kind's, modulo as many as there are."""
    text: str | None = None
    """What takes the place of the file, of a kind that is one."""

    def written(self) -> str:
        return json.dumps([self.kind, self.changes, self.sealed, self.action, self.text])

    @classmethod
    def read(cls, line: str) -> Input:
        kind, changes, sealed, action, text = json.loads(line)
        return cls(kind, tuple(map(tuple, changes)), sealed, action, text)


def tried(given: Input, good: Path, place: Path) -> bool:
    """Build an input in a folder, and do with it what it says.

    Args:
        good: the folder of `make_good`.
        place: a folder that does not exist; it is removed.

    Returns:
        Whether it was taken, rather than refused.

    Raises:
        Wrong: it gave a wrong result, wrote through a link, or gave an error that is none of the project's or
            cannot be read.
    """
    kind = KINDS[given.kind]
    try:
        build(given, good, place)
        action = kind.actions[given.action % len(kind.actions)]
        try:
            action(place / kind.changed, good)
        finally:
            if (place / OUTSIDE).read_bytes() != WRITTEN_OUTSIDE:
                raise Wrong("what a link leads to was written to")
    except DareError as error:
        _check_message(str(error))
        return False
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return True


def build(given: Input, good: Path, place: Path) -> None:
    """Write an input's files."""
    kind = KINDS[given.kind]
    place.mkdir()
    (place / OUTSIDE).write_bytes(WRITTEN_OUTSIDE)
    shutil.copytree(good / kind.changed, place / kind.changed)
    folder = place / kind.changed
    if given.text is not None:
        (folder / kind.file).write_text(given.text, encoding="utf-8", errors="surrogatepass")
    of_parts = [change for change in given.changes if change[0] in ("row", "frame", "recompress")]
    change_part(folder, of_parts)
    apply_changes(folder, [change for change in given.changes if change not in of_parts])
    if given.sealed and kind.sealed:
        reseal(folder)


def _check_message(message: str) -> None:
    if len(message) > _LONGEST_MESSAGE or not message.isprintable():
        raise Wrong(f"an error that cannot be read: {message[:300]!a}")


Action = Callable[[Path, Path], Any]


def _shown(table: Any) -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    lines = console.file.getvalue().split("\n")  # type: ignore[attr-defined]
    if not all(line.isprintable() for line in lines):
        raise Wrong("a table that gives the terminal orders")


def _inspect(package: Path, _: Path) -> None:
    opened = DeltaPackage.open(package)
    _shown(inspect_table(opened, every_tensor=True))
    json.dumps(inspect_json(opened))


def _verify(package: Path, good: Path) -> None:
    verify(package, good / "base")


def _apply(package: Path, good: Path) -> None:
    _applied(good / "base", [package], package.parent / "out")


def _apply_after(package: Path, good: Path) -> None:
    _applied(good / "base", [good / "first", package], package.parent / "out")


def _apply_before(package: Path, good: Path) -> None:
    _applied(good / "base", [package, good / "second"], package.parent / "out")


def _applied(base: Path, packages: list[Path], out: Path) -> None:
    """Apply, and compare with what the second reader, written from the document alone, makes of them."""
    apply(base, packages, out)
    opened = [format_reader.read_package(package) for package in packages]
    wanted = format_reader.apply_chain(format_reader.read_checkpoint(base), opened)
    found = format_reader.read_checkpoint(out)
    if found.keys() != wanted.keys() or not all(_same(found[name], wanted[name]) for name in wanted):
        raise Wrong("other weights than the format says")


def _same(left: Any, right: Any) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and np.array_equal(left.words, right.words)


def _merge_package(package: Path, good: Path) -> None:
    merge(good / "base", [package, good / "tuned"], package.parent / "out")


def _extract_tuned(tuned: Path, good: Path) -> None:
    """Without dropping: what comes back is what the folder held."""
    package = extract(good / "base", tuned, tuned.parent / "package", p=0)
    apply(good / "base", package, tuned.parent / "out")
    if (tuned / "adapter_config.json").exists() or not (tuned / "model.safetensors").is_file():
        return
    found = format_reader.read_checkpoint(tuned.parent / "out")
    for name, tensor in format_reader.read_safetensors(tuned / "model.safetensors").items():
        if not _same(found[name], tensor):
            raise Wrong(f"{name!a}: other weights than were extracted")


def _extract_base(base: Path, good: Path) -> None:
    tuned = good / ("tuned" if base.name == "sharded" else "grown")
    extract(base, tuned, base.parent / "package", p=0.5)


def _diagnose(tuned: Path, good: Path) -> None:
    _shown(diagnosis_table(diagnose(good / "base", tuned)))


def _merge_tuned(tuned: Path, good: Path) -> None:
    report = merge(good / "base", [good / "tuned", tuned], tuned.parent / "out", method="ties")
    _shown(report.table(every_tensor=True))


def _merge_config(folder: Path, good: Path) -> None:
    with chdir(good):
        recipe, _ = read(folder / "config.yml")
        merged(MergeTask.of(recipe), folder.parent / "out")


def _experts_config(folder: Path, _: Path) -> None:
    read_experts(folder / "config.yml")


def _journal(folder: Path, _: Path) -> None:
    Journal(folder / "points.jsonl", "b", "t", {"eval": "m"}).read()


def _search(folder: Path, _: Path) -> None:
    MeasurementRecord(folder / "search.json", {"a": 1}).all  # noqa: B018


def _statistics(folder: Path, _: Path) -> None:
    file = StatisticsFile.open(folder / "fisher.safetensors", "fisher")
    for name in file.tensors:
        file.whole(name)


def _dequantise(folder: Path, _: Path) -> None:
    opened = open_weights(folder, dequantize=True)
    for name, info in opened.tensors.items():
        if opened.read(name, 0, info.numel).size != info.numel:
            raise Wrong(f"{name} has not {info.numel} elements")


def _resume(begun: Path, good: Path) -> None:
    """Go on with what a killed merge left: the result is that of one that was not killed."""
    out = begun.parent / "merged"
    begun.rename(begun.parent / ".merged.00000000-1-00000000.partial")
    merge(good / "base", [good / "tuned", good / "later"], out, weights=good_files.WEIGHTS)
    found, wanted = (format_reader.read_checkpoint(folder) for folder in (out, good / "merged"))
    if found.keys() != wanted.keys() or not all(_same(found[name], wanted[name]) for name in wanted):
        raise Wrong("other weights than a merge that was not killed")


@dataclass(frozen=True)
class Kind:
    changed: str
    """The folder among the good files."""
    files: tuple[str, ...]
    actions: tuple[Action, ...]
    sealed: bool = False

    @property
    def file(self) -> str:
        return self.files[0]


_PACKAGE = ("dare_config.json", "dare_delta.safetensors")
_MODEL = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json")
_MODULES = ("modules.json", "1_Dense/model.safetensors", "1_Dense/config.json", "model.safetensors")
_SHARDED = ("model.safetensors.index.json", "modules.json", "model-0.safetensors")
_ON_MODELS = (_extract_tuned, _merge_tuned, _diagnose, _extract_base)
KINDS = {
    "package": Kind(
        "package", (*_PACKAGE, "config.json"), (_inspect, _verify, _apply, _merge_package), sealed=True
    ),
    "chain, first": Kind("first", _PACKAGE, (_apply_before,), sealed=True),
    "chain, second": Kind("second", _PACKAGE, (_apply_after,), sealed=True),
    "checkpoint": Kind("grown", _MODEL, _ON_MODELS),
    "index": Kind("sharded", _SHARDED, _ON_MODELS),
    "adapter": Kind("adapter", ("adapter_config.json", "adapter_model.safetensors"), _ON_MODELS[:3]),
    "yaml": Kind("merge", ("config.yml",), (_merge_config,)),
    "experts": Kind("experts", ("config.yml",), (_experts_config,)),
    "journal": Kind("records", ("points.jsonl",), (_journal,)),
    "record": Kind("records", ("search.json",), (_search,)),
    "statistics": Kind("records", ("fisher.safetensors",), (_statistics,)),
    "gptq": Kind("gptq", _MODEL[:2], (_dequantise,)),
    "awq": Kind("awq", _MODEL[:2], (_dequantise,)),
    "compressed-tensors": Kind("compressed-tensors", _MODEL[:2], (_dequantise,)),
    "modules": Kind("modules", _MODULES, _ON_MODELS[:3]),
    "killed merge": Kind(
        "begun", ("merge-journal.0", "merge-journal.begun", "model.safetensors"), (_resume,)
    ),
    "command line": Kind("desk", ("words.json",), (command_lines.run_line,)),
}
"""What inputs there are."""


def _with_frameworks(*names: str) -> tuple[Action, ...]:
    """Actions of `with_frameworks`, which takes seconds to import."""

    def action(name: str) -> Action:
        return lambda folder, good: getattr(importlib.import_module("with_frameworks"), name)(folder, good)

    return tuple(map(action, names))


_BERT = ("config.json", "model.safetensors")
_TEXTS = ("texts.jsonl", "texts.json", "texts.csv", "texts.txt")
_WITH_FRAMEWORKS = {
    "texts": Kind("texts", _TEXTS, _with_frameworks("classified", "spoken")),
    "tokenizer": Kind(
        "words", ("tokenizer.json", "tokenizer_config.json"), _with_frameworks("read_tokenizer")
    ),
    "swept": Kind("swept", ("sweep.jsonl",), _with_frameworks("swept")),
    "lora": Kind("classifier", _BERT, _with_frameworks("lora_of_model")),
    "lora of a package": Kind("bert-package", _PACKAGE, _with_frameworks("lora_of_package"), sealed=True),
    "gguf": Kind("gguf", ("tiny.gguf",), _with_frameworks("dequantized")),
}
LEFT_OUT = () if all(map(importlib.util.find_spec, ("transformers", "gguf"))) else tuple(_WITH_FRAMEWORKS)
"""Kinds for which something is not installed."""
if not LEFT_OUT:
    KINDS |= _WITH_FRAMEWORKS


def make_good(folder: Path) -> Path:
    """Write the good files of all kinds into a folder."""
    good_files.make(folder)
    if not LEFT_OUT:
        importlib.import_module("with_frameworks").make(folder)
    return folder
