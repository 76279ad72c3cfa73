"""A fine-tuned model that lacks tensors which its base has, and its own class needs: saved by another class,
or only in part. Whoever loads what is made of it would get random ones in their place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TensorMismatch
from ..weights.derived_buffers import is_derived
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.config_file import CONFIG, config_beside, read_config
from ..weights.heads import embeddings_in, heads_in
from ..weights.protocol import Weights
from ..weights.skeletons import skeleton

logger = logging.getLogger("dare_train")


def check_complete(
    folder: Path | None, base: Weights, aligned: Weights, tuned: Weights, *, decided: Callable[[str], bool]
) -> list[str]:
    """Sentences on what a model lacks outside of its layers, such as a head.

    Args:
        folder: where its configuration lies, if it has one.
        base: in its own names.
        aligned: under the names of the result.
        decided: whether the user has said what becomes of a tensor.

    Raises:
        TensorMismatch: it lacks layers or embeddings.
    """
    lacking = {
        name
        for name, info in aligned.tensors.items()
        if name not in tuned.tensors and not is_derived(name, info.shape) and not decided(name)
    }
    config = (read_config(folder / CONFIG) if folder is not None else {}) or config_beside(base)
    if not lacking or folder is None or not isinstance(base, Checkpoint):
        return []
    missing = sorted(lacking & _needed(config, tuned.tensors.keys()))
    if not missing:
        return []
    of = str(config["architectures"][0])
    count = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    inside = [name for name in missing if any(map(str.isdigit, name.split(".")))] + embeddings_in(missing)
    if inside:
        raise TensorMismatch(
            f"{tuned.label}: {inside[0]}{count}",
            expected=f"in it, since {of} needs it and {base.label} has it",
            found="missing",
            remedy="save the whole model; or dare-train merge takes the base's for what is missing",
        )
    return [f"{missing[0]}{count}: missing in {tuned.label}, so in the result, though {of} needs it"]


def notes_on_new_modules(
    folder: Path | None, base: Collection[str], adapted: Collection[str], label: str
) -> list[str]:
    """A sentence on modules that only an adapter has, such as a classifier's head, where no configuration
    comes with it that has them.
    """
    new = sorted({*adapted} - {*base})
    others = [name for name in new if name not in heads_in(new)]
    if not others or folder is None or (folder / CONFIG).exists():
        return []
    of = (
        "config.json of the result is the base's: name the class and the labels there that the adapter is for"
    )
    return [f"{others[0]}: in {label} alone; {of}"]


def _needed(config: Mapping[str, Any], held: Collection[str]) -> set[str]:
    """What a configuration's class has to be given, as files call it, but for what is tied to something that
    is there; nothing where the class is not known here.
    """
    module = skeleton(config)
    if module is None:
        return set()
    from ..weights.live.checkpoint_names import file_places
    from ..weights.live.declared_ties import ties_of

    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    try:
        places = file_places(module, shapes)
    except ConfigError:  # a conversion that is no view says nothing of what files have
        return set()
    tied = {name for group in ties_of(module) if not group.isdisjoint(held) for name in group}
    return {name for name in places if name not in tied}
