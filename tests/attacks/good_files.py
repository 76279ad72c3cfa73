"""The good files that inputs are made of: a base, a tuned model, an adapter, packages, a chain, records."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import save_weights

from dare_train import extract, merge
from dare_train.evaluation.measurements import Journal, MeasurementRecord, Point
from dare_train.merging.statistics.statistics_file import save_statistics

Arrays = dict[str, np.ndarray]
MODULE = "model.layers.0.self_attn.q_proj"
TOKENS = 6
WEIGHTS = [0.5, 0.25]
"""Of the merge that was killed."""


def make(folder: Path) -> Path:
    """Write them into a folder."""
    base = _base()
    tuned = {name: array + np.float32(0.01) for name, array in base.items()}
    later = {name: array + np.float32(0.01) for name, array in tuned.items()}
    _model(folder / "base", base, TOKENS)
    _model(folder / "tuned", tuned, TOKENS)
    _model(folder / "later", later, TOKENS)
    rows = np.concatenate([tuned["embed_tokens.weight"], np.ones((2, 4), np.float32)])
    grown = {**tuned, "embed_tokens.weight": rows, "head.weight": np.ones((3, 4), np.float32)}
    _model(folder / "grown", grown, TOKENS + 2)
    _sharded(folder / "sharded", tuned)
    _adapter(folder / "adapter")
    extract(folder / "base", folder / "grown", folder / "package", p=0.5)
    extract(folder / "base", folder / "tuned", folder / "first", p=0)
    extract(folder / "tuned", folder / "later", folder / "second", p=0)
    _records(folder / "records")
    (folder / "merge").mkdir()
    (folder / "merge" / "config.yml").write_text(RECIPE)
    (folder / "experts").mkdir()
    (folder / "experts" / "config.yml").write_text(EXPERTS)
    _modules(folder / "modules")
    _quantised(folder)
    _begun(folder)
    _desk(folder)
    return folder


RECIPE = """merge_method: ties
base_model: base
models:
  - model: tuned
    parameters: {weight: [0.1, 0.5, 1], density: [{filter: self_attn, value: 0.5}, {value: 0.3}]}
  - {model: grown, parameters: {weight: 0.3}}
parameters: {normalize: true, lambda: 1.0}
dtype: bfloat16
seed: 7
"""
EXPERTS = """base_model: base
gate_mode: hidden
dtype: bfloat16
experts_per_token: 1
experts:
  - {source_model: tuned, positive_prompts: [one, two], noise_scale: 0.1}
  - {source_model: grown, positive_prompts: [three], negative_prompts: [four], residual_scale: 0.5}
