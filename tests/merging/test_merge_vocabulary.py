"""Vocabularies of merged models: ids as the tokenizers library and transformers give them, rows as the inputs
have them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny import refusal
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dare_train import extract
from dare_train.errors import CheckpointError, ConfigError, DareError, TensorMismatch
from dare_train.merging.models.merged_tokenizer import write_tokenizer
from dare_train.merging.models.tokenizer_files import read_tokens
from dare_train.merging.models.vocabulary import Vocabulary, unite

BASE = {"[UNK]": 0, "[PAD]": 1, "a": 2, "b": 3, "ab": 4}
PIECES = [("[UNK]", 0.0), ("[PAD]", 0.0), ("▁a", -1.0), ("▁b", -2.0), ("▁", -3.0), ("a", -4.0), ("b", -4.0)]
MODELS: dict[str, Any] = {
    "bpe": lambda: models.BPE(vocab=BASE, merges=[("a", "b")], unk_token="[UNK]"),
    "wordpiece": lambda: models.WordPiece(vocab=BASE, unk_token="[UNK]"),
    "wordlevel": lambda: models.WordLevel(vocab=BASE, unk_token="[UNK]"),
    "unigram": lambda: models.Unigram(PIECES, unk_id=0),
}
UNIGRAM = {piece: id for id, (piece, _) in enumerate(PIECES)}


def tokenizer(kind: str = "bpe") -> Any:
    backend = Tokenizer(MODELS[kind]())
    backend.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "unigram" else pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def saved(folder: Path, *tokens: str | AddedToken, kind: str = "bpe") -> Path:
    """A folder with a tokenizer as fine-tuning leaves it, to which tokens were added."""
    made = tokenizer(kind)
    made.add_tokens(list(tokens))
    made.save_pretrained(folder)
    return folder


def tokens_of(folder: Path, base: Path | None = None) -> dict[str, int]:
    tokens = read_tokens(folder, base)
    assert tokens is not None
    return tokens


def united(base: Path, inputs: Sequence[Path | None], *, base_rows: int = 5, rows: int = 64) -> Vocabulary:
    held = [None if folder is None else read_tokens(folder, base) for folder in inputs]
    labels = [f"model {number}" for number in range(len(inputs))]
    return unite(tokens_of(base), held, labels=labels, base_rows=base_rows, input_rows=[rows] * len(inputs))


def staged(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging"


def encodes(folder: Path, tokens: Mapping[str, int]) -> Any:
    """What transformers and the library load from a folder gives each token its id, and encodes it so."""
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.get_vocab() == tokens
    for token, id in tokens.items():
        assert loaded.convert_tokens_to_ids(token) == id
        assert loaded.added_tokens_encoder.get(token, id) == id
    for token in loaded.added_tokens_encoder:
        assert loaded.encode(token, add_special_tokens=False) == [tokens[token]]
    if (folder / "tokenizer.json").exists():
        assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() == tokens
    return loaded


def rows_of(vocabulary: Vocabulary) -> list[list[int]]:
    assert all(
        rows.dtype == np.int64 and rows.shape == (vocabulary.embedding_rows,) for rows in vocabulary.rows
    )
    return [rows.tolist() for rows in vocabulary.rows]


# Reading


@pytest.mark.parametrize("kind", MODELS)
def test_ids_of_every_kind_of_model(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path / "model", "new", AddedToken("<x>", special=True), kind=kind)
    assert read_tokens(folder) == AutoTokenizer.from_pretrained(folder).get_vocab()
    own = UNIGRAM if kind == "unigram" else BASE
    assert read_tokens(folder) == {**own, "new": len(own), "<x>": len(own) + 1}


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "ab", "[PAD]", "x", "y", "z", ""]), st.integers(0, 12)), max_size=8
    ),
    st.booleans(),
)
def test_added_tokens_load_with_the_librarys_ids(
    tmp_path_factory: Any, added: list[tuple[str, int]], gap: bool
) -> None:
    model = {"type": "BPE", "unk_token": None, "vocab": {**BASE, "ab": 7 if gap else 4}, "merges": []}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    document = {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": token, **flags} for token, id in added],
        "model": model,
    }
    library = Tokenizer.from_str(json.dumps(document)).get_vocab()
    folder = tmp_path_factory.mktemp("given")
    (folder / "tokenizer.json").write_text(json.dumps(document))
    ambiguous = len({id for _, id in set(added)}) < len(set(added)) or len(set(library.values())) < len(
        library
    )
    if ambiguous:
        with pytest.raises(CheckpointError, match="one token with id"):
            read_tokens(folder)
    else:
        assert read_tokens(folder) == library


def test_no_tokenizer_no_tokens(tmp_path: Path) -> None:
    assert read_tokens(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_tokens(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b")
    assert read_tokens(tmp_path) is None
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 32000}')
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer\.model: expected a tokenizer\.json beside it, found added tokens; AutoTokenizer",
    ):
        read_tokens(tmp_path)
    with pytest.raises(CheckpointError, match="expected a folder"):
        read_tokens(tmp_path / "none")


def old_bert(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text(
        "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nx\u2028y\n##b\n", encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", **files.pop("config", {})})
    )
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def decoder(**ids: int) -> dict[str, Any]:
    flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    return {"added_tokens_decoder": {str(id): {"content": token, **flags} for token, id in ids.items()}}


@pytest.mark.parametrize(
    ("files", "added"),
    [
        ({}, {}),
        ({"added_tokens": {"two": 9, "one": 8}}, {"one": 8, "two": 9}),
        ({"config": decoder(one=8, two=9)}, {"one": 8, "two": 9}),
        ({"config": decoder(one=8), "added_tokens": {"other": 8}}, {"one": 8}),
    ],
    ids=["none", "added_tokens", "decoder", "both"],
)
def test_older_files(tmp_path: Path, files: dict[str, Any], added: dict[str, int]) -> None:
    folder = old_bert(tmp_path / "bert", **files)
    own = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "x\u2028y": 6, "##b": 7}
    assert read_tokens(folder) == {**own, **added} == AutoTokenizer.from_pretrained(folder).get_vocab()


def old_gpt2(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        **dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<e>"),
    }
    contents = {"vocab": {"a": 0, "b": 1, "ab": 2, "<e>": 3}, "tokenizer_config": config, **files}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return folder


def test_vocab_json(tmp_path: Path) -> None:
    folder = old_gpt2(tmp_path / "gpt2", added_tokens={"new": 4})
    assert (
        read_tokens(folder)
        == {"a": 0, "b": 1, "ab": 2, "<e>": 3, "new": 4}
        == AutoTokenizer.from_pretrained(folder).get_vocab()
    )


def test_tokens_that_only_the_configuration_lists(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "new")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **decoder(new=5, late=9, soon=7)}))
    assert (
        read_tokens(folder)
        == {**BASE, "new": 5, "soon": 6, "late": 7}
        == AutoTokenizer.from_pretrained(folder).get_vocab()
    )


def test_a_package_is_completed_by_its_base(tmp_path: Path) -> None:
    base, model = old_bert(tmp_path / "base"), tmp_path / "model"
    model.mkdir()
    (model / "added_tokens.json").write_text('{"new": 8}')
    assert read_tokens(model, base) is None
    package = packed(base, model, tmp_path / "package")
    assert read_tokens(package, base) == {**tokens_of(base), "new": 8}
    assert read_tokens(package) is None


def test_what_a_package_does_not_list_counts_for_nothing(tmp_path: Path) -> None:
    base, model = old_bert(tmp_path / "base"), tmp_path / "model"
    model.mkdir()
    package = packed(base, model, tmp_path / "package")
    (package / "added_tokens.json").write_text('{"new": 8}')
    assert read_tokens(package, base) == tokens_of(base)


def packed(base: Path, model: Path, out: Path) -> Path:
    """A package that carries the files of a model's folder in which it differs from the base's."""
    for folder in (base, model):
        save_file({"w": np.ones(3, np.float32)}, folder / "model.safetensors")
    return extract(base, model, out, p=0).path


DAMAGED = {
    "cut": ("tokenizer.json", '{"model": {"vocab": {"a": ', "expected a JSON object, found"),
    "deep": ("tokenizer.json", "[" * 100_000, "expected a JSON object, found"),
    "not text": ("tokenizer.json", b"\xff\xfe", "expected a JSON object, found"),
    "not an object": ("tokenizer.json", "[]", "expected a JSON object, found []"),
    "no model": ("tokenizer.json", "{}", "expected a vocabulary of tokens with ids, found None"),
    "ids as text": (
        "tokenizer.json",
        '{"model": {"vocab": {"a": "0"}}}',
        "expected a vocabulary of tokens with ids",
    ),
    "ids below zero": (
        "tokenizer.json",
        '{"model": {"vocab": {"a": -1}}}',
        "expected a vocabulary of tokens with ids",
    ),
    "pieces without names": (
        "tokenizer.json",
        '{"model": {"vocab": [[0.0]]}}',
        "expected a vocabulary of tokens with ids",
    ),
    "one id twice": (
        "tokenizer.json",
        '{"model": {"vocab": {"a": 0, "b": 0}}}',
        "one token with id 0, found 'a' and 'b'",
    ),
    "added beyond a gap": (
        "tokenizer.json",
        '{"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": [{"id": 3, "content": "c"}]}',
        "expected one token with id 2, found 'b' and 'c'",
    ),
    "added twice": (
        "tokenizer.json",
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "b"}, {"id": 1, '
        '"content": "c"}]}',
        "expected one token with id 1, found 'b' and 'c'",
    ),
    "added without content": (
        "tokenizer.json",
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}',
        "expected added tokens with content and id, found {'id': 1}",
    ),
    "added as object": (
        "tokenizer.json",
        '{"model": {"vocab": {"a": 0}}, "added_tokens": {"b": 1}}',
        "a list of added tokens",
    ),
    "decoder": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"x": {}}}',
        "expected added_tokens_decoder with tokens by id",
    ),
    "decoder as list": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": ["x"]}',
        "expected added_tokens_decoder with tokens by id",
    ),
    "decoder without content": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"7": {}}}',
        "added tokens with content and id",
    ),
    "decoder with a long number": (
        "tokenizer_config.json",
        json.dumps({"added_tokens_decoder": {"9" * 5000: {}}}),
        "expected added_tokens_decoder with tokens by id",
    ),
    "map": ("added_tokens.json", '{"x": true}', "expected added tokens with content and id"),
    "nested": ("vocab.json", '{"eng": {"a": 0}}', "expected a vocabulary of tokens with ids"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, case: str) -> None:
    name, content, text = DAMAGED[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DareError) as caught:
        read_tokens(tmp_path)
    named = str(tmp_path) if case == "added beyond a gap" else str(tmp_path / name)
    refusal(caught.value, CheckpointError, named, text)


# Uniting


def test_nothing_added() -> None:
    vocabulary = unite(
        BASE, [BASE, None, {"a": 2}], labels=["x", "y", "z"], base_rows=8, input_rows=[8, 8, 6]
    )
    assert vocabulary.tokens == BASE
    assert (vocabulary.added, vocabulary.moved, vocabulary.size, vocabulary.embedding_rows) == (
        (),
        False,
        5,
        8,
    )
    assert rows_of(vocabulary) == [[0, 1, 2, 3, 4, 5, 6, 7]] * 2 + [[0, 1, 2, 3, 4, 5, -1, -1]]


def test_one_input_adds() -> None:
    vocabulary = unite(
        BASE, [{**BASE, "x": 5, "y": 6}, None], labels=["x", "y"], base_rows=5, input_rows=[7, 5]
    )
    assert vocabulary.tokens == {**BASE, "x": 5, "y": 6}
    assert (vocabulary.added, vocabulary.moved, vocabulary.size, vocabulary.embedding_rows) == (
        ("x", "y"),
        False,
        7,
        7,
    )
    assert rows_of(vocabulary) == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, -1, -1]]


def test_colliding_ids() -> None:
    vocabulary = unite(
        BASE,
        [{**BASE, "x": 5, "y": 6}, {**BASE, "u": 5, "v": 6, "w": 7}],
        labels="xy",
        base_rows=5,
        input_rows=[7, 8],
    )
    assert vocabulary.tokens == {**BASE, "x": 5, "y": 6, "w": 7, "u": 8, "v": 9}
    assert vocabulary.added == ("x", "y", "w", "u", "v")
    assert vocabulary.moved
    assert rows_of(vocabulary) == [[0, 1, 2, 3, 4, 5, 6, -1, -1, -1], [0, 1, 2, 3, 4, -1, -1, 7, 5, 6]]


def test_one_token_added_twice() -> None:
    same = unite(
        BASE, [{**BASE, "x": 5}, {**BASE, "x": 5, "y": 6}], labels="xy", base_rows=5, input_rows=[6, 7]
    )
    assert same.tokens == {**BASE, "x": 5, "y": 6}
    assert not same.moved
    other = unite(
        BASE, [{**BASE, "x": 5}, {**BASE, "y": 5, "x": 6}], labels="xy", base_rows=5, input_rows=[6, 7]
    )
    assert other.tokens == {**BASE, "x": 5, "y": 6}
    assert rows_of(other) == [[0, 1, 2, 3, 4, 5, -1], [0, 1, 2, 3, 4, 6, 5]]


def test_padding_rows_take_added_tokens() -> None:
    vocabulary = unite(
        BASE, [{**BASE, "x": 5}, {**BASE, "y": 5}, None], labels="xyz", base_rows=8, input_rows=[8, 8, 8]
    )
    assert vocabulary.embedding_rows == 8
    assert vocabulary.size == 7
    assert rows_of(vocabulary) == [
        [0, 1, 2, 3, 4, 5, -1, 7],
        [0, 1, 2, 3, 4, -1, 5, 7],
        [0, 1, 2, 3, 4, -1, -1, 7],
    ]


def test_padding_that_only_an_input_has_is_left_out() -> None:
    assert rows_of(unite(BASE, [{**BASE, "x": 5}], labels="x", base_rows=5, input_rows=[64])) == [
        [0, 1, 2, 3, 4, 5]
    ]


def test_a_renamed_token_is_another() -> None:
    """Its row means something else in that input, so it must not go into the row of the base's token."""
    renamed = {token if token != "b" else "<im_start>": id for token, id in BASE.items()}
    vocabulary = unite(BASE, [renamed, BASE], labels="xy", base_rows=5, input_rows=[5, 5])
    assert vocabulary.tokens == {**BASE, "<im_start>": 5}
    assert rows_of(vocabulary) == [[0, 1, 2, -1, 4, 3], [0, 1, 2, 3, 4, -1]]


