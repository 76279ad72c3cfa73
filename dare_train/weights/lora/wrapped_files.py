"""A model whose files have something before all of its names that its class does not have: what a wrapper
calls the model inside.
"""

from __future__ import annotations

import logging

from ...errors import TensorMismatch
from ..alignment import align
from ..files.config_file import config_beside
from ..protocol import Weights, under
from ..skeletons import skeleton

logger = logging.getLogger("dare_train")


def without_wrapper(base: Weights, model: Weights) -> Weights:
    """A model under the names of its class, where those of the base tell that a wrapper's stands before all
    of them; else as it is.
    """
    try:
        _, prefix = align(base, model.tensors.keys(), model=model.label)
    except TensorMismatch:
        return model
    before_all = all(name.startswith(prefix) for name in model.tensors)
    if not prefix or prefix.startswith("-") or not before_all or _is_own(prefix, base, model):
        return model
    logger.warning("%s: names without %s, as the model has them", model.label, prefix)
    return under(model, {name.removeprefix(prefix): name for name in model.tensors})


def _is_own(prefix: str, base: Weights, model: Weights) -> bool:
    """Whether names with the prefix are the class's own, or such as transformers loads. Where no class is
    known, those are not that would have it twice.
    """
    for weights in (model, base):
        module = skeleton(config_beside(weights))
        if module is None:
            continue
        from ..live.checkpoint_names import loads_without

        known = module.state_dict().keys()
        if not known.isdisjoint(model.tensors) or loads_without(module, prefix, next(iter(model.tensors))):
            return True
        if any(name.removeprefix(prefix) in known for name in model.tensors):
            return False
    return not any(name.startswith(prefix) for name in base.tensors)
