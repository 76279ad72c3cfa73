"""What a reader of a merge's result should know, in a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .prepared_merge import PreparedMerge, gives_q


def notes_of(ready: PreparedMerge) -> Iterator[str]:
    """What a merge does that its recipe does not say."""
    merged = ready.merged
    yield from ready.notes
    yield from ready.chosen.notes if ready.chosen is not None else ()
    dropped = [model.label for model in merged.inputs if any(map(model.dropped, model.tensors))]
    if dropped:
        yield f"dropped in their packages already, and not dropped at random again: {', '.join(dropped)}"
    if any(statistics.file.merge for statistics in merged.gram):
        yield "RegMean++: the Gram matrices are those of inputs that come from layers merged before"
    averaged = [name for name, fate in merged.fates.items() if fate.how == "merged" and merged.averaged(name)]
    if averaged:
        needs = merged.method.needs
        why = f"not every model has {needs} statistics of them" if needs else "they are no matrices"
        yield f"averaged, since {why}: {_some(averaged)}"
    if merged.recipe.rescale == "q" and not gives_q(merged.recipe):
        plain = [
            name for name, fate in merged.fates.items() if fate.how == "merged" and not merged.has_gram(name)
        ]
        yield f"rescaled by 1/(1 - p), since not every model has Gram matrices of them: {_some(plain)}"


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
