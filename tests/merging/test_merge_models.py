"""What models of one base differ in: vocabularies, heads, names, dtypes, files. Every tensor of the result is
accounted for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import (
    State,
    bert_config,
    check_report,
    config_of,
    edit_config,
    files_of,
    llama,
    merge_refused,
    save,
    save_tokenizer,
    state_of,
    sum_of,
    told,
    tuned,
    write_state,
)
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    set_seed,
)

from dare_train import DareConfig, DeltaPackage, Snapshotter, apply, extract, merge
from dare_train.errors import (
    BaseMismatch,
    ChainError,
    CheckpointError,
    ConfigError,
    DtypeMismatch,
    TensorMismatch,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(name, model, *tokens)`: a model on disk, as fine-tuning leaves it."""
    return lambda name, model, *tokens, **options: save(model, tmp_path / name, *tokens, **options)


def merged(base: Path, models: list[Path], out: Path, **options: Any) -> State:
    """The result, once its report was found to be true."""
    weights = options.get("weights") or [1.0] * len(models)
    states = [state_of(model) for model in models]
    return check_report(merge(base, models, out, **options), state_of(base), states, weights)


# Vocabularies without tokenizers


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_one_model_added_are_kept(make: Make, tmp_path: Path, tied: bool) -> None:
    base = llama(tied=tied)
    folders = make("base", base), make("one", tuned(base, 1)), make("two", tuned(base, 2, rows=8))
    report = merge(folders[0], folders[1:], tmp_path / "out", weights=[0.5, 0.25])
    result = check_report(
        report, *[state_of(folders[0]), [state_of(folder) for folder in folders[1:]]], [0.5, 0.25]
    )
    added = {
        fate.name: fate.added.rows.tolist()
        for fate in report.tensors
        if fate.added is not None and fate.added.rows.size
    }
    assert added == {name: [5, 6, 7] for name in ([EMBEDDING] if tied else [HEAD, EMBEDDING])}
    two = state_of(folders[2])
    for name in added:
        assert torch.equal(result[name][5:], two[name][5:])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == 8
    assert torch.equal(loaded.get_output_embeddings().weight[5:], two[HEAD if not tied else EMBEDDING][5:])
    rows = {row["name"]: row.get("added_rows") for row in report.as_json()["tensors"]}
    assert rows[EMBEDDING] == 3
    assert rows["model.norm.weight"] is None


def test_rows_of_two_models_need_tokenizers(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = [make("base", base), make("one", tuned(base, 1, rows=6)), make("two", tuned(base, 2, rows=7))]
    texts = (
        f"{HEAD}: expected at most one model that adds rows to the base's 5, found 6 in "
        f"{folders[1]}, 7 in {folders[2]}",
        "put each model's tokenizer into its folder, so that rows are told by their tokens; or "
        "tokenizer='base' (--tokenizer base)",
    )
    merge_refused(folders[0], folders[1:], tmp_path / "place", TensorMismatch, *texts)
    merged(folders[0], folders[1:], tmp_path / "left-out", tokenizer="base")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "left-out").config.vocab_size == 5
    for folder, tokens in zip(folders, ((), ("x",), ("x", "y")), strict=True):
        save_tokenizer(folder, *tokens)
    merged(folders[0], folders[1:], tmp_path / "united")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "united").config.vocab_size == 7


def test_rows_of_the_same_number_but_other_content_need_tokenizers(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = [make("base", base), make("one", tuned(base, 1, rows=6)), make("two", tuned(base, 2, rows=6))]
    merge_refused(
        folders[0], folders[1:], tmp_path / "place", TensorMismatch, "at most one model that adds rows"
    )


def test_the_same_rows_in_two_models_are_added_once(make: Make, tmp_path: Path) -> None:
    base = llama()
    grown = tuned(base, 1, rows=7)
    folders = make("base", base), make("one", grown), make("two", tuned(base, 2, rows=7))
    state = {**state_of(folders[2]), **{name: state_of(folders[1])[name] for name in (EMBEDDING, HEAD)}}
    two = write_state(state, tmp_path / "same", config_of(folders[2]))
    result = merged(folders[0], [folders[1], two], tmp_path / "out", weights=[0.5, 0.5])
    assert torch.equal(result[EMBEDDING][5:], state[EMBEDDING][5:])


def test_left_out_rows_are_noted(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1, rows=6))
    report = merge(folders[0], folders[1:], tmp_path / "out", tokenizer="base")
    assert told(report)[HEAD] == told(report)[EMBEDDING] == ("merged", "added rows left out")
    assert told(report)["model.norm.weight"] == ("merged", "")
    assert report.counts() == {"merged": 21, "copied": 0, "carried": 0}


def test_a_union_without_tokenizers_is_refused(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base, tokenizer=True), make("one", tuned(base, 1, rows=6))
    text = (
        "tokenizer: expected a tokenizer beside every model that added rows, and the base, "
        f"found none in {folders[1]}"
    )
    merge_refused(folders[0], folders[1:], tmp_path / "place", ConfigError, text, tokenizer="union")


def test_rows_that_a_package_adds_are_kept(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1, rows=7)), make("two", tuned(base, 2))
    package = extract(folders[0], folders[1], tmp_path / "package", p=0)
    merged(folders[0], list(folders[1:]), tmp_path / "out", weights=[0.5, 0.25])
    merge(folders[0], [package, folders[2]], tmp_path / "again", weights=[0.5, 0.25])
    assert (
        files_of(tmp_path / "again")["model.safetensors"] == files_of(tmp_path / "out")["model.safetensors"]
    )
    assert config_of(tmp_path / "again")["vocab_size"] == 7


# Vocabularies with tokenizers


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def speakers(request: pytest.FixtureRequest, make: Make) -> tuple[Path, list[Path]]:
    """A base, and models that gave the same two ids to different tokens, and one token to both."""
    base = llama(tied=request.param)
    one = make("one", tuned(base, 1, rows=7), "x", AddedToken("<s>", special=True))
    two = make("two", tuned(base, 2, rows=7), AddedToken("<s>", special=True), "y")
    return make("base", base, tokenizer=True), [one, two]


