"""A file of several merges, some of which have names and go into others (`mergekit-multi`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from ...config import check_folder_name
from ...errors import ConfigError, brief
from .yaml_parts import documents_of

_NAMES_A_MODEL = {"model", "base_model", "path", "lora", "source", "tokenizer_source"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One merge of a file.

    Attributes:
        name: what others call its result; empty for the one that is the file's.
        document: its configuration, with the folders of others' results for their names.
        out: where its result belongs.
    """

    name: str
    document: Mapping[str, Any]
    out: Path


def stages_of(path: Path, out: Path, folder: Path) -> list[Stage]:
    """The merges of a file, each after those whose results it needs; none where it is one merge alone.

    Args:
        out: where the last one's result belongs: that of the one without a name, or of the one that no other
            uses.
        folder: where those of the others belong, under their names.

    Raises:
        ConfigError: the file cannot be read, names are missing, given twice, or lead round.
    """
    documents = documents_of(path)
    if len(documents) < 2:
        return []
    by_name = _by_name(documents)
    uses = {name: {*_used(document, by_name.keys() - {""})} for name, document in by_name.items()}
    last = _last(uses)
    places = {name: out if name == last else folder / name for name in by_name}
    try:
        order = [*TopologicalSorter(uses).static_order()]
    except CycleError as error:
        found = " → ".join(error.args[1])
        raise ConfigError("name", expected="merges that need one another in an order", found=found) from error
    return [Stage(name=name, document=_placed(by_name[name], places), out=places[name]) for name in order]


def _by_name(documents: Sequence[object]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for document in documents:
        if not isinstance(document, dict):
            raise ConfigError("the configuration", expected="a merge in each document", found=brief(document))
        name = document.get("name", "")
        if name != "":
            check_folder_name("name", name)
        if name in found:
            said = f"two merges called {name!r}" if name else "two merges without one"
            remedy = "give each its own; the one for --out may do without"
            raise ConfigError("name", expected="another for each merge", found=said, remedy=remedy)
        found[name] = {key: value for key, value in document.items() if key != "name"}
    return found


def _last(uses: Mapping[str, set[str]]) -> str:
    if "" in uses:
        return ""
    used = set[str]().union(*uses.values())
    unused = [name for name in uses if name not in used]
    if len(unused) > 1:
        remedy = "leave out the name of the one that --out is for"
        found = ", ".join(unused)
        raise ConfigError("name", expected="one merge that no other uses", found=found, remedy=remedy)
    return unused[0] if unused else next(iter(uses))


def _used(value: object, names: set[str], key: str = "") -> Iterator[str]:
    """Names of other merges, where a configuration names models."""
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from _used(each, names, str(inner))
    elif isinstance(value, list):
        for each in value:
            yield from _used(each, names, key)
    elif isinstance(value, str) and key in _NAMES_A_MODEL and value.partition("+")[0] in names:
        yield value.partition("+")[0]


def _placed(value: Any, places: Mapping[str, Path], key: str = "") -> Any:
    """With folders in place of names."""
    if isinstance(value, dict):
        return {inner: _placed(each, places, str(inner)) for inner, each in value.items()}
    if isinstance(value, list):
        return [_placed(each, places, key) for each in value]
    name, plus, adapter = value.partition("+") if isinstance(value, str) else ("", "", "")
    if name and name in places and key in _NAMES_A_MODEL:
        return f"{places[name]}{plus}{adapter}"
    return value
