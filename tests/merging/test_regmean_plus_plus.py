"""RegMean++: layer after layer against its definition in float64, and what stays beside the result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import adapt
from commands import dare_train
from merging import State, bert_config, files_of, state_of, tuned, write_state
from statistics_of import close
from tiny import refusal
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from dare_train import collect_gram, extract, merge, regmean_plus_plus
from dare_train.errors import CheckpointError, ConfigError, DareError, OutputExists, TensorMismatch
from dare_train.merging.statistics.statistics_file import StatisticsFile

Batches = list[dict[str, torch.Tensor]]


def llama(**options: Any) -> LlamaForCausalLM:
    set_seed(3)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False, attn_implementation="eager", **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(seed: int, *, vocabulary: int = 40, padded: bool = True) -> Batches:
    """Two, of which the first has padding."""
    ids = torch.randint(1, vocabulary, (5, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 7, 7] if padded else [7] * 5)[:, None]
    rows = {"input_ids": ids * mask, "attention_mask": mask.long()}
    return [
        {name: tensor[:3] for name, tensor in rows.items()},
        {name: tensor[3:] for name, tensor in rows.items()},
    ]


def moved(model: Any, seed: int) -> Any:
    """A copy that went far enough for layers of the merged model to give other inputs."""
    far = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in far.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return far


def saved(tmp_path: Path, make: Callable[[], Any]) -> tuple[Path, list[Any], list[Path]]:
    """A base, and two models of it, in memory and in folders."""
    base = make()
    experts = [moved(base, seed) for seed in (1, 2)]
    base.save_pretrained(tmp_path / "base")
    for number, expert in enumerate(experts):
        expert.save_pretrained(tmp_path / f"expert-{number}")
    return tmp_path / "base", experts, [tmp_path / f"expert-{number}" for number in range(2)]


# The definition.


def closed_form(
    grams: Sequence[torch.Tensor], layers: Sequence[torch.Tensor], weights: Sequence[float]
) -> Any:
    """W of RegMean for layers [out, in], with shrink 0.9 and ridge 1e-6."""
    size = len(grams[0])
    shrunk = []
    for gram, weight in zip(grams, weights, strict=True):
        own = gram * (0.9 + 0.1 * torch.eye(size, dtype=gram.dtype))
        shrunk.append(weight * (own + 1e-6 * own.trace() / size * torch.eye(size, dtype=gram.dtype)))
    products = [gram @ layer.T for gram, layer in zip(shrunk, layers, strict=True)]
    return torch.linalg.solve(sum(shrunk), sum(products)).T


def run_layer(model: Any, layer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One decoder layer on hidden states [batch, seq, size]."""
    count = hidden.shape[1]
    seen = torch.ones(count, count).tril().bool() & mask.bool()[:, None, None]
    bias = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, -1e30)
    positions = torch.arange(count)[None]
    places = model.model.rotary_emb(hidden, positions)
    found = layer(hidden, attention_mask=bias, position_ids=positions, position_embeddings=places)
    return found[0] if isinstance(found, tuple) else found


