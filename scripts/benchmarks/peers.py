"""The same work by mergekit and deltatensors, in the same minutes on the same files.

mergekit merges one 468 M model with `dare_linear`; we extract and apply. deltatensors saves the same pair 90
% sparse; we extract. Both are installed from the index into an environment of their own, beside a CPU torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import finetune, llama
from .apply import apply
from .common import Pair, cached, remove, scratch, size
from .extract import extract
from .process import Measured, measure
from .report import Report, Row

PEERS = ("mergekit==0.1.5", "deltatensors==0.2.0")
TORCH = "torch==2.13.0"
SAVE_SPARSE = """
import sys
from deltatensors import save_delta_from_paths
options = {"strategy": "sparse", "sparsity": 0.9}
save_delta_from_paths(sys.argv[1], finetuned_dir=sys.argv[2], base_dir=sys.argv[3], **options)
"""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Each of the four processes once, and how many times our package is smaller than deltatensors' file."""

    merged: Measured
    saved: Measured
    extracted: Measured
    applied: Measured
    smaller: float

    @property
    def end_to_end(self) -> float:
        return self.extracted.seconds + self.applied.seconds


def run(runs: int) -> Report:
    """`runs` rounds after one that is not counted; a model that was written is deleted before the next
    process starts.
    """
    peers, pair, real = environment(), llama.pair("468M"), finetune.pair()
    with scratch() as folder:
        rounds = [_round(peers, pair, folder) for _ in range(1 + runs)][1:]
        smaller = {
            "468 M, synthetic": [one.smaller for one in rounds],
            "all-MiniLM fine-tune": [_real_ratio(peers, real, folder)],
        }
    rows = [
        Row(what=f"times smaller, {what}", values=values, unit="×", at_least=25)
        for what, values in smaller.items()
    ]
    return Report(
        title=f"Peers: {', '.join(PEERS)}; 468 M, bf16",
        rows=[*_mergekit_rows(rounds), *_deltatensors_rows(rounds), *rows],
    )


def environment() -> Path:
    """The folder with the peers' programs, installed the first time. Not moved afterwards: its scripts hold
    its path.
    """
    stamp = cached(
        "peers-installed",
        f"installing {', '.join(PEERS)} in an environment of their own: a minute or more",
        _install,
    )
    return stamp.with_name("peers") / "bin"


def _install(folder: Path) -> None:
    home = folder.with_name("peers")
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    for wanted in ([TORCH], PEERS):  # torch first: left to itself, pip may choose one for CUDA
        subprocess.run([home / "bin" / "pip", "install", "--quiet", *wanted], check=True)


def _round(peers: Path, pair: Pair, folder: Path) -> Round:
    merged = merge(peers, pair, folder)
    remove(folder / "out")
    extracted = extract(pair, folder / "package")
    applied = apply(pair.base, folder)
    remove(folder / "out")
    saved = save_sparse(peers, pair, folder)
    smaller = _ratio(folder)
    remove(folder / "sparse")
    return Round(merged=merged, saved=saved, extracted=extracted, applied=applied, smaller=smaller)


def _real_ratio(peers: Path, pair: Pair, folder: Path) -> float:
    """The sizes once more, of a real fine-tune."""
    extract(pair, folder / "package")
    save_sparse(peers, pair, folder)
    return _ratio(folder)


def _ratio(folder: Path) -> float:
    """deltatensors' file over our whole package folder."""
    return size(folder / "sparse") / size(folder / "package")


def merge(peers: Path, pair: Pair, folder: Path) -> Measured:
    """mergekit's `dare_linear` of one model at density 0.1 and weight 1; JSON is YAML too."""
    model = {"model": str(pair.tuned), "parameters": {"weight": 1.0, "density": 0.1}}
    config = {
        "merge_method": "dare_linear",
        "base_model": str(pair.base),
        "models": [model],
        "dtype": "bfloat16",
    }
    (folder / "merge.yml").write_text(json.dumps(config))
    remove(folder / "out")
    command: list[str | Path] = [
        peers / "mergekit-yaml",
        folder / "merge.yml",
        folder / "out",
        "--no-copy-tokenizer",
        "--quiet",
    ]
    return measure(command, env={"HF_HUB_OFFLINE": "1"})


def save_sparse(peers: Path, pair: Pair, folder: Path) -> Measured:
    """deltatensors' streaming save, 90 % sparse."""
    remove(folder / "sparse")
    return measure(
        [peers / "python", "-c", SAVE_SPARSE, folder / "sparse" / "model.wdelta", pair.tuned, pair.base]
    )


def _mergekit_rows(rounds: list[Round]) -> list[Row]:
    return [
        Row(what="mergekit dare_linear", values=[one.merged.seconds for one in rounds], unit="s"),
        Row(what="dare-train extract + apply", values=[one.end_to_end for one in rounds], unit="s"),
        Row(
            what="times faster",
            values=[one.merged.seconds / one.end_to_end for one in rounds],
            unit="×",
            at_least=5,
        ),
        *_memory("mergekit", [one.merged for one in rounds]),
        *_memory("dare-train apply", [one.applied for one in rounds]),
    ]


def _deltatensors_rows(rounds: list[Round]) -> list[Row]:
    return [
        Row(what="deltatensors, 90 % sparse", values=[one.saved.seconds for one in rounds], unit="s"),
        Row(what="dare-train extract", values=[one.extracted.seconds for one in rounds], unit="s"),
        Row(
            what="times faster",
            values=[one.saved.seconds / one.extracted.seconds for one in rounds],
            unit="×",
            at_least=10,
        ),
        *_memory("deltatensors", [one.saved for one in rounds]),
        *_memory("dare-train extract", [one.extracted for one in rounds]),
    ]


def _memory(what: str, measured: list[Measured]) -> list[Row]:
    return [
        Row(what=f"{what}: peak anonymous", values=[one.anonymous for one in measured], unit="MB"),
        Row(what=f"{what}: peak resident", values=[one.resident for one in measured], unit="MB"),
    ]
