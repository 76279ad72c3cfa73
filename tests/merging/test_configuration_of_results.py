"""What a result's config.json says is what its weights are, of `merge` and of `extract` and `apply`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import save_adapter
from llama_tensors import EMBEDDING, HEAD, LLAMA, QUERY, factors, state
from quantised_models import save_model
from safetensors.torch import load_file

from dare_train import apply, extract, merge
from dare_train.dtypes import DTYPES
from dare_train.package.model_config import Facts, settled
from dare_train.weights.protocol import TensorInfo


def by_merge(base: Path, model: Path, out: Path) -> None:
    merge(base, [model], out)


def by_package(base: Path, model: Path, out: Path) -> None:
    apply(base, extract(base, model, out.with_name("package"), p=0), out)


def by_merged_package(base: Path, model: Path, out: Path) -> None:
    merge(base, [model], out.with_name("package"), package=True)
    apply(base, out.with_name("package"), out)


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {
    "merge": by_merge,
    "extract and apply": by_package,
    "merge into a package": by_merged_package,
}


def loaded(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    found: torch.nn.Module = model
    return found


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_an_adapter_brings_are_in_the_configuration(way: str, tmp_path: Path) -> None:
    base = save_model(state(tied=False), tmp_path / "base", {**LLAMA, "tie_word_embeddings": False})
    larger = {name: torch.cat([state(tied=False)[name], torch.ones(3, 8)]) for name in (EMBEDDING, HEAD)}
    model = save_adapter(
        tmp_path / "adapter", {**factors(QUERY), **larger}, modules_to_save=["embed_tokens", "lm_head"]
    )
    WAYS[way](base, model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 9
    assert torch.equal(loaded(tmp_path / "out").get_output_embeddings().weight, larger[HEAD])  # type: ignore[operator]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", ["by factors", "in full"])
def test_a_tied_head_that_was_trained_is_one_no_more(way: str, trained: str, tmp_path: Path) -> None:
    base = save_model(state(tied=True), tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})
    embedding = state(tied=True)[EMBEDDING]
    if trained == "by factors":
        of_head = factors("lm_head", rows=6)
        a, b = (of_head[f"lm_head.lora_{which}.weight"].double() for which in "AB")
        expected = (embedding.double() + b @ a).float()
        model = save_adapter(tmp_path / "adapter", {**factors(QUERY), **of_head})
    else:
        expected = embedding * 2
        saved = {**factors(QUERY), HEAD: expected}
        model = save_adapter(tmp_path / "adapter", saved, modules_to_save=["lm_head"])
    WAYS[way](base, model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    found = loaded(tmp_path / "out")
    assert torch.equal(found.get_output_embeddings().weight, expected)  # type: ignore[operator]
    assert torch.equal(found.get_input_embeddings().weight, embedding)  # type: ignore[operator]


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_embedding_that_was_trained_in_full_alone_leaves_the_head(way: str, tmp_path: Path) -> None:
    base = save_model(state(tied=True), tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})
    embedding = state(tied=True)[EMBEDDING]
    tensors = {**factors(QUERY), EMBEDDING: embedding * 2}
    WAYS[way](
        base, save_adapter(tmp_path / "adapter", tensors, modules_to_save=["embed_tokens"]), tmp_path / "out"
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    found = loaded(tmp_path / "out")
    assert torch.equal(found.get_output_embeddings().weight, embedding)  # type: ignore[operator]
    assert torch.equal(found.get_input_embeddings().weight, embedding * 2)  # type: ignore[operator]


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_embedding_with_factors_moves_its_head_and_that_is_told(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_model(state(tied=True), tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})
    module = EMBEDDING.removesuffix(".weight")
    of_embedding = {
        f"{module}.lora_embedding_A": torch.ones(2, 6),
        f"{module}.lora_embedding_B": torch.ones(8, 2),
    }
    with caplog.at_level(logging.WARNING, "dare_train"):
        WAYS[way](base, save_adapter(tmp_path / "adapter", of_embedding), tmp_path / "out")
    assert f"merged into {EMBEDDING}, and so into {HEAD}, which is tied to it" in caplog.text
    found = loaded(tmp_path / "out").get_output_embeddings().weight  # type: ignore[operator]
    assert torch.equal(found, state(tied=True)[EMBEDDING] + 2)


@pytest.mark.parametrize("way", WAYS)
def test_an_embedding_that_was_trained_as_one_with_its_head_stays_so(way: str, tmp_path: Path) -> None:
    base = save_model(state(tied=True), tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})
    expected = state(tied=True)[EMBEDDING] * 2
    tensors = {**factors(QUERY), EMBEDDING: expected, HEAD: expected.clone()}
    fields = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    WAYS[way](base, save_adapter(tmp_path / "adapter", tensors, **fields), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert torch.equal(loaded(tmp_path / "out").get_output_embeddings().weight, expected)  # type: ignore[operator]


@pytest.mark.parametrize("way", WAYS)
def test_a_head_that_stays_tied_stays_so(way: str, tmp_path: Path) -> None:
    base = save_model(state(tied=True), tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})
    WAYS[way](base, save_adapter(tmp_path / "adapter", factors(QUERY)), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert HEAD not in load_file(tmp_path / "out/model.safetensors")


def test_a_configuration_that_contradicts_its_own_weights_is_told_and_corrected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {**LLAMA, "vocab_size": 7, "tie_word_embeddings": False}
    base = save_model(state(tied=False), tmp_path / "base", wrong)
    model = save_model(state(tied=False, seed=1), tmp_path / "model", wrong)
    report = merge(base, [model], tmp_path / "merged")
    text = f"config.json says vocab_size 7, and {EMBEDDING} has 6 rows: it is written as 6"
    assert any(text in note for note in report.notes)
    with caplog.at_level(logging.WARNING, "dare_train"):
        apply(base, extract(base, model, tmp_path / "package", p=0), tmp_path / "applied")
    assert text in caplog.text
    for out in ("merged", "applied"):
        assert json.loads((tmp_path / out / "config.json").read_text())["vocab_size"] == 6
        loaded(tmp_path / out)


def test_a_class_that_is_not_known_is_told_and_left() -> None:
    tensors = {EMBEDDING: info(6)}
    config, notes = settled({"vocab_size": 7, "architectures": ["Unheard"]}, Facts(tensors=tensors))
    assert config["vocab_size"] == 7
    text = f"config.json says vocab_size 7, and {EMBEDDING} has 6 rows: correct one of them if the model "
    assert notes == [f"{text}does not load"]
    part = {"text_config": {"vocab_size": 4}}
    config, notes = settled(part, Facts(tensors=tensors, sizes={4}))
    assert (config, notes) == ({"text_config": {"vocab_size": 6}}, [])


def info(rows: int) -> TensorInfo:
    return TensorInfo(DTYPES["F32"], (rows, 8))


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_weights_that_landed_on_the_bases_grid_are_of_its_dtype(key: str, tmp_path: Path) -> None:
    config = {**{name: value for name, value in LLAMA.items() if name != "torch_dtype"}, key: "bfloat16"}
    rounded = {name: tensor.bfloat16() for name, tensor in state(tied=False).items()}
    base = save_model(rounded, tmp_path / "base", config)
    tuned = save_model(state(tied=False, seed=1), tmp_path / "tuned", {**config, key: "float32"})
    apply(base, extract(base, tuned, tmp_path / "package", p=0.5), tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {
        torch.bfloat16
    }
    assert said(tmp_path / "out")[key] == "bfloat16"


def test_weights_that_a_package_makes_finer_are_of_its_dtype(tmp_path: Path) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in state(tied=False).items()}
    base = save_model(rounded, tmp_path / "base", {**LLAMA, "torch_dtype": "bfloat16"})
    tuned = save_model(state(tied=False, seed=1), tmp_path / "tuned", LLAMA)
    (tuned / "config.json").unlink()
    apply(base, extract(base, tuned, tmp_path / "package", p=0, cast_base=True), tmp_path / "out")
    assert said(tmp_path / "out")["torch_dtype"] == "float32"


def test_a_dtype_that_the_base_says_wrongly_is_left(tmp_path: Path) -> None:
    base = save_model(state(tied=False), tmp_path / "base", {**LLAMA, "torch_dtype": "bfloat16"})
    tuned = save_model(state(tied=False, seed=1), tmp_path / "tuned", said(base))
    apply(base, extract(base, tuned, tmp_path / "package", p=0), tmp_path / "out")
    assert said(tmp_path / "out") == said(base)


@pytest.mark.parametrize("order", [("head", "plain"), ("plain", "head")], ids=str)
def test_packages_side_by_side_are_described_by_the_one_that_brings_a_head(
    order: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_model(state(tied=True), tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})
    of_head = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
    models = {
        "head": ({**state(tied=True, seed=1), "score.weight": torch.ones(2, 8)}, of_head),
        "plain": (state(tied=True, seed=2), {"use_cache": False}),
    }
    for name, (tensors, fields) in models.items():
        extract(
            base, save_model(tensors, tmp_path / name, {**said(base), **fields}), tmp_path / f"{name}-p", p=0
        )
    with caplog.at_level(logging.WARNING, "dare_train"):
        apply(base, [tmp_path / f"{name}-p" for name in order], tmp_path / "out")
    head, plain = (tmp_path / f"{name}-p" for name in ("head", "plain"))
    assert (
        f"config.json: that of {head} counts, and that of {plain} does not, which is another" in caplog.text
    )
    assert said(tmp_path / "out")["architectures"] == of_head["architectures"]
    assert said(tmp_path / "out")["id2label"] == of_head["id2label"]


def test_a_package_that_is_given_twice_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_model(state(tied=True), tmp_path / "base", LLAMA)
    package = extract(base, state(tied=True, seed=1), tmp_path / "package", p=0)
    shutil.copytree(tmp_path / "package", tmp_path / "copy")
    other = extract(base, state(tied=True, seed=2), tmp_path / "other", p=0)
    for number, again in enumerate((package, tmp_path / "copy", other)):
        with caplog.at_level(logging.WARNING, "dare_train"):
            apply(base, [package, again], tmp_path / f"out-{number}")
        assert ("given twice, so that its delta counts twice" in caplog.text) is (again is not other)
        caplog.clear()
