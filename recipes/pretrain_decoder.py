"""Pretrain a small Llama on plain text and code, as a base to fine-tune: what the decoder recipes take where
no larger one is at hand.

    python recipes/pretrain_decoder.py            # a tiny one, of the standard library's text: seconds
    python recipes/pretrain_decoder.py --full     # 11.2 M parameters, of public texts: about 25 minutes
    python recipes/pretrain_decoder.py --texts my/folder    # .txt, .md and .jsonl files, or Hub ids

A byte-level BPE tokenizer is trained on the same text. A twentieth, spread over all of it, is held out. Saved
in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import public_data
import standard_library
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from inputs import VARIABLE, data_arguments, documents
from option_types import seed
from quickstart import TimeIsUp, say
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

HELD_OUT = 20
"""One block in so many."""
STORIES = "stories260K"
"""A decoder of 260 thousand parameters, where a folder of local copies has it."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model, and of the time that goes into it."""

    hidden: int
    layers: int
    feed_forward: int
    vocabulary: int
    block: int
    """Tokens of one training example."""
    steps: int
    learning_rate: float
    deviation: float
    """Of new weights."""
    seconds: float


TINY = Size(
    hidden=128,
    layers=2,
    feed_forward=352,
    vocabulary=512,
    block=64,
    steps=80,
    learning_rate=1e-2,
    deviation=0.1,
    seconds=300,
)
FULL = Size(
    hidden=320,
    layers=8,
    feed_forward=864,
    vocabulary=4096,
    block=256,
    steps=1000,
    learning_rate=1e-3,
    deviation=0.02,
    seconds=1800,
)


def main() -> None:
    options = parse()
    pretrain(texts(options), FULL if options.full else TINY, options.out, options.seed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    data_arguments(parser)
    add("--out", type=Path, default=Path("runs/decoder"), help="where the model goes (default: %(default)s)")
    add(
        "--texts",
        nargs="+",
        metavar="TEXT",
        help=f"some of {', '.join(public_data.PLAIN)}; files, folders or Hub ids",
    )
    add("--full", action="store_true", help="the larger model, of public texts")
    add("--seed", type=seed, default=0)
    return parser.parse_args()


def texts(options: argparse.Namespace) -> list[str]:
    """Public ones with `--full` or a folder of local copies, else the standard library's."""
    if not (options.texts or options.full or options.data):
        return standard_library.texts()
    return [
        text
        for name in options.texts or public_data.PLAIN
        for text in documents(name, options.data, options.columns)
    ]


def base_decoder(options: argparse.Namespace) -> str:
    """What decoder recipes begin with: stories260K of the local copies, of the Hub with `--full`, else a tiny
    one.
    """
    if options.data and (options.data / STORIES).is_dir():
        return str(options.data / STORIES)
    if options.full:
        return from_hub(options.out / Path(public_data.STORIES).name)
    folder: Path = options.out / "tiny-decoder"
    if not (folder / "config.json").exists():
        pretrain(standard_library.texts(), TINY, folder, seed=0)
    return str(folder)


def from_hub(folder: Path) -> str:
    """A folder with the pretrained decoder's files."""
    name = public_data.STORIES
    try:
        return str(
            snapshot_download(
                name, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "tokenizer*"]
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        sys.exit(
            f"no decoder {name}: the Hub did not give it ({type(error).__name__}: {reason}); "
            "name another by its Hub id or folder, "
            f"or a folder that has {STORIES} with {VARIABLE}=FOLDER"
        )


def pretrain(documents: Sequence[str], size: Size, out: Path, seed: int) -> None:
    """From nothing, with a tokenizer of its own."""
    began = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    say(f"pretraining a decoder on {len(documents):,} documents, {sum(map(len, documents)):,} characters")
    tokenizer = trained_tokenizer(documents, size.vocabulary)
    train, held_out = blocks(documents, tokenizer, size.block)
    set_seed(seed)
    model = LlamaForCausalLM(configuration(size, tokenizer))
    say(
        f"{model.num_parameters():,} parameters; {len(train):,} blocks of {size.block} tokens "
        f"to train on, {len(held_out):,} held out"
    )
    trainer = trainer_for(model, train, held_out, size, out, seed)
    trainer.train()
    loss = float(trainer.evaluate()["eval_loss"])
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    say(
        f"held-out loss {loss:.3f} (perplexity {exp(loss):.1f}); "
        f"{time.perf_counter() - began:.0f} s; the model is in {out}"
    )


def trained_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def blocks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All documents behind one another, each after a `<s>`, cut into blocks; (to train on, held out)."""
    tokens = [
        token
        for text in texts
        for token in (tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"])
    ]
    rows = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for number, row in enumerate(rows):
        parts[number % HELD_OUT == 0].append({"input_ids": row, "labels": row})
    return parts


def configuration(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        initializer_range=size.deviation,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def trainer_for(
    model: torch.nn.Module,
    train: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    size: Size,
    out: Path,
    seed: int,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=size.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=size.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=size.steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[TimeIsUp(size.seconds)],
    )


if __name__ == "__main__":
    main()
