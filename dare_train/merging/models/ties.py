"""Models of which some tie a head to an embedding and others do not, or write it under another of its names:
each tensor of the result, and what it is in each model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...weights.heads import embeddings_in, heads_in
from ...weights.live.declared_ties import Ties, declared_ties, ties_of
from ...weights.protocol import SEGMENT, Weights, runs

Same = Callable[[str, str], bool]
"""Whether a model has the same content under two of the result's names."""


@dataclass(kw_only=True)
class Tied:
    """A model, or the base, as far as its ties are concerned. Names are the result's.

    Attributes:
        names: the model's own name of each tensor that it has.
        ties: see `Ties`; None where nothing says what is tied: then it is as the base is.
    """

    names: dict[str, str]
    ties: Ties | None
    same: Same

    def has_tied(self, group: frozenset[str], otherwise: bool) -> bool:
        """Whether a group is one tensor here, by what is said and by what is there: `otherwise` counts where
        nothing is said.
        """
        said = otherwise if self.ties is None else any(len(tie & group) > 1 for tie in self.ties)
        first, *others = [name for name in group if name in self.names] or [""]
        return said and all(self.same(first, other) for other in others)


@dataclass(frozen=True, kw_only=True)
class Reconciled:
    """What `reconcile` found.

    Attributes:
        aliases: names that the base gets beside its own, and those of which they are copies.
        filled: for each model, names that it gets, and whose content they have.
        dropped: for each model, names that are others of a tensor that it has anyway.
        untied: whether the result has apart what the base's configuration may say is one.
    """

    aliases: Mapping[str, str]
    filled: Sequence[Mapping[str, str]]
    dropped: Sequence[Collection[str]]
    untied: bool


def reconcile(base: Tied, models: Sequence[Tied]) -> Reconciled:
    """Give every model the names that the result has of what some of them tie.

    A tensor that is tied in all has the base's name. Where the base has it once and a model has two in its
    place, the result has two, each a delta of the base's one; where the base has two, a model that ties them
    moves both.
    """
    aliases: dict[str, str] = {}
    filled: list[dict[str, str]] = [{} for _ in models]
    dropped: list[set[str]] = [set() for _ in models]
    untied = False
    for group in _joined([base, *models]):
        there = sorted(group & base.names.keys())
        if not there:
            continue
        base_ties = base.has_tied(group, otherwise=len(there) == 1)
        tied = [model.has_tied(group, otherwise=base_ties) for model in models]
        apart = {
            name
            for model, ties in zip(models, tied, strict=True)
            if not ties and len(group & model.names.keys()) > 1
            for name in group & model.names.keys()
        }
        wanted = sorted(apart - set(there))
        aliases.update(dict.fromkeys(wanted, there[0]))
        untied = untied or bool(wanted) or (len(there) > 1 and not base_ties)
        for number, model in enumerate(models):
            own = sorted(group & model.names.keys(), key=lambda name: (name not in there, name))
            if not own or not tied[number]:
                continue
            filled[number].update({name: own[0] for name in (*there, *wanted) if name not in own})
            dropped[number].update(set(own) - {*there, *wanted})
    return Reconciled(aliases=aliases, filled=filled, dropped=dropped, untied=untied)


def _joined(all_of_them: Iterable[Tied]) -> list[frozenset[str]]:
    """The groups of all, those that share a name as one."""
    groups: list[frozenset[str]] = []
    for tie in (tie for model in all_of_them for tie in model.ties or ()):
        touching = [group for group in groups if group & tie]
        groups = [group for group in groups if not group & tie]
        groups.append(tie.union(*touching))
    return groups


def said_ties(given: object, config: Mapping[str, Any]) -> Ties | None:
    """What a model in memory, or a configuration's class, ties; None where neither says it."""
    if hasattr(given, "all_tied_weights_keys"):
        return ties_of(given)
    found = declared_ties(config)
    return found if found or "tie_word_embeddings" in config else None


def ties_by_name(names: Collection[str], known: Collection[str]) -> Ties:
    """What a model ties that says no more than that it does: one embedding, and every head of those known.

    Args:
        names: of the model.
        known: of all models.
    """
    embeddings = embeddings_in(names)
    heads = heads_in(known)
    return [frozenset({*embeddings, *heads})] if len(embeddings) == 1 and heads else []


def same_content(weights: Weights, first: str, second: str) -> bool:
    """Whether two tensors are equal to the bit."""
    info = weights.tensors[first]
    return first == second or (
        weights.tensors[second] == info
        and all(
            bool((weights.read(first, start, count) == weights.read(second, start, count)).all())
            for start, count in runs(info.numel, SEGMENT)
        )
    )
