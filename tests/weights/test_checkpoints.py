"""Checkpoints as people have them: sharded, tied, prefixed, in memory, in the Hub's cache, with their other
files.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import base_state, moved, save
from training import classifier, save_base, weights_print
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    set_seed,
)

from dare_train import DeltaPackage, applied, apply, apply_, extract
from dare_train.package.companion_files import companions
from dare_train.weights.files.checkpoint import Checkpoint


def result_of(package: Path) -> str:
    return DeltaPackage.open(package).manifest.result


def tuned_model(folder: Path, base: Path) -> BertForSequenceClassification:
    model = classifier(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    model.save_pretrained(folder)
    return model


def test_sharded_and_single_file_checkpoints_are_the_same(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = tuned_model(tmp_path / "tuned", base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one = extract(base, tmp_path / "tuned", tmp_path / "one", p=0.5)
    two = extract(base, tmp_path / "sharded", tmp_path / "two", p=0.5)
    assert one.manifest.tensors == two.manifest.tensors


def test_a_sharded_base_gives_a_sharded_result(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    whole = classifier(base)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    model = tuned_model(tmp_path / "tuned", base)
    extract(tmp_path / "sharded", tmp_path / "tuned", tmp_path / "package", p=0)
    apply(tmp_path / "sharded", tmp_path / "package", tmp_path / "result")
    index = json.loads((tmp_path / "result/model.safetensors.index.json").read_text())
    assert (
        index["weight_map"]
        == json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())["weight_map"]
    )
    assert weights_print(BertForSequenceClassification.from_pretrained(tmp_path / "result")) == weights_print(
        model
    )


def test_tied_weights_travel_once(tmp_path: Path) -> None:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.transformer.wte.weight.add_(0.01)
    model.save_pretrained(tmp_path / "tuned")
    on_disk = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "package", p=0)
    assert "lm_head.weight" not in on_disk.records
    live = extract(tmp_path / "base", model, tmp_path / "live", p=0)
    assert live.manifest.result == on_disk.manifest.result
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with applied(again, on_disk):
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert again.lm_head.weight.data_ptr() == again.transformer.wte.weight.data_ptr()


def test_every_kind_of_weights_gives_the_same_package(tmp_path: Path) -> None:
    base, tuned = (
        {name: t.float() if t.is_floating_point() else t for name, t in s.items()}
        for s in (base_state(), moved(base_state()))
    )
    arrays = [{name: tensor.numpy() for name, tensor in state.items()} for state in (base, tuned)]
    expected = extract(
        save(base, tmp_path / "b"), save(tuned, tmp_path / "t"), tmp_path / "folders"
    ).manifest.tensors
    assert extract(base, tuned, tmp_path / "states").manifest.tensors == expected
    assert extract(*arrays, tmp_path / "arrays").manifest.tensors == expected
    assert extract(tmp_path / "b/model.safetensors", tuned, tmp_path / "mixed").manifest.tensors == expected


def test_a_state_dict_is_changed_in_place_and_back(tmp_path: Path) -> None:
    state = base_state()
    package = extract(base_state(), moved(base_state()), tmp_path / "package", p=0.5)
    undo = apply_(state, package)
    assert not torch.equal(state["a.weight"], base_state()["a.weight"])
    assert 0 < undo.nbytes < 20 * state["a.weight"].numel()
    undo.revert()
    undo.revert()
    assert all(torch.equal(state[name], tensor) for name, tensor in base_state().items())


def test_tensors_that_are_not_contiguous_are_changed_too(tmp_path: Path) -> None:
    package = extract(base_state(), moved(base_state()), tmp_path / "package", p=0)
    state = base_state()
    state["a.weight"] = state["a.weight"].T.contiguous().T
    assert not state["a.weight"].is_contiguous()
    with applied(state, package):
        assert torch.equal(state["a.weight"], moved(base_state())["a.weight"])
    assert torch.equal(state["a.weight"], base_state()["a.weight"])


def test_an_encoder_serves_as_base_of_a_classifier_and_back(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = tuned_model(tmp_path / "tuned", base)
    package = extract(base, tmp_path / "tuned", tmp_path / "package", p=0)
    assert package.manifest.prefix == "bert."
    apply(base, package, tmp_path / "result")
    assert weights_print(BertForSequenceClassification.from_pretrained(tmp_path / "result")) == weights_print(
        model
    )
    model.bert.save_pretrained(tmp_path / "encoder")
    back = extract(tmp_path / "tuned", tmp_path / "encoder", tmp_path / "back", p=0)
    assert back.manifest.prefix == "-bert."
    assert apply(tmp_path / "tuned", back, tmp_path / "again") == back.manifest.result


def test_packages_side_by_side_add_up(tmp_path: Path) -> None:
    base = {"w": torch.linspace(-1, 1, 5000)}
    one, two = base["w"] + 0.25, base["w"] * 1.5
    packages = [
        extract(base, {"w": tuned}, tmp_path / name, p=0) for name, tuned in (("one", one), ("two", two))
    ]
    apply(save(base, tmp_path / "base"), packages, tmp_path / "sum", weights=[0.5, 2.0])
    expected = base["w"] + 0.5 * (one - base["w"]) + 2.0 * (two - base["w"])
    assert torch.equal(load_file(tmp_path / "sum/model.safetensors")["w"], expected)


def test_companions_of_the_tuned_model_come_along(tmp_path: Path) -> None:
    base, tuned = save(base_state(), tmp_path / "base"), save(moved(base_state()), tmp_path / "tuned")
    for folder, files in (
        (base, {"config.json": '{"a": 1}', "tokenizer.json": "{}", "LICENSE": "free", "README.md": "base"}),
        (
            tuned,
            {
                "config.json": '{"a": 2}',
                "tokenizer.json": "{ }",
                "trainer_state.json": "{}",
                "chat_template.jinja": "x",
            },
        ),
    ):
        for name, text in files.items():
            (folder / name).write_text(text)
    (tuned / "checkpoint-1").mkdir()
    (tuned / "checkpoint-1/config.json").write_text("{}")
    package = extract(base, tuned, tmp_path / "package")
    assert [record.file for record in package.manifest.files] == ["chat_template.jinja", "config.json"]
    apply(base, package, tmp_path / "result")
    found = {
        path.name: path.read_text()
        for path in (tmp_path / "result").iterdir()
        if path.suffix != ".safetensors"
    }
    assert found == {
        "config.json": '{"a": 2}',
        "tokenizer.json": "{}",
        "LICENSE": "free",
        "chat_template.jinja": "x",
    }


def test_a_tokenizer_that_only_remembers_its_last_call_stays_at_home(tmp_path: Path) -> None:
    base, tuned = save(base_state(), tmp_path / "base"), save(moved(base_state()), tmp_path / "tuned")
    (base / "tokenizer.json").write_text('{"added_tokens": [], "padding": null}')
    (tuned / "tokenizer.json").write_text('{"added_tokens": [], "padding": {"length": 8}}')
    assert extract(base, tuned, tmp_path / "package").manifest.files == ()


def test_subfolders_count_when_a_listing_names_them(tmp_path: Path) -> None:
    for name in ("1_Pooling", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}]')
    assert companions(tmp_path) == [Path("1_Pooling/config.json"), Path("modules.json")]


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub/models--someone--model/snapshots/abc"
    save(base_state(), snapshot)
    (tmp_path / "hub/models--someone--model/refs").mkdir()
    (tmp_path / "hub/models--someone--model/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert Checkpoint.open("someone/model").folder == snapshot
    package = extract("someone/model", moved(base_state()), tmp_path / "package")
    assert package.manifest.base_model == "someone/model"
    assert "base_model: someone/model" in (package.path / "README.md").read_text()


def test_masks_made_by_hand_are_stored(tmp_path: Path) -> None:
    base, tuned = base_state(), moved(base_state())
    mask = np.zeros((20, 30), np.bool_)
    mask[3:7, ::2] = True
    package = extract(base, tuned, tmp_path / "package", p=0.5, masks={"a.weight": mask})
    assert (package.records["a.weight"].mask, package.records["a.weight"].kept) == ("stored", int(mask.sum()))
    state = base_state()
    apply_(state, package)
    assert torch.equal(
        state["a.weight"], torch.where(torch.from_numpy(mask), tuned["a.weight"], base["a.weight"])
    )


def test_verify_notices_a_wrong_base(tmp_path: Path) -> None:
    base = save(base_state(), tmp_path / "base")
    package = extract(base, moved(base_state()), tmp_path / "package")
    package.verify()
    package.verify(base)
    with pytest.raises(Exception, match="this is not the base the package was made from"):
        package.verify(save(moved(base_state()), tmp_path / "other"))


def test_files_of_processors_in_subfolders_come_along(tmp_path: Path) -> None:
    """A second tokenizer, voices, a language model of speech, code of `generate`: what processors read."""
    tokenizer = {"qformer_tokenizer/tokenizer_config.json": "{}", "qformer_tokenizer/vocab.txt": "x"}
    others = {
        "custom_generate/generate.py": "x",
        "custom_generate/requirements.txt": "x",
        "language_model/5gram.bin": "x",
        "speaker_embeddings/v2/voice.npy": "x",
    }
    left = {
        "checkpoint-1/tokenizer_config.json": "{}",
        "checkpoint-1/model.safetensors": "",
        "logs/config.json": "{}",
        "language_model/.cache/x.bin": "",
    }
    base, tuned = save(base_state(), tmp_path / "base"), save(moved(base_state()), tmp_path / "tuned")
    for name, text in {**tokenizer, **others, **left}.items():
        for folder in (base, tuned):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    (tuned / "qformer_tokenizer/vocab.txt").write_text("y")
    assert companions(base) == sorted(map(Path, {**tokenizer, **others}))
    package = extract(base, tuned, tmp_path / "package", p=0)
    assert [record.file for record in package.manifest.files] == ["qformer_tokenizer/vocab.txt"]
    apply(base, package, tmp_path / "result")
    found = {
        str(path.relative_to(tmp_path / "result"))
        for path in (tmp_path / "result").rglob("*")
        if path.is_file()
    }
    assert found == {"model.safetensors", *tokenizer, *others}
    assert (tmp_path / "result/qformer_tokenizer/vocab.txt").read_text() == "y"


def tokenizer_files(folder: Path, config: dict[str, Any], **files: str) -> None:
    texts = {"tokenizer_config.json": json.dumps(config), **files}
    for name, text in texts.items():
        (folder / name).write_text(text)


TEMPLATE, SPECIAL, ADDED = "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"


@pytest.mark.parametrize("config", [{"chat_template": "{{ 'tuned' }}"}, {}], ids=["in another file", "gone"])
def test_a_template_that_the_tuned_model_does_not_have_is_not_the_bases(
    config: dict[str, str], tmp_path: Path
) -> None:
    """`tokenizer_config.json` has it, or nothing has; a file of the base's would speak for both."""
    base, tuned = save(base_state(), tmp_path / "base"), save(moved(base_state()), tmp_path / "tuned")
    tokenizer_files(base, {"eos_token": "a"}, **{TEMPLATE: "{{ 'base' }}"})
    tokenizer_files(tuned, {"eos_token": "b", **config})
    apply(base, extract(base, tuned, tmp_path / "package", p=0), tmp_path / "result")
    assert (tmp_path / "result" / TEMPLATE).read_text() == config.get("chat_template", "")


