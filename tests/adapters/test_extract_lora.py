"""Deltas of low rank as adapters: PEFT loads them, and what they leave out is what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import dare_train
from low_rank_models import KINDS, Pair, pair
from safetensors.torch import load_file
from tiny import refusal
from training import classifier, save_base, train
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from dare_train import apply, extract, extract_lora, save_statistics
from dare_train.errors import ConfigError, DareError, NonFiniteDelta, OutputExists, TensorMismatch
from dare_train.weights.lora.opening import open_weights

Q = "model.layers.0.self_attn.q_proj"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("kind", [*KINDS])
def test_at_full_rank_peft_gives_the_tuned_model(kind: str, tmp_path: Path) -> None:
    models = pair(kind, tmp_path)
    found = extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=64)
    assert found.error < 1e-6
    state, merged = models.state, models.merged(tmp_path / "adapter")
    assert state.keys() == merged.keys()
    assert max(relative(merged[name], state[name]) for name in state) < 1e-6


@pytest.mark.parametrize("kind", [*KINDS])
def test_before_merging_peft_computes_the_same(kind: str, tmp_path: Path) -> None:
    models = pair(kind, tmp_path)
    extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=3)
    adapted = models.adapted(tmp_path / "adapter")
    before = models.outputs(adapted)
    assert torch.allclose(models.outputs(adapted.merge_and_unload()), before, atol=1e-6)
    assert not torch.allclose(models.outputs(models.loaded(models.base)), before, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS])
def test_the_errors_are_those_of_the_merged_model(kind: str, tmp_path: Path) -> None:
    models = pair(kind, tmp_path)
    found = extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=4)
    start, end = models.loaded(models.base).state_dict(), models.state
    merged = models.merged(tmp_path / "adapter")
    assert {*found.ranks.values()} == {4}
    for module, error in found.errors.items():
        name = f"{module}.weight"
        assert relative(merged[name] - start[name], end[name] - start[name]) == pytest.approx(error, rel=1e-3)
    tied = {name for name in end if name == "lm_head.weight" and "tied" in kind}
    left = sum(float((end[name] - merged[name]).double().square().sum()) for name in end.keys() - tied)
    whole = sum(float((end[name] - start[name]).double().square().sum()) for name in end.keys() - tied)
    assert found.error == pytest.approx((left / whole) ** 0.5, rel=1e-3)
    assert found.norm_left == pytest.approx((1 - left / whole) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("kind", [*KINDS])
def test_our_own_reader_gives_what_peft_merges(kind: str, tmp_path: Path) -> None:
    models = pair(kind, tmp_path)
    extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=4)
    extract(models.base, tmp_path / "adapter", tmp_path / "package", p=0.0)
    apply(models.base, tmp_path / "package", tmp_path / "received")
    merged, received = models.merged(tmp_path / "adapter"), models.loaded(tmp_path / "received").state_dict()
    assert merged.keys() == received.keys()
    assert max(relative(received[name], merged[name]) for name in merged) < 2**-8


def test_an_error_gives_the_smallest_rank_of_each_matrix(tmp_path: Path) -> None:
    models = pair("qwen2, with biases", tmp_path)
    found = extract_lora(models.base, models.tuned, tmp_path / "adapter", error=0.3)
    start, end = models.loaded(models.base).state_dict(), models.state
    assert len({*found.ranks.values()}) > 1
    assert all(error <= 0.3 for error in found.errors.values())
    for module, rank in found.ranks.items():
        delta = (end[f"{module}.weight"] - start[f"{module}.weight"]).double().numpy()
        sizes = np.linalg.svd(delta, compute_uv=False)
        left_out = [
            np.sqrt(np.square(sizes[kept:]).sum() / np.square(sizes).sum()) for kept in (rank - 1, rank)
        ]
        assert left_out[0] > 0.3 >= left_out[1]
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert fields["rank_pattern"] == fields["alpha_pattern"] != {}


def test_factors_in_bfloat16_keep_the_error_that_is_asked_for(tmp_path: Path) -> None:
    models = pair("llama", tmp_path)
    single = extract_lora(models.base, models.tuned, tmp_path / "single", error=0.01)
    half = extract_lora(models.base, models.tuned, tmp_path / "half", error=0.01, dtype="BF16")
    assert all(error <= 0.01 for error in half.errors.values())
    assert sum(half.ranks.values()) >= sum(single.ranks.values())
    assert half.nbytes < single.nbytes
    with pytest.raises(ConfigError) as caught:
        extract_lora(models.base, models.tuned, tmp_path / "none", error=1e-4, dtype="BF16")
    refusal(caught.value, ConfigError, "an error that factors in BF16 can have", "dtype F32")
    assert not (tmp_path / "none").exists()


def test_what_was_not_tuned_is_not_in_the_adapter(tmp_path: Path) -> None:
    models = pair("llama", tmp_path, tuned=lambda name: "layers.1.mlp" in name)
    found = extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=2)
    layers = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert {*found.ranks} == {*layers}
    assert found.saved == ()
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert {*fields["target_modules"]} == {*layers}, "names as short as other layers have would match those"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 6
    assert models.merged(tmp_path / "adapter").keys() == models.state.keys()


def test_target_modules_are_short_where_they_can_be(tmp_path: Path) -> None:
    models = pair("llama", tmp_path, tuned=lambda name: "self_attn" in name)
    extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=2)
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert fields["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (fields["r"], fields["lora_alpha"], fields["task_type"]) == (2, 2, "CAUSAL_LM")
    assert fields["base_model_name_or_path"] == str(models.base)


def test_what_is_left_out_is_told_and_counted(tmp_path: Path) -> None:
    models = pair("llama", tmp_path)
    found = extract_lora(
        models.base, models.tuned, tmp_path / "adapter", rank=64, exclude=["*norm*", "*embed*"]
    )
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    assert {*names} <= {*found.left_out}
    assert len(found.left_out) == 6
    assert found.saved == ()
    start, end = models.loaded(models.base).state_dict(), models.state
    squares = {name: float((end[name] - start[name]).double().square().sum()) for name in end}
    left = sum(squares[name] for name in found.left_out)
    assert found.error == pytest.approx((left / sum(squares.values())) ** 0.5, rel=1e-5)
    assert "6 tuned tensors left as in the base" in str(found)


@pytest.mark.parametrize("own", [True, False])
def test_a_tokenizer_comes_along_if_it_is_not_the_bases(own: bool, tmp_path: Path) -> None:
    models = pair("qwen2, with biases", tmp_path)
    for folder in (models.base, models.tuned):
        (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    if own:
        (models.tuned / "chat_template.jinja").write_text("{{ x }}")
    extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=2)
    expected = {"tokenizer_config.json", "chat_template.jinja"} if own else set()
    found = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert found == {"adapter_config.json", "adapter_model.safetensors", *expected}


def test_a_new_head_on_a_bare_encoder_is_saved_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train(classifier(base), tmp_path / "run").save_model(str(tmp_path / "tuned"))
    found = extract_lora(base, tmp_path / "tuned", tmp_path / "adapter", rank=64)
    assert "classifier" in found.saved
    models = Pair(base, tmp_path / "tuned", AutoModelForSequenceClassification)
    start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    start.save_pretrained(tmp_path / "with-head")
    merged = Pair(tmp_path / "with-head", tmp_path / "tuned", models.kind).merged(tmp_path / "adapter")
    assert max(relative(merged[name], value) for name, value in models.state.items()) < 1e-6
    extract(base, tmp_path / "adapter", tmp_path / "package", p=0.0)
    apply(base, tmp_path / "package", tmp_path / "received")
    received = load_file(tmp_path / "received/model.safetensors")
    assert torch.equal(received["classifier.weight"], models.state["classifier.weight"])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_of_a_package_the_delta_is_what_applying_makes(p: float, tmp_path: Path) -> None:
    models = pair("llama", tmp_path)
    extract(models.base, models.tuned, tmp_path / "package", p=p)
    apply(models.base, tmp_path / "package", tmp_path / "received")
    one = extract_lora(models.base, tmp_path / "package", tmp_path / "one", rank=5)
    two = extract_lora(models.base, tmp_path / "received", tmp_path / "two", rank=5)
    assert (one.errors, one.error, one.saved) == (two.errors, two.error, two.saved)
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert all((one.path / name).read_bytes() == (two.path / name).read_bytes() for name in names)


def test_a_package_of_another_base_is_refused(tmp_path: Path) -> None:
    models = pair("llama", tmp_path / "a")
    other = pair("llama", tmp_path / "b", by=0.03)
    extract(models.base, models.tuned, tmp_path / "package", p=0.5)
    with pytest.raises(DareError, match="not the base the package was made from"):
        extract_lora(other.tuned, tmp_path / "package", tmp_path / "adapter", rank=2)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_can_be_given_a_smaller_rank(tmp_path: Path) -> None:
    models = pair("llama", tmp_path, tuned=lambda name: name.endswith("_proj.weight"))
    extract_lora(models.base, models.tuned, tmp_path / "wide", rank=8)
    extract_lora(models.base, tmp_path / "wide", tmp_path / "narrow", rank=3)
    extract_lora(models.base, models.tuned, tmp_path / "direct", rank=3)
    narrow, direct = models.merged(tmp_path / "narrow"), models.merged(tmp_path / "direct")
    assert max(relative(narrow[name], direct[name]) for name in direct) < 1e-5


def test_with_gram_matrices_the_error_of_outputs_is_told(tmp_path: Path) -> None:
    models = pair("llama", tmp_path, tuned=lambda name: name == f"{Q}.weight")
    inputs = np.random.Generator(np.random.Philox(key=3)).standard_normal((100, 32)) * np.arange(1, 33)
    gram = (inputs.T @ inputs / 100).astype(np.float32)
    path = save_statistics(tmp_path / "g.safetensors", "gram", {f"{Q}.weight": gram}, examples=100)
    found = extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=4, gram=path)
    start, end = models.loaded(models.base).state_dict(), models.state
    merged = models.merged(tmp_path / "adapter")[f"{Q}.weight"]
    name = f"{Q}.weight"
    rest, delta = (inputs @ (end[name] - other).double().numpy().T for other in (merged, start[name]))
    expected = np.linalg.norm(rest) / np.linalg.norm(delta)
    assert found.output_error == pytest.approx(expected, rel=1e-3)
    assert "of what it does to outputs" in str(found)


REFUSED: dict[str, tuple[dict[str, Any], type[DareError], str]] = {
    "neither": ({}, ConfigError, "rank, error: expected one of them, found neither"),
    "both": ({"rank": 1, "error": 0.1}, ConfigError, "rank, error: expected one of them, found both"),
    "no rank": ({"rank": 0}, ConfigError, "rank: expected at least 1, found 0"),
    "no share": ({"error": 1.0}, ConfigError, "error: expected a share between 0 and 1"),
    "a dtype": ({"rank": 1, "dtype": "I8"}, ConfigError, "dtype: expected one of F32, BF16, F16, found I8"),
    "nothing": ({"rank": 1, "exclude": ["*"]}, ConfigError, "linear layers that were tuned, found none"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*REFUSED])
def test_options_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    options, kind, text = REFUSED[case]
    models = pair("llama", tmp_path)
    with pytest.raises(DareError) as caught:
        extract_lora(models.base, models.tuned, tmp_path / "adapter", **options)
    refusal(caught.value, kind, text)
    assert not (tmp_path / "adapter").exists()


def test_embeddings_that_peft_would_not_tie_are_refused(tmp_path: Path) -> None:

    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2)
    )
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ConfigError) as caught:
        extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    refusal(caught.value, ConfigError, "transformer.wte.weight", "tied to lm_head.weight", "--exclude")
    found = extract_lora(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2, exclude="transformer.wte.*"
    )
    assert found.left_out == ("transformer.wte.weight",)


def test_rows_that_the_base_does_not_have_are_refused(tmp_path: Path) -> None:
    models = pair("llama", tmp_path)
    model = models.kind.from_pretrained(models.tuned)
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path / "longer")
    with pytest.raises(TensorMismatch) as caught:
        extract_lora(models.base, tmp_path / "longer", tmp_path / "adapter", rank=2)
    refusal(caught.value, TensorMismatch, "shape [64, 32]", "[70, 32]", "leave it out (exclude)")
    both = ["model.embed_tokens.weight", "lm_head.weight"]
    found = extract_lora(models.base, tmp_path / "longer", tmp_path / "adapter", rank=2, exclude=both)
    assert {*found.left_out} == {*both}
    assert 0 < found.error < 1
    models.adapted(tmp_path / "adapter")


@pytest.mark.parametrize("rows", [63, 65])
def test_a_configuration_of_other_shapes_than_the_weights_is_refused(rows: int, tmp_path: Path) -> None:
    models = pair("llama", tmp_path)
    config = models.tuned / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": rows}))
    with pytest.raises(TensorMismatch) as caught:
        extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=2)
    refusal(caught.value, TensorMismatch, f"shape [{rows}, 32], as config.json says", "[64, 32]")


def test_nan_is_refused(tmp_path: Path) -> None:
    models = pair("llama", tmp_path)
    model = models.kind.from_pretrained(models.tuned)
    with torch.no_grad():
        model.get_parameter(f"{Q}.weight")[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteDelta, match=re.escape(f"{Q}.weight: expected a finite delta")):
        extract_lora(models.base, tmp_path / "broken", tmp_path / "adapter", rank=2)


def test_what_an_adapter_is_made_of_is_not_overwritten(tmp_path: Path) -> None:
    models = pair("qwen2, with biases", tmp_path)
    extract(models.base, models.tuned, tmp_path / "package", p=0)
    for tuned in (models.tuned, tmp_path / "package"):
        for out in (models.base, tuned, tmp_path):
            with pytest.raises(ConfigError, match="expected another folder than those that are read"):
                extract_lora(models.base, tuned, out, rank=2, overwrite=True)
    assert extract_lora(models.base, tmp_path / "package", tmp_path / "adapter", rank=2).ranks


def test_a_folder_that_is_there_stays_unless_told_otherwise(tmp_path: Path) -> None:
    models = pair("llama", tmp_path)
    extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=2)
    with pytest.raises(OutputExists):
        extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=3)
    extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=3, overwrite=True)
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert fields["r"] == 3


def test_the_command_says_what_is_left_in_one_line(tmp_path: Path) -> None:
    models = pair("llama", tmp_path)
    done = dare_train("lora", "base", "tuned", "--rank", 4, "--out", "adapter", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = extract_lora(models.base, models.tuned, tmp_path / "again", rank=4)
    assert done.stdout == f"adapter: {found}\n"
    assert re.search(r"15 linear layers at rank 4, 6 modules whole, [\d,]+ bytes; ", done.stdout)
    assert f"{found.norm_left:.2%} of the delta's norm is left (relative error" in done.stdout
    refused = dare_train("lora", "base", "tuned", "--out", "other", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    models = pair("llama, tied", tmp_path)
    extract_lora(models.base, models.tuned, tmp_path / "adapter", rank=4)
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert fields["ensure_weight_tying"] is True
    adapted = models.adapted(tmp_path / "adapter")
    live = open_weights(adapted)
    assert "lm_head.weight" not in live.tensors