def grams_in(module: Any, run: Callable[[], object], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Σ x xᵀ of what goes into the linear layers of a module while it runs, without padding."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear):

            def see(_: Any, args: Any, name: str = name) -> None:
                rows = args[0][mask.bool()]
                sums[name] = sums.get(name, 0) + rows.T @ rows

            hooks.append(part.register_forward_pre_hook(see))
    run()
    for hook in hooks:
        hook.remove()
    return sums


@torch.no_grad()
def by_definition(experts: Sequence[Any], data: Sequence[Batches], weights: Sequence[float]) -> State:
    """RegMean++ of decoders, in float64."""
    experts = [copy.deepcopy(expert).double().eval() for expert in experts]
    merged = copy.deepcopy(experts[0])
    shares = [weight / sum(weights) for weight in weights]

    def average(into: Any, parts: Sequence[Any]) -> None:
        """Every parameter the weighted mean."""
        for name, parameter in into.named_parameters():
            own = [part.get_parameter(name) for part in parts]
            parameter.copy_(sum(share * one for share, one in zip(shares, own, strict=True)))

    average(merged, experts)
    hidden = [[merged.model.embed_tokens(batch["input_ids"]) for batch in own] for own in data]
    tokens = [sum(float(batch["attention_mask"].sum()) for batch in own) for own in data]
    for number, layer in enumerate(merged.model.layers):
        grams: list[dict[str, torch.Tensor]] = []
        for place, expert in enumerate(experts):
            own_layer = expert.model.layers[number]
            total: dict[str, torch.Tensor] = {}
            for state, batch in zip(hidden[place], data[place], strict=True):
                mask = batch["attention_mask"]
                found = grams_in(
                    own_layer, lambda s=state, m=mask, e=expert, o=own_layer: run_layer(e, o, s, m), mask
                )
                for name, gram in found.items():
                    total[name] = total.get(name, 0) + gram / tokens[place]
            grams.append(total)
        for name in grams[0]:
            own = [expert.model.layers[number].get_parameter(f"{name}.weight") for expert in experts]
            layer.get_parameter(f"{name}.weight").copy_(
                closed_form([gram[name] for gram in grams], own, weights)
            )
        hidden = [
            [run_layer(merged, layer, s, b["attention_mask"]) for s, b in zip(states, own, strict=True)]
            for states, own in zip(hidden, data, strict=True)
        ]
    last = []
    for states, own, count in zip(hidden, data, tokens, strict=True):
        rows = torch.cat(
            [merged.model.norm(s)[b["attention_mask"].bool()] for s, b in zip(states, own, strict=True)]
        )
        last.append(rows.T @ rows / count)
    merged.lm_head.weight.copy_(closed_form(last, [expert.lm_head.weight for expert in experts], weights))
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 0.5]])
def test_layers_are_merged_by_what_comes_from_merged_layers(tmp_path: Path, weights: list[float]) -> None:
    base, experts, folders = saved(tmp_path, llama)
    data = [batches(1), batches(2)]
    report = regmean_plus_plus(base, folders, tmp_path / "out", data, weights=weights)
    expected, found = by_definition(experts, data, weights), state_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close(found[name], tensor, 1e-5)
    assert report.notes[0].startswith("RegMean++: ")
    own = [
        collect_and_save(expert, own, tmp_path / f"{n}")
        for n, (expert, own) in enumerate(zip(experts, data, strict=True))
    ]
    merge(base, folders, tmp_path / "plain", method="regmean", weights=weights, gram=own)
    name = "model.layers.2.mlp.down_proj.weight"
    plain = state_of(tmp_path / "plain")[name]
    assert float((plain.double() - expected[name]).norm()) > 1e-3 * float(expected[name].norm())
    first = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(state_of(tmp_path / "plain")[first], found[first]), "embeddings are averaged first"


def collect_and_save(model: Any, data: Batches, folder: Path) -> Path:
    from dare_train import save_statistics

    return save_statistics(folder.with_suffix(".gram"), "gram", collect_gram(model, data), examples=5)


def gpt2() -> GPT2LMHeadModel:
    set_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=16, eos_token_id=0)
    )


def bert() -> BertForSequenceClassification:
    set_seed(2)
    config = bert_config(num_labels=3)
    config.vocab_size = 40
    config.num_hidden_layers = 2
    return BertForSequenceClassification(config)