def test_several_templates_of_a_tuned_model_are_all_heard(tmp_path: Path) -> None:
    """An older `tokenizer_config.json` lists them, and would not be asked beside the base's file."""
    base, tuned = save(base_state(), tmp_path / "base"), save(moved(base_state()), tmp_path / "tuned")
    tokenizer_files(base, {"eos_token": "a"}, **{TEMPLATE: "{{ 'base' }}"})
    listed = [
        {"name": name, "template": f"{{{{ '{name}' }}}}"} for name in ("default", "tool_use", "../../outside")
    ]
    tokenizer_files(tuned, {"eos_token": "b", "chat_template": listed})
    result = tmp_path / "result"
    apply(base, extract(base, tuned, tmp_path / "package", p=0), result)
    assert (result / TEMPLATE).read_text() == "{{ 'default' }}"
    assert [path.name for path in (result / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize("eos", ["</s>", "<end>"])
def test_older_files_of_a_tokenizer_do_not_contradict_its_newer_ones(eos: str, tmp_path: Path) -> None:
    """transformers 5 writes no `special_tokens_map.json` any more, and reads it before other files."""
    base, tuned = save(base_state(), tmp_path / "base"), save(moved(base_state()), tmp_path / "tuned")
    special = json.dumps({"eos_token": {"content": "</s>", "lstrip": False}})
    tokenizer_files(base, {"eos_token": "</s>"}, **{SPECIAL: special, ADDED: '{"<x>": 9}'})
    tokenizer_files(tuned, {"eos_token": eos})
    package = extract(base, tuned, tmp_path / "package", p=0)
    apply(base, package, tmp_path / "result")
    found = {name: json.loads((tmp_path / "result" / name).read_text()) for name in (SPECIAL, ADDED)}
    assert found == {SPECIAL: {} if eos == "<end>" else json.loads(special), ADDED: {}}


def test_files_of_a_tokenizer_that_the_tuned_model_lacks_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = save(base_state(), tmp_path / "base"), save(moved(base_state()), tmp_path / "tuned")
    tokenizer_files(base, {}, **{"tokenizer.json": "{}"})
    tokenizer_files(tuned, {}, **{"vocab.json": "{}"})
    further = base / "additional_chat_templates"
    further.mkdir()
    (further / "rag.jinja").write_text("{{ documents }}")
    with caplog.at_level(logging.WARNING, "dare_train"):
        extract(base, tuned, tmp_path / "package", p=0)
    for name in ("tokenizer.json", "additional_chat_templates/rag.jinja"):
        assert f"{name}: that of {base} counts in the result" in caplog.text
