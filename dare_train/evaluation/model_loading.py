"""Models and tokenizers from folders, of the class that their configuration names.

Unless the user trusts the code that comes with a model, it is not run, and weights are those of safetensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import CheckpointError, brief
from ..weights.skeletons import asks_for

if TYPE_CHECKING:
    import torch

_Loaded = TypeVar("_Loaded")


_SELDOM = "snowman \u2603"
"""Some vocabularies have nothing that stands for it."""


def load_model(folder: str, dtype: Any = "auto", *, trust_remote_code: bool = False) -> torch.nn.Module:
    """The model of a folder or a Hub id, of the class that its configuration names, on the CPU, not training.

    Args:
        trust_remote_code: run the code that came with the model, if its configuration asks for it.

    Raises:
        CheckpointError: the configuration names no class that transformers knows, asks for code of its own,
            or cannot be loaded.
    """
    import transformers

    config = _loaded(folder, "a configuration", transformers.AutoConfig.from_pretrained, trust_remote_code)
    if not trust_remote_code:
        for name, value in asks_for(_settings(config)):
            expected = "no code from a repository, and no more layers than models have"
            remedy = "pass --trust-remote-code if you trust whoever made it"
            raise CheckpointError(
                f"{folder}: config.json: {name}", expected=expected, found=value, remedy=remedy
            )
    kind = _class_of(config, trust_remote_code)
    if kind is None:
        names = [str(name) for name in config.architectures or []]
        expected = "architectures that transformers knows in config.json"
        remedy = "use it from Python, with a model of your own"
        if getattr(config, "auto_map", None):
            remedy = "pass --trust-remote-code if you trust the code that came with it"
        raise CheckpointError(folder, expected=expected, found=", ".join(names) or "none", remedy=remedy)
    only_weights: dict[str, Any] = {} if trust_remote_code else {"use_safetensors": True}
    model: torch.nn.Module = _loaded(
        folder, "a model", kind.from_pretrained, trust_remote_code, dtype=dtype, **only_weights
    )
    return model.train(False)


def load_tokenizer(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model; `trust_remote_code` as for the model.

    Raises:
        CheckpointError: there is none that loads.
    """
    from transformers import AutoTokenizer

    what = "a tokenizer beside the model"
    remedy = "save the model's there: tokenizer.save_pretrained(folder)"
    tokenizer = _loaded(folder, what, AutoTokenizer.from_pretrained, trust_remote_code, remedy=remedy)
    if {*tokenizer.get_vocab()} <= {*tokenizer.all_special_tokens}:  # for some models an empty one is made
        raise CheckpointError(folder, expected=what, found="none that loads", remedy=remedy)
    if not isinstance(longest := tokenizer.model_max_length, (int, float)):  # it compares lengths with it
        raise CheckpointError(
            f"{folder}: model_max_length", expected="a number", found=brief(longest), remedy=remedy
        )
    try:
        tokenizer(_SELDOM)
    except Exception as error:  # what a stranger's file makes it raise
        expected = "a tokenizer that takes any text"
        raise CheckpointError(folder, expected=expected, found=brief(error), remedy=remedy) from error
    return tokenizer


def _settings(config: Any) -> dict[str, Any]:
    """All of a configuration's, with those that it does not write."""
    return {
        name: _settings(value) if hasattr(value, "to_dict") else value for name, value in vars(config).items()
    }


def _class_of(config: Any, trust_remote_code: bool) -> Any:
    import transformers

    names = [name for name in config.architectures or [] if isinstance(name, str)]
    if trust_remote_code:
        own = getattr(config, "auto_map", None) or {}
        for auto, reference in own.items():
            if isinstance(reference, str) and reference.rpartition(".")[2] in names:
                return getattr(transformers, auto, None)
    known = (getattr(transformers, name, None) for name in names)
    return next((kind for kind in known if _is_model(kind)), None)


def _is_model(kind: Any) -> bool:
    """Whether it is a class of models: the name is the configuration's, and may be that of anything."""
    import transformers

    return isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)


def _loaded(
    folder: str, what: str, load: Callable[..., _Loaded], trusted: bool, *, remedy: str = "", **options: Any
) -> _Loaded:
    """What a loader of transformers makes of a folder. Files there are a stranger's, and may make it raise
    anything.
    """
    try:
        return load(folder, trust_remote_code=trusted, **options)
    except Exception as error:
        if "trust_remote_code" in str(error):
            remedy = "pass --trust-remote-code if you trust the code that came with it"
        found = f"{type(error).__name__}: {str(error)[:300]}"
        raise CheckpointError(
            folder, expected=f"{what} that transformers loads", found=found, remedy=remedy
        ) from error
