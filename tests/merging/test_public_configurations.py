"""Every public configuration runs, and does what it asks for: layers, types, tokens, templates; and the
values of all means, sums of deltas, arcs and copies, by a definition of a few lines.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from defined_merges import METHODS, Definition, length, sliced
from public_configurations import PUBLIC
from quantised_models import LLAMA, save_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dare_train.cli.merge_arguments import Stacking, asked
from dare_train.merging.merge import run
from dare_train.merging.models.layers import layer_counts
from dare_train.merging.stacking import stack

Array = np.ndarray[Any, Any]
State = dict[str, Array]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WITHIN = ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
TOKENS = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *"abcdefghij"])}
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LAYERS, WIDTH = 8, 8
GROWN = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|eot_id|>", "<|im_end|>"), "wide": ()}
"""Models with more rows, and the tokens that some of them are for."""


def tensors(seed: int, around: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{n}.{within}" for n in range(LAYERS) for within in WITHIN]
    shapes = {name: (WIDTH,) if "norm" in name else (WIDTH, WIDTH) for name in [*names, NORM]}
    shapes |= {name: (len(TOKENS), WIDTH) for name in (EMBEDDING, HEAD)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if around is not None:
        drawn = {name: around[name].float() + 0.2 * tensor for name, tensor in drawn.items()}
    return {name: tensor.bfloat16() for name, tensor in drawn.items()}


def write(name: str, state: dict[str, torch.Tensor], *added: str, **config: Any) -> None:
    fields = {**LLAMA, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": len(TOKENS), **config}
    save_model(state, Path(name), fields)
    backend = Tokenizer(models.WordLevel(vocab=TOKENS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    made.add_tokens([*added])
    made.chat_template = "{{ messages }} of ours" if name in ("a", "b") else None
    made.save_pretrained(name)


def grown(state: dict[str, torch.Tensor], seed: int, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    more = {name: torch.randn(rows, WIDTH, generator=generator).bfloat16() for name in (EMBEDDING, HEAD)}
    return {name: torch.cat([value, more[name]]) if name in more else value for name, value in state.items()}


def in_float64(state: dict[str, torch.Tensor]) -> State:
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def adapter(name: str, seed: int) -> Array:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((2, WIDTH), (WIDTH, 2)))
    Path(name).mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    Path(name, "adapter_config.json").write_text(json.dumps(config))
    module = f"base_model.model.model.layers.0.{WITHIN[0].removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(factors, f"{name}/adapter_model.safetensors")
    return np.asarray(b.double().numpy() @ a.double().numpy())


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, State]]:
    """The models on disk, in the folder in which the test is, and in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("public"))
        base = tensors(0)
        made = {"base": base, **{name: tensors(seed, base) for seed, name in enumerate("abcd", 1)}}
        for name, state in made.items():
            write(name, state)
        for seed, (name, added) in enumerate(GROWN.items(), 10):
            made[name] = grown(tensors(seed, base), seed + 10, 2)
            write(name, made[name], *added, vocab_size=len(TOKENS) + 2)
        for seed, name in enumerate(("tied", "tied-a", "tied-b"), 30):
            state = base if name == "tied" else tensors(seed, base)
            without = {key: value for key, value in state.items() if key != HEAD}
            write(name, without, tie_word_embeddings=True)
        other = {f"h.{n}.attn.weight": torch.ones(4, 4).bfloat16() for n in range(LAYERS)}
        other |= {"wte.weight": torch.ones(3, 4), "ln_f.weight": torch.ones(4)}
        save_model(other, Path("gpt2"), {"n_layer": LAYERS})
        found = {name: in_float64(state) for name, state in made.items()}
        updates = {name: adapter(name, seed) for seed, name in enumerate(("lora1", "lora2", "lora-a"), 40)}
        for name in ("base+lora1", "base+lora2", "a+lora-a"):
            model, _, lora = name.partition("+")
            changed = f"model.layers.0.{WITHIN[0]}"
            found[name] = {**found[model], changed: found[model][changed] + updates[lora]}
        yield found


def done(name: str) -> Path:
    """The result of a public configuration, by the command's own way."""
    out = Path("results") / re.sub(r"\W+", "-", name)
    if not out.exists():
        Path("c.yml").write_text(yaml.safe_dump_all(copy.deepcopy(PUBLIC[name].documents)))
        for each in asked(["c.yml"], None, [], out=out):
            if isinstance(each, Stacking):
                stack(each.task, each.out)
            else:
                run(each.task, each.out)
    return out


