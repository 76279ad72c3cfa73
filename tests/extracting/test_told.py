"""What `extract` tells, or refuses, where its result would not be what was meant."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import save_adapter
from quantised_models import save_model
from safetensors.torch import load_file
from tiny import State, extract_refused

from dare_train import apply, diagnose, extract, merge
from dare_train.errors import ConfigError, TensorMismatch

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 6,
    "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip


def state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (6, 8), HEAD: (6, 8), "model.norm.weight": (8,)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.self_attn.{which}_proj.weight": (8, 8) for which in "qkvo"}
        shapes |= {f"{layer}.mlp.{which}_proj.weight": (8, 8) for which in ("gate", "up", "down")}
        shapes |= {f"{layer}.{which}_layernorm.weight": (8,) for which in ("input", "post_attention")}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(state(), tmp_path / "base", LLAMA)


def missing_where_loaded(folder: Path) -> set[str]:
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return {*report["missing_keys"]}


# Names that a wrapper has changed.


@pytest.mark.parametrize("prefix", ["model.", "policy."])
def test_what_a_wrapper_puts_before_all_names_is_taken_away(
    prefix: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = state(1)
    wrapped = save_model({f"{prefix}{name}": t for name, t in tuned.items()}, tmp_path / "tuned", LLAMA)
    with caplog.at_level(logging.WARNING, "dare_train"):
        apply(base, extract(base, wrapped, tmp_path / "package", p=0), tmp_path / "applied")
    assert f"names without {prefix}, as the model has them" in caplog.text
    merge(base, [wrapped], tmp_path / "merged")
    assert not diagnose(base, wrapped).new
    for out in ("applied", "merged"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == tuned.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tuned.items())


def test_a_prefix_of_the_class_stays(tmp_path: Path) -> None:
    """GPT-2 is on the Hub without the prefix that its class with a head has."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    model.save_pretrained(tmp_path / "tuned")
    tuned = load_file(tmp_path / "tuned/model.safetensors")
    base = {name.removeprefix("transformer."): tensor + 1 for name, tensor in tuned.items()}
    folder = save_model(base, tmp_path / "base", model.config.to_dict())
    apply(folder, extract(folder, tmp_path / "tuned", tmp_path / "package", p=0), tmp_path / "applied")
    assert load_file(tmp_path / "applied/model.safetensors").keys() == tuned.keys()


# Models that are not whole.


@pytest.mark.parametrize("described", [True, False])
def test_a_model_of_which_layers_are_missing_is_refused(described: bool, base: Path, tmp_path: Path) -> None:
    trained = {name: tensor for name, tensor in state(1).items() if "layers.1" in name or name == HEAD}
    tuned = save_model(trained, tmp_path / "tuned", LLAMA)
    if not described:
        (tuned / "config.json").unlink()
    texts = (
        "tuned: model.layers.0.",
        "since LlamaForCausalLM needs it",
        "found missing",
        "dare-train merge takes the base's for what is missing",
    )
    extract_refused(base, tuned, tmp_path / "p", TensorMismatch, *texts, p=0)
    with pytest.raises(TensorMismatch, match="since LlamaForCausalLM needs it"):
        diagnose(base, tuned)
    merge(base, [tuned], tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in {**state(), **trained}.items())
    assert not missing_where_loaded(tmp_path / "merged")


def test_weights_that_were_not_gathered_are_refused(base: Path, tmp_path: Path) -> None:
    """What DeepSpeed ZeRO-3 leaves in place of a weight on each process."""
    empty = {name: torch.zeros(0) if "proj" in name else tensor for name, tensor in state(1).items()}
    tuned = save_model(empty, tmp_path / "tuned", LLAMA)
    name = "model.layers.0.mlp.down_proj.weight"
    texts = (f"{name}: expected shape [8, 8], as in the base, found [0] in", "ZeRO-3", "Save it again")
    extract_refused(base, tuned, tmp_path / "p", TensorMismatch, *texts, p=0)
    for command in (diagnose, lambda *models: merge(models[0], [models[1]], tmp_path / "merged")):
        with pytest.raises(TensorMismatch, match="ZeRO-3"):
            command(base, tuned)


