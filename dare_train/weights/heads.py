"""Embeddings and heads by their names, where nothing else tells of them."""

from __future__ import annotations

from collections.abc import Collection

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "shared.weight",
)
HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
_OUTPUT, _BESIDE = "output.weight", ("tok_embeddings.weight", "model.tok_embeddings.weight")
"""A head where it stands beside such an embedding; elsewhere it is any layer's."""
_BIASES = (*(f"{head.removesuffix('.weight')}.bias" for head in HEADS), "predictions.bias")


def embeddings_in(names: Collection[str]) -> list[str]:
    """Those with a row for each token that go in."""
    return [name for name in names if _ends(name, EMBEDDINGS)]


def heads_in(names: Collection[str]) -> list[str]:
    """Those with a row for each token that come out."""
    return [name for name in names if _ends(name, HEADS) or _is_output(name, names)]


def biases_in(names: Collection[str]) -> list[str]:
    """Those of heads."""
    return [name for name in names if _ends(name, _BIASES)]


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return f".{name}".endswith(tuple(f".{ending}" for ending in endings))


def _is_output(name: str, names: Collection[str]) -> bool:
    if not _ends(name, (_OUTPUT,)):
        return False
    before = name.removesuffix(_OUTPUT)
    return any(f"{before}{beside}" in names for beside in _BESIDE)
