"""What a merge did: the recipe it followed, and what became of each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import printable
from .config.recipe import Recipe
from .models.matching import Fate

if TYPE_CHECKING:
    from rich.console import RenderableType

_LONGEST = 200
"""Characters of a cell: names are strangers'."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Returned by `merge`, and kept beside its result as dare_merge.json."""

    out: str
    """Where the result is."""
    recipe: Recipe
    notes: tuple[str, ...]
    """What a reader of the result should know."""
    tensors: tuple[Fate, ...]
    """What became of each, sorted by name: `merged`, `copied` from the base or `carried` from a model."""
    labels: tuple[str, ...]
    """Of the models, by the numbers that tensors go by."""
    fingerprint: str
    """Of the result's weights (docs/format.md §3.3): the same on every machine. A package has it in its own
    manifest."""
    changed: frozenset[str] = frozenset()
    """Names of tensors that differ from the base's."""

    def counts(self) -> dict[str, int]:
        """How many tensors were merged, copied and carried."""
        return {how: sum(fate.how == how for fate in self.tensors) for how in ("merged", "copied", "carried")}

    @property
    def summary(self) -> str:
        """How much of the base was changed, in a line."""
        carried = self.counts()["carried"]
        merged = sum(fate.how == "merged" and fate.name in self.changed for fate in self.tensors)
        rest = len(self.tensors) - merged - carried
        return f"{merged} of {len(self.tensors)} tensors merged, {carried} carried, {rest} copied unchanged"

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values; `recipe` is the text of a configuration that `dare-train merge` runs
        again.
        """
        return {
            "recipe": self.recipe.to_yaml(),
            "notes": list(self.notes),
            "models": list(self.labels),
            **({"fingerprint": self.fingerprint} if self.fingerprint else {}),
            "tensors": [self._row(fate) for fate in self.tensors],
        }

    def _row(self, fate: Fate) -> dict[str, Any]:
        row: dict[str, Any] = {
            "name": fate.name,
            "dtype": fate.info.dtype.code,
            "shape": list(fate.info.shape),
            "how": fate.how,
        }
        if fate.how != "copied":
            row["models"] = list(fate.models)
        if fate.added is not None and fate.added.rows.size:
            row["added_rows"] = int(fate.added.rows.size)
        return {**row, "note": fate.note} if fate.note else row

    def table(self, *, every_tensor: bool = False) -> RenderableType:
        """For a terminal: a row for each kind of fate, or for every tensor."""
        from rich.table import Table
        from rich.text import Text

        counts = ", ".join(f"{count} {how}" for how, count in self.counts().items() if count)
        table = Table(
            title=Text(f"{printable(self.recipe.method, _LONGEST)}: {counts} tensors"),
            caption=Text("\n".join(map(printable, self.notes))) if self.notes else None,
        )
        for title in (
            "tensor" if every_tensor else "tensors",
            "dtype",
            "elements",
            "what became of it",
            "from",
            "note",
        ):
            table.add_column(title, justify="right" if title == "elements" else "left")
        for row in self._rows(every_tensor):
            table.add_row(*(Text(printable(cell, _LONGEST)) for cell in row))
        return table

    def _rows(self, every_tensor: bool) -> Iterator[tuple[str, ...]]:
        groups: dict[tuple[str, ...], list[Fate]] = {}
        for fate in self.tensors:
            note = ", ".join(part for part in (fate.note, _rows_of(fate)) if part)
            key = (fate.info.dtype.code, fate.how, self._from(fate), note, fate.name if every_tensor else "")
            groups.setdefault(key, []).append(fate)
        for (dtype, how, origin, note, _), fates in groups.items():
            name = fates[0].name if len(fates) == 1 else f"{fates[0].name} and {len(fates) - 1} more"
            yield name, dtype, f"{sum(fate.info.numel for fate in fates):,}", how, origin, note

    def _from(self, fate: Fate) -> str:
        if fate.how == "copied":
            return "base"
        everyone = len(fate.models) == len(self.labels) > 1
        return (
            "all models"
            if everyone
            else ", ".join(self.labels[number].rstrip("/").split("/")[-1] for number in fate.models)
        )


def _rows_of(fate: Fate) -> str:
    count = fate.added.rows.size if fate.added else 0
    return f"{count} added row{'s' if count > 1 else ''}" if count else ""