def own_rows(folder: Path, name: str, *tokens: str) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(tokens))
    return state_of(folder)[name][ids]


def test_every_added_token_has_its_rows(speakers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (one, two) = speakers
    result = merged(base, [one, two], tmp_path / "out", weights=[0.5, 0.25])
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    )
    assert len(tokenizer) == model.config.vocab_size == 8
    assert tokenizer.convert_tokens_to_ids(["a", "b"]) == [2, 3]
    assert tokenizer.added_tokens_encoder.keys() == {"[UNK]", "[PAD]", "x", "y", "<s>"}
    for name in result.keys() & {EMBEDDING, HEAD}:
        loaded = model.get_parameter(name)
        ids = tokenizer.convert_tokens_to_ids(["x", "y", "<s>"])
        assert torch.equal(loaded[ids[0]], own_rows(one, name, "x")[0])
        assert torch.equal(loaded[ids[1]], own_rows(two, name, "y")[0])
        mean = (0.5 * own_rows(one, name, "<s>") + 0.25 * own_rows(two, name, "<s>")) / 0.75
        torch.testing.assert_close(loaded[ids[2:]], mean)
    encoded = tokenizer("a x <s> y", return_tensors="pt").input_ids
    assert torch.isfinite(model(encoded).logits).all()


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]])
def test_weights_that_add_up_to_nothing_give_a_token_the_plain_mean(
    speakers: tuple[Path, list[Path]], tmp_path: Path, weights: list[float]
) -> None:
    base, (one, two) = speakers
    merged(base, [one, two], tmp_path / "out", weights=weights)
    mean = (own_rows(one, EMBEDDING, "<s>") + own_rows(two, EMBEDDING, "<s>")) / 2
    torch.testing.assert_close(own_rows(tmp_path / "out", EMBEDDING, "<s>"), mean)
    assert torch.equal(own_rows(tmp_path / "out", EMBEDDING, "x"), own_rows(one, EMBEDDING, "x"))


def test_the_bases_tokenizer_leaves_added_tokens_out(
    speakers: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, models = speakers
    merged(base, models, tmp_path / "out", tokenizer="base")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 5
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_a_union_may_be_asked_for_where_nothing_grew(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base, tokenizer=True), make("one", tuned(base, 1))
    assert (
        merged(folders[0], [folders[1]], tmp_path / "out", tokenizer="union").keys()
        == state_of(folders[0]).keys()
    )


def test_padding_rows_take_the_tokens(make: Make, tmp_path: Path) -> None:
    """The embedding is larger than the vocabulary, as most are, and no model has to resize it."""
    base = llama(vocab=8)
    folders = (
        make("base", base, tokenizer=True),
        make("one", tuned(base, 1), "x"),
        make("two", tuned(base, 2), "y"),
    )
    report = merge(*[folders[0], folders[1:], tmp_path / "out"])
    result, states = state_of(tmp_path / "out"), [state_of(folder) for folder in folders]
    for name in (EMBEDDING, HEAD):
        assert torch.equal(result[name][5], states[1][name][5])
        assert torch.equal(result[name][6], states[2][name][5])
        torch.testing.assert_close(
            result[name][:5],
            sum_of(*[states[0][name][:5], [s[name][:5] for s in states[1:]], [1, 1]]).float(),
        )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["x", "y"]) == [5, 6]
    assert config_of(tmp_path / "out")["vocab_size"] == 8
    assert {fate.name for fate in report.tensors if fate.added is not None and fate.added.rows.size} == {
        EMBEDDING,
        HEAD,
    }


def test_biases_of_the_head_follow_their_tokens(make: Make, tmp_path: Path) -> None:
    """A bias has an element for each token, though it looks like any other vector."""
    set_seed(3)
    base = BertForMaskedLM(bert_config())
    base.resize_token_embeddings(8, mean_resizing=False)
    folders = (
        make("base", base, tokenizer=True),
        make("one", tuned(base, 1), "x"),
        make("two", tuned(base, 2), "y"),
    )
    merge(folders[0], folders[1:], tmp_path / "out")
    bias = "cls.predictions.bias"
    result, one, two = (
        state_of(tmp_path / "out")[bias],
        state_of(folders[1])[bias],
        state_of(folders[2])[bias],
    )
    assert result[5] == one[5]
    assert result[6] == two[5]
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert loaded.get_output_embeddings().bias[6] == two[5]


def test_a_masked_language_model_may_grow(make: Make, tmp_path: Path) -> None:
    set_seed(3)
    base = BertForMaskedLM(bert_config())
    folders = (
        make("base", base, tokenizer=True),
        make("one", tuned(base, 1, rows=6), "x"),
        make("two", tuned(base, 2, rows=6), "y"),
    )
    merged(folders[0], list(folders[1:]), tmp_path / "out")
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == 7
    head = loaded.get_output_embeddings()
    assert torch.equal(head.weight[6], state_of(folders[2])["bert.embeddings.word_embeddings.weight"][5])
    assert head.bias[5:].tolist() == [
        state_of(folder)["cls.predictions.bias"][5].item() for folder in folders[1:]
    ]