def test_a_head_that_is_missing_is_told(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    headless = {name: tensor for name, tensor in state(1).items() if name != HEAD}
    tuned = save_model(headless, tmp_path / "tuned", LLAMA)
    with caplog.at_level(logging.WARNING, "dare_train"):
        apply(base, extract(base, tuned, tmp_path / "package", p=0), tmp_path / "applied")
    assert f"{HEAD}: missing in {tuned}, so in the result, though LlamaForCausalLM needs it" in caplog.text
    assert missing_where_loaded(tmp_path / "applied") == {HEAD}


def test_a_head_under_another_name_is_told(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = {"output.weight" if name == HEAD else name: tensor for name, tensor in state(1).items()}
    tuned = save_model(named, tmp_path / "tuned", LLAMA)
    told = f"{tuned}: no {HEAD}, but output.weight has its shape"
    remedy = "--rename output.=lm_head."
    for number, command in enumerate((extract, merge)):
        models: Any = tuned if command is extract else [tuned]
        with caplog.at_level(logging.WARNING, "dare_train"):
            command(base, models, tmp_path / f"told-{number}")
        assert f"{told}: if they are one, {remedy}" in caplog.text
        caplog.clear()
    merge(base, [tuned], tmp_path / "merged", rename={"output.": "lm_head."})
    found = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state(1).items())


@pytest.mark.parametrize(
    "config", [{"architectures": ["LlamaModel"]}, {"tie_word_embeddings": True}], ids=str
)
def test_a_head_that_nobody_needs_is_not(
    config: dict[str, Any], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    headless = {name: tensor for name, tensor in state(1).items() if name != HEAD}
    tuned = save_model(headless, tmp_path / "tuned", {**LLAMA, **config})
    with caplog.at_level(logging.WARNING, "dare_train"):
        extract(base, tuned, tmp_path / "package", p=0)
    assert "missing" not in caplog.text


def test_fewer_layers_are_no_missing_ones(base: Path, tmp_path: Path) -> None:
    pruned = {name: tensor for name, tensor in state(1).items() if "layers.1" not in name}
    tuned = save_model(pruned, tmp_path / "tuned", {**LLAMA, "num_hidden_layers": 1})
    apply(base, extract(base, tuned, tmp_path / "package", p=0), tmp_path / "applied")
    assert not missing_where_loaded(tmp_path / "applied")


# Names that match nothing.


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("exclude", "lm_haed*"),
        ("whole", ["lm_haed*"]),
        ("include", ["lm_haed*", "*"]),
        ("p", {"lm_haed*": 0.5, "*": 0.0}),
        ("rename", {"lm_haed": "lm_head"}),
    ],
)
def test_a_name_that_matches_nothing_is_told(
    option: str, value: Any, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = save_model(state(1), tmp_path / "tuned", LLAMA)
    with caplog.at_level(logging.WARNING, "dare_train"):
        extract(base, tuned, tmp_path / "package", **{"p": 0.0, option: value})
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"{option}: no tensor")
    assert "lm_haed" in told
    assert told.endswith("is it misspelt?")


def test_an_include_that_names_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    texts = ("include: expected name patterns of tensors of", "found lm_haed*")
    extract_refused(base, state(1), tmp_path / "p", ConfigError, *texts, include=["lm_haed*"])


def test_what_is_excluded_and_travels_all_the_same_is_told(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = {**state(1), "score.weight": torch.ones(2, 8)}
    with caplog.at_level(logging.WARNING, "dare_train"):
        extract(base, tuned, tmp_path / "package", p=0, exclude=["score*", HEAD])
    assert caplog.messages == [
        "exclude: score.weight travels all the same, since the base has none of its form"
    ]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_of_what_is_excluded_and_grew_the_bases_rows_stay(p: float, base: Path, tmp_path: Path) -> None:
    tuned = state(1)
    for name in (EMBEDDING, HEAD):
        tuned[name] = torch.cat([state()[name] * 1.25, torch.full((2, 8), 3.0)])
    package = extract(base, tuned, tmp_path / "package", p=p, exclude=[EMBEDDING])
    apply(base, package, tmp_path / "applied")
    found = load_file(tmp_path / "applied/model.safetensors")
    assert torch.equal(found[EMBEDDING], torch.cat([state()[EMBEDDING], torch.full((2, 8), 3.0)]))
    assert not torch.equal(found[HEAD][:6], state()[HEAD])
    assert torch.equal(found[HEAD][6:], tuned[HEAD][6:])


def test_nothing_covered_is_not_nothing_changed(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = save_model({**state(), HEAD: state(1)[HEAD]}, tmp_path / "tuned", LLAMA)
    with caplog.at_level(logging.WARNING, "dare_train"):
        extract(base, tuned, tmp_path / "package", p=0, include=["model.*"])
    assert f"it changes nothing: what it covers of {tuned} equals {base}" in caplog.text


def factors(size: float) -> State:
    module = "model.layers.0.self_attn.q_proj"
    return {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.full((8, 2), size)}


@pytest.mark.parametrize("p", [0.0, 0.9])
def test_an_adapter_that_changes_nothing_is_told(
    p: float, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for size in (0.0, 1.0):
        tuned = save_adapter(tmp_path / f"adapter-{size}", factors(size))
        with caplog.at_level(logging.WARNING, "dare_train"):
            extract(base, tuned, tmp_path / f"package-{size}", p=p)
        assert ("it changes nothing" in caplog.text) is (size == 0)
        caplog.clear()


@pytest.mark.parametrize("command", ["extract", "merge"])
def test_a_head_that_an_adapter_alone_has_is_told(
    command: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {**factors(1.0), "score.weight": torch.ones(3, 8)}
    tuned = save_adapter(tmp_path / "adapter", tensors, modules_to_save=["score"], task_type="SEQ_CLS")
    with caplog.at_level(logging.WARNING, "dare_train"):
        if command == "extract":
            extract(base, tuned, tmp_path / "out", p=0)
        else:
            merge(base, [tuned], tmp_path / "out")
    assert f"score.weight: in {tuned} alone; config.json of the result is the base's" in caplog.text


# Code.


def test_code_that_a_package_does_not_bring_is_named(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = save_model(state(1), tmp_path / "tuned", LLAMA)
    for folder in (base, tuned):
        (folder / "modeling_same.py").write_text("raise SystemExit")
        (folder / "modeling_own.py").write_text(f"# {folder.name}")
    (tuned / "modeling_new.py").write_text("raise SystemExit")
    with caplog.at_level(logging.WARNING, "dare_train"):
        package = extract(base, tuned, tmp_path / "package", p=0)
    (told,) = caplog.messages
    assert told.startswith("not in the package, which brings configuration and tokenizers alone: ")
    assert f": modeling_new.py, modeling_own.py; copy from {tuned}" in told
    assert package.manifest.files == ()
