"""Imported by each Python that a command of `dare-train run` starts, when it starts: waits for the Trainer of
transformers, and lets the `sitecustomize` that this one hides have its turn.

Most of these processes never train. So this imports what Python has imported by then, and nothing of
dare_train until there is a Trainer.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_TRAINER = "transformers.trainer"


class _TrainerFinder:
    """Finds the Trainer's module as the others do, and has its Trainer followed once it is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _TRAINER:
            return None
        spec = _found(name, path, target)
        if spec is not None:
            _execute_and_follow(spec.loader)
        return spec


def _found(name: str, path: Any, target: Any = None) -> ModuleSpec | None:
    """What the other finders find."""
    others = [finder for finder in sys.meta_path if not isinstance(finder, _TrainerFinder)]
    found = (finder.find_spec(name, path, target) for finder in others)
    return next((spec for spec in found if spec is not None), None)


def _execute_and_follow(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _follow(module)

    loader.exec_module = exec_module


def _follow(module: Any) -> None:
    try:
        from dare_train.integrations.trainer_hook import follow
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "dare_train":
            raise
        message = f"dare-train run: {sys.executable} makes a Trainer, and has no dare_train: install it there"
        raise ImportError(message) from error
    follow(module.Trainer)


def _give_way() -> None:
    """Import the `sitecustomize` that there would be without this one, if any."""
    here = os.path.dirname(__file__)  # noqa: PTH120 - pathlib is slow to import
    spec = _found("sitecustomize", [place for place in sys.path if place != here])
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _TrainerFinder())
_give_way()