def test_a_base_token_with_another_id() -> None:
    with pytest.raises(DareError) as caught:
        unite(BASE, [BASE, {**BASE, "b": 4, "ab": 3}], labels=["one", "two"], base_rows=5, input_rows=[5, 5])
    refusal(
        caught.value,
        TensorMismatch,
        "two: token 'b': expected id 3, as in the base, found id 4; merge only models that kept",
    )


def test_a_token_without_a_row() -> None:
    inputs = [BASE, {**BASE, "x": 5}]
    with pytest.raises(DareError) as caught:
        unite(BASE, inputs, labels=["one", "two"], base_rows=5, input_rows=[5, 5])
    refusal(
        caught.value,
        TensorMismatch,
        "two: token 'x': expected a row of its embedding, of number 5, found 5 rows; resize it",
    )
    resized = unite(BASE, [*inputs, inputs[1]], labels="xyz", base_rows=5, input_rows=[5, 5, 6])
    assert [rows[5] for rows in resized.rows] == [-1, -1, 5]


def test_every_list_has_one_entry_for_each_input() -> None:
    with pytest.raises(ValueError, match="shorter"):
        unite(BASE, [BASE, BASE], labels=["x"], base_rows=5, input_rows=[5, 5])
    with pytest.raises(ValueError, match="shorter"):
        unite(BASE, [BASE, BASE], labels=["x", "y"], base_rows=5, input_rows=[5])


