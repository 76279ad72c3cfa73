"""Weights of one model under other names: what is missing on one side lies on the other, as something new.

Nothing is renamed by guesses. What can be seen from shapes is told, with the `--rename` that would map it.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import NamedTuple

from ..errors import TensorMismatch
from .derived_buffers import is_derived
from .heads import embeddings_in, heads_in
from .protocol import TensorInfo

logger = logging.getLogger("dare_train")

_NUMBERS = re.compile(r"(?<![0-9A-Za-z])[0-9]+(?![0-9A-Za-z])")
_EXPERTS = re.compile(r"(^|\.)experts\.")
_ENDINGS = {".gamma": ".weight", ".beta": ".bias", ".weight": ".gamma", ".bias": ".beta"}
"""Of layer norms: what TensorFlow called them, today's, and the other way round."""
_FEW = 8
"""Tensors of one shape in one layer, up to which names are compared one by one."""
_SHARE = 0.1
"""Of the base's tensors: so many under other names are no chance any more."""


class Pair(NamedTuple):
    """Two tensors of one shape that may be the same one."""

    model: str
    base: str
    old: str
    """What to replace in the model's name."""
    new: str


def check_names_meet(
    base: Mapping[str, TensorInfo], model: Mapping[str, TensorInfo], *, base_label: str, label: str
) -> None:
    """
    Args:
        model: under the base's names, as far as they are known; without tensors that are known to be new.

    Raises:
        TensorMismatch: many of the base's tensors are not in the model, and as many of the same shapes are
            new; or tensors of the model are empty.
    """
    _check_not_empty(base, model, label)
    missing, new = _apart(base, model)
    pairs = pairs_of(missing, new)
    if _is_no_chance(pairs, len(base)):
        raise _error(pairs, missing, base_label, label)
    by_token = {*embeddings_in(base), *heads_in(base)}
    for pair in (pair for pair in pairs if pair.base in by_token):
        told = "%s: no %s, but %s has its shape: if they are one, --rename %s=%s (rename=) says so"
        logger.warning(told, label, pair.base, pair.model, pair.old, pair.new)
    if _cut_otherwise(missing, new, sum(info.numel for info in base.values())):
        expected = f"in {label}, as {base_label} has it"
        found = f"not there, and {min(new)} {list(new[min(new)].shape)} instead"
        remedy = (
            "are weights cut or packed otherwise, as experts are? Save both with one version of their library"
        )
        raise TensorMismatch(min(missing), expected=expected, found=found, remedy=remedy)


def _check_not_empty(base: Mapping[str, TensorInfo], model: Mapping[str, TensorInfo], label: str) -> None:
    """What a process has of weights that others hold, saved as if it were all."""
    empty = sorted(
        name for name, info in model.items() if not info.numel and name in base and base[name].numel
    )
    if empty:
        expected = f"shape {list(base[empty[0]].shape)}, as in the base"
        found = f"{list(model[empty[0]].shape)} in {label}"
        remedy = (
            "was it saved by DeepSpeed ZeRO-3 without gathering weights? Save it again, with "
            "stage3_gather_16bit_weights_on_model_save"
        )
        raise TensorMismatch(empty[0], expected=expected, found=found, remedy=remedy)


def explained(
    base: Mapping[str, TensorInfo], model: Mapping[str, TensorInfo], *, base_label: str, label: str
) -> TensorMismatch | None:
    """What to say where not one name is the same; None where shapes do not fit either."""
    pairs = pairs_of(*_apart(base, model))
    return _error(pairs, base, base_label, label) if _is_no_chance(pairs, len(base)) else None