def t5() -> T5ForConditionalGeneration:
    set_seed(2)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def albert() -> AlbertForMaskedLM:
    set_seed(2)
    return AlbertForMaskedLM(
        AlbertConfig(
            vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=16,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (gpt2, [f"transformer.h.{n}." for n in range(3)]),
        (bert, ["bert.encoder.layer.0.", "bert.encoder.layer.1.", "bert.pooler.", "classifier."]),
        (t5, [*(f"{side}.block.{n}." for side in ("encoder", "decoder") for n in range(2)), "lm_head."]),
        (
            albert,
            [
                "albert.encoder.embedding_hidden_mapping_in.",
                "albert.encoder.albert_layer_groups.0.",
                "predictions.dense.",
            ],
        ),
    ],
)
def test_each_gram_is_that_of_a_models_layer_after_merged_ones(
    tmp_path: Path, make: Callable[[], Any], blocks: list[str]
) -> None:
    """In the merged model with one layer of an expert, which sees what comes before it."""
    base, experts, folders = saved(tmp_path, make)
    data = [batches(seed, padded=make is not t5) for seed in (1, 2)]
    if make is t5:
        data = [[{**batch, "decoder_input_ids": batch["input_ids"]} for batch in own] for own in data]
    regmean_plus_plus(base, folders, tmp_path / "out", data)
    result = type(experts[0]).from_pretrained(tmp_path / "out").eval()
    for number, (expert, own) in enumerate(zip(experts, data, strict=True)):
        file = StatisticsFile.open(tmp_path / f"out.{number + 1}.gram.safetensors", "gram")
        reached = 0
        for block in blocks:
            hybrid = copy.deepcopy(result)
            parts = {name: part for name, part in expert.state_dict().items() if name.startswith(block)}
            assert parts
            hybrid.load_state_dict(parts, strict=False)
            grams = collect_gram(hybrid, own)
            for name in grams.keys() & parts.keys():
                close(torch.tensor(file.whole(name)), grams[name].double(), 1e-5)
                assert file.transposed(name) == (name in grams.transposed)
                reached += 1
        assert reached == len(file.tensors) > 3
        assert file.examples == 5


def test_the_model_is_the_merged_one_afterwards(tmp_path: Path) -> None:
    base, _, folders = saved(tmp_path, llama)
    live = LlamaForCausalLM.from_pretrained(base)
    live.train()
    regmean_plus_plus(base, folders, tmp_path / "out", [batches(1), batches(2)], model=live, examples=4)
    assert live.training
    found = state_of(tmp_path / "out")
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, found[name]), name


def test_packages_and_adapters_are_models_too(tmp_path: Path) -> None:
    base, _, folders = saved(tmp_path, llama)
    data = [batches(1), batches(2)]
    regmean_plus_plus(base, folders, tmp_path / "out", data)
    extract(base, folders[0], tmp_path / "package", p=0.0)
    adapted = adapt(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=["q_proj"])
    adapted.merge_and_unload().save_pretrained(tmp_path / "adapted")
    regmean_plus_plus(base, [tmp_path / "package", folders[1]], tmp_path / "of-package", data)
    assert (
        files_of(tmp_path / "out")["model.safetensors"]
        == files_of(tmp_path / "of-package")["model.safetensors"]
    )
    regmean_plus_plus(base, [tmp_path / "adapter", folders[1]], tmp_path / "of-adapter", data)
    regmean_plus_plus(base, [tmp_path / "adapted", folders[1]], tmp_path / "of-adapted", data)
    expected = state_of(tmp_path / "of-adapted")
    for name, tensor in state_of(tmp_path / "of-adapter").items():
        close(tensor, expected[name].double(), 1e-5)


