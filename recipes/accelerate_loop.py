"""Delta packages from a training loop of one's own, with accelerate: on one process, or on many.

    python recipes/accelerate_loop.py
    torchrun --nproc-per-node 2 recipes/accelerate_loop.py    # CPUs will do
    accelerate launch recipes/accelerate_loop.py              # on what `accelerate config` says

A tiny model learns to count, so that nothing is downloaded; `--model` takes any causal language model
instead. `--resume` goes on from the last checkpoint in `--out`, to more `--steps`, relative to the base that
the run began with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from counting import save_tiny_model, sequences
from option_types import count, drop_rate
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import dare_train
from dare_train import Snapshot

BATCH = 8


def main() -> None:
    options = parse()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available()
    )  # unless told so, without GPUs it takes torchrun's processes for strangers
    with accelerator.main_process_first():
        base = options.model or save_tiny_model(options.out / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = sequences(options.steps * BATCH * accelerator.num_processes)
    batches: DataLoader[Any] = DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches)

    checkpoint = options.out / "checkpoint"
    begun, record = load(accelerator, checkpoint) if options.resume else (0, None)

    # From here on a snapshot can be taken. Unwrapped, the model can tell where it was loaded from: that is
    # the base.
    snapshotter = dare_train.Snapshotter.begin(
        accelerator.unwrap_model(model),
        options.out / "dare",
        dare_train.DareConfig(p=options.p),
        resumed=record,
    )
    snapshots = []
    for step, batch in enumerate(accelerator.skip_first_batches(loader, begun), begun + 1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

        snapshots.append(snapshotter.finished())  # one that has been written meanwhile; None at most steps
        if step % options.every == 0 or step == options.steps:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
            snapshots.append(
                snapshotter.take(model, options.out / f"dare/step-{step}", step=step)
            )  # the one before, or None
            save(accelerator, checkpoint, step, snapshotter.record)
    snapshots.append(snapshotter.close())

    if accelerator.is_main_process:
        report([snapshot for snapshot in snapshots if snapshot is not None], base, options.out / "received")
    accelerator.end_training()


def save(accelerator: Accelerator, folder: Path, step: int, record: dict[str, Any]) -> None:
    """A checkpoint as accelerate writes it, and beside it what the packages are relative to."""
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        (folder / "progress.json").write_text(json.dumps({"step": step, "base": record}))


def load(accelerator: Accelerator, folder: Path) -> tuple[int, dict[str, Any]]:
    """Go on from a checkpoint. Returns its step and the record of the base."""
    accelerator.load_state(str(folder))
    progress = json.loads((folder / "progress.json").read_text())
    return progress["step"], progress["base"]


def report(snapshots: list[Snapshot], base: str, received: Path) -> None:
    """What the packages took, and proof that the last one arrives on the untouched base."""
    for snapshot in snapshots:
        stats = snapshot.package.stats
        size = f"{stats['bytes']:,} bytes, {stats['bits_per_parameter']:.3f} bits per parameter"
        print(f"{snapshot.package.path}: {size}; training waited {snapshot.waited:.3f} s")
    package = snapshots[-1].package
    fingerprint = dare_train.apply(base, package, received, overwrite=True)
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
        default=Path("runs/accelerate_loop"),
        help="where everything goes (default: %(default)s)",
    )
    parser.add_argument("--steps", type=count, default=40, help="steps in all (default: %(default)s)")
    parser.add_argument(
        "--every", type=count, default=20, help="steps from one package to the next (default: %(default)s)"
    )
    parser.add_argument("--p", type=drop_rate, default=0.9, help="drop rate (default: %(default)s)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the output folder"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