def test_a_package_brings_its_tokens(speakers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (one, two) = speakers
    package = extract(base, one, tmp_path / "package", p=0)
    merge(base, [one, two], tmp_path / "out")
    merge(base, [package, two], tmp_path / "again")
    ours, theirs = files_of(tmp_path / "again"), files_of(tmp_path / "out")
    assert [name for name in theirs if ours[name] != theirs[name]] == ["dare_merge.json", "dare_merge.yml"]


def test_a_reserved_token_that_a_model_renamed_stays_the_bases(make: Make, tmp_path: Path) -> None:
    base = llama(vocab=7)
    folders = (
        make("base", base, "<r0>", "<r1>"),
        make("one", tuned(base, 1), "<im_start>", "<r1>"),
        make("two", tuned(base, 2), "<r0>", "<r1>"),
    )
    merge(folders[0], folders[1:], tmp_path / "out")
    result, one, two = (state_of(folder) for folder in (tmp_path / "out", *folders[1:]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<r0>", "<r1>", "<im_start>"]) == [5, 6, 7]
    for name in (EMBEDDING, HEAD):
        assert torch.equal(result[name][5], two[name][5])
        assert torch.equal(result[name][7], one[name][5])
        expected = sum_of(*[state_of(folders[0])[name][6], [one[name][6], two[name][6]], [1, 1]])
        torch.testing.assert_close(result[name][6], expected.float())


def test_tokens_without_a_row_in_the_head_are_refused(make: Make, tmp_path: Path) -> None:
    """A bare model was resized; the base's head has no row for the new token, and no model brings one."""
    base = llama()
    folders = (
        make("base", base, tokenizer=True),
        make("one", tuned(base, 1, rows=6).model, "x"),
        make("two", tuned(base, 2, rows=6), "y"),
    )
    text = f"{HEAD}: expected a row for each added token, found none for 'x' in any model"
    alone = (
        f"{HEAD}: expected 6 rows, as {EMBEDDING} has, found 5 (in no model); merge models "
        "that have added rows in both"
    )
    merge_refused(folders[0], folders[1:2], tmp_path / "place", TensorMismatch, alone, "tokenizer='base'")
    merge_refused(folders[0], folders[1:], tmp_path / "place", TensorMismatch, text, "tokenizer='base'")
    result = merged(folders[0], [folders[2]], tmp_path / "out")
    assert len(result[HEAD]) == 6
    merge(folders[0], folders[1:], tmp_path / "again", tokenizer="base")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config.vocab_size == 5


def test_rows_without_a_head_to_follow_are_refused(make: Make, tmp_path: Path) -> None:
    """The same without tokenizers: the result would not load."""
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1, rows=6).model)
    text = (
        f"{HEAD}: expected 6 rows, as {EMBEDDING} has, found 5 (in no model); merge models "
        "that have added rows in both"
    )
    merge_refused(folders[0], folders[1:], tmp_path / "place", TensorMismatch, text, "tokenizer='base'")
    merge(folders[0], folders[1:], tmp_path / "out", tokenizer="base")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 5


# Tied and untied heads


def test_an_untied_head_on_a_tied_base_is_a_delta_of_its_embedding(make: Make, tmp_path: Path) -> None:
    tied, untied = llama(tied=True), llama()
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.model.embed_tokens.weight)
    folders = make("base", tied), make("one", tuned(untied, 1)), make("two", tuned(tied, 2))
    base, one, two = (state_of(folder) for folder in folders)
    assert (HEAD in base, HEAD in one, HEAD in two) == (False, True, False)
    report = merge(folders[0], folders[1:], tmp_path / "out", weights=[0.5, 0.25])
    models = [one, {**two, HEAD: two[EMBEDDING]}]
    result = check_report(report, {**base, HEAD: base[EMBEDDING]}, models, [0.5, 0.25])
    assert told(report)[HEAD] == ("merged", "")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, result[HEAD])
    assert not torch.equal(result[HEAD], result[EMBEDDING])


def test_a_tied_model_on_an_untied_base_moves_both(make: Make, tmp_path: Path) -> None:
    tied, untied = llama(tied=True), llama()
    folders = make("base", untied), make("one", tuned(untied, 1)), make("two", tuned(tied, 2))
    base, one, two = (state_of(folder) for folder in folders)
    report = merge(folders[0], folders[1:], tmp_path / "out", weights=[0.5, 0.25])
    result = check_report(report, base, [one, {**two, HEAD: two[EMBEDDING]}], [0.5, 0.25])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(loaded.lm_head.weight, result[HEAD])


def test_a_base_that_does_not_say_whether_it_is_tied_is_told(make: Make, tmp_path: Path) -> None:
    """Configurations from before transformers 5 leave the default out."""
    tied, untied = llama(tied=True), llama()
    folders = edit_config(make("base", tied), tie_word_embeddings=None), make("one", tuned(untied, 1))
    result = merge(folders[0], folders[1:], tmp_path / "out") and state_of(tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, result[HEAD])


def test_tied_models_stay_tied(make: Make, tmp_path: Path) -> None:
    base = llama(tied=True)
    folders = make("base", base), make("one", tuned(base, 1)), make("two", tuned(base, 2))
    assert HEAD not in merged(folders[0], list(folders[1:]), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert config_of(tmp_path / "out") == config_of(folders[0])


def test_a_head_that_is_written_twice_stays_tied(make: Make, tmp_path: Path) -> None:
    """Some converters write tied heads out. Untying them would change what models such as T5 compute."""
    base = llama(tied=True)
    folders = []
    for name, model in (("base", base), ("one", tuned(base, 1))):
        state = state_of(make(name, model))
        folders.append(
            write_state(
                {**state, HEAD: state[EMBEDDING].clone()},
                tmp_path / f"{name}-twice",
                config_of(tmp_path / name),
            )
        )
    result = merged(folders[0], folders[1:], tmp_path / "out")
    assert torch.equal(result[HEAD], result[EMBEDDING])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True


def test_a_tied_package_on_an_untied_base_is_refused_with_a_way_out(make: Make, tmp_path: Path) -> None:
    """Its head is its embedding, of which it has the difference from the base's embedding, not from the
    base's head.
    """
    untied, tied = llama(), llama(tied=True)
    folders = make("base", untied), make("one", tuned(tied, 1))
    package = extract(*folders, tmp_path / "package", p=0)
    texts = (f"{package.path}: expected {HEAD}", "tied to its embedding", "dare-train apply")
    merge_refused(folders[0], [package], tmp_path / "place", CheckpointError, *texts)
    apply(folders[0], package, tmp_path / "applied")
    state = state_of(folders[1])
    report = merge(folders[0], [tmp_path / "applied"], tmp_path / "out", weights=[0.5])
    check_report(report, state_of(folders[0]), [{**state, HEAD: state[EMBEDDING]}], [0.5])


def test_a_package_that_says_nothing_of_the_head_leaves_it(make: Make, tmp_path: Path) -> None:
    """A missing head is a tied one only where the model's configuration says so."""
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1))
    package = extract(
        folders[0],
        edit_config_of_bare(folders[1], tmp_path / "bare", config_of(folders[0])),
        tmp_path / "package",
        p=0,
    )
    assert HEAD not in package.records
    report = merge(folders[0], [package], tmp_path / "out")
    assert told(report)[HEAD] == ("copied", "in no model")
    assert torch.equal(state_of(tmp_path / "out")[HEAD], state_of(folders[0])[HEAD])


