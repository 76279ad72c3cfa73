"""Llama-shaped pairs of bf16 checkpoints of any size: normal base weights, Laplace-distributed deltas, a real
LlamaConfig.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .common import WEIGHTS, Pair, cached

SEED = 0
BASE_STD = 0.02
DELTA_SCALE = 0.0005
"""Mean |δ|: about 5 % of the base's, so that nearly every bf16 weight changes. Real fine-tunes compress
better."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    layers: int
    vocabulary: int
    hidden: int = 1024
    intermediate: int = 4096

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by checkpoint name, in the order of the file."""
        h, inter = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (h,)}
        shapes |= {"model.embed_tokens.weight": (self.vocabulary, h), "lm_head.weight": (self.vocabulary, h)}
        for layer in (f"model.layers.{number}." for number in range(self.layers)):
            shapes |= {f"{layer}self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
            shapes |= {f"{layer}mlp.{name}_proj.weight": (inter, h) for name in ("gate", "up")}
            shapes |= {f"{layer}mlp.down_proj.weight": (h, inter)}
            shapes |= {f"{layer}{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        return dict(sorted(shapes.items()))


SHAPES = {
    "tiny": Shape(layers=1, vocabulary=256, hidden=64, intermediate=128),
    "117M": Shape(layers=6, vocabulary=8000),
    "468M": Shape(layers=24, vocabulary=32000),
    "936M": Shape(layers=48, vocabulary=64000),
}


def pair(name: str) -> Pair:
    """The pair of that size from the cache, made the first time: the same bits on every machine."""
    folder = cached(
        f"llama-{name}", f"making a {name} Llama-shaped pair", lambda folder: _make(SHAPES[name], folder)
    )
    return Pair(folder / "base", folder / "tuned")


def others(name: str, count: int) -> list[Path]:
    """`count` further models of the pair's base, with deltas of their own."""
    base = pair(name).base / WEIGHTS
    return [
        cached(
            f"llama-{name}-{seed}",
            f"making another {name} model",
            partial(_another, SHAPES[name], base, seed),
        )
        for seed in range(1, count + 1)
    ]


def _another(shape: Shape, base: Path, seed: int, folder: Path) -> None:
    """The base plus Laplace-distributed deltas of another generator, one tensor at a time."""
    _write_config(shape, folder)
    generator = np.random.default_rng([SEED, seed])
    with base.open("rb") as source, (folder / WEIGHTS).open("wb") as tuned:
        tuned.write(source.read(len(_header(shape))))
        for dimensions in shape.tensors().values():
            words = np.frombuffer(source.read(2 * int(np.prod(dimensions))), np.uint16).reshape(dimensions)
            delta = generator.laplace(scale=DELTA_SCALE, size=dimensions).astype(np.float32)
            tuned.write(to_bf16((words.astype(np.uint32) << 16).view(np.float32) + delta).tobytes())


def _make(shape: Shape, folder: Path) -> None:
    for part in ("base", "tuned"):
        (folder / part).mkdir()
        _write_config(shape, folder / part)
    with (folder / "base" / WEIGHTS).open("wb") as base, (folder / "tuned" / WEIGHTS).open("wb") as tuned:
        _write_weights(shape, base, tuned)


def _write_weights(shape: Shape, base: BinaryIO, tuned: BinaryIO) -> None:
    """One tensor at a time."""
    generator = np.random.default_rng(SEED)
    header = _header(shape)
    for file in (base, tuned):
        file.write(header)
    for dimensions in shape.tensors().values():
        words = to_bf16(generator.standard_normal(dimensions, np.float32) * np.float32(BASE_STD))
        delta = generator.laplace(scale=DELTA_SCALE, size=dimensions).astype(np.float32)
        base.write(words.tobytes())
        tuned.write(to_bf16((words.astype(np.uint32) << 16).view(np.float32) + delta).tobytes())


def _header(shape: Shape) -> bytes:
    """The first bytes of a safetensors file: a length, and where each tensor lies."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dimensions in shape.tensors().items():
        end = offset + 2 * int(np.prod(dimensions))
        entries[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bf16 numbers, ties to even. Finite values only."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_config(shape: Shape, folder: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 64,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
