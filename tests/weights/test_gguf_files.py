"""GGUF files: refused where a checkpoint belongs, and written as one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import gguf_models
import pytest
import torch
from commands import dare_train
from gguf_models import write_gguf
from tiny import base_state, extract_refused, moved, refusal, save
from training import classifier, make_trainer, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from dare_train import DareCallback, apply, dequantize, extract, merge
from dare_train.errors import CheckpointError, ConfigError, DareError, OutputExists


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_checkpoint_has_the_dequantised_weights_to_the_bit(tmp_path: Path, tied: bool) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    size = dequantize(tmp_path / "tiny.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert state.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}
    for name, values in expected.items():
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(state[name], torch.from_numpy(values).bfloat16()), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert size["parameters"] == sum(values.size for values in expected.values())
    assert size["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size


def test_tokenizer_template_and_generation_settings_come_along(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    dequantize(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "hi you"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s>user\nhi you</s>\n<s>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[0] == ids[-len("assistant\n") - 1] == 1, "markers are tokens of their own"
    assert ids.count(gguf_models.TOKENS.index("hi")) == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == 2


def test_the_checkpoint_is_a_base(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    dequantize(tmp_path / "tiny.gguf", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.25
    package = extract(tmp_path / "base", model, tmp_path / "package", p=0.0)
    apply(tmp_path / "base", package, tmp_path / "received")
    received = AutoModelForCausalLM.from_pretrained(tmp_path / "received")
    assert torch.equal(received.lm_head.weight, model.lm_head.weight)


def dequantize_refused(file: Path, kind: type[DareError], *texts: str) -> None:
    out = file.parent / "place" / "out"
    with pytest.raises(DareError) as caught:
        dequantize(file, out)
    assert not out.parent.exists()
    refusal(caught.value, kind, *texts)


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("Four score and seven years ago")
    dequantize_refused(tmp_path / "text.gguf", CheckpointError, "text.gguf: expected a GGUF file", "b'Four'")
    dequantize_refused(tmp_path / "none.gguf", CheckpointError, "none.gguf: expected", "found no such file")
    dequantize_refused(tmp_path, CheckpointError, f"{tmp_path}: expected a GGUF file, found a folder")


def test_a_folder_that_transformers_cannot_write_to_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ConfigError, match=r"out: expected a path that is UTF-8, found .*\\udcff"):
        dequantize(tmp_path / "tiny.gguf", tmp_path / "out\udcff")


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    write_gguf(tmp_path / "new.gguf", architecture="brontosaurus")
    dequantize_refused(
        tmp_path / "new.gguf",
        CheckpointError,
        "that transformers reads",
        "brontosaurus",
        "a newer transformers",
    )


@pytest.mark.parametrize("size", [4, 40, 4_000, 50_000])
def test_a_gguf_cut_short(tmp_path: Path, size: int) -> None:
    write_gguf(tmp_path / "cut.gguf")
    assert (tmp_path / "cut.gguf").stat().st_size > size
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "cut.gguf").read_bytes()[:size])
    dequantize_refused(tmp_path / "cut.gguf", CheckpointError, "cut.gguf", "that transformers reads")


def test_a_part_of_the_weights_is_refused(tmp_path: Path) -> None:
    """transformers would draw the others at random."""
    write_gguf(tmp_path / "part.gguf", without="blk.1.ffn_up.weight")
    texts = "expected all weights in one file", "found no model.layers.1.mlp.up_proj.weight", "--merge"
    dequantize_refused(tmp_path / "part.gguf", CheckpointError, *texts)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else there(name, *rest)
    )
    dequantize_refused(tmp_path / "tiny.gguf", ConfigError, "expected the library gguf", "pip install gguf")


def test_a_folder_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExists, match="choose another"):
        dequantize(tmp_path / "tiny.gguf", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    dequantize(tmp_path / "tiny.gguf", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert (tmp_path / "out" / "config.json").exists()


def test_the_command(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    save(base_state(), tmp_path / "out")
    refused = dare_train("dequantize", "tiny.gguf", "--out", "out", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--overwrite" in refused.stderr
    done = dare_train("dequantize", "tiny.gguf", "--out", "out", "--overwrite", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"out: [\d,]+ parameters in bfloat16, [\d,]+ bytes\n", done.stdout)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_gguf_in_place_of_a_checkpoint_is_refused_with_the_command(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a model").mkdir()
    file = tmp_path / "a model" / "tiny.gguf"
    write_gguf(file)
    (tmp_path / "a model" / "README.md").touch()
    given = file if kind == "file" else file.parent
    command = f"found tiny.gguf; dequantize it: dare-train dequantize '{file}' --out FOLDER"
    base = save(base_state(), tmp_path / "base")
    package = extract(base, moved(base_state()), tmp_path / "package")
    extract_refused(given, base_state(), tmp_path / "place", CheckpointError, command)
    extract_refused(base, given, tmp_path / "place", CheckpointError, command)
    extract_refused(base_state(), given, tmp_path / "place", CheckpointError, command)
    for run in (
        lambda: apply(given, package, tmp_path / "received"),
        lambda: merge(given, [package], tmp_path / "merged"),
        lambda: merge(base, [given], tmp_path / "merged"),
    ):
        with pytest.raises(DareError) as caught:
            run()
        refusal(caught.value, CheckpointError, command)
    model = classifier(save_base(tmp_path / "encoder"))
    with pytest.raises(DareError) as caught:
        make_trainer(model, tmp_path / "out", DareCallback(base=str(given))).train()
    refusal(caught.value, CheckpointError, command)


def test_a_gguf_beside_safetensors_is_no_hindrance(tmp_path: Path) -> None:
    base = save(base_state(), tmp_path / "base")
    write_gguf(base / "tiny.gguf")
    extract(base, moved(base_state()), tmp_path / "package")