def edit_config_of_bare(folder: Path, out: Path, config: Any) -> Path:
    return write_state(
        {name: tensor for name, tensor in state_of(folder).items() if name != HEAD}, out, config
    )


# Names


def test_tensors_that_a_model_lacks_are_noted(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1)), make("two", tuned(base, 2))
    norm, gate = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"
    states = [state_of(folder) for folder in folders]
    lacking = [
        write_state({name: tensor for name, tensor in state.items() if name not in without}, tmp_path / label)
        for state, without, label in ((states[1], {norm, gate}, "l1"), (states[2], {norm}, "l2"))
    ]
    report = merge(folders[0], lacking, tmp_path / "out", weights=[0.5, 0.25])
    check_report(report, states[0], states[1:], [0.5, 0.25])
    fates = told(report)
    assert fates[norm] == ("copied", "in no model")
    assert fates[gate] == ("merged", f"not in {lacking[0]}")
    assert {fate for name, fate in fates.items() if name not in (norm, gate)} == {("merged", "")}


def test_renamed_tensors_are_found(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1)), make("two", tuned(base, 2))
    other = {
        name.replace("model.", "transformer.").replace(".mlp.", ".ffn."): tensor
        for name, tensor in state_of(folders[1]).items()
    }
    one = write_state(other, tmp_path / "renamed", config_of(folders[1]))
    expected = merged(folders[0], list(folders[1:]), tmp_path / "expected")
    report = merge(
        folders[0], [one, folders[2]], tmp_path / "out", rename={"transformer.": "model.", ".ffn.": ".mlp."}
    )
    assert told(report) == dict.fromkeys(expected, ("merged", ""))
    assert (
        files_of(tmp_path / "out")["model.safetensors"]
        == files_of(tmp_path / "expected")["model.safetensors"]
    )


def test_names_that_meet_after_renaming_are_refused(tmp_path: Path) -> None:
    base = {"a.weight": torch.ones(3), "b.weight": torch.ones(3)}
    text = "rename: expected different names for all tensors, found a.weight and b.weight as a.weight"
    merge_refused(base, [base], tmp_path / "place", ConfigError, text, rename={"b.": "a."})


OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def aged(folder: Path, out: Path) -> Path:
    """As TensorFlow called layer norms, and as many checkpoints on the Hub have them still."""
    names = {
        name: next((name.replace(new, old) for new, old in OLD.items() if name.endswith(new)), name)
        for name in state_of(folder)
    }
    return write_state(
        {names[name]: tensor for name, tensor in state_of(folder).items()}, out, config_of(folder)
    )


@pytest.mark.parametrize("old", ["base", "models", "both"])
@pytest.mark.parametrize("kind", ["encoder", "task model", "task model on encoder", "encoder on task model"])
def test_old_names_of_layer_norms_are_found(make: Make, tmp_path: Path, old: str, kind: str) -> None:
    set_seed(5)
    base = BertForSequenceClassification(bert_config())
    parts = {
        "encoder": (0, 0),
        "task model": (1, 1),
        "task model on encoder": (0, 1),
        "encoder on task model": (1, 0),
    }[kind]
    of = lambda model, part: model if part else model.bert  # noqa: E731
    folders = (
        make("base", of(base, parts[0])),
        make("one", of(tuned(base, 1), parts[1])),
        make("two", of(tuned(base, 2), parts[1])),
    )
    take = {"take": {"classifier*": 0}} if kind == "task model on encoder" else {}
    merge(folders[0], folders[1:], tmp_path / "expected", **take)
    given = [
        aged(folder, tmp_path / f"{folder.name}-old") if old in (role, "both") else folder
        for role, folder in zip(["base", "models", "models"], folders, strict=True)
    ]
    report = merge(given[0], given[1:], tmp_path / "out", **take)
    result, expected = state_of(tmp_path / "out"), state_of(tmp_path / "expected")
    modern = {
        name.replace("gamma", "weight").replace("beta", "bias"): tensor for name, tensor in result.items()
    }
    assert len(modern) == len(result)
    assert all(torch.equal(modern[name], tensor) for name, tensor in expected.items())
    assert modern.keys() == expected.keys()
    assert [name for name in result if name.endswith((".gamma", ".beta"))] == (
        [] if old == "models" else [n for n in result if "LayerNorm" in n]
    )
    assert all(how == "merged" for name, (how, _) in told(report).items() if "LayerNorm" in name)


@pytest.mark.parametrize("some", [False, True])
def test_prefixes_of_all_or_some_models_are_seen_through(make: Make, tmp_path: Path, some: bool) -> None:
    base = llama()
    models = [tuned(base, 1), tuned(base, 2)]
    folders = (
        make("base", base.model),
        *(make(f"whole-{n}", model) for n, model in enumerate(models)),
        make("bare", models[1].model),
    )
    given = [folders[1], folders[3] if some else folders[2]]
    plain = merged(folders[0], [make("bare-0", models[0].model), folders[3]], tmp_path / "plain")
    take = {"take": {HEAD: 0}}
    report = merge(folders[0], given, tmp_path / "out", **take)
    result = state_of(tmp_path / "out")
    assert result.keys() == {HEAD, *(f"model.{name}" for name in plain)}
    assert all(torch.equal(result[f"model.{name}"], tensor) for name, tensor in plain.items())
    assert told(report)[HEAD] == ("carried", "taken")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, state_of(folders[1])[HEAD])
    assert torch.equal(loaded.model.norm.weight, plain["norm.weight"])