def pairs_of(missing: Mapping[str, TensorInfo], new: Mapping[str, TensorInfo]) -> list[Pair]:
    """Tensors of one shape in one layer, the most alike first, each once."""
    by_place: defaultdict[tuple[object, ...], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, tensors in enumerate((missing, new)):
        for name, info in tensors.items():
            by_place[info.shape, tuple(_NUMBERS.findall(name))][side].append(name)
    pairs = []
    for of_base, of_model in by_place.values():
        few = max(len(of_base), len(of_model)) <= _FEW
        matched = (
            _most_alike(of_base, of_model) if few else zip(sorted(of_base), sorted(of_model), strict=False)
        )
        pairs += [_pair(theirs, own) for own, theirs in matched]
    return pairs


def _most_alike(of_base: list[str], of_model: list[str]) -> Iterable[tuple[str, str]]:
    ranked = sorted(
        ((own, theirs) for own in of_base for theirs in of_model),
        key=lambda names: (-SequenceMatcher(None, names[0], names[1], autojunk=False).ratio(), names),
    )
    used: set[str] = set()
    for own, theirs in ranked:
        if f"b {own}" not in used and f"m {theirs}" not in used:
            used |= {f"b {own}", f"m {theirs}"}
            yield own, theirs


def _pair(model: str, base: str) -> Pair:
    """The parts in which two names differ, with as much around them as tells where they stand."""
    theirs, own = model.split("."), base.split(".")
    same = 0
    while same < min(len(theirs), len(own)) - 1 and theirs[same] == own[same]:
        same += 1
    end = 0
    while end < min(len(theirs), len(own)) - same - 1 and theirs[-1 - end] == own[-1 - end]:
        end += 1
    old, new = (".".join(parts[same : len(parts) - end]) for parts in (theirs, own))
    behind = "." if end else ""
    before = "." if same else ""
    return Pair(model, base, f"{before}{old}{behind}", f"{before}{new}{behind}")


def _apart(
    base: Mapping[str, TensorInfo], model: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """What only the one has, and what only the other, but for what goes by its older name there."""
    return _only_in(base, model), _only_in(model, base)


def _only_in(these: Mapping[str, TensorInfo], others: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {
        name: info
        for name, info in these.items()
        if name not in others and respelt(name) not in others and not is_derived(name, info.shape)
    }


def respelt(name: str) -> str:
    """What TensorFlow called a part of a layer norm, or what it is called today."""
    ending = f".{name.rpartition('.')[2]}"
    return name.removesuffix(ending) + _ENDINGS.get(ending, ending)


def _is_no_chance(pairs: list[Pair], tensors: int) -> bool:
    if len(pairs) > 1 and len(pairs) >= _SHARE * tensors:
        return True
    layers: defaultdict[tuple[str, str], set[tuple[str, ...]]] = defaultdict(set)
    for pair in pairs:
        numbers = tuple(_NUMBERS.findall(pair.base))
        if numbers:
            layers[pair.old, pair.new].add(numbers)
    return any(len(places) > 1 for places in layers.values())


def apart_in_layers(
    base: Mapping[str, TensorInfo], model: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """What only the one has in numbered layers, and what only the other."""
    missing, new = _apart(base, model)
    return _in_layers(missing), _in_layers(new)


def _in_layers(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name: info for name, info in tensors.items() if _NUMBERS.search(name)}


def _cut_otherwise(missing: Mapping[str, TensorInfo], new: Mapping[str, TensorInfo], everything: int) -> bool:
    """Whether what is missing in layers is likely what is new there, in other pieces: experts on both sides,
    as many elements in each layer, or a large share of all that there are.
    """
    of_base, of_model = _in_layers(missing), _in_layers(new)
    if not of_base or not of_model:
        return False
    if all(any(_EXPERTS.search(name) for name in names) for names in (of_base, of_model)):
        return True
    if len(of_base) != len(of_model) and _by_layer(of_base) == _by_layer(of_model):
        return True
    cut, others = (sum(info.numel for info in infos.values()) for infos in (of_base, of_model))
    return cut >= _SHARE * everything and others >= cut / 2


def _by_layer(tensors: Mapping[str, TensorInfo]) -> Mapping[str, int]:
    """Elements, by the first number of their names."""
    found: Counter[str] = Counter()
    for name, info in tensors.items():
        found[_NUMBERS.findall(name)[0]] += info.numel
    return found


def _error(
    pairs: list[Pair], missing: Mapping[str, TensorInfo], base_label: str, label: str
) -> TensorMismatch:
    rules = Counter((pair.old, pair.new) for pair in pairs)
    shown: list[Pair] = []
    for rule, _ in rules.most_common(3):
        shown.append(next(pair for pair in pairs if (pair.old, pair.new) == rule))
    shown += [pair for pair in pairs if pair not in shown][: 3 - len(shown)]
    options = dict.fromkeys(f"--rename {pair.old}={pair.new}" for pair in shown)
    also = ", ".join(f"{pair.base} and {pair.model}" for pair in shown)
    return TensorMismatch(
        label,
        expected=f"the names of {base_label}",
        found=f"{len(pairs)} of its tensors under others: {also}",
        remedy=f"if they are the same, {' '.join(options)} (rename=) maps these",
    )