def added_in_order(tokens: list[str]) -> dict[str, int]:
    return {**BASE, **{token: 5 + number for number, token in enumerate(tokens)}}


@given(
    st.lists(
        st.none() | st.lists(st.sampled_from("pqrstuvw"), unique=True).map(added_in_order),
        min_size=1,
        max_size=4,
    ),
    st.integers(5, 12),
)
def test_every_token_has_one_id_and_every_row_its_token(
    inputs: list[dict[str, int] | None], base_rows: int
) -> None:
    heights = [max(base_rows, 13)] * len(inputs)
    vocabulary = unite(BASE, inputs, labels=["model"] * len(inputs), base_rows=base_rows, input_rows=heights)
    assert vocabulary.tokens.keys() == BASE.keys() | {token for tokens in inputs for token in tokens or {}}
    assert sorted(vocabulary.tokens.values()) == list(range(vocabulary.size)), (
        "a gap would shift ids when the tokenizer loads"
    )
    assert BASE.items() <= vocabulary.tokens.items()
    for tokens, rows in zip(inputs, rows_of(vocabulary), strict=True):
        held = BASE if tokens is None else tokens
        assert rows[: vocabulary.size] == [
            held.get(token, -1) for token in sorted(vocabulary.tokens, key=vocabulary.tokens.__getitem__)
        ]
        assert rows[vocabulary.size :] == list(range(vocabulary.size, max(base_rows, vocabulary.size)))