@pytest.mark.parametrize("some", [False, True])
def test_a_base_with_a_head_keeps_it_where_models_are_bare(make: Make, tmp_path: Path, some: bool) -> None:
    base = llama()
    models = [tuned(base, 1), tuned(base, 2)]
    folders = (
        make("base", base),
        make("bare", models[0].model),
        make("two", models[1] if some else models[1].model),
    )
    report = merge(folders[0], folders[1:], tmp_path / "out")
    result, whole = state_of(tmp_path / "out"), [{HEAD: None, **model.state_dict()} for model in models]
    assert result.keys() == state_of(folders[0]).keys()
    assert told(report)[HEAD] == (("merged", f"not in {folders[1]}") if some else ("copied", "in no model"))
    for name in result.keys() - {HEAD}:
        expected = sum_of(base.state_dict()[name], [state[name] for state in whole], [1, 1])
        torch.testing.assert_close(result[name], expected.float(), msg=name)
    assert config_of(tmp_path / "out") == config_of(folders[0])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_packages_of_task_models_have_their_names(make: Make, tmp_path: Path) -> None:
    set_seed(5)
    base = BertForSequenceClassification(bert_config(num_labels=3))
    folders = make("base", base.bert), make("one", tuned(base, 1)), make("two", tuned(base, 2))
    packages = [extract(folders[0], folder, tmp_path / f"p-{folder.name}", p=0) for folder in folders[1:]]
    options: dict[str, Any] = dict(take={"classifier*": 1})
    merge(folders[0], folders[1:], tmp_path / "expected", **options)
    for number, given in enumerate((packages, [packages[0], folders[2]], [folders[1], packages[1]])):
        merge(folders[0], given, tmp_path / f"{number}", **options)
        ours, theirs = files_of(tmp_path / f"{number}"), files_of(tmp_path / "expected")
        assert [name for name in theirs if ours.get(name) != theirs[name]] == [
            "dare_merge.json",
            "dare_merge.yml",
        ]


# Heads of their own


@pytest.fixture
def classifiers(make: Make) -> tuple[Path, Path, Path, Path]:
    """An encoder; two classifiers with 3 labels that share a head; one with 4."""
    set_seed(5)
    base = BertForSequenceClassification(bert_config(num_labels=3))
    one, two = tuned(base, 1), tuned(base, 2)
    two.classifier.load_state_dict(one.classifier.state_dict())
    set_seed(6)
    three = BertForSequenceClassification(
        bert_config(num_labels=4, id2label={n: f"label {n}" for n in range(4)})
    )
    three.bert.load_state_dict(tuned(base, 3).bert.state_dict())
    return make("base", base.bert), make("one", one), make("two", two), make("three", three)


def loads_with_head_of(out: Path, model: Path) -> None:
    loaded, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    expected = state_of(model)
    assert torch.equal(loaded.classifier.weight, expected["classifier.weight"])
    assert loaded.config.id2label == {
        int(key): value
        for key, value in AutoModelForSequenceClassification.from_pretrained(model).config.id2label.items()
    }
    assert torch.equal(loaded.bert.pooler.dense.bias, state_of(out)["bert.pooler.dense.bias"])


def test_a_head_that_one_model_has_is_carried(
    classifiers: tuple[Path, ...], make: Make, tmp_path: Path
) -> None:
    base, _, _, three = classifiers
    bare = make("bare", tuned(BertModel.from_pretrained(base), 4))
    for number, models in enumerate(([three], [three, bare], [bare, three])):
        report = merge(base, models, tmp_path / f"{number}")
        assert told(report)["classifier.weight"] == ("carried", "")
        loads_with_head_of(tmp_path / f"{number}", three)


def test_a_head_that_is_equal_in_all_is_carried(classifiers: tuple[Path, ...], tmp_path: Path) -> None:
    base, one, two, _ = classifiers
    report = merge(base, [one, two], tmp_path / "out")
    assert told(report)["classifier.weight"] == ("carried", "the same in 2 models")
    loads_with_head_of(tmp_path / "out", one)


@pytest.mark.parametrize("taken", [0, 1])
def test_heads_that_differ_need_a_choice(classifiers: tuple[Path, ...], tmp_path: Path, taken: int) -> None:
    base, one, _, three = classifiers
    texts = (
        f"classifier.bias: expected the same content as in {one}, since it is no delta of the "
        f"base, found other content in {three}",
        "take={'classifier.bias': model} (--take) takes one model's, exclude='classifier.bias' "
        "(--exclude) leaves it out",
    )
    merge_refused(base, [one, three], tmp_path / "place", TensorMismatch, *texts)
    report = merge(base, [one, three], tmp_path / "taken", take={"classifier*": taken})
    assert told(report)["classifier.weight"] == ("carried", "taken")
    assert {
        name: fate.models
        for name, fate in zip(told(report), report.tensors, strict=True)
        if name.startswith("cl")
    } == {"classifier.bias": (taken,), "classifier.weight": (taken,)}
    loads_with_head_of(tmp_path / "taken", (one, three)[taken])
    by_name = merge(base, [one, three], tmp_path / "named", take={"classifier*": str((one, three)[taken])})
    assert by_name.fingerprint == report.fingerprint
    left = merge(base, [one, three], tmp_path / "left", exclude="classifier*")
    assert not [name for name in told(left) if name.startswith("classifier")]
    assert torch.equal(
        state_of(tmp_path / "left")["bert.pooler.dense.bias"],
        state_of(tmp_path / "taken")["bert.pooler.dense.bias"],
    )


def test_a_head_of_another_shape_than_the_bases_may_be_taken(
    classifiers: tuple[Path, ...], tmp_path: Path
) -> None:
    _, one, two, three = classifiers
    text = f"classifier.bias: expected shape [3], as in the base, found [4] in {three}"
    merge_refused(
        one, [two, three], tmp_path / "place", TensorMismatch, text, "take={'classifier.bias': model}"
    )
    merge(one, [two, three], tmp_path / "out", take={"classifier*": 1})
    loads_with_head_of(tmp_path / "out", three)
    report = merge(one, [two, three], tmp_path / "kept", exclude=["classifier*"])
    assert told(report)["classifier.weight"] == ("copied", "excluded")
    loads_with_head_of(tmp_path / "kept", one)


