"""What was found to do harm, made by code: each must be taken rightly, or refused."""

from __future__ import annotations

from changes import HALF, VALUES, Change, deep
from good_files import RECIPE
from judging import KINDS, LEFT_OUT, Input

_MANIFEST = "dare_config.json"
_HEAD = ("tensors", 1)
"""Of a tensor that is a delta."""


def _every(kind: str, *changes: Change, sealed: bool = True) -> tuple[Input, ...]:
    """A change, and each thing that is done with the kind."""
    return tuple(Input(kind, changes, sealed, action) for action in range(len(KINDS[kind].actions)))


def _manifest(*keys: str | int, value: object) -> tuple[Input, ...]:
    return _every("package", ("at", _MANIFEST, [*keys], value))


def _bomb(key: str) -> Input:
    levels = ["- &a0 [1,1,1,1,1,1,1,1,1,1]"]
    levels += [f"- &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return Input("yaml", (), text=RECIPE + f"{key}:\n" + "".join(f"  {level}\n" for level in levels))


def _in_place(kind: str) -> tuple[Input, ...]:
    instead = ("pipe", "folder", "link", "round", "empty", "nothing")
    return tuple(
        one for file in KINDS[kind].files for what in instead for one in _every(kind, ("kind", file, what))
    )


_WITH_FRAMEWORKS = {
    "a column without a name": _every("texts", ("u64", "texts.csv", 0, 0)),
    "half a character in a text": _every("texts", ("set", "texts.json", 1, "half char")),
    "a text without a token": _every("texts", ("set", "texts.json", 1, "empty")),
    "a GGUF of a million layers": _every("gguf", ("u64", "tiny.gguf", 616, 1 << 20)),
    "a tokenizer without a token for other words": _every(
        "tokenizer", ("drop", "tokenizer.json", 273), ("drop", "tokenizer.json", 272)
    ),
    "architectures that are a number": _every("lora", ("at", "config.json", ["architectures"], 7)),
    "a model type that is no text": _every("lora", ("at", "config.json", ["model_type"], {})),
    "rows that the weights do not have": _every("lora", ("at", "config.json", ["vocab_size"], 1 << 31)),
}
_OTHERS: tuple[object, ...] = ([], 7, None, "x", deep(300))
_TOKENS = ["model", "vocab", "a"]
_NAMES = ("escape", "[/x]", "square", "digits", "turned", "half char", "line", "nul", "parts", "dollars")

CORPUS: dict[str, tuple[Input, ...]] = {
    **{f"something else in the place of a file: {kind}": _in_place(kind) for kind in KINDS},
    **{f"a tensor called {name}": _manifest(*_HEAD, "name", value=VALUES[name]) for name in _NAMES},
    **{f"a base called {name}": _manifest("base_model", value=VALUES[name]) for name in _NAMES},
    "300,000 dimensions": _manifest(*_HEAD, "shape", value=[1 << 61] * 300_000),
    "a shape that is too large before it is nothing": _manifest(*_HEAD, "shape", value=[1 << 61, 1 << 61, 0]),
    "a name of 300,000 parts": _manifest(*_HEAD, "name", value="a." * 150_000),
    "nested deep": tuple(
        one
        for kind in KINDS
        for file in KINDS[kind].files
        for one in _every(kind, ("cut", file, 0), ("put", file, 0, "[", 100_000))
    ),
    "aliases of aliases": tuple(map(_bomb, ("parameters", "rescale", "seed", "weight"))),
    "an alias of itself": (Input("yaml", (), text="a: &a [*a]\n"),),
    "a number in base 60": (Input("yaml", (), text=RECIPE.replace("7", "1:" + "59:" * 3000 + "59")),),
    "a YAML that PyYAML stumbles over": (Input("yaml", (), text='a: "\\U99999999"\n'),),
    "patterns that go back and try again": tuple(
        one
        for field in ("rank_pattern", "alpha_pattern")
        for one in _every("adapter", ("at", "adapter_config.json", [field], {r"((\w+\.?)+)+\!": 2}))
    ),
    "a token id of 2^31": _every("checkpoint", ("at", "tokenizer.json", _TOKENS, (1 << 31) - 1)),
    "half a character in an index": _every(
        "index", ("at", "model.safetensors.index.json", ["weight_map", "norm"], f"{HALF}.safetensors")
    ),
    "half a character in a module's name": _every("modules", ("put", "modules.json", 140, HALF, 1)),
    "half a character in the bytes of a record": _every("record", ("put", "search.json", 150, HALF, 1)),
    "statistics of a tensor of another name": _every(
        "statistics", ("name", "fisher.safetensors", 180, "10^400")
    ),
    "a pipe in the place of a merge's journal": _every("killed merge", ("kind", "merge-journal.0", "pipe")),
    **({} if LEFT_OUT else _WITH_FRAMEWORKS),
    "configurations of other kinds": tuple(
        one
        for value in _OTHERS
        for field in ("architectures", "model_type", "tie_word_embeddings", "vocab_size")
        for one in _every("checkpoint", ("at", "config.json", [field], value))
    ),
}
