"""Tiny models to merge, their tokenizers, and an independent reading of what a merge left on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import refusal
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from dare_train import merge
from dare_train.errors import DareError
from dare_train.merging.merge_report import MergeReport

State = dict[str, torch.Tensor]
WORDS = {"[UNK]": 0, "[PAD]": 1, "a": 2, "b": 3, "ab": 4}


def llama(*, tied: bool = False, vocab: int = 5, seed: int = 7) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16, tie_word_embeddings=tied, bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert_config(**options: Any) -> BertConfig:
    return BertConfig(
        vocab_size=5,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        **options,
    )


def tuned(model: Any, seed: int, *, rows: int | None = None) -> Any:
    """A copy that moved a little, as fine-tuning moves it; its embeddings resized to `rows`."""
    moved = copy.deepcopy(model)
    if rows is not None:
        set_seed(100 + seed)
        moved.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.004)
    return moved


def save(
    model: Any, folder: Path, *tokens: str | AddedToken, tokenizer: bool = False, **options: Any
) -> Path:
    """The model as `save_pretrained` leaves it; with tokens, or where asked for, its tokenizer too."""
    model.save_pretrained(folder, **options)
    if tokens or tokenizer:
        save_tokenizer(folder, *tokens)
    return folder


def save_tokenizer(folder: Path, *tokens: str | AddedToken) -> Path:
    backend = Tokenizer(models.BPE(vocab=WORDS, merges=[("a", "b")], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    made.add_tokens(list(tokens))
    made.save_pretrained(folder)
    return folder


def state_of(folder: Path) -> State:
    """All tensors of a folder, each of which one file holds."""
    states = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert states
    assert sum(map(len, states)) == len(set().union(*states))
    return {name: tensor for state in states for name, tensor in state.items()}


def write_state(
    state: Mapping[str, torch.Tensor], folder: Path, config: Mapping[str, Any] | None = None
) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def edit_config(folder: Path, **changes: Any) -> Path:
    config = {key: value for key, value in {**config_of(folder), **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def told(report: MergeReport) -> dict[str, tuple[str, str]]:
    """What the report says of each tensor: how, and the note."""
    assert len({fate.name for fate in report.tensors}) == len(report.tensors)
    return {fate.name: (fate.how, fate.note) for fate in report.tensors}


def sum_of(base: torch.Tensor, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Task arithmetic, in float64."""
    total = base.double()
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + weight * (tensor.double() - base.double())
    return total


def check_report(
    report: MergeReport, base: State, models: Sequence[State], weights: Sequence[float]
) -> State:
    """Every tensor of the result is in the report once, and is what the report says: by task arithmetic,
    copied or carried.

    Rows that models added are left to the test. Returns the result.
    """
    out = Path(report.out)
    result, record = state_of(out), json.loads((out / "dare_merge.json").read_text())
    assert (
        [fate.name for fate in report.tensors] == sorted(result) == [row["name"] for row in record["tensors"]]
    )
    assert record == json.loads(json.dumps(report.as_json()))
    for fate in report.tensors:
        name, tensor = fate.name, result[fate.name]
        assert tuple(tensor.shape) == fate.info.shape
        if fate.how == "copied":
            assert torch.equal(tensor, base[name].to(tensor.dtype)), name
        elif fate.how == "carried":
            assert torch.equal(tensor, models[fate.models[0]][name].to(tensor.dtype)), name
        else:
            count = len(base[name]) if base[name].dim() else None
            own = [
                models[number][name][:count] if base[name].dim() else models[number][name]
                for number in fate.models
            ]
            expected = sum_of(base[name], own, [weights[number] for number in fate.models])
            inner = tensor[:count] if base[name].dim() else tensor
            torch.testing.assert_close(
                inner,
                expected.to(tensor.dtype),
                rtol=2**-7 if tensor.dtype == torch.bfloat16 else 1e-6,
                atol=1e-6,
            )
    return result


def merge_refused(
    base: Any, given: Sequence[Any], place: Path, kind: type[DareError], *texts: str, **options: Any
) -> None:
    """The merge says why not, in one line, and leaves nothing."""
    place.mkdir(exist_ok=True)
    before = sorted(place.rglob("*"))
    with pytest.raises(DareError) as caught:
        merge(base, given, place / "out", **options)
    assert sorted(place.rglob("*")) == before
    refusal(caught.value, kind, *texts)