def test_taking_what_a_model_lacks_is_refused(
    classifiers: tuple[Path, ...], make: Make, tmp_path: Path
) -> None:
    base, one, _, _ = classifiers
    bare = make("bare", tuned(BertModel.from_pretrained(base), 4))
    text = f"take for classifier.bias: expected a model that has it, found none of that name in {bare}"
    merge_refused(base, [one, bare], tmp_path / "place", ConfigError, text, take={"classifier*": 1})
    text = f"take['classifier*']: expected one of {one}, {bare}, found '2'"
    merge_refused(base, [one, bare], tmp_path / "place", ConfigError, text, take={"classifier*": 2})


def test_the_bases_tokenizer_and_a_models_head_fit_together(
    classifiers: tuple[Path, ...], make: Make, tmp_path: Path
) -> None:
    """The head's configuration comes from a model that grew; the embedding and the tokenizer do not."""
    base, one, two, _ = classifiers
    save_tokenizer(base)
    grown = make("grown", tuned(BertForSequenceClassification.from_pretrained(one), 6, rows=7), "x", "y")
    (grown / "added_tokens.json").write_text('{"x": 5, "y": 6}')
    package = extract(base, grown, tmp_path / "package", p=0)
    for number, first in enumerate((grown, package)):
        merge(base, [first, two], tmp_path / f"{number}", tokenizer="base", take={"classifier*": 0})
        loads_with_head_of(tmp_path / f"{number}", grown)
        assert config_of(tmp_path / f"{number}")["vocab_size"] == 5
        assert (
            AutoTokenizer.from_pretrained(tmp_path / f"{number}").get_vocab()
            == AutoTokenizer.from_pretrained(base).get_vocab()
        )
        merge(base, [first, two], tmp_path / f"{number}-union", take={"classifier*": 1})
        loads_with_head_of(tmp_path / f"{number}-union", two)
        assert config_of(tmp_path / f"{number}-union")["vocab_size"] == 7
        assert len(AutoTokenizer.from_pretrained(tmp_path / f"{number}-union")) == 7


def test_a_package_that_carries_what_another_model_moved_is_refused(tmp_path: Path) -> None:
    """Neither may be lost without a word."""
    base = {"a": torch.ones(8), "b": torch.ones(4)}
    one, two = (
        {"a": torch.full((8,), 2.0), "b": torch.ones(4)},
        {"a": torch.full((8,), 3.0), "b": torch.ones(4)},
    )
    package = extract(base, one, tmp_path / "package", p=0, whole=["a"])
    text = (
        f"a: expected the same content as in {package.path}, since it is no delta of the "
        "base, found other content in model in memory"
    )
    for models in ([package, two], [two, package]):
        merge_refused(
            base,
            models,
            tmp_path / "place",
            TensorMismatch,
            "a: expected the same content as in",
            "take={'a': model}",
        )
    merge_refused(base, [package, two], tmp_path / "place", TensorMismatch, text)
    report = merge(base, [package, base], tmp_path / "same")
    assert told(report) == {"a": ("carried", ""), "b": ("merged", "")}
    assert torch.equal(state_of(tmp_path / "same")["a"], one["a"])


# Integers, scalars, empty tensors


def test_buffers_of_integers_are_copied_where_equal_and_carried_where_one_differs(tmp_path: Path) -> None:
    base = {"w": torch.ones(6), "ids": torch.arange(4), "flag": torch.tensor([True, False])}
    one, two = {**base, "w": torch.zeros(6)}, {**base, "ids": torch.arange(1, 5)}
    report = merge(write_state(base, tmp_path / "base"), [one, two], tmp_path / "out")
    check_report(report, base, [one, two], [1, 1])
    assert told(report) == {
        "flag": ("copied", "not floating point, equal in all"), "ids": ("carried", ""), "w": ("merged", ""),
    }  # fmt: skip
    assert report.tensors[1].models == (1,)
    three = {**base, "ids": torch.arange(2, 6)}
    merge_refused(
        base, [one, two, three], tmp_path / "place", TensorMismatch, "ids: expected the same content as in"
    )
    check_report(
        merge(write_state(base, tmp_path / "b"), [two, three], tmp_path / "taken", take={"ids": 1}),
        base,
        [two, three],
        [1, 1],
    )
    again = merge(write_state(base, tmp_path / "c"), [two, dict(two)], tmp_path / "same")
    assert told(again)["ids"] == ("carried", "the same in 2 models")


def test_scalars_and_empty_tensors_are_merged(tmp_path: Path) -> None:
    base = {
        "scale": torch.tensor(2.0),
        "nothing": torch.empty(0, 4),
        "w": torch.ones(3),
        "n": torch.tensor(7),
    }
    one = {
        "scale": torch.tensor(3.0),
        "nothing": torch.empty(0, 4),
        "w": torch.zeros(3),
        "n": torch.tensor(7),
    }
    report = merge(write_state(base, tmp_path / "base"), [one], tmp_path / "out", weights=[0.5])
    result = check_report(report, base, [one], [0.5])
    assert result["scale"] == 2.5
    assert result["nothing"].shape == (0, 4)
    merge(
        tmp_path / "base",
        [write_state(one, tmp_path / "one")],
        tmp_path / "package",
        weights=[0.5],
        package=True,
    )
    apply(tmp_path / "base", tmp_path / "package", tmp_path / "applied")
    assert (
        files_of(tmp_path / "applied")["model.safetensors"] == files_of(tmp_path / "out")["model.safetensors"]
    )


# Dtypes