shared_experts: [{source_model: base}]
architecture: deepseek
"""


def _quantised(folder: Path) -> None:
    """Weights whose integers lie several in a word."""
    random = np.random.default_rng(5)

    def words(*shape: int) -> np.ndarray:
        return random.integers(-(2**31), 2**31, shape, dtype=np.int32)

    def scales(*shape: int) -> np.ndarray:
        return random.random(shape).astype(np.float16)

    state = {"shape": [4, 32], "blocksize": 64, "dtype": "bfloat16", "quant_type": "nf4"}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    four_bits: Arrays = {
        "weight": random.integers(0, 256, (64, 1), dtype=np.uint8),
        "weight.absmax": np.array([7, 200], np.uint8),
        "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "weight.nested_absmax": np.ones(1, np.float32),
        "weight.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state | nested).encode(), np.uint8),
    }
    gptq: Arrays = {
        "qweight": words(1, 8),
        "qzeros": words(2, 1) & 0x77777777,
        "scales": scales(2, 8),
        "g_idx": np.arange(8, dtype=np.int32) % 2,
    }
    awq: Arrays = {"qweight": words(8, 1), "qzeros": words(2, 1), "scales": scales(2, 8)}
    rows: Arrays = {
        "weight_packed": words(3, 2),
        "weight_scale": scales(3, 2),
        "weight_shape": np.array([3, 12]),
    }
    bytes_: Arrays = {
        "weight": random.integers(-128, 128, (4, 6), dtype=np.int8),
        "weight_scale": scales(4, 1),
        "weight_zero_point": np.array([[3], [-5], [0], [127]], np.int8),
    }
    of_rows = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 6}
    layouts: dict[str, tuple[dict[str, Arrays], dict[str, Any]]] = {
        "gptq": ({"a": gptq, "b": four_bits}, {"bits": 4, "checkpoint_format": "gptq"}),
        "awq": ({"a": awq}, {"bits": 4, "version": "gemm"}),
        "compressed-tensors": (
            {"a": rows, "b": bytes_},
            {"format": "pack-quantized", "config_groups": {"group_0": {"weights": of_rows}}},
        ),
    }
    for method, (units, said) in layouts.items():
        (folder / method).mkdir()
        arrays = {
            f"{module}.{leaf}": array for module, parts in units.items() for leaf, array in parts.items()
        }
        save_weights({**arrays, "norm": np.ones(3, np.float32)}, folder / method / "model.safetensors")
        config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": method, **said}}
        _write(folder / method / "config.json", config)


def _base() -> Arrays:
    random = np.random.default_rng(3)
    shapes = {f"{MODULE}.weight": (8, 6), "embed_tokens.weight": (TOKENS, 4), "norm": (9,)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _model(folder: Path, arrays: Arrays, tokens: int) -> None:
    folder.mkdir()
    save_weights(arrays, folder / "model.safetensors")
    _write(folder / "config.json", {"model_type": "llama", "vocab_size": tokens, "layers": [0.0, 1.5]})
    added = [{"id": number, "content": f"<{number}>", "special": True} for number in range(4, tokens)]
    vocabulary = {"a": 0, "b": 1, "c": 2, "d": 3}
    _write(folder / "tokenizer.json", {"added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary}})
    decoder = {str(token["id"]): {"content": token["content"], "special": True} for token in added}
    _write(folder / "tokenizer_config.json", {"eos_token": "<4>", "added_tokens_decoder": decoder})


def _sharded(folder: Path, arrays: Arrays) -> None:
    folder.mkdir()
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(sorted(arrays))}
    for name, file in files.items():
        save_weights({name: arrays[name]}, folder / file)
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": files})
    _write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "t"}])


def _modules(folder: Path) -> None:
    """As sentence-transformers has them: a module beside the first, in a folder of its own."""
    base = _base()
    _model(folder, {name: array + np.float32(0.01) for name, array in base.items()}, TOKENS)
    listed = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Dense"}]
    _write(folder / "modules.json", listed)
    (folder / "1_Dense").mkdir()
    _write(folder / "1_Dense" / "config.json", {"in_features": 4, "out_features": 2})
    save_weights({"linear.weight": np.ones((2, 4), np.float32)}, folder / "1_Dense" / "model.safetensors")


class _Killed(KeyboardInterrupt):
    """While it was merging."""


def _begun(folder: Path) -> None:
    """What a merge leaves that is killed after its first tensor, and what it would have made."""

    def kill(done: int, everything: int) -> None:
        if 0 < done < everything:
            raise _Killed

    models = folder / "base", [folder / "tuned", folder / "later"]
    merge(*models, folder / "merged", weights=WEIGHTS)
    with suppress(_Killed):
        merge(*models, folder / "killed", weights=WEIGHTS, progress=kill)
    (left,) = folder.glob(".killed.*.partial")
    left.rename(folder / "begun")


def _desk(folder: Path) -> None:
    """Where command lines are tried."""
    for name in ("base", "tuned", "package", "adapter"):
        shutil.copytree(folder / name, folder / "desk" / name)
    (folder / "desk" / "config.yml").write_text(RECIPE)
    (folder / "desk" / "texts.jsonl").write_text('{"text": "a b", "label": 0}\n')
    (folder / "desk" / "words.json").write_text('["inspect", "package"]')


def _adapter(folder: Path) -> None:
    folder.mkdir()
    factors = {"A": np.ones((2, 6), np.float32), "B": np.ones((8, 2), np.float32)}
    tensors = {f"base_model.model.{MODULE}.lora_{part}.weight": array for part, array in factors.items()}
    save_weights(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"k.*|v": 3},
        "modules_to_save": None, "target_modules": ["q_proj"], "auto_mapping": {"base_model_class": "X"},
    }  # fmt: skip
    _write(folder / "adapter_config.json", config)


def _records(folder: Path) -> None:
    folder.mkdir()
    journal = Journal(folder / "points.jsonl", "b", "t", {"eval": "m"})
    journal.read()
    for seed in range(3):
        journal.add(Point(variant="dare", p=0.5, seed=seed, metrics={"loss": 0.1 * seed}))
    MeasurementRecord(folder / "search.json", {"a": 1}).measured("x", lambda: {"loss": 0.5})
    save_statistics(folder / "fisher.safetensors", "fisher", {"norm": np.ones(9, np.float32)}, examples=3)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
