"""A result's tokenizer of one's choice, against a definition by token: which row each model has for it, and
whose stands where it has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_models import LLAMA, save_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dare_train import extract, merge
from dare_train.dtypes import DTYPES
from dare_train.errors import CheckpointError, ConfigError, DareError, TensorMismatch
from dare_train.merging.config.mergekit import read
from dare_train.merging.config.task import MergeTask
from dare_train.merging.merge import run
from dare_train.merging.models.revocabulated import Revocabulated
from dare_train.weights.protocol import ArrayWeights

EMBEDDING, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
BASE = {"<unk>": 0, "a": 1, "b": 2, "c": 3}
TOKENS: dict[str, dict[str, int]] = {
    "base": BASE,
    "chat": {**BASE, "<start>": 4, "<end>": 5},
    "tool": {**BASE, "<end>": 4, "<call>": 5},
    "moved": {"<unk>": 0, "c": 1, "b": 2, "a": 3, "d": 4},
}
Row = np.ndarray[Any, Any]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Row]]:
    """Models on disk, in float32, and the embedding of each by token."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        generator = torch.Generator().manual_seed(seed)
        shapes = {EMBEDDING: (len(tokens), 8), HEAD: (len(tokens), 8), OTHER: (8, 8)}
        state = {which: torch.randn(shape, generator=generator) for which, shape in shapes.items()}
        save_model(state, Path(name), {**LLAMA, "hidden_size": 8, "vocab_size": len(tokens)})
        added = [token for token in tokens if token.startswith("<") and token != "<unk>"]
        own = {token: id for token, id in tokens.items() if token not in added}
        backend = Tokenizer(models.WordLevel(vocab=own, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        made.add_tokens(added)
        made.save_pretrained(name)
        found[name] = {token: state[EMBEDDING][id].numpy() for token, id in tokens.items()}
    return found


def merged(method: str, names: str, tokenizer: Mapping[str, Any] | str, **keys: Any) -> dict[str, Row]:
    """The result's embedding by the tokens of its tokenizer, and the rows after them under ''."""
    listed = [{"model": name, "parameters": {"weight": 0.5}} for name in names.split()]
    spoken = {"tokenizer_source": tokenizer} if isinstance(tokenizer, str) else {"tokenizer": tokenizer}
    recipe, _ = read(f"{ {'merge_method': method, 'models': listed, **spoken, **keys}!r}")
    assert read(recipe.to_yaml())[0] == recipe
    run(MergeTask.of(recipe), "out", overwrite=True)
    embedding = load_file("out/model.safetensors")[EMBEDDING].numpy()
    ids = AutoTokenizer.from_pretrained("out").get_vocab()
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == len(embedding)
    return {**{token: embedding[id] for token, id in ids.items()}, "": embedding[len(ids) :]}


def mean(*several: Row) -> Row:
    total: Row = np.mean(np.stack(several).astype(np.float64), axis=0)
    return total


def test_a_models_tokenizer_says_which_rows_meet(rows: dict[str, dict[str, Row]]) -> None:
    found = merged("linear", "base moved", "moved")
    assert {token for token in found if token} == set(TOKENS["moved"])
    for token in ("<unk>", "a", "b", "c"):
        np.testing.assert_allclose(found[token], mean(rows["base"][token], rows["moved"][token]), atol=1e-6)
    np.testing.assert_allclose(found["d"], rows["moved"]["d"], atol=1e-6)


def test_what_only_some_models_have_is_theirs_in_all(rows: dict[str, dict[str, Row]]) -> None:
    tokenizer = {"source": "union", "pad_to_multiple_of": 4}
    found = merged("task_arithmetic", "chat tool", tokenizer, base_model="base")
    assert set(found) == {*BASE, "<start>", "<end>", "<call>", ""}
    np.testing.assert_allclose(found["<start>"], rows["chat"]["<start>"], atol=1e-6)
    np.testing.assert_allclose(found["<call>"], rows["tool"]["<call>"], atol=1e-6)
    np.testing.assert_allclose(found["<end>"], mean(rows["chat"]["<end>"], rows["tool"]["<end>"]), atol=1e-6)
    of_base = rows["base"]["a"]
    expected = of_base + 0.5 * (rows["chat"]["a"] - of_base) + 0.5 * (rows["tool"]["a"] - of_base)
    np.testing.assert_allclose(found["a"], expected, atol=1e-6)


def test_a_union_without_a_base_gives_new_ids(rows: dict[str, dict[str, Row]]) -> None:
    """`<end>` is 5 in one model, and 4 in the other."""
    found = merged("linear", "chat tool", "union")
    assert set(found) == {*BASE, "<start>", "<end>", "<call>", ""}
    np.testing.assert_allclose(found["<end>"], mean(rows["chat"]["<end>"], rows["tool"]["<end>"]), atol=1e-6)
    np.testing.assert_allclose(found["<call>"], rows["tool"]["<call>"], atol=1e-6)


def test_rows_are_padded_with_the_mean_of_the_others(rows: dict[str, dict[str, Row]]) -> None:
    found = merged("linear", "chat tool", {"source": "union", "pad_to_multiple_of": 5})
    tokens = [row for token, row in found.items() if token]
    assert (len(tokens), found[""].shape) == (7, (3, 8))
    for row in found[""]:
        np.testing.assert_allclose(row, mean(*tokens), atol=1e-6)


def test_tokens_get_the_rows_that_are_said(rows: dict[str, dict[str, Row]]) -> None:
    said = {
        "<start>": {"source": "chat"},
        "<end>": {"source": "tool", "force": True},
        "<alias>": {"source": {"kind": "model_token", "model": "chat", "token": "<start>"}},
        "<third>": {"source": {"kind": "model_token", "model": "tool", "token_id": 3}},
        "<blank>": {"source": {"kind": "zero"}},
        "a": {"source": {"kind": "zero"}, "force": True},
        "b": {"source": {"kind": "zero"}},
    }
    found = merged("linear", "chat tool", {"source": "union", "tokens": said})
    expected = {
        "<start>": rows["chat"]["<start>"],
        "<end>": rows["tool"]["<end>"],
        "<alias>": rows["chat"]["<start>"],
        "<third>": rows["tool"]["c"],
        "<blank>": np.zeros(8),
        "a": np.zeros(8),
        "b": mean(rows["chat"]["b"], rows["tool"]["b"]),
        "<call>": rows["tool"]["<call>"],
    }
    for token, row in expected.items():
        np.testing.assert_allclose(found[token], row, atol=1e-6, err_msg=token)


def test_the_bases_tokenizer_finds_tokens_that_have_other_ids(rows: dict[str, dict[str, Row]]) -> None:
    found = merged("task_arithmetic", "moved chat", "base", base_model="base")
    assert set(found) == {*BASE, ""}
    for token in BASE:
        of_base, *others = (rows[name][token] for name in ("base", "moved", "chat"))
        expected = of_base + 0.5 * sum(other - of_base for other in others)
        np.testing.assert_allclose(found[token], expected, atol=1e-6, err_msg=token)


def test_a_token_that_no_model_has_is_zeros(rows: dict[str, dict[str, Row]]) -> None:
    found = merged("task_arithmetic", "moved", "chat", base_model="base")
    np.testing.assert_array_equal(found["<start>"], np.zeros(8))
    said = json.loads(Path("out/dare_merge.json").read_text())["notes"]
    assert "rows of zeros, since no model has these tokens: '<start>', '<end>'" in said


def test_other_tensors_are_merged_as_ever(rows: dict[str, dict[str, Row]]) -> None:
    merged("linear", "base moved", "moved")
    left, right = (load_file(f"{name}/model.safetensors")[OTHER].numpy() for name in ("base", "moved"))
    np.testing.assert_allclose(
        load_file("out/model.safetensors")[OTHER].numpy(), mean(left, right), atol=1e-6
    )


def test_a_model_without_a_tokenizer_has_the_bases(rows: dict[str, dict[str, Row]]) -> None:
    for name in ("chat", "moved"):
        for file in Path(name).glob("*token*"):
            file.unlink()
    with pytest.raises(CheckpointError, match=r"chat: expected tokenizer\.json, by which rows"):
        merged("linear", "base chat", {"source": "base", "pad_to_multiple_of": 8})


REFUSED: dict[str, tuple[Any, str, str]] = {
    "no model of the merge": (
        {"<x>": {"source": "moved"}},
        "union",
        "a source among chat, tool, found 'moved'",
    ),
    "no such token": ({"<x>": {"source": "chat"}}, "union", "a row of chat for '<x>', found none"),
    "no such row": (
        {"<x>": {"source": {"kind": "model_token", "model": "chat", "token_id": 6}}},
        "union",
        "a row of chat for id 6, found none",
    ),
    "no such folder": ({}, "nowhere", "nowhere: expected a folder or a Hub id"),
    "no source": ({"<x>": {"force": True}}, "base", r"tokens\['<x>'\]: expected source: a model"),
    "both": (
        {"<x>": {"source": {"kind": "model_token", "model": "chat", "token_id": 6, "token": "a"}}},
        "base",
        r"tokens\['<x>'\].source: expected a model, {kind: zero}, or",
    ),
    "negative": (
        {"<x>": {"source": {"kind": "model_token", "model": "chat", "token_id": -1}}},
        "base",
        r"tokens\['<x>'\].source: expected a model",
    ),
    "force": (
        {"<x>": {"source": "chat", "force": 1}},
        "base",
        r"tokens\['<x>'\].force: expected true or false",
    ),
    "a list": (["<x>"], "base", "tokenizer.tokens: expected sources by token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(case: str, rows: dict[str, dict[str, Row]]) -> None:
    tokens, source, message = REFUSED[case]
    with pytest.raises(DareError, match=message):
        merged("linear", "chat tool", {"source": source, "tokens": tokens})


@pytest.mark.parametrize("multiple", [0, -4, 1.5, True, 1 << 17])
def test_padding_is_a_number_of_rows(multiple: Any) -> None:
    keys = {"merge_method": "linear", "models": [{"model": "a"}]}
    with pytest.raises(ConfigError, match="pad_to_multiple_of: expected an integer from 1 to 65536"):
        read(f"{ {**keys, 'tokenizer': {'pad_to_multiple_of': multiple}} }")


def test_packages_have_no_vocabulary_of_their_own(rows: dict[str, dict[str, Row]]) -> None:
    extract("base", "base", "package", p=0)
    with pytest.raises(ConfigError, match="package: expected checkpoints, where the result has a tokenizer"):
        merge("base", ["package"], "out", tokenizer="moved")
    with pytest.raises(ConfigError, match="tokenizer: expected the base's, with the ids"):
        merge("base", ["chat"], "out", tokenizer="chat", package=True)


def test_python_and_the_command_line_name_a_model_too(rows: dict[str, dict[str, Row]]) -> None:
    merge("base", ["moved"], "out", tokenizer="moved", weights=[1.0])
    np.testing.assert_array_equal(
        load_file("out/model.safetensors")[EMBEDDING].numpy()[[3, 4]],
        np.stack([rows["moved"]["a"], rows["moved"]["d"]]),
    )


# Rows, run by run.


def naive(values: Row, rows: Row, others: Callable[[int], Row], padding: int) -> Row:
    found = np.stack([values[own] if own >= 0 else others(row) for row, own in enumerate(rows)])
    return np.concatenate([found, np.tile(found.astype(np.float64).mean(axis=0), (padding, 1))]).astype("f4")


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("padding", [0, 2])
def test_every_run_is_that_of_the_whole(width: int, padding: int) -> None:
    values = np.random.default_rng(1).normal(size=(6, width)).astype("f4")
    donors = np.random.default_rng(2).normal(size=(4, width)).astype("f4")
    own, other = ArrayWeights({"head": values, "w": values}), ArrayWeights({"head": donors})
    rows = np.array([2, 3, 4, -1, 0, -1, -1, 5])
    others = {3: [(other, 1)], 5: [(other, 0), (own, 2), (other, 3)]}
    means = {3: donors[1], 5: mean(donors[0], values[2], donors[3]), 6: 0 * donors[0]}
    expected = naive(values, rows, means.__getitem__, padding).reshape(-1)
    view = Revocabulated(own, {"head"}, rows, others, folder=None, padding=padding)
    assert view.tensors["head"].shape == (8 + padding, width)
    for start in range(expected.size + 1):
        for stop in range(start, expected.size + 1):
            words = view.read("head", start, stop - start)
            np.testing.assert_allclose(words.view("f4"), expected[start:stop], atol=1e-6)
    np.testing.assert_array_equal(view.read("w", 1, 2).view("f4"), values.reshape(-1)[1:3])
    assert view.tensors["w"].dtype == DTYPES["F32"]


def test_rows_of_another_width_are_refused() -> None:
    own, other = (ArrayWeights({"head": np.ones((2, width), "f4")}) for width in (3, 4))
    view = Revocabulated(own, {"head"}, np.array([-1]), {0: [(other, 0)]}, folder=None)
    with pytest.raises(TensorMismatch, match="head: expected rows of 3 numbers"):
        view.read("head", 0, 3)
    view = Revocabulated(own, {"head"}, np.array([-1]), {0: [(ArrayWeights({}), 0)]}, folder=None)
    with pytest.raises(TensorMismatch, match="head: expected a row for token 0, found no such tensor"):
        view.read("head", 0, 3)
