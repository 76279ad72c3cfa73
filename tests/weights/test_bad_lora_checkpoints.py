"""Adapters that cannot be merged here: each is refused in one line that says what to do, and nothing is
written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import State, extract_refused, save

from dare_train import apply, extract
from dare_train.errors import CheckpointError, DareError, NonFiniteDelta, TensorMismatch

Edit = Callable[[State], object]
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "init_lora_weights": True,
    "target_modules": ["a"],
    "bias": "none",
}
A, B, MAGNITUDE = (f"base_model.model.a.lora_{part}" for part in ("A.weight", "B.weight", "magnitude_vector"))


def base_state() -> State:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "a.weight": (20, 30),
        "a.bias": (20,),
        "square.weight": (8, 8),
        "image.weight": (6, 4, 3, 3),
        "words.weight": (12, 5),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def factors(out: int = 20, width: int = 30, rank: int = 4) -> State:
    return {A: torch.ones(rank, width), B: torch.ones(out, rank)}


def square(rank: int = 4) -> State:
    return {
        A.replace(".a.", ".square."): torch.ones(rank, 8),
        B.replace(".a.", ".square."): torch.ones(8, rank),
    }


def embedding() -> State:
    return {
        "base_model.model.words.lora_embedding_A": torch.ones(4, 12),
        "base_model.model.words.lora_embedding_B": torch.ones(5, 4),
    }


def convolution(groups: int = 1) -> State:
    prefix = "base_model.model.image.lora_"
    return {
        f"{prefix}A.weight": torch.ones(4, 4, 3, 3),
        f"{prefix}B.weight": torch.ones(6, 4 // groups, 1, 1),
    }


def adapter(folder: Path, tensors: State, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(base_state(), tmp_path / "base")


def refused(base: Path, folder: Path, kind: type[DareError], *texts: str, **options: Any) -> None:
    extract_refused(base, folder, folder.parent / "results", kind, *texts, **options)


def test_the_adapter_that_the_others_are_made_from_is_accepted(base: Path, tmp_path: Path) -> None:
    package = extract(base, adapter(tmp_path / "adapter", factors()), tmp_path / "package", p=0)
    assert {record.name for record in package.manifest.tensors if record.kind == "delta"} == {"a.weight"}


MERGE = "merge it with PEFT (merge_and_unload, then save_pretrained) and extract from the merged model"


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"peft_type": "LOHA"}, ["peft_type: expected \"LORA\", found 'LOHA'", MERGE]),
        ({"peft_type": None}, ["peft_type", "found None", MERGE]),
        (
            {"init_lora_weights": "pissa"},
            ["init_lora_weights: expected a start that leaves the base as it is, found 'pissa'", MERGE],
        ),
        ({"init_lora_weights": "pissa_niter_4"}, ["found 'pissa_niter_4'", MERGE]),
        ({"init_lora_weights": "olora"}, ["found 'olora'", MERGE]),
        ({"init_lora_weights": "corda"}, ["found 'corda'", MERGE]),
        ({"init_lora_weights": "loftq"}, ["found 'loftq'", MERGE]),
        ({"init_lora_weights": "lora_ga"}, ["found 'lora_ga'", MERGE]),
        (
            {"target_parameters": ["experts.down_proj"]},
            ["target_parameters: expected a base whose config.json names a class of transformers", MERGE],
        ),
        ({"trainable_token_indices": [3]}, ["trainable_token_indices: expected not set, found [3]", MERGE]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication", MERGE]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens", MERGE]),
        ({"use_qalora": True}, ["use_qalora", MERGE]),
        ({"kasa_config": {"beta": 1}}, ["kasa_config", MERGE]),
        ({"use_bdlora": {"nblocks": 2}}, ["use_bdlora", MERGE]),
        ({"arrow_config": {"top_k": 3}}, ["arrow_config", MERGE]),
        ({"monteclora_config": {"num_samples": 3}}, ["monteclora_config", MERGE]),
        ({"megatron_config": {"a": 1}}, ["megatron_config", MERGE]),
        ({"ensure_weight_tying": True}, ["ensure_weight_tying", MERGE]),
        (
            {"something_of_tomorrow": "x" * 200},
            ["something_of_tomorrow: expected not set, found 'xxx", MERGE],
        ),
        ({"r": None}, ["adapter_config.json: r: expected a positive integer, found None"]),
        ({"r": 0}, ["r: expected a positive integer, found 0"]),
        ({"r": True}, ["r: expected a positive integer, found True"]),
        ({"r": 10**400}, ["r: expected a positive integer"]),
        ({"lora_alpha": "16"}, ["lora_alpha: expected a number, found '16'"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha: expected a number, found nan"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha: expected a number, found inf"]),
        ({"rank_pattern": [2]}, ["rank_pattern: expected name patterns with numbers, found [2]"]),
        ({"rank_pattern": {"a": 1.5}}, ["rank_pattern: a: expected a positive integer, found 1.5"]),
        ({"alpha_pattern": {"a": None}}, ["alpha_pattern: a: expected a number, found None"]),
        (
            {"alpha_pattern": {"a(": 1}},
            ["alpha_pattern: expected patterns of characters", "found no regular expression: {'a(': 1}"],
        ),
        (
            {"alpha_pattern": {"(?i)a": 1}},
            ["alpha_pattern: expected patterns of characters", "a group that begins with '(?i)'"],
        ),
        ({"modules_to_save": "head"}, ["modules_to_save: expected a list of names, found 'head'"]),
        ({"modules_to_save": ["head", 3]}, ["modules_to_save: expected a list of names"]),
    ],
    ids=lambda value: next(iter(value.items())).__repr__()[:40] if isinstance(value, dict) else "",
)
def test_configurations(changes: dict[str, Any], texts: list[str], base: Path, tmp_path: Path) -> None:
    refused(
        base,
        adapter(tmp_path / "adapter", factors(), **changes),
        CheckpointError,
        "adapter_config.json",
        *texts,
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "expected a PEFT adapter's configuration, found no such file"),
        ("{", "expected a PEFT adapter's configuration, found Expecting property name"),
        ("[]", "expected a PEFT adapter's configuration, found []"),
        ("[" * 100000, "expected a PEFT adapter's configuration, found values nested too deep"),
    ],
    ids=["missing", "cut off", "a list", "deep"],
)
def test_configurations_that_cannot_be_read(
    content: str | None, text: str, base: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "adapter", factors())
    (folder / "adapter_config.json").unlink()
    if content is not None:
        (folder / "adapter_config.json").write_text(content)
    refused(base, folder, CheckpointError, "adapter_config.json", text)


@pytest.mark.parametrize(
    ("tensors", "changes", "kind", "texts"),
    [
        (
            {A: torch.ones(4, 30)},
            {},
            TensorMismatch,
            ["a.lora_B: expected in", "found missing; fetch the adapter again"],
        ),
        ({B: torch.ones(20, 4)}, {}, TensorMismatch, ["a.lora_A: expected in", "missing"]),
        (
            {**factors(), MAGNITUDE: torch.ones(20)},
            {},
            CheckpointError,
            ["found lora_magnitude_vector too", MERGE],
        ),
        (
            {**factors(), A.replace("weight", "bias"): torch.ones(4)},
            {},
            CheckpointError,
            ["found lora_A.bias too", MERGE],
        ),
        (factors(), {"use_dora": True}, TensorMismatch, ["a.lora_magnitude_vector: expected in", "missing"]),
        (
            {**factors(), MAGNITUDE: torch.ones(30)},
            {"use_dora": True},
            TensorMismatch,
            ["expected shape [20], found [30]"],
        ),
        (factors(rank=2), {}, TensorMismatch, ["a.lora_A.weight: expected shape [4, 30], found [2, 30]"]),
        (factors(), {"rank_pattern": {"a": 3}}, TensorMismatch, ["expected shape [3, 30], found [4, 30]"]),
        (
            {A: torch.ones(4), B: torch.ones(20)},
            {},
            TensorMismatch,
            ["expected factors of a weight [20, 30]"],
        ),
        (
            factors(out=21),
            {},
            TensorMismatch,
            ["a.weight: expected factors of a weight [20, 30]", "found [4, 30] and [21, 4]", "the base"],
        ),
        ({A: torch.ones(4, 30), B: torch.ones(20, 3)}, {}, TensorMismatch, ["[4, 30] and [20, 3]"]),
        (
            {A: torch.ones(4, 30).int(), B: torch.ones(20, 4)},
            {},
            CheckpointError,
            ["floating-point numbers of 16 bits or more, found I32"],
        ),
        (
            convolution(groups=2),
            {},
            TensorMismatch,
            ["image.weight: expected factors of a weight [6, 4, 3, 3]"],
        ),
        (
            {key.replace(".a.", ".gone."): t for key, t in factors().items()} | square(),
            {},
            TensorMismatch,
            ["gone.weight: expected in", "found missing; is this the base that the adapter was trained on?"],
        ),
        (
            {**square(), **{k.replace(".a.", ".words."): t for k, t in factors(5, 12).items()}},
            {},
            CheckpointError,
            [
                "square.weight: expected other modules to lie as fan_in_fan_out = false says",
                "some that do not",
                MERGE,
            ],
        ),
        (
            {**square(), **factors()},
            {"fan_in_fan_out": True},
            CheckpointError,
            ["fan_in_fan_out = true", MERGE],
        ),
        (
            {**factors(30, 20), MAGNITUDE: torch.ones(20)},
            {"use_dora": True},
            TensorMismatch,
            ["a.lora_magnitude_vector: expected shape [30], found [20]"],
        ),
        (
            {**embedding(), "base_model.model.words.lora_magnitude_vector": torch.ones(50)},
            {"use_dora": True},
            TensorMismatch,
            ["words.lora_magnitude_vector: expected shape [5], found [50]"],
        ),
        (
            {**convolution(), "base_model.model.image.lora_magnitude_vector": torch.ones(6)},
            {"use_dora": True},
            TensorMismatch,
            ["image.lora_magnitude_vector: expected shape [1, 6, 1, 1], found [6]"],
        ),
        (
            {**factors(), B.replace("weight", "bias"): torch.ones(4)},
            {},
            TensorMismatch,
            ["a.lora_B.bias: expected shape [20], found [4]"],
        ),
        (
            {**square(), B.replace(".a.", ".square.").replace("weight", "bias"): torch.ones(8)},
            {},
            TensorMismatch,
            ["square.bias: expected in", "found missing"],
        ),
        (
            {**factors(), "base_model.model.a.lora_C.weight": torch.ones(3)},
            {},
            TensorMismatch,
            ["a.lora_C.weight: expected in", "or in a module under modules_to_save", "found neither", MERGE],
        ),
        (
            {A.replace("lora_A.", "lora_A.default."): torch.ones(3)} | factors(),
            {},
            TensorMismatch,
            ["a.lora_A.default.weight", "neither"],
        ),
        (
            {"base_model.model.prompt": torch.ones(3)},
            {},
            CheckpointError,
            ["expected factors lora_A and lora_B, found 1 other tensors"],
        ),
        ({}, {}, CheckpointError, ["expected factors lora_A and lora_B, found 0 other tensors"]),
    ],
)
def test_tensors(
    tensors: State,
    changes: dict[str, Any],
    kind: type[DareError],
    texts: list[str],
    base: Path,
    tmp_path: Path,
) -> None:
    refused(base, adapter(tmp_path / "adapter", tensors, **changes), kind, *texts)


def test_a_base_of_another_model(base: Path, tmp_path: Path) -> None:
    tensors = {key.replace(".a.", ".gone."): tensor for key, tensor in factors().items()}
    refused(
        base, adapter(tmp_path / "adapter", tensors), TensorMismatch, "not one of them", "is this the base"
    )


def test_a_quantized_base(tmp_path: Path) -> None:
    base = save({**base_state(), "a.weight": torch.ones(20, 30).to(torch.uint8)}, tmp_path / "base")
    texts = ["expected full precision, since the adapter is merged into it", "(U8 a.weight)"]
    refused(base, adapter(tmp_path / "adapter", factors()), CheckpointError, *texts)


def test_a_folder_that_holds_a_model_too(base: Path, tmp_path: Path) -> None:
    adapter(base, factors())
    texts = [
        "expected a model or an adapter, found both in one folder",
        "base/adapter_model.safetensors or",
        "base/model.safetensors",
    ]
    refused(tmp_path / "base", base, CheckpointError, *texts)
    adapted = extract(base, base / "adapter_model.safetensors", tmp_path / "adapted", p=0)
    plain = extract(base, base / "model.safetensors", tmp_path / "plain", p=0)
    assert (adapted.stats["changed"], plain.stats["changed"]) == (600, 0)


def test_an_adapter_that_is_not_safetensors(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", factors())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(
        base, folder, CheckpointError, "adapter_model.bin", "load the adapter with PEFT and save it again"
    )


def test_a_module_that_was_saved_travels_whole_however_many_rows_it_has(base: Path, tmp_path: Path) -> None:
    head = {"base_model.model.words.weight": torch.randn(14, 5, generator=torch.Generator().manual_seed(1))}
    folder = adapter(tmp_path / "adapter", factors() | head, modules_to_save=["words"])
    assert extract(base, folder, tmp_path / "package").records["words.weight"].kind == "whole"


def test_factors_that_are_not_finite(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", {A: torch.full((4, 30), torch.inf), B: torch.ones(20, 4)})
    refused(base, folder, NonFiniteDelta, "a.weight: expected finite weights")


def test_copies_that_a_wrapper_left_behind_do_not_count(base: Path, tmp_path: Path) -> None:
    names = {"words.weight": 1.0, "words.modules_to_save.weight": 2.0, "words.original_module.weight": 3.0}
    tensors = {f"base_model.model.{name}": torch.full((12, 5), value) for name, value in names.items()}
    folder = adapter(tmp_path / "adapter", factors() | tensors, modules_to_save=["words"])
    save_file({"optimizer": torch.ones(1)}, folder / "other.safetensors")
    package = extract(base, folder, tmp_path / "package", p=0)
    apply(base, package, tmp_path / "result")
    assert torch.equal(load_file(tmp_path / "result/model.safetensors")["words.weight"], torch.ones(12, 5))


def test_the_folder_that_is_read_is_not_written(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", factors())
    with pytest.raises(DareError, match="another folder than those that are read"):
        extract(base, folder, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