def test_models_of_another_dtype_are_merged_into_the_bases(make: Make, tmp_path: Path) -> None:
    base = llama().bfloat16()
    folders = make("base", base), make("one", tuned(base.float(), 1)), make("two", tuned(base.half(), 2))
    base.bfloat16().save_pretrained(tmp_path / "base")
    result = merged(folders[0], list(folders[1:]), tmp_path / "out", weights=[0.5, 0.25])
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    state, models = state_of(folders[0]), [state_of(folder) for folder in folders[1:]]
    exact = sum_of(state[EMBEDDING], [model[EMBEDDING] for model in models], [0.5, 0.25])
    assert torch.equal(result[EMBEDDING], exact.float().bfloat16())


def test_float64_is_merged_in_float64(tmp_path: Path) -> None:
    base = {"w": torch.linspace(0, 1, 50, dtype=torch.float64)}
    one = {"w": base["w"] + 1e-12}
    merge(write_state(base, tmp_path / "base"), [one], tmp_path / "out", weights=[0.5])
    assert torch.equal(state_of(tmp_path / "out")["w"], base["w"] + 0.5 * (one["w"] - base["w"]))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_the_base_may_be_rounded_to_the_models_dtype(
    make: Make, tmp_path: Path, base_dtype: torch.dtype
) -> None:
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[base_dtype]
    base = llama().to(base_dtype)
    folders = make("base", base), make("one", tuned(base.to(other), 1)), make("two", tuned(base.to(other), 2))
    rounded = {name: tensor.to(other) for name, tensor in state_of(folders[0]).items()}
    report = merge(folders[0], folders[1:], tmp_path / "out", cast_base=True, weights=[0.5, 0.25])
    result = check_report(report, rounded, [state_of(folder) for folder in folders[1:]], [0.5, 0.25])
    assert {tensor.dtype for tensor in result.values()} == {other}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == other
    assert torch.equal(loaded.lm_head.weight, result[HEAD])


def test_the_base_is_rounded_under_renamed_and_prefixed_names_too(tmp_path: Path) -> None:
    base = {"m.w": torch.linspace(0, 1, 50), "m.v": torch.linspace(1, 2, 50)}
    one = {name: (tensor + 0.25).bfloat16() for name, tensor in base.items()}
    renamed, bare = ({old.replace("m.", new): tensor for old, tensor in one.items()} for new in ("k.", ""))
    for number, (model, rename) in enumerate(((renamed, {"k.": "m."}), (bare, {}))):
        merge(
            write_state(base, tmp_path / f"b{number}"),
            [model, {**one}],
            tmp_path / f"{number}",
            cast_base=True,
            rename=rename,
        )
        assert {tensor.dtype for tensor in state_of(tmp_path / f"{number}").values()} == {torch.bfloat16}


def test_packages_on_a_rounded_base_need_the_same_rounding(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1).bfloat16())
    package = extract(*folders, tmp_path / "package", p=0, cast_base=True)
    merge_refused(
        folders[0],
        [package],
        tmp_path / "place",
        DtypeMismatch,
        "expected BF16",
        "cast_base=True (--cast-base)",
    )
    apply(folders[0], package, tmp_path / "applied", cast_base=True)
    for number, models in enumerate(([package], [package, package], [package, folders[1]])):
        options: dict[str, Any] = dict(cast_base=True, weights=[1 / len(models)] * len(models))
        merge(folders[0], models, tmp_path / f"{number}", **options)
        result = state_of(tmp_path / f"{number}")
        assert all(torch.equal(tensor, result[name]) for name, tensor in state_of(folders[1]).items())
        assert config_of(tmp_path / f"{number}")["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_quantized_models_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    base, code = (
        {"w": torch.ones(6), "v": torch.ones(3)},
        {torch.int8: "I8", torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3"}[dtype],
    )
    one = {"w": torch.ones(6).to(dtype), "v": torch.zeros(3)}
    texts = (
        "w: expected floating-point numbers of 16 bits or more",
        f"found {code} in model in memory",
        "take={'w': model}",
    )
    merge_refused(base, [one], tmp_path / "place", DtypeMismatch, *texts)
    report = merge(base, [one], tmp_path / "out", exclude="w")
    assert told(report) == {"v": ("merged", ""), "w": ("copied", "excluded")}


# Files


def test_files_may_be_cut_in_any_way(make: Make, tmp_path: Path) -> None:
    base = llama()
    models = [base, tuned(base, 1), tuned(base, 2)]
    whole = [make(f"whole-{number}", model) for number, model in enumerate(models)]
    cut = [
        make(f"cut-{number}", model, max_shard_size=f"{2 + number}KB") for number, model in enumerate(models)
    ]
    counts = [len(list(folder.glob("*.safetensors"))) for folder in cut]
    assert min(counts) > 1
    assert len(set(counts)) > 1
    expected = merged(whole[0], whole[1:], tmp_path / "whole")
    result = merged(cut[0], [whole[1], cut[2]], tmp_path / "cut")
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == counts[0]
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    again = merged(whole[0], cut[1:], tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_one_file_may_stand_for_a_model(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1))
    merge(folders[0], [folders[1]], tmp_path / "out")
    merge(folders[0] / "model.safetensors", [folders[1] / "model.safetensors"], tmp_path / "again")
    assert (
        files_of(tmp_path / "again")["model.safetensors"] == files_of(tmp_path / "out")["model.safetensors"]
    )


# Adapters, packages, memory


def test_an_adapter_is_the_model_that_it_makes(make: Make, tmp_path: Path) -> None:
    from adapting import adapt

    base = llama()
    folders = make("base", base, tokenizer=True), make("one", tuned(base, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapt(
            AutoModelForCausalLM.from_pretrained(folders[0]),
            tmp_path / "adapter",
            target_modules=["q_proj", "down_proj"],
        )
    package = extract(folders[0], tmp_path / "adapter", tmp_path / "package", p=0)
    apply(folders[0], package, tmp_path / "adapted")
    expected = merged(
        folders[0], [tmp_path / "adapted", folders[1]], tmp_path / "expected", weights=[0.5, 0.25]
    )
    report = merge(folders[0], [tmp_path / "adapter", folders[1]], tmp_path / "out", weights=[0.5, 0.25])
    assert all(torch.equal(state_of(tmp_path / "out")[name], tensor) for name, tensor in expected.items())
    assert {how for how, _ in told(report).values()} == {"merged"}
    merge(folders[0], [package, folders[1]], tmp_path / "packed", weights=[0.5, 0.25])
    assert (
        files_of(tmp_path / "packed")["model.safetensors"] == files_of(tmp_path / "out")["model.safetensors"]
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "slerp", "average"])
def test_packages_and_checkpoints_of_the_same_models_give_the_same(
    make: Make, tmp_path: Path, method: str
) -> None:
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1)), make("two", tuned(base, 2))
    packages = [extract(folders[0], folder, tmp_path / f"p-{folder.name}", p=0) for folder in folders[1:]]
    expected = merge(folders[0], folders[1:], tmp_path / "out", method=method).fingerprint
    for number, models in enumerate(([packages[0].path, folders[2]], [folders[1], packages[1]], packages)):
        assert merge(folders[0], models, tmp_path / f"{number}", method=method).fingerprint == expected


