"""Copies of one base that differ in what decides nothing, models with fewer tokens, adapters of another base,
and files that come along.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from adapting import save_adapter
from llama_tensors import LLAMA, QUERY, factors, state
from quantised_models import save_model
from safetensors.torch import load_file, save_file

from dare_train import apply, apply_, extract, merge
from dare_train.errors import CheckpointError, TensorMismatch
from dare_train.weights.derived_buffers import is_derived
from dare_train.weights.files.checkpoint import Checkpoint

State = dict[str, torch.Tensor]
BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
    "embeddings.position_ids": torch.arange(5).reshape(1, 5),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "h.0.attn.bias": torch.ones(1, 1, 3, 3),
}


def test_which_buffers_decide_nothing() -> None:
    assert all(is_derived(name, tuple(tensor.shape)) for name, tensor in BUFFERS.items())
    for name in ("h.0.attn.bias", "model.layers.0.self_attn.q_proj.bias", "rotary_emb.freqs", "inv_freqs"):
        assert not is_derived(name, (3,))


def copies(tmp_path: Path) -> tuple[Path, Path, Path, Path, State]:
    """A base with buffers and without, and a fine-tune with (in another dtype) and without."""
    base, tuned = state(tied=False), state(tied=False, seed=1)
    halves = {name: tensor.half() for name, tensor in BUFFERS.items()}
    return (
        save_model(base | BUFFERS, tmp_path / "old", {}),
        save_model(base, tmp_path / "new", {}),
        save_model(tuned, tmp_path / "tuned", {}),
        save_model(tuned | halves, tmp_path / "tuned-old", {}),
        tuned,
    )


def same(folder: Path, tuned: State) -> bool:
    found = load_file(folder / "model.safetensors")
    others = found.keys() - tuned.keys()
    return others <= BUFFERS.keys() and all(torch.equal(found[name], tuned[name]) for name in tuned)


@pytest.mark.parametrize("of_base", ["old", "new"])
@pytest.mark.parametrize("of_tuned", ["tuned", "tuned-old"])
def test_either_copy_of_a_base_will_do(of_base: str, of_tuned: str, tmp_path: Path) -> None:
    *_, tuned = copies(tmp_path)
    package = extract(tmp_path / of_base, tmp_path / of_tuned, tmp_path / "package", p=0)
    for target in ("old", "new"):
        apply(tmp_path / target, package, tmp_path / f"applied-{target}")
        assert same(tmp_path / f"applied-{target}", tuned)
    merge(tmp_path / of_base, [tmp_path / of_tuned], tmp_path / "merged")
    assert same(tmp_path / "merged", tuned)
    both = [tmp_path / "tuned", tmp_path / "tuned-old"]
    merge(tmp_path / of_base, both, tmp_path / "average", method="average")
    live = {name: tensor.clone() for name, tensor in state(tied=False).items()}
    apply_(live, package)
    assert all(torch.equal(live[name], tensor) for name, tensor in tuned.items())


def tokenizer(folder: Path, tokens: int) -> None:
    vocabulary = {f"t{number}": number for number in range(tokens)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))


@pytest.mark.parametrize("method", ["slerp", "task_arithmetic", "average"])
@pytest.mark.parametrize("asked", [None, "union", "base"])
def test_a_model_with_fewer_tokens_keeps_the_bases(method: str, asked: str | None, tmp_path: Path) -> None:
    base = save_model(state(tied=False, rows=9), tmp_path / "base", LLAMA)
    model = save_model(state(tied=False, rows=6, seed=1), tmp_path / "model", LLAMA)
    tokenizer(base, 9)
    tokenizer(model, 6)
    models = [base, model] if method == "slerp" else [model]
    merge(base, models, tmp_path / "out", method=method, tokenizer=asked)
    before = load_file(base / "model.safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape == (9, 8)
        assert torch.equal(found[name][6:], before[name][6:])
        assert not torch.equal(found[name][:6], before[name][:6])


def test_fewer_rows_of_unknown_tokens_are_refused(tmp_path: Path) -> None:
    base = save_model(state(tied=False, rows=9), tmp_path / "base", {})
    model = save_model(state(tied=False, rows=6), tmp_path / "model", {})
    with pytest.raises(TensorMismatch, match="expected 9 rows, as in the base, found 6; put both tokenizers"):
        merge(base, [model], tmp_path / "out")
    tokenizer(base, 9)
    tokenizer(model, 6)
    document = json.loads((model / "tokenizer.json").read_text())
    document["model"]["vocab"] = {"t1": 0, "t0": 1, **{f"t{n}": n for n in range(2, 6)}}
    (model / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TensorMismatch, match="token 't0': expected id 0"):
        merge(base, [model], tmp_path / "out", tokenizer="union")
    merge(base, [model], tmp_path / "out", tokenizer="base")
    places = (base, model, tmp_path / "out")
    before, own, found = (load_file(place / "model.safetensors")["lm_head.weight"] for place in places)
    torch.testing.assert_close(found, torch.cat([own[[1, 0]], own[2:], before[6:]]))


def test_fewer_rows_of_tensors_that_are_excluded_do_not_matter(tmp_path: Path) -> None:
    base = save_model(state(tied=False, rows=9), tmp_path / "base", {})
    model = save_model(state(tied=False, rows=6, seed=1), tmp_path / "model", {})
    excluded = ["lm_head.weight", "model.embed_tokens.weight"]
    with pytest.raises(TensorMismatch, match=r"model\.embed_tokens\.weight: expected 9 rows"):
        merge(base, [model], tmp_path / "out", exclude=excluded[:1])
    merge(base, [model], tmp_path / "out", exclude=excluded)
    found, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert all(torch.equal(found[name], before[name]) for name in excluded)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("somebody/instruct", True),
        ("/elsewhere/instruct", True),
        ("base", False),
        ("somebody/Base", False),
        ("/cache/models--somebody--base/snapshots/0123", False),
        ("", False),
    ],
)
def test_an_adapter_of_another_base_is_told(
    said: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_model(state(tied=False), tmp_path / "base", LLAMA)
    model = save_adapter(tmp_path / "adapter", factors(QUERY), base_model_name_or_path=said)
    with caplog.at_level(logging.WARNING, "dare_train"):
        merge(base, [model], tmp_path / "out")
        extract(base, model, tmp_path / "package")
    assert caplog.text.count(f"trained on {said}, and merged into {base}") == (2 if told else 0)


def test_a_package_that_changes_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_model(state(tied=False), tmp_path / "base", LLAMA)
    nothing = {name: torch.zeros_like(t) if "_B." in name else t for name, t in factors(QUERY).items()}
    model = save_adapter(tmp_path / "adapter", nothing)
    with caplog.at_level(logging.WARNING, "dare_train"):
        extract(base, model, tmp_path / "package", p=0)
    assert "package: it changes nothing: " in caplog.text
    with pytest.raises(TensorMismatch, match="adapter changes nothing of it"):
        merge(base, [model], tmp_path / "out")


def test_tokenizers_and_processors_come_along(tmp_path: Path) -> None:
    names = [
        "source.spm", "target.spm", "bpe.codes", "vocab.bpe", "a.tokenizer", "sentencepiece.bpe.model",
        "qwen.tiktoken", "preprocessor_config.json", "additional_chat_templates/rag.jinja",
    ]  # fmt: skip
    base = save_model(state(tied=False), tmp_path / "base", LLAMA)
    for seed, folder in ((1, "base"), (2, "model")):
        if folder == "model":
            save_model(state(tied=False, seed=1), tmp_path / "model", LLAMA)
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"seed": seed}))
    merge(base, [tmp_path / "model"], tmp_path / "merged")
    package = extract(base, tmp_path / "model", tmp_path / "package")
    assert {record.file for record in package.manifest.files} == set(names)
    apply(base, package, tmp_path / "applied")
    for out, seed in (("merged", 1), ("applied", 2)):
        assert all(json.loads((tmp_path / out / name).read_text()) == {"seed": seed} for name in names)


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (LLAMA, "convert it: LlamaForCausalLM.from_pretrained"),
        ({"architectures": ["a b"]}, "convert it: the model's own class, CLASS.from_pretrained"),
        ({}, "convert it: the model's own class, CLASS.from_pretrained"),
    ],
)
def test_old_files_are_converted_by_the_models_own_class(
    config: dict[str, object], remedy: str, tmp_path: Path
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=remedy):
        Checkpoint.open(tmp_path)


def test_a_pipeline_of_several_models_is_told_which(tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(1)}, tmp_path / name / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"found no weights, but in unet, vae; give one of the models in it"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", "{{ 'B' }}"), ("chatml", "im_start"), ("{{ messages[0]['content'] }}", "messages[0]")],
)
def test_a_chat_template(choice: str, expected: str, tmp_path: Path) -> None:
    from dare_train.merging.config.mergekit import read
    from dare_train.merging.config.task import MergeTask
    from dare_train.merging.merge import run

    for number, (name, template) in enumerate({"base": "A", "one": "B", "two": "B"}.items()):
        folder = save_model(state(tied=False, seed=number), tmp_path / name, LLAMA)
        text = f"{{{{ '{template}' }}}}"
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": text, "x": 1}))
    given = {
        "merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "chat_template": choice,
        "models": [{"model": str(tmp_path / name)} for name in ("one", "two")],
    }  # fmt: skip
    recipe, _ = read(json.dumps(given))
    run(MergeTask.of(recipe), tmp_path / "out")
    assert expected in (tmp_path / "out/chat_template.jinja").read_text()
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"x": 1}
    again, _ = read((tmp_path / "out/dare_merge.yml").read_text())
    assert again == recipe
