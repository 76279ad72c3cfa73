"""Models that tie a head to an embedding, whatever the two are called: merged, they are tied, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import set_seed

from dare_train import DareConfig, Snapshotter, extract, merge

SMALL: dict[str, Any] = dict(
    vocab_size=64,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
)
BERT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
)
T5: dict[str, Any] = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
CONFIGS: dict[str, dict[str, Any]] = {
    "Albert": {**BERT, "embedding_size": 8},
    "BigBirdPegasus": {**SMALL, "max_position_embeddings": 64},
    "LED": {
        **{name: value for name, value in SMALL.items() if name != "max_position_embeddings"},
        "max_encoder_position_embeddings": 32,
        "max_decoder_position_embeddings": 32,
        "attention_window": 4,
    },
    "ProphetNet": dict(
        vocab_size=64, hidden_size=16, num_encoder_layers=1, num_decoder_layers=1,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    ),
    "T5": T5,
    "MT5": {**T5, "tie_word_embeddings": False},
    "Bart": SMALL,
    "Bert": BERT,
    "Electra": {**BERT, "embedding_size": 16},
    "Llama": {**BERT, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "GPT2": dict(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16),
}  # fmt: skip
HEADED = {
    "Albert": "AlbertForMaskedLM",
    "Bert": "BertForMaskedLM",
    "Electra": "ElectraForMaskedLM",
    "Llama": "LlamaForCausalLM",
    "GPT2": "GPT2LMHeadModel",
}
BARE = {"Electra": "ElectraModel", "MT5": "MT5Model", "T5": "T5Model"}


def classes(family: str) -> tuple[Any, Any, Any]:
    """Of the model with a head, of the one without, and of their configuration."""
    headed = HEADED.get(family, f"{family}ForConditionalGeneration")
    bare = BARE.get(family, f"{family}Model")
    return tuple(getattr(transformers, name) for name in (headed, bare, f"{family}Config"))  # type: ignore[return-value]


def tuned(headed: Any, base: Path, seed: int, out: Path) -> Any:
    set_seed(7)  # heads that the base lacks begin alike
    model = headed.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    model.save_pretrained(out)
    return model


def ties(model: torch.nn.Module) -> set[frozenset[str]]:
    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in places.values() if len(names) > 1}


@pytest.mark.parametrize("of", ["the same class", "the bare class"])
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_tied_stays_tied(family: str, of: str, tmp_path: Path) -> None:
    headed, bare, config = classes(family)
    set_seed(5)
    base = tmp_path / "base"
    (headed if of == "the same class" else bare)(config(**CONFIGS[family])).save_pretrained(base)
    models = [tuned(headed, base, seed, tmp_path / f"tuned-{seed}") for seed in (1, 2)]
    packages = []
    for number, model in enumerate(models):
        set_seed(7)
        taker = Snapshotter.begin(headed.from_pretrained(base), tmp_path / "begun", DareConfig(p=0))
        taker.take(model, tmp_path / f"live-{number}", step=1, files=tmp_path / f"tuned-{number + 1}")
        taken = taker.close()
        assert taken is not None
        packages.append(taken.package)
    folders = [tmp_path / "tuned-1", tmp_path / "tuned-2"]
    extracted = [extract(base, folder, tmp_path / f"of-{folder.name}", p=0) for folder in folders]
    own = [name for name, record in extracted[0].records.items() if record.kind == "whole"]
    for what, given in (("folders", folders), ("packages", packages), ("extracted", extracted)):
        merge(base, given, tmp_path / what, method="average", take=dict.fromkeys(own, 0))
        loaded, told = headed.from_pretrained(tmp_path / what, output_loading_info=True)
        assert not told["missing_keys"], what
        assert all("pooler" in name for name in told["unexpected_keys"]), (
            what
        )  # nothing of the base is left out
        assert ties(loaded) == ties(models[0]), what
        for name, parameter in loaded.named_parameters():
            one, two = (dict(model.named_parameters())[name] for model in models)
            expected = one if torch.equal(parameter, one) else (one + two) / 2
            torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=0)
