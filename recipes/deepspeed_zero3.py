"""Delta packages from the Trainer under DeepSpeed ZeRO-3: the callback is the one that a single device takes.

    torchrun --nproc-per-node 2 recipes/deepspeed_zero3.py
    deepspeed recipes/deepspeed_zero3.py

The weights are never gathered for a package: each process writes the partition that it holds. A tiny model
learns to count, so that nothing is downloaded; `--model` takes any causal language model instead.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from counting import save_tiny_model, sequences
from option_types import count, drop_rate
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dare_train import DareCallback, apply

CONFIG = Path(__file__).with_suffix(".json")
warnings.filterwarnings(
    "ignore", "`torch.distributed", FutureWarning
)  # DeepSpeed uses names that torch is giving up, at every step


def main() -> None:
    options = parse()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        prepare_for_cpu()
    args = TrainingArguments(  # before the model, which is partitioned as it is loaded
        output_dir=str(options.out),
        deepspeed=str(CONFIG),
        bf16=True,
        max_steps=options.steps,
        save_steps=10,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu else None,
    )
    with args.main_process_first():
        base = options.model or save_tiny_model(options.out / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    callback = DareCallback(p=options.p)
    Trainer(model=model, args=args, train_dataset=sequences(1000), callbacks=[callback]).train()

    if args.process_index == 0:
        report(callback, base, options.out / "received")
    torch.distributed.destroy_process_group()


def prepare_for_cpu() -> None:
    """Introduce the processes to each other, which TrainingArguments leave out with `use_cpu`.

    DeepSpeed would compile a kernel for messages in shared memory first, for a minute; gloo does without.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


def report(callback: DareCallback, base: str, received: Path) -> None:
    """Where the packages are, and proof that the last one arrives on the untouched base."""
    for snapshot in callback.packages:
        stats = snapshot.package.stats
        size = f"{stats['bytes']:,} bytes, {stats['bits_per_parameter']:.3f} bits per parameter"
        print(f"{snapshot.package.path}: {size}; training waited {snapshot.waited:.3f} s")
    package = callback.packages[-1].package
    fingerprint = apply(base, package, received, overwrite=True)
    same = "the one on record" if fingerprint == package.manifest.result else "NOT the one on record"
    print(f"applied to {base}: {received}, fingerprint {fingerprint[:12]}, {same}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="folder or Hub id of a causal language model (default: a tiny one, made on the spot)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/deepspeed_zero3"),
        help="where everything goes (default: %(default)s)",
    )
    parser.add_argument("--steps", type=count, default=20, help="(default: %(default)s)")
    parser.add_argument("--p", type=drop_rate, default=0.9, help="drop rate (default: %(default)s)")
    parser.add_argument("--local_rank", help="given by the deepspeed launcher, and known already")
    return parser.parse_args()


if __name__ == "__main__":
    main()
