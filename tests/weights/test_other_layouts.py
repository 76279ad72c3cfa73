"""A base with its experts by number and a model with all of them in one tensor, and the other way round."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DECODER
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    JambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    set_seed,
)

from dare_train import apply, diagnose, extract, merge
from dare_train.errors import DareError, TensorMismatch
from dare_train.weights.live.layouts import Block, Place
from dare_train.weights.lora.opening import open_weights
from dare_train.weights.lora.other_layouts import in_layout_of
from dare_train.weights.lora.relaid import Relaid
from dare_train.weights.protocol import ArrayWeights, TensorInfo

CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**DECODER, num_local_experts=3),
    "qwen2_moe": Qwen2MoeConfig(
        **DECODER, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=3
    ),
    "qwen3_moe": Qwen3MoeConfig(**DECODER, moe_intermediate_size=8, num_experts=3, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **DECODER, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "jamba": JambaConfig(**DECODER, num_experts=3, use_mamba_kernels=False, mamba_dt_rank=2),
}  # fmt: skip
LAYOUTS = {"by number": True, "in one": False}
BOTH_WAYS = [("by number", "in one"), ("in one", "by number")]


def saved(kind: str, folder: Path) -> Path:
    """A base and a fine-tune of it, each in both layouts."""
    for name, seed in (("base", 5), ("tuned", 6)):
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]).bfloat16()
        for layout, original in LAYOUTS.items():
            model.save_pretrained(folder / name / layout, save_original_format=original)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def is_same(folder: Path, expected: Path) -> bool:
    found, wanted = tensors(folder), tensors(expected)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def loads(folder: Path) -> bool:
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return not any(info.values())


@pytest.mark.parametrize(("of_base", "of_tuned"), BOTH_WAYS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_either_layout_is_read_as_that_of_the_base(
    kind: str, of_base: str, of_tuned: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(kind, tmp_path)
    base, tuned = folder / "base" / of_base, folder / "tuned" / of_tuned
    expected = folder / "tuned" / of_base
    assert tensors(tuned).keys() != tensors(expected).keys()
    with caplog.at_level(logging.WARNING, "dare_train"):
        package = extract(base, tuned, tmp_path / "package", p=0)
    assert f"cut, joined or named as {base} has them, by transformers' own conversion" in caplog.text
    assert {record.kind for record in package.manifest.tensors} <= {"delta", "base"}
    apply(base, package, tmp_path / "applied")
    merge(base, [tuned], tmp_path / "merged")
    for result in ("applied", "merged"):
        assert is_same(tmp_path / result, expected)
        assert loads(tmp_path / result)
    dropped = extract(base, tuned, tmp_path / "dropped", p=0.5)
    assert dropped.manifest.result == extract(base, expected, tmp_path / "as-base", p=0.5).manifest.result
    for out, models in (("ties", [tuned, expected]), ("ties-as-base", [expected, expected])):
        merge(base, models, tmp_path / out, method="dare_ties", p=0.5, weights=[0.5, 0.7])
    assert is_same(tmp_path / "ties", tmp_path / "ties-as-base")
    found = diagnose(base, tuned)
    assert found.new == ()
    assert found.verdict == diagnose(base, expected).verdict


def test_arrays_are_cut_as_the_configuration_of_the_base_says(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    base = folder / "base/by number"
    extract(base, tensors(folder / "tuned/in one"), tmp_path / "package", p=0)
    apply(base, tmp_path / "package", tmp_path / "applied")
    assert is_same(tmp_path / "applied", folder / "tuned/by number")


@pytest.mark.parametrize(
    ("change", "of_base", "of_tuned"),
    [
        *((change, *ways) for change in ("no class", "other sizes", "another layer") for ways in BOTH_WAYS),
        ("other dtypes", "in one", "by number"),
    ],
)
def test_what_is_not_defined_is_refused(change: str, of_base: str, of_tuned: str, tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path)
    base, tuned = folder / "base" / of_base, folder / "tuned" / of_tuned
    state = tensors(tuned)
    experts = sorted(name for name in state if ".layers.1.mlp.experts." in name)
    for config in (base / "config.json", tuned / "config.json"):
        fields = json.loads(config.read_text())
        if change == "no class":
            fields["architectures"] = ["OursForCausalLM"]
        if change == "other sizes":
            fields["moe_intermediate_size"] = 4
        config.write_text(json.dumps(fields))
    if change == "another layer":
        state["model.layers.2.mlp.experts.extra"] = state.pop(experts[0])
    if change == "other dtypes":
        state[experts[0]] = state[experts[0]].float()
    save_file(state, tuned / "model.safetensors")
    for action in (
        lambda: extract(base, tuned, tmp_path / "out", p=0),
        lambda: extract(base, tuned, tmp_path / "out", p=0.9),
        lambda: merge(base, [tuned], tmp_path / "out"),
        lambda: diagnose(base, tuned),
    ):
        with pytest.raises(TensorMismatch, match="are weights cut or packed otherwise, as experts are"):
            action()
    assert not (tmp_path / "out").exists()


def test_packages_keep_to_the_layout_that_they_were_made_in(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    package = extract(folder / "base/by number", folder / "tuned/by number", tmp_path / "package", p=0)
    other = folder / "base/in one"
    for action in (
        lambda: apply(other, package, tmp_path / "out"),
        lambda: merge(other, [package], tmp_path / "out"),
    ):
        with pytest.raises(DareError, match="experts"):
            action()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("start", "count"), [(0, 0), (0, 24), (3, 1), (5, 13), (23, 1)])
def test_reading_is_what_indexing_is(start: int, count: int) -> None:
    """A tensor of two matrices, the second turned, against numpy, both ways."""
    whole = np.arange(48, dtype=np.float32).reshape(2, 4, 6)
    first, second = whole[0], np.ascontiguousarray(whole[1].T)
    blocks = {
        "first": Block(0, "whole", 0, (24,), (1,)),
        "second": Block(0, "whole", 24, (6, 4), (1, 6)),
    }
    places = {name: Place(shape, (blocks[name],)) for name, shape in (("first", (4, 6)), ("second", (6, 4)))}
    one = ArrayWeights({"whole": whole})
    infos = {name: TensorInfo(one.tensors["whole"].dtype, place.shape) for name, place in places.items()}
    cut = Relaid(one, infos, cut=places, joined={})
    for name, expected in (("first", first), ("second", second)):
        read = cut.read(name, start, count).view(np.float32)
        assert np.array_equal(read, expected.reshape(-1)[start : start + count])
    two = ArrayWeights({"first": first, "second": second})
    joined = Relaid(two, one.tensors, cut={}, joined={"whole": list(blocks.items())})
    for offset in (0, 12, 24):
        read = joined.read("whole", offset + start, count).view(np.float32)
        assert np.array_equal(read, whole.reshape(-1)[offset + start : offset + start + count])


def test_weights_that_meet_are_left_alone(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    base, tuned = (open_weights(folder / name / "in one") for name in ("base", "tuned"))
    assert in_layout_of(base, tuned) is tuned
    assert in_layout_of(base, stranger := ArrayWeights({"x": np.ones(3, np.float32)})) is stranger


def test_a_model_of_packed_files_keeps_their_names(tmp_path: Path) -> None:
    """What the callback asks for, and what training saves."""
    base = saved("mixtral", tmp_path) / "base/in one"
    model = AutoModelForCausalLM.from_pretrained(base)
    assert open_weights(model).tensors.keys() == tensors(base).keys()
    model.save_pretrained(tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == tensors(base).keys()


def test_renamed_experts_are_cut_after_they_were_renamed(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    state = {
        name.replace(".mlp.", ".moe."): tensor for name, tensor in tensors(folder / "tuned/in one").items()
    }
    base = folder / "base/by number"
    merge(base, [state], tmp_path / "merged", rename={".moe.": ".mlp."})
    assert is_same(tmp_path / "merged", folder / "tuned/by number")