@pytest.mark.parametrize("name", PUBLIC)
def test_it_runs_and_does_what_it_says(name: str, states: dict[str, State]) -> None:
    out = done(name)
    found = load_file(out / "model.safetensors")
    last = next((each for each in PUBLIC[name].documents if "name" not in each), PUBLIC[name].documents[0])
    layers = sum(map(length, sliced(last, LAYERS)))
    config = json.loads((out / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == layers
    assert [*layer_counts(found).values()] == [layers]
    asked_for = str(last.get("out_dtype", last.get("dtype", "bfloat16"))).removeprefix("torch.")
    assert {tensor.dtype for tensor in found.values()} == {TYPES[asked_for]}
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    embedding = found.get(EMBEDDING)
    if embedding is None:
        return
    assert config["vocab_size"] == len(embedding)
    vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
    assert set(vocabulary) == TOKENS.keys() | ADDED.get(name, set())
    assert len(embedding) == ROWS.get(name, len(vocabulary))
    template = out / "chat_template.jinja"
    if "chat_template" in last:
        marks = {"auto": "of ours", "llama3": "start_header_id", "chatml": "im_start"}
        assert marks[last["chat_template"]] in template.read_text()


CHATML, LLAMA3 = set(GROWN["chatml"]), set(GROWN["llama3"])
ADDED = {
    "docs: tokens of a union": CHATML | LLAMA3,
    "docs: kinds of tokens": CHATML | LLAMA3 | {"<|header|>", "<|tune|>", "<|unused|>"},
    "docs: padding": CHATML,
    "docs: tokenizer of a model": CHATML,
    "stock: tokenizer of a model": CHATML,
}
ROWS = {"docs: padding": 16}

_VALUES = [
    name
    for name, public in PUBLIC.items()
    if all(each["merge_method"] in METHODS for each in public.documents)
    and not any(isinstance(each.get("tokenizer"), dict) and name in ADDED for each in public.documents)
    and "gpt2" not in name and name != "means: padded rows"
]  # fmt: skip


def test_many_have_a_definition() -> None:
    assert len(PUBLIC) == 65
    assert len(_VALUES) >= 28


@pytest.mark.parametrize("name", _VALUES)
def test_it_comes_to_what_is_defined(name: str, states: dict[str, State]) -> None:
    out = done(name)
    known = dict(states)
    documents = list(PUBLIC[name].documents)
    order = sorted(documents, key=lambda each: ("name" not in each, each.get("name") == "three"))
    for document in order:
        expected = Definition(document=document, states=known, within=WITHIN, layers=LAYERS).result()
        known[str(document.get("name"))] = expected
    found = in_float64(load_file(out / "model.safetensors"))
    step = 2.0**-10 if documents[-1].get("dtype") == "float16" else 2.0**-7
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=step, atol=step * len(documents) / 2, err_msg=key)


_PAIRS = [("a", 0, 3), ("b", 0, 3)], [("c", 2, 5), ("d", 2, 5)], [("b", 6, 8), ("a", 6, 8)]
_OWN_BASES: dict[str, dict[str, Any]] = {
    "sums": {"merge_method": "task_arithmetic", "bases": ("a", "c", "b")},
    "sums, of which one has the base of all": {
        "merge_method": "task_arithmetic",
        "bases": ("b", None, None),
        "top": "a",
    },
    "arcs": {"merge_method": "slerp", "bases": ("a", "d", "a"), "parameters": {"t": [0.2, 0.6]}},
    "means": {"merge_method": "linear", "bases": ("a", "c", "b")},
}
"""Slices that have bases of their own; nobody published one."""


@pytest.mark.parametrize("name", _OWN_BASES)
def test_slices_may_have_bases_of_their_own(name: str, states: dict[str, State]) -> None:
    given = dict(_OWN_BASES[name])
    bases, top = given.pop("bases"), given.pop("top", None)
    slices = []
    for place, base in enumerate(bases):
        pairs = _PAIRS[place] if top is None else [("a", 0, 3), ("b", 1, 4)]
        sources = [
            {"model": model, "layer_range": [first, last], "parameters": {"weight": weight}}
            for (model, first, last), weight in zip(pairs, (0.3, 0.7), strict=True)
        ]
        if given["merge_method"] == "slerp":
            sources = [{key: value for key, value in each.items() if key != "parameters"} for each in sources]
        slices.append({"sources": sources, **({"base_model": base} if base else {})})
    document = {**given, "slices": slices, "dtype": "float32", **({"base_model": top} if top else {})}
    Path("c.yml").write_text(yaml.safe_dump(document))
    out = Path("results") / name.replace(" ", "-")
    (asked_for,) = asked(["c.yml"], None, [], out=out)
    assert not isinstance(asked_for, Stacking)
    run(asked_for.task, out)
    expected = Definition(document=document, states=states, within=WITHIN, layers=LAYERS).result()
    found = in_float64(load_file(out / "model.safetensors"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