# Writing


def test_nothing_added_nothing_written(tmp_path: Path) -> None:
    base, staging = saved(tmp_path / "base"), staged(tmp_path)
    inputs = [saved(tmp_path / "one"), None]
    vocabulary = united(base, inputs)
    assert write_tokenizer(vocabulary, base, inputs, staging) == []
    assert list(staging.iterdir()) == []


@pytest.mark.parametrize("kind", MODELS)
def test_the_only_input_that_adds_gives_its_files(tmp_path: Path, kind: str) -> None:
    base, staging = saved(tmp_path / "base", kind=kind), staged(tmp_path)
    one = saved(tmp_path / "one", "new", AddedToken("<x>", special=True), kind=kind)
    (one / "chat_template.jinja").write_text("{{ messages }}")
    (one / "model.safetensors").write_bytes(b"")
    (staging / "special_tokens_map.json").write_text("{}")
    inputs = [saved(tmp_path / "zero", kind=kind), one, None]
    vocabulary = united(base, inputs)
    written = write_tokenizer(vocabulary, base, inputs, staging)
    assert (
        written
        == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
        == sorted(p.name for p in staging.iterdir())
    )
    assert all((staging / name).read_bytes() == (one / name).read_bytes() for name in written)
    encodes(staging, vocabulary.tokens)


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_of_several_inputs_are_appended(tmp_path: Path, kind: str) -> None:
    base, staging = saved(tmp_path / "base", kind=kind), staged(tmp_path)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    special = AddedToken("<|im_start|>", special=True, normalized=False)
    stripped = AddedToken("<mask>", lstrip=True, rstrip=True, single_word=True, normalized=False)
    inputs = [
        saved(tmp_path / "one", "new", special, kind=kind),
        saved(tmp_path / "two", stripped, special, "中", kind=kind),
    ]
    vocabulary = united(base, inputs)
    first = len(UNIGRAM if kind == "unigram" else BASE)
    assert vocabulary.tokens == {
        **tokens_of(base),
        "new": first,
        "<|im_start|>": first + 1,
        "中": first + 2,
        "<mask>": first + 3,
    }
    assert vocabulary.moved
    written = write_tokenizer(vocabulary, base, inputs, staging)
    assert (
        written
        == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
        == sorted(p.name for p in staging.iterdir())
    )
    loaded = encodes(staging, vocabulary.tokens)
    assert loaded.added_tokens_decoder[first + 1] == special
    assert loaded.added_tokens_decoder[first + 3] == stripped
    assert loaded.decode([first + 1, first], skip_special_tokens=True) == "new"
    plain = tokenizer(kind).encode("a b", add_special_tokens=False)
    assert loaded.encode("a b", add_special_tokens=False) == plain


