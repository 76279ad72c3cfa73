"""The two files of a LoRA adapter, as PEFT reads them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from filecmp import cmp
from pathlib import Path
from shutil import copyfile
from typing import Any

from ..dtypes import Words
from ..errors import ConfigError
from ..merging.models.tokenizer_files import tokenizer_files
from ..weights.files.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..weights.files.checkpoint_writer import CheckpointWriter, Layout
from ..weights.lora.lora_config import AdapterConfig
from ..weights.protocol import TensorInfo

Tensors = Mapping[str, tuple[TensorInfo, Words]]


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> int:
    """Write an adapter into a folder that is there; returns its weights' bytes."""
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    infos = {name: info for name, (info, _) in named.items()}
    with CheckpointWriter(folder, Layout(files={ADAPTER_WEIGHTS: infos})) as writer:
        for name, (_, words) in named.items():
            writer.write(name, 0, words)
    return (folder / ADAPTER_WEIGHTS).stat().st_size


def write_tokenizer_of(tuned: Path | None, base: Path | None, folder: Path) -> None:
    """Put the tuned model's tokenizer beside its adapter, as trainers do, if it is not the base's."""
    files = tokenizer_files(tuned, None) if tuned is not None else {}
    others = tokenizer_files(base, None) if base is not None else {}
    if any(name not in others or not cmp(path, others[name], shallow=False) for name, path in files.items()):
        for name, path in files.items():
            copyfile(path, folder / name)


def config_fields(
    ranks: Mapping[str, int],
    *,
    base: str,
    model: Any,
    task: str | None,
    saved: Sequence[str],
    tied: bool,
    biases: bool,
    transposed: bool,
) -> dict[str, Any]:
    """What `adapter_config.json` says. α is the rank, so that nothing is scaled.

    Args:
        ranks: by module.
        base: what the adapter's base is called.
        model: of the tuned model's class.
        task: in PEFT's words.
        saved: modules that are written as they are.
        tied: whether PEFT has to tie others to one of these.
        biases: whether biases of other modules are.
        transposed: whether weights lie as [in, out].
    """
    ((common, _),) = Counter(ranks.values()).most_common(1)
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": kind if task is None else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _targets([*ranks], [name for name, _ in model.named_modules()]),
        "modules_to_save": [*saved] or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "ensure_weight_tying": tied,
    }


def _targets(adapted: list[str], modules: Sequence[str]) -> list[str]:
    """The last parts of the names, where these are no other module's; else whole names."""
    ends = sorted({name.rpartition(".")[2] for name in adapted})
    matched = {name for name in modules if name.rpartition(".")[2] in ends}
    return ends if matched == {*adapted} else adapted


def check_ranks(folder: Path, ranks: Mapping[str, int]) -> None:
    """PEFT matches names by patterns: what it would read is what was written.

    Raises:
        ConfigError: one module's name is matched by another's pattern.
    """
    config = AdapterConfig.read(folder / ADAPTER_CONFIG)
    for name, rank in ranks.items():
        found = config.rank_of(name)
        if (found, config.scaling_of(name)) != (rank, 1.0):
            expected = f"rank {rank} by its name"
            remedy = "give all matrices one rank (rank), or leave it out (exclude)"
            raise ConfigError(name, expected=expected, found=f"{found}, of another module", remedy=remedy)
