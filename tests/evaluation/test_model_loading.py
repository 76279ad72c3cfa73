"""Models from strangers' folders: nothing that came with one is run unless the user says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from worded_models import save_llama

from dare_train.errors import CheckpointError
from dare_train.evaluation.model_loading import load_model, load_tokenizer
from dare_train.weights.skeletons import skeleton

_OWN = """
from pathlib import Path
from transformers import LlamaForCausalLM
Path({mark!r}).touch()
class OwnForCausalLM(LlamaForCausalLM):
    pass
"""
_AUTO_MAP = {"AutoModelForCausalLM": "own.OwnForCausalLM"}


def change(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "llama")


@pytest.fixture
def mark(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once the code in the folder has run; the model asks for that code."""
    mark = tmp_path / "executed"
    (llama / "own.py").write_text(_OWN.format(mark=str(mark)))
    change(llama, auto_map=_AUTO_MAP, architectures=["OwnForCausalLM"])
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    return mark


def test_code_that_came_with_a_model_is_not_run(llama: Path, mark: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found OwnForCausalLM; pass --trust-remote-code if you trust"):
        load_model(str(llama))
    assert not mark.exists()


def test_code_that_came_with_a_model_is_run_for_who_trusts_it(llama: Path, mark: Path) -> None:
    model = load_model(str(llama), trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert mark.exists()


def test_a_class_that_transformers_has_needs_no_code(llama: Path, mark: Path) -> None:
    change(llama, architectures=["LlamaForCausalLM"])
    assert type(load_model(str(llama))).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


def test_a_configuration_or_tokenizer_that_needs_code_says_so(llama: Path) -> None:
    change(llama, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(CheckpointError, match="pass --trust-remote-code if you trust the code"):
        load_model(str(llama))


def test_pickles_are_not_read(llama: Path) -> None:
    weights = llama / "model.safetensors"
    torch.save({}, llama / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"expected a model that transformers loads, found OSError"):
        load_model(str(llama))


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "stranger/kernel"},
        {"num_hidden_layers": 10**9},
        {"architectures": ["logging"]},
    ],
)
def test_what_a_configuration_may_not_ask_for(llama: Path, fields: dict[str, Any]) -> None:
    change(llama, **fields)
    with pytest.raises(CheckpointError, match=r"expected (no code|architectures that)"):
        load_model(str(llama))
    assert skeleton(json.loads((llama / "config.json").read_text())) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": 7}', '{"model_type": "llama", "vocab_size": []}']
)
def test_damaged_configurations_are_one_error(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(llama))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path, llama: Path) -> None:
    assert "a" in load_tokenizer(str(llama)).get_vocab() or len(load_tokenizer(str(llama)).get_vocab()) > 3
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="expected a tokenizer beside the model"):
        load_tokenizer(str(tmp_path / "none"))


def test_a_longest_length_that_is_no_number_is_refused(llama: Path) -> None:
    path = llama / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "BF16"}))
    with pytest.raises(CheckpointError, match="model_max_length: expected a number, found 'BF16'"):
        load_tokenizer(str(llama))


def evaluated(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


def test_the_working_folder_has_the_metric_and_never_replaces_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "my_metric.py").write_text("import yaml, my_helper\nscore = lambda folder: my_helper.SCORE\n")
    (tmp_path / "my_helper.py").write_text("SCORE = 7\n")
    (tmp_path / "yaml.py").write_text("raise SystemExit('a stranger was here')\n")
    code = "from dare_train.merging.search import metric_of; print(metric_of('my_metric:score')('folder'))"
    done = evaluated(tmp_path, "-P", "-c", code)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_python_dash_m_takes_nothing_from_the_working_folder(tmp_path: Path) -> None:
    for name in ("numpy", "yaml", "safetensors", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was here')\n")
    (tmp_path / "c.yml").write_text("merge_method: none\n")
    done = evaluated(tmp_path, "-m", "dare_train", "merge", "c.yml", "--out", "o")
    assert done.returncode == 2, done.stderr
    assert "stranger" not in done.stderr + done.stdout
