"""A tiny Llama as a GGUF file: its blocks, its tokenizer, its chat template."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from dare_train import dequantize

WIDTH, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
LETTERS = [chr(code) for code in (*range(ord("!"), ord("~") + 1), ord("Ġ"), ord("Ċ"))]
"""As a byte-level tokenizer writes them: Ġ is a space, Ċ ends a line."""
MERGES = ["h i", "Ġ t", "y o", "yo u"]
TOKENS = ["<unk>", "<s>", "</s>", *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] + '\n' + message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

Arrays = dict[str, "np.ndarray"]


def write_gguf(path: Path, *, architecture: str = "llama", tied: bool = True, without: str = "") -> Arrays:
    """Returns the dequantised weights in float32, under the names that transformers has for them."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    _add_tokenizer(writer)
    weights = {}
    for number, (name, (theirs, shape)) in enumerate(_tensors(tied).items()):
        values = np.random.default_rng(number).normal(0, 0.1, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        blocks = gguf.quantize(values, kind)
        weights[theirs] = _as_transformers_has_it(name, gguf.dequantize(blocks, kind).reshape(shape))
        if name != without:
            writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def save_chat_model(folder: Path) -> Path:
    """Of random weights, with a tokenizer of bytes and a chat template, in bfloat16."""
    write_gguf(folder / "tiny.gguf")
    dequantize(folder / "tiny.gguf", folder / "model")
    return folder / "model"


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([control] * 3 + [normal] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def _tensors(tied: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names here and there, and shapes."""
    width_of_a_head = WIDTH // HEADS
    narrow = KV_HEADS * width_of_a_head
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (len(TOKENS), WIDTH)),
        "output_norm.weight": ("model.norm.weight", (WIDTH,)),
    }
    if not tied:
        tensors["output.weight"] = ("lm_head.weight", (len(TOKENS), WIDTH))
    for layer in range(LAYERS):
        for name, theirs, shape in (
            ("attn_norm", "input_layernorm", (WIDTH,)),
            ("attn_q", "self_attn.q_proj", (WIDTH, WIDTH)),
            ("attn_k", "self_attn.k_proj", (narrow, WIDTH)),
            ("attn_v", "self_attn.v_proj", (narrow, WIDTH)),
            ("attn_output", "self_attn.o_proj", (WIDTH, WIDTH)),
            ("ffn_norm", "post_attention_layernorm", (WIDTH,)),
            ("ffn_gate", "mlp.gate_proj", (INNER, WIDTH)),
            ("ffn_up", "mlp.up_proj", (INNER, WIDTH)),
            ("ffn_down", "mlp.down_proj", (WIDTH, INNER)),
        ):
            tensors[f"blk.{layer}.{name}.weight"] = (f"model.layers.{layer}.{theirs}.weight", shape)
    return tensors


def _as_transformers_has_it(name: str, values: np.ndarray) -> np.ndarray:
    """llama.cpp has the two halves of each head's rotary dimensions interleaved."""
    heads = HEADS if "attn_q" in name else KV_HEADS if "attn_k" in name else 0
    if not heads:
        return values
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