def test_the_same_tokens_in_two_inputs(tmp_path: Path) -> None:
    base, staging = saved(tmp_path / "base"), staged(tmp_path)
    inputs = [
        saved(tmp_path / "one", "x"),
        saved(tmp_path / "two", "x", "y"),
        saved(tmp_path / "three", "x", "y"),
    ]
    (inputs[1] / "chat_template.jinja").write_text("{{ two }}")
    vocabulary = united(base, inputs)
    write_tokenizer(vocabulary, base, inputs, staging)
    assert encodes(staging, {**BASE, "x": 5, "y": 6}).chat_template == "{{ two }}"


def with_decoder(folder: Path) -> Path:
    """As transformers 4 wrote it: the configuration lists added tokens too, and so does a file of their
    own.
    """
    tokens = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["added_tokens_decoder"] = {
        str(id): token.__getstate__() for id, token in tokens.added_tokens_decoder.items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    added = {token: id for token, id in tokens.added_tokens_encoder.items() if id >= len(BASE)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def test_every_list_of_the_base_is_continued(tmp_path: Path) -> None:
    base, staging = with_decoder(saved(tmp_path / "base", "old")), staged(tmp_path)
    inputs = [
        with_decoder(saved(tmp_path / "one", "old", "x")),
        saved(tmp_path / "two", "old", AddedToken("<y>", special=True)),
    ]
    vocabulary = united(base, inputs)
    assert write_tokenizer(vocabulary, base, inputs, staging) == [
        "added_tokens.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((staging / "added_tokens.json").read_text()) == {"old": 5, "x": 6, "<y>": 7}
    listed = json.loads((staging / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {id: token["content"] for id, token in listed.items()} == {
        "0": "[UNK]",
        "1": "[PAD]",
        "5": "old",
        "6": "x",
        "7": "<y>",
    }
    assert listed["7"] == dict(
        content="<y>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True
    )
    encodes(staging, {**BASE, "old": 5, "x": 6, "<y>": 7})


def test_tokens_of_the_configuration_come_before_those_that_are_added(tmp_path: Path) -> None:
    base, staging = saved(tmp_path / "base"), staged(tmp_path)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, **decoder(early=5)}))
    inputs = [saved(tmp_path / "one", "early", "x"), saved(tmp_path / "two", "early", "y")]
    vocabulary = united(base, inputs)
    write_tokenizer(vocabulary, base, inputs, staging)
    encodes(staging, {**BASE, "early": 5, "x": 6, "y": 7})


@pytest.mark.parametrize("old", [old_bert, old_gpt2])
def test_older_files_are_continued(tmp_path: Path, old: Any) -> None:
    base, staging = old(tmp_path / "base"), staged(tmp_path)
    first = len(tokens_of(base))
    inputs = [
        old(tmp_path / "one", added_tokens={"new": first}),
        old(tmp_path / "two", added_tokens={"other": first}),
    ]
    vocabulary = united(base, inputs)
    assert "added_tokens.json" in write_tokenizer(vocabulary, base, inputs, staging)
    assert {path.name for path in staging.iterdir()} == {path.name for path in base.iterdir()} | {
        "added_tokens.json"
    }
    encodes(staging, {**tokens_of(base), "new": first, "other": first + 1})


def test_a_token_with_a_role_is_special(tmp_path: Path) -> None:
    base, staging = saved(tmp_path / "base"), staged(tmp_path)
    one, two = saved(tmp_path / "one", "x"), saved(tmp_path / "two")
    (two / "special_tokens_map.json").write_text(
        json.dumps({"sep_token": {"content": "<s>"}, "additional_special_tokens": ["<t>"]})
    )
    (two / "added_tokens.json").write_text(json.dumps({"<s>": 5, "<t>": 6, "u": 7}))
    vocabulary = united(base, [one, two])
    write_tokenizer(vocabulary, base, [one, two], staging)
    loaded = encodes(staging, vocabulary.tokens)
    special = {token.content: token.special for token in loaded.added_tokens_decoder.values()}
    assert special == {"[UNK]": True, "[PAD]": True, "<s>": True, "<t>": True, "u": False, "x": False}


def test_packages_and_their_base_give_the_tokenizer(tmp_path: Path) -> None:
    base, staging = saved(tmp_path / "base"), staged(tmp_path)
    same = packed(base, saved(tmp_path / "same"), tmp_path / "nothing carried")
    assert united(base, [same]).added == ()
    package = packed(base, saved(tmp_path / "one", "x"), tmp_path / "package")
    vocabulary = united(base, [package])
    assert write_tokenizer(vocabulary, base, [package], staging) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert encodes(staging, {**BASE, "x": 5}).pad_token == "[PAD]"


def test_a_renamed_token_is_appended(tmp_path: Path) -> None:
    base, staging = saved(tmp_path / "base", "<r0>", "<r1>"), staged(tmp_path)
    one = saved(tmp_path / "one", AddedToken("<im_start>", special=True), "<r1>")
    vocabulary = united(base, [one, base], base_rows=7)
    assert rows_of(vocabulary) == [[0, 1, 2, 3, 4, -1, 6, 5], [0, 1, 2, 3, 4, 5, 6, -1]]
    write_tokenizer(vocabulary, base, [one, base], staging)
    encodes(staging, {**BASE, "<r0>": 5, "<r1>": 6, "<im_start>": 7})


def refused(
    tmp_path: Path, base: Path, inputs: list[Path | None], kind: type[DareError], *texts: str
) -> None:
    vocabulary, staging = united(base, inputs), staged(tmp_path)
    with pytest.raises(DareError) as caught:
        write_tokenizer(vocabulary, base, inputs, staging)
    refusal(caught.value, kind, *texts)


def edited(folder: Path, **fields: Any) -> Path:
    document = json.loads((folder / "tokenizer.json").read_text())
    for name, value in fields.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else [*document[name], *value]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_a_vocabulary_that_grew_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    one = edited(
        saved(tmp_path / "one"), model={"vocab": {**BASE, "ba": 5}, "merges": [["a", "b"], ["b", "a"]]}
    )
    text = (
        "/one: token 'ba': expected added beside the base's vocabulary, found put into it; "
        "add it with tokenizer.add_tokens"
    )
    refused(tmp_path, base, [one], ConfigError, text)


def test_an_id_that_its_file_contradicts_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    one = edited(saved(tmp_path / "one"), added_tokens=[{"id": 9, "content": "x"}])
    text = (
        "/one: token 'x': expected id 5, with which it loads, found id 9 in its file; see "
        "which of them the model was trained with"
    )
    refused(tmp_path, base, [one], CheckpointError, text)


def test_a_base_with_a_gap_is_refused_before_ids_shift(tmp_path: Path) -> None:
    """Its tokens load with ids up to 7, six of them; what is appended would load with id 6."""
    gap = {"vocab": {**BASE, "c": 7}}
    base = edited(saved(tmp_path / "base"), model=gap)
    one = edited(saved(tmp_path / "one"), model=gap, added_tokens=[{"id": 6, "content": "x"}])
    two = edited(saved(tmp_path / "two"), model=gap, added_tokens=[{"id": 6, "content": "y"}])
    text = "/base: token 'x': expected to load with id 8, found id 6; the base's ids have gaps"
    refused(tmp_path, base, [one, two], CheckpointError, text)


def test_tokens_that_no_folder_describes(tmp_path: Path) -> None:
    base, staging = saved(tmp_path / "base"), staged(tmp_path)
    vocabulary = unite(BASE, [{**BASE, "x": 5}], labels="x", base_rows=5, input_rows=[6])
    with pytest.raises(
        ConfigError, match="token 'x': expected a tokenizer among the inputs that has it, found none"
    ):
        write_tokenizer(vocabulary, base, [None], staging)
    with pytest.raises(
        CheckpointError, match=r"staging: expected tokenizer\.json, found none to append tokens to"
    ):
        write_tokenizer(vocabulary, staging, [None], staging)


def test_neither_tokenizers_nor_frameworks_are_loaded() -> None:
    code = (
        "import sys, dare_train.merging.models.merged_tokenizer; print({'torch', 'transformers', "
        "'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
