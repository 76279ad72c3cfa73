"""Pretrain a small Llama on plain text and code, as a base to fine-tune: what the decoder recipes take where no larger one is at hand.

    python recipes/pretrain_decoder.py                     # a trial of a minute
    python recipes/pretrain_decoder.py --full              # 11.2 M parameters, about 25 minutes on two cores
    python recipes/pretrain_decoder.py --texts my/folder   # any folder of .txt, .md and .jsonl files (column text)

A byte-level BPE tokenizer is trained on the same text. A twentieth, spread over all of it, is held out. Saved in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from quickstart import TimeIsUp, say
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FOLDERS = ("books", "tinyshakespeare", "tinystories_sample", "wiki_demo", "wikitext2", "python_code")
BLOCK = 256
"""Tokens of one training example."""
HELD_OUT = 20
"""One block in so many."""


@dataclass(frozen=True)
class Size:
    """Of the model, and of the time that goes into it."""

    hidden: int
    layers: int
    feed_forward: int
    vocabulary: int
    steps: int
    seconds: float


TRIAL = Size(hidden=64, layers=4, feed_forward=176, vocabulary=1024, steps=60, seconds=40)
FULL = Size(hidden=320, layers=8, feed_forward=864, vocabulary=4096, steps=1000, seconds=1800)


def main() -> None:
    options, began = parse(), time.perf_counter()
    logging.set_verbosity_error()
    size = FULL if options.full else TRIAL
    texts = list(documents(options.texts or [DATA / name for name in FOLDERS]))
    say(f"{len(texts):,} documents, {sum(map(len, texts)):,} characters")
    tokenizer = trained_tokenizer(texts, size.vocabulary)
    train, held_out = blocks(texts, tokenizer)
    set_seed(options.seed)
    model = LlamaForCausalLM(configuration(size, tokenizer))
    say(f"{model.num_parameters():,} parameters; {len(train):,} blocks of {BLOCK} tokens to train on, {len(held_out):,} held out")
    trainer = trainer_for(model, train, held_out, size, options)
    trainer.train()
    loss = float(trainer.evaluate()["eval_loss"])
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    say(f"held-out loss {loss:.3f} (perplexity {exp(loss):.1f}); {time.perf_counter() - began:.0f} s; the model is in {options.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/decoder"), help="where the model goes (default: %(default)s)")
    add("--texts", type=Path, nargs="+", help=f"files and folders to learn from; by default {', '.join(FOLDERS)} in ../shared/data")
    add("--full", action="store_true", help="the larger model")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def documents(places: list[Path]) -> Iterator[str]:
    """The text of every file below the places, in the order of their names."""
    for place in places:
        if not place.exists():
            sys.exit(f"no text: {place} not found; pass --texts")
        files = sorted(path for path in place.rglob("*") if path.suffix in (".txt", ".md", ".jsonl")) if place.is_dir() else [place]
        for path in files:
            if not path.stem.startswith("LICENSE"):
                yield from contents(path)


def contents(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        yield text
        return
    yield from (str(json.loads(line)["text"]) for line in text.splitlines() if line.strip())


def trained_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All documents behind one another, each after a `<s>`, cut into blocks; (to train on, held out)."""
    tokens = [token for text in texts for token in (tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"])]
    rows = [tokens[start : start + BLOCK] for start in range(0, len(tokens) - BLOCK + 1, BLOCK)]
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for number, row in enumerate(rows):
        parts[number % HELD_OUT == 0].append({"input_ids": row, "labels": row})
    return parts


def configuration(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
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
    model: torch.nn.Module, train: list[dict[str, Any]], held_out: list[dict[str, Any]], size: Size, options: argparse.Namespace
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=size.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=size.steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held_out, callbacks=[TimeIsUp(size.seconds)])


if __name__ == "__main__":
    main()
