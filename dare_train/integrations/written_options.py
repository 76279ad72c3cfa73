"""Arguments of a `DareCallback` that somebody wrote down, on a command line or in YAML: read and checked
without torch, before anything is started.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..config import DareConfig
from ..errors import ConfigError
from ..evaluation.harness_text import is_harness
from ..kernels.backends import checked
from ..snapshots.callback_options import check_options, schedule

Words = list[str]
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def drop_rates(words: Words, name: str = "p") -> float | dict[str, float]:
    """A drop rate; or several as PATTERN=RATE, first match wins.

    Raises:
        ConfigError: one of them is no number.
    """
    pairs = [word.rpartition("=") for word in words]
    try:
        rates = {pattern or "*": float(rate) for pattern, _, rate in pairs}
    except ValueError as error:
        raise ConfigError(name, expected="a number, or PATTERN=NUMBER", found=" ".join(words)) from error
    if len(rates) < len(words):
        raise ConfigError(name, expected="one rate for each pattern", found=" ".join(words))
    return rates["*"] if list(rates) == ["*"] else rates


def _text(name: str, words: Words) -> str:
    if len(words) > 1:
        raise ConfigError(name, expected="one value", found=" and ".join(words))
    return words[0]


def _number(name: str, words: Words) -> int:
    word = _text(name, words)
    try:
        return int(word)
    except ValueError as error:
        raise ConfigError(name, expected="an integer", found=word) from error


def _truth(name: str, words: Words) -> bool:
    word = _text(name, words)
    if word.lower() not in _TRUTH:
        raise ConfigError(name, expected="true or false", found=word)
    return _TRUTH[word.lower()]


def _evaluation(name: str, words: Words) -> str | bool:
    word = _text(name, words)
    return word if is_harness(word) else _truth(name, words)


def _patterns(name: str, words: Words) -> Words:
    return words


def _moments(name: str, words: Words) -> list[str | int]:
    return [int(word) if word.isascii() and word.isdecimal() and len(word) < 20 else word for word in words]


OPTIONS: Mapping[str, Callable[[str, Words], Any]] = {
    "p": lambda name, words: drop_rates(words, name),
    "seed": _number,
    "rescale": _text,
    "values": _text,
    "include": _patterns,
    "exclude": _patterns,
    "whole": _patterns,
    "allow_nonfinite": _truth,
    "dtype": _text,
    "rounding": _text,
    "when": _moments,
    "base": _text,
    "keep": _number,
    "keep_best": _truth,
    "incremental": _truth,
    "evaluate": _evaluation,
    "on_error": _text,
    "source": _text,
    "kernels": _text,
    "name": _text,
    "artifact": _truth,
    "push_to_hub": _text,
}
"""Each argument of `DareCallback`, and how it is read from the words that were given for it."""

_DEFAULTS: Mapping[str, Any] = {
    "keep": None,
    "keep_best": False,
    "incremental": False,
    "evaluate": False,
    "values": "auto",
    "name": "dare",
    "on_error": "warn",
    "source": "weights",
}


def read(pairs: Sequence[str]) -> dict[str, Any]:
    """Arguments of a `DareCallback` from NAME=VALUE. A name may be given several times where several values
    can be.

    Raises:
        ConfigError: a name is unknown, or a value cannot be read.
    """
    words: dict[str, Words] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError("--dare", expected="NAME=VALUE, such as p=0.9", found=repr(pair))
        _check_name(name, "--dare ")
        words.setdefault(name, []).append(value)
    return {name: OPTIONS[name](f"--dare {name}", given) for name, given in words.items()}


def check(options: Mapping[str, Any]) -> None:
    """Whether these can be the arguments of a `DareCallback`.

    Raises:
        ConfigError: saying which cannot.
    """
    for name, value in options.items():
        _check_name(name)
        reader = OPTIONS[name]
        if reader is _truth and not isinstance(value, bool):
            raise ConfigError(name, expected="true or false", found=repr(value))
        if reader is _text and value is not None and not isinstance(value, str):
            raise ConfigError(name, expected="a text", found=repr(value))
    config = {field.name for field in fields(DareConfig) if field.init}
    DareConfig(**{name: value for name, value in options.items() if name in config})
    if "when" in options:
        schedule(options["when"])
    check_options(**{name: options.get(name, default) for name, default in _DEFAULTS.items()})
    checked(options.get("kernels"), "kernels")


def _check_name(name: str, before: str = "") -> None:
    if name in OPTIONS:
        return
    near = difflib.get_close_matches(name, OPTIONS, n=1)
    meant = f"{near[0]}?" if near else f"one of {', '.join(OPTIONS)}"
    raise ConfigError(f"{before}{name}", expected="an argument of DareCallback", found="none", remedy=meant)
