"""Mixtures of experts: `mergekit-moe`'s configurations, against their definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import dare_train
from quantised_models import quantised
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dare_train import mixture_of_experts
from dare_train.errors import CheckpointError, ConfigError, DareError, TensorMismatch
from dare_train.merging.config.mergekit import read
from dare_train.merging.expert_recipe import read_experts

State = dict[str, torch.Tensor]
Fields = dict[str, Any]
WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(29))]
SIZES: Fields = dict(
    vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=1,
)  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-3, rope_theta=50.0),
    "mistral": MistralConfig(**SIZES, rope_theta=70.0),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}
NAMES = ("base", "one", "two")
PROMPTS = {"one": ["w1 w2", "w3 w4 w5"], "two": ["w6 w7 w8"], "base": ["w9"]}


def save_dense(config: PreTrainedConfig, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the models of a type are made when they are asked for."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(kind: str) -> dict[str, State]:
    found = {}
    for seed, name in enumerate(NAMES):
        if not Path(name).exists():
            save_dense(CONFIGS[kind], Path(name), seed + 1)
        found[name] = load_file(Path(name) / "model.safetensors")
    return found


def recipe(gate: str = "random", shared: str = "", **fields: Any) -> Path:
    experts = [{"source_model": name, "positive_prompts": PROMPTS[name]} for name in ("one", "two")]
    document: Fields = {"base_model": "base", "gate_mode": gate, "experts": experts}
    if shared:
        prompts = {"positive_prompts": PROMPTS["base"]} if shared == "gated" else {}
        document["shared_experts"] = [{"source_model": "base", **prompts}]
    Path("moe.yml").write_text(json.dumps({**document, **fields}))
    return Path("moe.yml")


def loaded(folder: str) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


MATRICES = ("gate_proj", "up_proj", "down_proj")
SHAPES: dict[str, tuple[str, str, Fields]] = {
    "Mixtral": ("llama", "MixtralForCausalLM", {}),
    "Mixtral of Mistral": ("mistral", "MixtralForCausalLM", {}),
    "Qwen": ("qwen2", "Qwen2MoeForCausalLM", {"shared": "gated"}),
    "Qwen of Llama": ("llama", "Qwen2MoeForCausalLM", {"shared": "gated", "architecture": "qwen"}),
    "Qwen3": ("qwen3", "Qwen3MoeForCausalLM", {}),
    "DeepSeek": ("llama", "DeepseekForCausalLM", {"shared": "plain"}),
    "DeepSeek alone": ("mistral", "DeepseekForCausalLM", {"architecture": "deepseek"}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_experts_are_the_mlps_and_the_rest_is_the_bases(case: str, dense: Path) -> None:
    kind, architecture, options = SHAPES[case]
    models = made(kind)
    report = mixture_of_experts(recipe(**options), "out")
    found = load_file("out/model.safetensors")
    mixtral = architecture.startswith("Mixtral")
    block, parts = ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", MATRICES)
    expected = {name: tensor for name, tensor in models["base"].items() if ".mlp." not in name}
    shared = {"Qwen2MoeForCausalLM": "shared_expert", "DeepseekForCausalLM": "shared_experts"}
    for layer in range(2):
        begin = f"model.layers.{layer}"
        for part, called in zip(MATRICES, parts, strict=True):
            for number, name in enumerate(("one", "two")):
                expert = f"{begin}.{block}.experts.{number}.{called}.weight"
                expected[expert] = models[name][f"{begin}.mlp.{part}.weight"]
            if "shared" in options:
                inside = f"{begin}.{block}.{shared[architecture]}.{part}.weight"
                expected[inside] = models["base"][f"{begin}.mlp.{part}.weight"]
        if case == "Qwen of Llama":
            for which, rows in (("q", 16), ("k", 8), ("v", 8)):
                expected[f"{begin}.self_attn.{which}_proj.bias"] = torch.zeros(rows).bfloat16()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    gates = {f"model.layers.{layer}.{block}.gate.weight": (2, 16) for layer in range(2)}
    if architecture.startswith("Qwen2"):
        gates |= {f"model.layers.{layer}.mlp.shared_expert_gate.weight": (1, 16) for layer in range(2)}
    assert {name: tuple(found[name].shape) for name in found.keys() - expected.keys()} == gates
    assert report.tensors.keys() == found.keys()
    config = json.loads(Path("out/config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["num_experts_per_tok"] == 2
    if architecture.startswith("Deepseek"):
        assert "trust_remote_code=True" in report.notes[0]
        assert (config["n_routed_experts"], config["n_shared_experts"]) == (
            2,
            1 if "shared" in options else None,
        )
        assert config["rope_theta"] == {"llama": 50.0, "mistral": 70.0}[kind]
    else:
        assert type(loaded("out")).__name__ == architecture
    assert Path("out/tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_experts_that_are_all_the_base_are_the_base(kind: str, dense: Path) -> None:
    """Whatever the gates say: the configuration computes what the dense model does."""
    made(kind)
    experts = [{"source_model": "base"}] * 4
    mixture_of_experts(recipe(experts=experts), "out", allow_same=True)
    tokens = {"input_ids": torch.arange(12)[None]}
    with torch.no_grad():
        found = loaded("out").float()(**tokens).logits
        expected = AutoModelForCausalLM.from_pretrained("base").float()(**tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def hidden_states(texts: list[str], mode: str) -> torch.Tensor:
    """A vector for each layer, in float64, one prompt after the other."""
    model = AutoModelForCausalLM.from_pretrained("base")
    vectors = []
    for text in texts:
        ids = torch.tensor([[WORDS.index(word) for word in ["<s>", *text.split()]]])
        with torch.no_grad():
            states = torch.stack(model(input_ids=ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
        vectors.append(states.double().mean(1) if mode == "hidden_avg" else states[:, -1].double())
    return torch.stack(vectors).mean(0)


def embedding(texts: list[str]) -> torch.Tensor:
    rows = load_file("base/model.safetensors")["model.embed_tokens.weight"].double()
    ids = [WORDS.index(word) for text in texts for word in ["<s>", *text.split()]]
    total = rows[ids].sum(0)
    return (total / total.norm()).repeat(2, 1)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_gates_of_prompts(mode: str, dense: Path) -> None:
    made("llama")
    prompts = {"one": ["w1 w2", "w3 w4"], "two": ["w6 w7"]}
    against = ["w10 w11"]
    experts = [
        {"source_model": "one", "positive_prompts": prompts["one"]},
        {"source_model": "two", "positive_prompts": prompts["two"], "negative_prompts": against},
    ]
    mixture_of_experts(recipe(mode, experts=experts), "out")
    found = load_file("out/model.safetensors")

    def of(texts: list[str]) -> torch.Tensor:
        return embedding(texts) if mode == "cheap_embed" else hidden_states(texts, mode)

    for number, vectors in enumerate((of(prompts["one"]), of(prompts["two"]) - of(against))):
        for layer, vector in enumerate(vectors / vectors.norm(dim=-1, keepdim=True)):
            gate = found[f"model.layers.{layer}.block_sparse_moe.gate.weight"][number].double()
            torch.testing.assert_close(gate, vector, rtol=0.02, atol=0.004)


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_gates_that_are_drawn_are_functions_of_the_seed(mode: str, dense: Path) -> None:
    made("llama")
    drawn = []
    for out, seed in (("out", 0), ("again", 0), ("other", 1)):
        mixture_of_experts(recipe(mode, dtype="float32"), out, seed=seed)
        state = load_file(f"{out}/model.safetensors")
        drawn.append(torch.stack([state[f"model.layers.{n}.block_sparse_moe.gate.weight"] for n in (0, 1)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    if mode == "uniform_random":
        assert 0.2 < float(drawn[0].abs().max()) <= 0.25
    else:
        assert 0.7 < float(drawn[0].std()) < 1.3


def test_noise_and_residual_scale_are_of_one_expert(dense: Path) -> None:
    models = made("llama")
    experts = [{"source_model": "one", "noise_scale": 0.5}, {"source_model": "two", "residual_scale": 0.25}]
    mixture_of_experts(recipe(experts=experts, dtype="float32"), "out")
    mixture_of_experts(recipe(experts=experts, dtype="float32"), "again")
    found, again = (load_file(f"{out}/model.safetensors") for out in ("out", "again"))
    assert all(torch.equal(found[name], again[name]) for name in found)
    begin = "model.layers.1.block_sparse_moe.experts"
    noises = [
        found[f"{begin}.0.{called}.weight"] - models["one"][f"model.layers.1.mlp.{part}.weight"].float()
        for part, called in zip(MATRICES, ("w1", "w3", "w2"), strict=True)
    ]
    assert all(0.4 < float(noise.std()) < 0.6 for noise in noises)
    assert not torch.allclose(noises[0], noises[1])
    for part, called, factor in (("gate_proj", "w1", 1), ("up_proj", "w3", 1), ("down_proj", "w2", 0.25)):
        expected = models["two"][f"model.layers.1.mlp.{part}.weight"].float() * factor
        assert torch.equal(found[f"{begin}.1.{called}.weight"], expected)


def test_a_head_that_is_the_embedding_stays_it(dense: Path) -> None:
    for seed, name in enumerate(NAMES):
        save_dense(LlamaConfig(**{**SIZES, "tie_word_embeddings": True}), Path(name), seed)
    mixture_of_experts(recipe(), "out")
    assert "lm_head.weight" not in load_file("out/model.safetensors")
    model = loaded("out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_as_a_command_and_again(dense: Path) -> None:
    made("llama")
    done = dare_train("moe", recipe("hidden"), "--out", "out", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "Mixtral: 2 experts, 2 for each token, 29 tensors" in done.stdout
    done = dare_train("moe", "out/dare_moe.yml", "--out", "again", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json"):
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()
    done = dare_train("moe", recipe(experts=[]), "--out", "none", cwd=Path.cwd())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


ONE = {"source_model": "one", "positive_prompts": ["w1"]}
TWO = {"source_model": "two", "positive_prompts": ["w2"]}
WRONG: dict[str, tuple[Fields, str]] = {
    "no experts": ({"experts": []}, "experts: expected a list with at least one entry"),
    "no base": ({"base_model": None}, "base_model: expected a name, found none"),
    "another key": ({"merge_method": "ties"}, "merge_method: expected one of base_model, experts"),
    "another gate": ({"gate_mode": "learned"}, "gate_mode: expected one of hidden, hidden_avg"),
    "too many for a token": ({"experts_per_token": 3}, "experts_per_token: expected 1 to 2"),
    "none for a token": ({"experts_per_token": 0}, "experts_per_token: expected 1 to 2"),
    "another dtype": ({"dtype": "int8"}, "dtype: expected one of float64"),
    "no prompts": (
        {"gate_mode": "hidden", "experts": [ONE, {"source_model": "two"}]},
        r"experts\[1\].positive_prompts: expected at least one.*or gate_mode: random",
    ),
    "the same prompts": (
        {"gate_mode": "hidden", "experts": [ONE, {**TWO, "positive_prompts": ["w1"]}]},
        "experts: expected different prompts",
    ),
    "one text": (
        {"experts": [{**ONE, "positive_prompts": "w1"}]},
        r"experts\[0\].positive_prompts: expected a list of texts",
    ),
    "the same models": ({"experts": [ONE, {**TWO, "source_model": "one"}]}, "allow_same=True"),
    "no number": ({"experts": [ONE, {**TWO, "noise_scale": "much"}]}, r"noise_scale: expected a number"),
    "too large a number": (
        {"experts": [ONE, {**TWO, "residual_scale": 10**40}]},
        "residual_scale: expected a",
    ),
    "no such shape": ({"architecture": "gpt"}, "architecture: expected one of Mixtral, DeepSeek MoE"),
    "no shape of it": (
        {"architecture": "mixtral", "shared_experts": [{"source_model": "base"}]},
        "Mixtral: has no shared_experts",
    ),
    "two shared": (
        {"architecture": "deepseek", "shared_experts": [{"source_model": "base"}] * 2},
        "DeepSeek MoE: has at most one of shared_experts, without prompts",
    ),
    "another type": ({"architecture": "qwen3"}, "Qwen3 MoE: takes models of one type among qwen3, not llama"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_made_is_refused(case: str, dense: Path) -> None:
    made("llama")
    fields, text = WRONG[case]
    with pytest.raises(ConfigError, match=text):
        mixture_of_experts(recipe(**fields), "out")
    assert not Path("out").exists()


@pytest.mark.parametrize("seed", [-1, 1 << 64, 0.5])
def test_a_seed_that_is_none_is_refused(seed: Any, dense: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed: expected an integer in \[0, 2\*\*64\), found"):
        mixture_of_experts(recipe(), "out", seed=seed)


def test_models_that_do_not_fit_are_refused(dense: Path) -> None:
    made("llama")
    state = load_file("two/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**state, name: torch.ones(32, 16).bfloat16()}, "two/model.safetensors")
    with pytest.raises(
        TensorMismatch, match=r"expected shape \[24, 16\], as in the base, found \[32, 16\] in two"
    ):
        mixture_of_experts(recipe(), "out")
    save_file({**state, "model.layers.0.self_attn.q_proj.bias": torch.ones(16)}, "two/model.safetensors")
    mixture_of_experts(recipe(), "fits")
    biased = LlamaConfig(**SIZES, attention_bias=True)
    for seed, folder in enumerate(NAMES):
        save_dense(biased, Path("biased") / folder, seed)
    document = json.loads(recipe().read_text())
    document["base_model"] = "biased/base"
    Path("moe.yml").write_text(json.dumps(document))
    with pytest.raises(
        TensorMismatch, match=r"bias: expected no such tensor.*MixtralForCausalLM cannot be made"
    ):
        mixture_of_experts("moe.yml", "out")


def test_quantised_models_and_missing_tokenizers_are_refused(dense: Path) -> None:
    made("llama")
    for file in Path("base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="base: expected a tokenizer, for the prompts, found none"):
        mixture_of_experts(recipe("cheap_embed"), "out")
    state = {f"model.layers.0.self_attn.{part}.weight": torch.ones(32, 32) for part in ("q_proj", "k_proj")}
    packed, config = quantised("fp8", state)
    save_file(packed, "two/model.safetensors")
    Path("two/config.json").write_text(json.dumps(config))
    with pytest.raises(DareError, match="found quantised weights: fp8 with scales"):
        mixture_of_experts(recipe(), "out")


def test_a_configuration_that_transformers_does_not_take_is_an_error(dense: Path) -> None:
    made("llama")
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(CheckpointError, match="base: expected a configuration of llama, found"):
        mixture_of_experts(recipe(), "out")
    Path("base/config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    with pytest.raises(
        CheckpointError, match="expected a configuration without code and without endless modules"
    ):
        mixture_of_experts(recipe(), "out")


def test_merge_names_the_command_for_mixtures() -> None:
    mixture = {"base_model": "a", "gate_mode": "random", "experts": [{"source_model": "a"}]}
    with pytest.raises(ConfigError, match="found experts instead; dare-train moe"):
        read(mixture)


def test_short_names_of_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "moe.yml"
    for given, code in (("bf16", "BF16"), ("half", "F16"), ("torch.float32", "F32"), (None, None)):
        document = {"base_model": "a", "gate_mode": "random", "experts": [ONE, TWO], "dtype": given}
        path.write_text(json.dumps(document))
        assert read_experts(path).dtype == code
