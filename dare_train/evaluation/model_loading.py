"""Models from folders, of the class that their configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch


def load_model(folder: str, dtype: Any = "auto") -> torch.nn.Module:
    """The model of a folder or a Hub id, of the class that its configuration names, on the CPU, not training.

    Raises:
        CheckpointError: the configuration names none that transformers knows.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    kind = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if kind is None:
        expected = "architectures that transformers knows in config.json"
        remedy = "use it from Python, with a model of your own"
        raise CheckpointError(folder, expected=expected, found=", ".join(names) or "none", remedy=remedy)
    model: torch.nn.Module = kind.from_pretrained(folder, dtype=dtype).train(False)
    return model
