"""Options of `mergekit-yaml` and `mergekit-multi` in a pasted command: done where they mean something here,
told where they do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .given_once import OnceCommand

NOTES = "dare_train.flags"
"""Under this name, what is to be told is in a command's context."""

_READ_BY_RUNS = "weights are read run by run, of safetensors alone"
_ONE_DEVICE = "one device works it out, and holds a run of a tensor at a time"
_TOLD: dict[str, tuple[int, str]] = {
    "--lora-merge-cache": (1, "adapters are merged while they are read"),
    "--lora-merge-dtype": (1, "adapters are merged in float64, and rounded once"),
    "--allow-crimes": (0, "models that do not fit together are refused, with it and without"),
    "--no-allow-crimes": (0, "models that do not fit together are refused, with it and without"),
    "--out-shard-size": (1, "the result's files are as large as the base's"),
    "--copy-tokenizer": (0, "the tokenizer comes along anyway"),
    "--clone-tensors": (0, "layers that are repeated are written each for itself"),
    "--no-clone-tensors": (0, "layers that are repeated are written each for itself"),
    "--trust-remote-code": (0, "no code of a model is run"),
    "--no-trust-remote-code": (0, "no code of a model is run"),
    "--lazy-unpickle": (0, _READ_BY_RUNS),
    "--no-lazy-unpickle": (0, _READ_BY_RUNS),
    "--write-model-card": (0, "a card is written anyway"),
    "--safe-serialization": (0, "safetensors are what is written"),
    "--low-cpu-memory": (0, _ONE_DEVICE),
    "--no-low-cpu-memory": (0, _ONE_DEVICE),
    "--read-to-gpu": (0, _ONE_DEVICE),
    "--no-read-to-gpu": (0, _ONE_DEVICE),
    "--multi-gpu": (0, _ONE_DEVICE),
    "--no-multi-gpu": (0, _ONE_DEVICE),
    "--async-write": (0, "writing goes on beside the arithmetic anyway"),
    "--no-async-write": (0, "writing goes on beside the arithmetic"),
    "--write-threads": (1, "one thread writes"),
    "--num-threads": (1, "all cores work; taskset leaves some out"),
    "-j": (1, "all cores work; taskset leaves some out"),
    "-v": (0, "the report says all there is"),
    "--no-quiet": (0, "the report is shown unless --quiet says otherwise"),
    "--no-cuda": (0, "the CPU works it out unless --device says otherwise"),
    "--no-unsafe-truncate-embeddings": (0, "rows are told by their tokens"),
    "--no-lazy": (0, "results are made anew"),
}
"""How many words follow, and what is told."""

_DONE: dict[str, tuple[str, ...]] = {
    "--cuda": ("--device", "cuda"),
    "--gpu-rich": ("--device", "cuda"),
    "--random-seed": ("--seed",),
    "--out-path": ("--out",),
    "-I": ("--intermediate-dir",),
}
"""What is meant, in words of ours."""

_REFUSED: dict[str, tuple[str, str]] = {
    "--unsafe-truncate-embeddings": (
        "rows told by their tokens",
        "tokenizer_source: base in the configuration leaves the others out",
    ),
    "--no-copy-tokenizer": ("a result with its tokenizer", "leave it out, and delete the tokenizer's files"),
    "--no-write-model-card": ("a result with its card", "leave it out, and delete README.md"),
    "--no-safe-serialization": ("safetensors", "leave it out"),
    "--transformers-cache": ("HF_HUB_CACHE=FOLDER before the command", "set that, and leave it out"),
    "--lazy": ("results made anew", "leave it out; a folder that is there is refused without --overwrite"),
}
"""What is done instead, and what to do."""


@dataclass(kw_only=True)
class Pasted:
    """A command's words without options that are mergekit's alone.

    Attributes:
        words: what remains.
        notes: a sentence for each option that means nothing here.
    """

    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def translated(given: Sequence[str]) -> Pasted:
    """The words of a command in ours.

    Raises:
        ConfigError: an option asks for what is not done here.
    """
    pasted = Pasted()
    words = iter(given)
    for word in words:
        if word == "--":
            pasted.words += [word, *words]
            break
        name, equals, value = word.partition("=")
        if name in _REFUSED:
            expected, remedy = _REFUSED[name]
            raise ConfigError(name, expected=expected, found="that option", remedy=remedy)
        if name in _TOLD:
            values, note = _TOLD[name]
            for _ in range(0 if equals else values):
                next(words, None)
            pasted.notes.append(f"{name} is ignored: {note}")
        else:
            pasted.words += _ours(name, equals, value)
    return pasted


def _ours(name: str, equals: str, value: str) -> Iterator[str]:
    if name not in _DONE:
        yield f"{name}{equals}{value}"
        return
    yield from _DONE[name]
    if equals:
        yield value


class MergeCommand(OnceCommand):
    """A command that takes mergekit's options beside its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        pasted = translated(args)
        ctx.meta[NOTES] = pasted.notes
        return super().parse_args(ctx, pasted.words)
