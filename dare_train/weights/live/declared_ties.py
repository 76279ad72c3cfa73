"""Which tensors of a model are one under several names, as its class and its configuration say.

Files have such a tensor once, usually. Names alone do not tell a head from other layers, nor whose embedding
it is; classes of transformers declare both, and do not need weights for it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from ..skeletons import skeleton

Ties = list[frozenset[str]]
"""Sets of names, as modules and as files have them, that stand for one tensor each."""


def declared_ties(config: Mapping[str, Any]) -> Ties | None:
    """What a configuration's class ties; None where that is not known here: no `architectures`, a class that
    transformers does not have, or no transformers at all.

    Args:
        config: the content of a `config.json`.
    """
    model = skeleton(config)
    return None if model is None else ties_of(model)


def ties_of(model: Any) -> Ties:
    """What a model in memory says it ties."""
    keys = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(keys, Mapping):
        return []
    by_source: defaultdict[str, set[str]] = defaultdict(set)
    for name, source in keys.items():
        by_source[source] |= {name, source}
    return [frozenset(names | _in_files(model, names)) for _, names in sorted(by_source.items())]


def _in_files(model: Any, names: Iterable[str]) -> set[str]:
    if "transformers" not in sys.modules:
        return set()
    from .checkpoint_names import renamed

    return {renamed(model, name) for name in names}