def test_the_recipe_gives_the_same_again(tmp_path: Path) -> None:
    base, _, folders = saved(tmp_path, llama)
    regmean_plus_plus(
        base, folders, tmp_path / "out", [batches(1), batches(2)], p=[0.5, 0.0], seed=3, shrink=0.8
    )
    done = dare_train("merge", "out/dare_merge.yml", "--out", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "RegMean++: " in " ".join(done.stdout.split())
    first, again = files_of(tmp_path / "out"), files_of(tmp_path / "again")
    assert first["model.safetensors"] == again["model.safetensors"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"shrink": 0.8}, "found those of another model or merge; collect them anew"),
        ({"weights": [1.0, 2.0]}, "found those of another model or merge"),
        (
            {"swapped": True},
            "expected Gram matrices of model 1, of what comes through this merge's layers",
        ),
        (
            {"plain": True},
            "of what comes through this merge's layers, found those of inputs of its own layers",
        ),
    ],
)
def test_grams_of_another_merge_are_refused(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    base, experts, folders = saved(tmp_path, llama)
    regmean_plus_plus(base, folders, tmp_path / "out", [batches(1), batches(2)])
    files = [tmp_path / "out.1.gram.safetensors", tmp_path / "out.2.gram.safetensors"]
    if settings.pop("swapped", False):
        files.reverse()
    if settings.pop("plain", False):
        files[1] = collect_and_save(experts[1], batches(2), tmp_path / "plain")
    with pytest.raises(CheckpointError) as caught:
        merge(base, folders, tmp_path / "other", method="regmean", gram=files, **settings)
    refusal(caught.value, CheckpointError, text)


# Refusals.


class Twice(torch.nn.Module):
    """Two layers, of which the first runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](self.layers[1](self.layers[0](x)))


def test_layers_that_run_again_are_refused(tmp_path: Path) -> None:
    set_seed(0)
    model = Twice()
    data = [[{"x": torch.randn(3, 4)}]]
    with pytest.raises(ConfigError) as caught:
        regmean_plus_plus(model.state_dict(), [tuned(model, 1)], tmp_path / "out", data, model=model)
    refusal(caught.value, ConfigError, "layers.0, which runs again after another", "merge with regmean")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "kind", "texts"),
    [
        ({"batches": [[]]}, ConfigError, ["batches: expected those of each of 2 models, found 1"]),
        ({"batches": [[], []]}, ConfigError, ["batches: expected at least one of each model, found none"]),
        ({"examples": 0}, ConfigError, ["examples"]),
        ({"gram": ["a", "b"]}, ConfigError, ["gram: expected none: they are collected, found 2 files"]),
        ({"density": 0.2}, ConfigError, ["density"]),
        ({"out": "expert-0"}, OutputExists, ["expert-0"]),
        ({"model": "small"}, TensorMismatch, ["pass model=, of the class and the sizes that the base has"]),
        ({"model": "adapted"}, ConfigError, ["model: expected one without adapters, found a PEFT model"]),
        ({"base": "memory"}, ConfigError, ["model: expected a model that batches go through"]),
        ({"exclude": "*"}, ConfigError, ["linear layers that models change and batches reach"]),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, change: dict[str, Any], kind: type[DareError], texts: list[str]
) -> None:
    base: Any
    base, _, folders = saved(tmp_path, llama)
    given: dict[str, Any] = {"batches": [batches(1), batches(2)], **change}
    out = tmp_path / given.pop("out", "out")
    if given.get("model") == "small":
        given["model"] = llama(head_dim=4)
    if given.get("model") == "adapted":
        given["model"] = adapt(llama(), tmp_path / "of-the-model", target_modules=["q_proj"])
    if given.pop("base", ""):
        base = state_of(base)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DareError) as caught:
        regmean_plus_plus(base, folders, out, given.pop("batches"), **given)
    refusal(caught.value, kind, *texts)
    assert sorted(tmp_path.iterdir()) == before


def test_tensors_outside_of_layers_are_averaged(tmp_path: Path) -> None:
    base, experts, folders = saved(tmp_path, llama)
    regmean_plus_plus(base, folders, tmp_path / "out", [batches(1), batches(2)])
    name = "model.embed_tokens.weight"
    mean = sum(expert.state_dict()[name].double() for expert in experts) / 2
    close(state_of(tmp_path / "out")[name], mean, 1e-6)


def test_a_head_of_one_model_is_carried(tmp_path: Path) -> None:
    """A base without a head: what the batches go through is of the models' class."""
    base, experts, folders = saved(tmp_path, bert)
    encoder = {name: tensor for name, tensor in state_of(base).items() if not name.startswith("classifier")}
    write_state(
        {name.removeprefix("bert."): tensor for name, tensor in encoder.items()}, tmp_path / "encoder"
    )
    report = regmean_plus_plus(
        tmp_path / "encoder", folders, tmp_path / "out", [batches(1), batches(2)], model=bert(),
        take={"classifier.*": 1},
    )  # fmt: skip
    found = state_of(tmp_path / "out")
    assert torch.equal(found["classifier.weight"], experts[1].classifier.weight)
    assert "classifier.weight" not in StatisticsFile.open(tmp_path / "out.1.gram.safetensors", "gram").tensors
    assert report.counts()["carried"] == 2