def test_what_a_package_dropped_is_not_dropped_again(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base), make("one", tuned(base, 1)), make("two", tuned(base, 2))
    package = extract(folders[0], folders[1], tmp_path / "package", p=0.5, seed=0, values="exact")
    report = merge(folders[0], [package, folders[2]], tmp_path / "out", p=0.5)
    assert report.notes == (
        f"dropped in their packages already, and not dropped at random again: {package.path}",
    )
    expected = merge(folders[0], folders[1:], tmp_path / "expected", p=0.5)
    assert expected.notes == ()
    assert report.fingerprint == expected.fingerprint


def test_a_package_of_another_base_is_refused(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base), make("other", tuned(base, 9)), make("one", tuned(base, 1))
    package = extract(folders[1], folders[2], tmp_path / "package", p=0.5)
    texts = (
        "expected fingerprint",
        f"as {package.path} has it on record",
        "this is not the base that the package was made from",
    )
    for options in ({}, {"package": True}, {"exclude": "model.layers.*"}):
        merge_refused(folders[0], [folders[2], package], tmp_path / "place", BaseMismatch, *texts, **options)


def test_a_package_that_continues_another_is_refused(tmp_path: Path) -> None:
    base = write_state({"w": torch.linspace(0, 1, 99)}, tmp_path / "base")
    model = {"w": torch.linspace(0, 1, 99)}
    snapshotter = Snapshotter.begin(model, tmp_path / "run", DareConfig(p=0.5), base=base, incremental=True)
    for step in (1, 2):
        model["w"] += 0.25
        snapshotter.take(model, tmp_path / f"{step}", step=step)
    snapshotter.close()
    text = (
        f"{tmp_path / '2'}: expected a package on the base, found one that continues "
        "another; merge the model that dare-train apply"
    )
    merge_refused(base, [tmp_path / "1", tmp_path / "2"], tmp_path / "place", ChainError, text)
    apply(base, [tmp_path / "1", tmp_path / "2"], tmp_path / "model")
    merge(base, [tmp_path / "1", tmp_path / "model"], tmp_path / "out", weights=[0, 1])
    assert torch.equal(state_of(tmp_path / "out")["w"], state_of(tmp_path / "model")["w"])


def test_modules_states_and_arrays_are_models(make: Make, tmp_path: Path) -> None:
    base = llama()
    models = [tuned(base, 1), tuned(base, 2)]
    folders = make("base", base), make("one", models[0]), make("two", models[1])
    expected = merge(folders[0], folders[1:], tmp_path / "out").fingerprint
    arrays = {name: tensor.numpy() for name, tensor in state_of(folders[0]).items()}
    kinds: list[tuple[Any, list[Any]]] = [
        (base, models),
        (base.state_dict(), [model.state_dict() for model in models]),
        (arrays, [folders[1], models[1]]),
        (
            folders[0],
            [DeltaPackage.open(extract(folders[0], models[0], tmp_path / "package", p=0).path), models[1]],
        ),
    ]
    for number, (given, others) in enumerate(kinds):
        report = merge(given, others, tmp_path / f"{number}")
        assert report.fingerprint == expected
        assert [row["how"] for row in report.as_json()["tensors"]] == ["merged"] * 21
    assert not (tmp_path / "0/config.json").exists()
    assert (tmp_path / "2/config.json").exists()
    assert merge(folders[0], models, tmp_path / "3b", take={"lm_head*": 1}).labels == (
        "model in memory",
        "model in memory",
    )


def test_a_tied_module_has_no_second_head(make: Make, tmp_path: Path) -> None:
    base = llama(tied=True)
    folders = make("base", base), make("one", tuned(base, 1))
    expected = merge(folders[0], folders[1:], tmp_path / "out").fingerprint
    assert merge(folders[0], [tuned(base, 1)], tmp_path / "module").fingerprint == expected


def test_a_tied_modules_state_says_its_head_twice(make: Make, tmp_path: Path) -> None:
    base = llama(tied=True)
    folder, state = make("base", base), tuned(base, 1).state_dict()
    merge(folder, [state], tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, state[EMBEDDING])
    assert torch.equal(loaded.model.embed_tokens.weight, state[EMBEDDING])


def test_a_model_of_something_else_is_refused(make: Make, tmp_path: Path) -> None:
    base = llama()
    folders = make("base", base), write_state({"other": torch.ones(3)}, tmp_path / "other")
    text = (
        f"{folders[0]}: expected tensors of {folders[1]}, found not one of them; is this the "
        "base it was tuned from?"
    )
    merge_refused(*folders[:1], [folders[1]], tmp_path / "place", TensorMismatch, text)


@pytest.mark.parametrize("models", ["a folder", 5, None])
def test_models_are_a_list(tmp_path: Path, models: Any) -> None:
    merge_refused(
        {"w": np.ones(3, np.float32)},
        models,
        tmp_path / "place",
        ConfigError,
        "models: expected a list of models",
    )


def test_no_model_at_all_is_refused(tmp_path: Path) -> None:
    merge_refused(
        {"w": np.ones(3, np.float32)},
        [],
        tmp_path / "place",
        ConfigError,
        "models: expected at least one besides the base",
    )
