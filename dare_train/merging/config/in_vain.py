"""What a recipe says and nothing comes of: patterns and filters that fit no tensor, cases that are never
reached.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ...config import unmatched
from ...extracting.patterns import notes_on_renaming
from ..methods.parameters import Case, Settings
from .recipe import Recipe


def said_in_vain(recipe: Recipe, names: Collection[str], own: Collection[str]) -> Iterator[str]:
    """A sentence on each.

    Args:
        names: of the tensors of base and models, as the result calls them.
        own: as the models call theirs.
    """
    for option, patterns in (("exclude", recipe.exclude), ("take", tuple(recipe.take))):
        for pattern in unmatched(patterns, names):
            yield f"{option}: no tensor is called {pattern}: is it misspelt?"
    yield from notes_on_renaming(recipe.rename, own)
    for level in recipe.levels():
        yield from cases_in_vain(level.settings, names, level.where)


def cases_in_vain(settings: Settings, names: Collection[str], where: str) -> Iterator[str]:
    """A sentence on each filter that fits none of the tensors, on cases behind one that fits all, and on
    none.
    """
    for parameter, setting in settings.items():
        if isinstance(setting, tuple):
            yield from _of_cases(setting, names, f"{parameter}{where}")


def _of_cases(cases: Sequence[Case], names: Collection[str], where: str) -> Iterator[str]:
    if not cases:
        yield f"{where}: an empty list says nothing"
    last = next((place for place, case in enumerate(cases) if case.matches_all), len(cases))
    for case in cases[:last]:
        if not any(map(case.matches, names)):
            yield f"{where}: no tensor's name has {case.filter} in it: is it misspelt?"
    behind = len(cases) - last - 1
    if behind > 0:
        never = "a case never counts" if behind == 1 else f"{behind} cases never count"
        yield f"{where}: {never}, behind one for every tensor: put that one last"
