"""Fisher information and input products, against their definitions in float64; the files that they travel
in.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import outcomes, run_ranks
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from statistics_of import State, assert_same, close
from training import classifier, save_base
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from dare_train.errors import CheckpointError, ConfigError, OutputExists, StorageError
from dare_train.evaluation import linear_layers as layers
from dare_train.merging.statistics.fisher_and_gram import collect_fisher, collect_gram
from dare_train.merging.statistics.statistics_file import StatisticsFile, save_statistics, statistics_path
from dare_train.weights.live.layouts import Block, Place
from dare_train.weights.live.sharding import Held

LENGTHS = [8, 3, 5, 8, 1, 6, 7, 4]


def batches(count: int = 8, size: int = 3, *, vocabulary: int = 60) -> list[dict[str, torch.Tensor]]:
    """Padded batches of `size` and a smaller last one."""
    ids = torch.randint(1, vocabulary, (count, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(8) < torch.tensor(LENGTHS[:count])[:, None]
    rows = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids[:, 0] % 3}
    return [
        {name: tensor[start : start + size] for name, tensor in rows.items()}
        for start in range(0, count, size)
    ]


def single(model: Any, data: list[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    return (
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in data
        for row in range(len(batch["labels"]))
    )


def fisher_by_definition(model: Any, data: list[dict[str, torch.Tensor]], labels: str) -> State:
    """By the names of the module's parameters, in float64."""
    model = copy.deepcopy(model).double().eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total, count = {name: torch.zeros_like(p) for name, p in parameters.items()}, 0
    for example in single(model, data):
        logarithms = model(**example).logits.log_softmax(-1)[0]
        chances = (
            logarithms.exp().tolist()
            if labels == "model"
            else torch.nn.functional.one_hot(example["labels"][0], 3).tolist()
        )
        for chance, value in zip(chances, logarithms, strict=True):
            gradients = torch.autograd.grad(value, parameters.values(), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += 0 if gradient is None else chance * gradient**2
        count += 1
    return {name: value.detach() / count for name, value in total.items()}


def inputs_by_definition(model: Any, data: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """X of some layers of the classifier, from what the model itself gives, each example without its padding,
    in float64.
    """
    model, found = copy.deepcopy(model).double().eval(), []
    for example in single(model, data):
        kept = example["attention_mask"][0].bool()
        output = model(input_ids=example["input_ids"][:, kept], output_hidden_states=True)
        hidden = [state[0] for state in output.hidden_states]
        pooled = model.bert.pooler(hidden[-1][None])
        found.append([hidden[0], hidden[1], hidden[-1][:1], pooled])
    names = [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.value",
        "bert.pooler.dense",
        "classifier",
    ]
    return {
        f"{name}.weight": torch.cat(parts).detach()
        for name, parts in zip(names, zip(*found, strict=True), strict=True)
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def model(base: Path) -> Any:
    return classifier(base)


def gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, eos_token_id=0, **options)
    )


def saved(model: Any, folder: Path) -> State:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


# Fisher information.


@pytest.mark.parametrize("labels", ["data", "model"])
def test_fisher_is_the_mean_of_squares_over_examples(model: Any, tmp_path: Path, labels: Any) -> None:
    model.train()
    model.bert.embeddings.requires_grad_(False)
    found, files = collect_fisher(model, batches(), labels=labels), saved(model, tmp_path / "saved")
    expected = fisher_by_definition(model, batches(), labels)
    assert found.keys() == expected.keys() < files.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].requires_grad, found[name].shape) == (
            torch.float32,
            False,
            files[name].shape,
        )
        close(found[name], tensor)
    assert float(found["classifier.weight"].min()) > 0


def test_fisher_of_bfloat16_weights_is_summed_in_float32(base: Path) -> None:
    model = classifier(base, dtype=torch.bfloat16)
    found = collect_fisher(model, batches())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    expected = fisher_by_definition(model, batches(), "data")
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        close(found[name], expected[name], 0.05)


def test_examples_stop_in_the_middle_of_a_batch_and_ask_for_no_more(model: Any) -> None:
    asked = []

    def told() -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches():
            asked.append(batch)
            yield batch

    found = collect_fisher(model, told(), examples=4)
    assert len(asked) == 2
    assert_same(found, collect_fisher(model, batches(4)))
    assert_same(collect_gram(model, told(), examples=3), collect_gram(model, batches(3)))
    assert len(asked) == 3


@pytest.mark.parametrize("collect", [collect_fisher, collect_gram])
def test_the_model_stays_as_it_was(model: Any, collect: Callable[..., State]) -> None:
    model.train()
    model.bert.pooler.eval()
    model.bert.embeddings.requires_grad_(False)
    model(**batches()[0]).loss.backward()

    def state() -> Any:
        tensors = {
            name: (p.clone(), None if p.grad is None else p.grad.clone(), p.requires_grad)
            for name, p in model.named_parameters()
        }
        return (
            tensors,
            [part.training for part in model.modules()],
            [len(part._forward_pre_hooks) for part in model.modules()],
        )

    before, random = state(), torch.get_rng_state()
    with torch.no_grad():  # whatever the caller's setting
        collect(model, batches())
    collect(model, batches())
    after = state()
    assert before[1:] == after[1:]
    for name, (weight, gradient, needed) in before[0].items():
        assert torch.equal(after[0][name][0], weight)
        assert needed == after[0][name][2]
        assert (after[0][name][1] is None) if gradient is None else torch.equal(after[0][name][1], gradient)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("collect", [collect_fisher, collect_gram])
def test_a_failure_leaves_no_trace(
    model: Any, collect: Callable[..., State], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train()

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("out of order")

    monkeypatch.setattr(model.classifier, "forward", broken)
    with pytest.raises(ValueError, match="out of order"):
        collect(model, batches())
    assert all(part.training and not part._forward_pre_hooks for part in model.modules())


def test_examples_without_labels_do_not_count() -> None:
    model, ids = gpt2(), torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.tensor([[True], [False], [True]]), ids, -100)
    found = collect_fisher(model, [{"input_ids": ids, "labels": labels}])
    assert_same(found, collect_fisher(model, [{"input_ids": ids[[0, 2]], "labels": ids[[0, 2]]}]))
    with pytest.raises(ConfigError, match="at least one example that counts, found none"):
        collect_fisher(model, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])


def test_tied_weights_are_one_tensor_as_in_files(tmp_path: Path) -> None:
    model, ids = gpt2(), torch.arange(1, 13).reshape(2, 6)
    found = collect_fisher(model, [{"input_ids": ids, "labels": ids}])
    files = saved(model, tmp_path / "saved")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in files.items()
    }
    assert "lm_head.weight" not in files


def test_fused_experts_are_cut_as_files_cut_them(tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes: dict[str, int] = dict(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, num_labels=3, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config, experts_implementation="eager")
    found, files = collect_fisher(model, batches(4)), saved(model, tmp_path / "saved")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in files.items()
    }
    expected = fisher_by_definition(model, batches(4), "data")
    model.load_state_dict(expected)
    cut = saved(model, tmp_path / "cut")
    assert sum(".experts." in name for name in cut) == 9
    assert_same(found, cut, 1e-5)


# Inputs of linear layers.


@pytest.mark.parametrize("size", [1, 3, 8])
def test_gram_is_the_mean_over_tokens_that_are_not_padding(model: Any, tmp_path: Path, size: int) -> None:
    found, files = collect_gram(model, batches(size=size)), saved(model, tmp_path / "saved")
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert found.keys() == linear < files.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (files[name].shape[1],) * 2)
    expected = inputs_by_definition(model, batches())
    assert {name: len(inputs) for name, inputs in expected.items()}.popitem() == ("classifier.weight", 8)
    assert len(expected["bert.encoder.layer.0.attention.self.query.weight"]) == sum(LENGTHS)
    for name, inputs in expected.items():
        close(found[name], inputs.T @ inputs / len(inputs))


def test_gram_knows_conv1d_and_leaves_tied_heads_out(tmp_path: Path) -> None:
    ids = torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    for tied in (True, False):
        model = gpt2(tie_word_embeddings=tied)
        found, files = collect_gram(model, [{"input_ids": ids}]), saved(model, tmp_path / str(tied))
        layers = {name for name, tensor in files.items() if tensor.dim() == 2 and ".h." in name}
        assert found.keys() == layers | (set() if tied else {"lm_head.weight"})
        assert {tuple(found[name].shape) for name in layers if "c_proj" in name} == {(16, 16), (64, 64)}
        hidden = model.double().eval()(ids, output_hidden_states=True).hidden_states[0]
        inputs = model.transformer.h[0].ln_1(hidden).detach().reshape(-1, 16)
        close(found["transformer.h.0.attn.c_attn.weight"], inputs.T @ inputs / len(inputs))


class Plain(torch.nn.Module):
    """A Linear used twice, one that never runs, and one whose input has lost its batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.unused = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))
        self.again.weight = self.first.weight
        self.flat = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(
            logits=self.flat(self.again(self.first(input=x)).reshape(-1, 4)).reshape(*x.shape[:2], 2)
        )


def test_gram_of_plain_modules() -> None:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = collect_gram(model, [{"x": x, "attention_mask": mask}])
    assert found.keys() == {"first.weight", "flat.weight"}
    with torch.no_grad():
        rows = x[mask.bool()]
        both = torch.cat([rows, model.first(rows)]).double()
        last = model.first(model.first(rows)).double()
    close(found["first.weight"], both.T @ both / 10)
    close(found["flat.weight"], last.T @ last / 5)


@pytest.mark.parametrize("saved_classifier", [False, True])
def test_gram_of_an_adapted_model_is_that_of_the_merged_one(model: Any, saved_classifier: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"modules_to_save": ["classifier"]} if saved_classifier else {}
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False, **options)
        )
    found = collect_gram(adapted, batches())
    with pytest.raises(
        ConfigError, match=r"model: expected no adapters: .* found a PEFT model; merge_and_unload\(\) first"
    ):
        collect_fisher(adapted, batches())
    merged = adapted.merge_and_unload()
    assert_same(found, collect_gram(merged, batches()), 1e-5)
    assert collect_fisher(merged.requires_grad_(True), batches()).keys() > found.keys()


def test_encoder_and_decoder_have_statistics_where_nothing_is_padded() -> None:
    sizes = dict(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model, ids = T5ForConditionalGeneration(T5Config(**sizes)), torch.arange(1, 7).reshape(2, 3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert "decoder.block.0.layer.1.EncDecAttention.k.weight" in collect_gram(model, [batch])
    with pytest.raises(
        ConfigError, match="attention_mask: expected no padding, with encoder and decoder, found padding"
    ):
        collect_gram(model, [batch | {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}])


# What is refused.


def batch_with(**changes: Any) -> list[dict[str, Any]]:
    return [{**batches()[0], **changes}]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (batches(), {"examples": 0}, "examples: expected a positive number of examples, or None, found 0"),
        (batches(), {"labels": "guess"}, 'labels: expected "data" or "model"'),
        ([], {}, "batches: expected at least one example that counts, found none"),
        (
            [batches()[0]["input_ids"]],
            {},
            "batches: expected mappings from arguments of the model to tensors, found a Tensor",
        ),
        ([{"input_ids": "text"}], {}, r"found \['input_ids'\] and no tensor"),
        (
            batch_with(labels=None),
            {},
            "expected an output with a loss, one number, found none; pass batches with labels",
        ),
        (
            batch_with(position_ids=torch.arange(8)[None]),
            {},
            r"batches: position_ids: expected 3 rows, .*shape \(1, 8\); pass batches of one",
        ),
    ],
)
def test_wrong_batches_and_options(model: Any, data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        collect_fisher(model, data, **options)


def test_log_likelihoods_must_be_finite(model: Any) -> None:
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(ConfigError, match=r"batches: expected finite log-likelihoods, found \[nan\]"):
        collect_fisher(model, batches())


def test_a_models_own_labels_need_exclusive_classes(model: Any) -> None:
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(
        ConfigError,
        match=r"expected logits \[1, classes\] of an example, found those of multi_label_classification",
    ):
        collect_fisher(model, batches(), labels="model")
    with pytest.raises(ConfigError, match=r'found shape \(1, 8, 40\); use labels="data"'):
        collect_fisher(gpt2(), batches(vocabulary=40), labels="model")


def test_frozen_and_unfinished_models(model: Any) -> None:
    with pytest.raises(ConfigError, match="model: expected parameters that need gradients, found none"):
        collect_fisher(model.requires_grad_(False), batches())
    with pytest.raises(
        ConfigError, match="model: expected weights that are whole in this process, found shards"
    ):
        collect_gram(model.to("meta"), batches())


def test_a_layer_that_files_hold_in_parts_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(_: Any, held: dict[str, Held]) -> dict[str, Place]:
        upper = Place((1, 32), (Block(0, "classifier.weight", 0, (32,), (1,)),))
        lower = Place((2, 32), (Block(0, "classifier.weight", 32, (64,), (1,)),))
        rest = {name: Place.whole(name, held[name].shape) for name in held if name != "classifier.weight"}
        return {**rest, "upper": upper, "lower": lower}

    monkeypatch.setattr(layers.NamedTensors, "places", halves)
    with pytest.raises(
        ConfigError,
        match=r"upper: expected shape \(3, 32\), as in the model, found \(1, 32\); use a model whose",
    ):
        collect_gram(model, batches())


# Several ranks.


def collected(rank: int, base: Path, wrapped: bool) -> tuple[State, State]:
    dist.init_process_group("gloo")
    model: Any = classifier(base)
    if wrapped:
        model = torch.nn.parallel.DistributedDataParallel(model)
    own = [batches()[0], batches()[2]] if rank == 0 else [batches()[1]]
    return collect_fisher(model, own), collect_gram(model, iter(own))


@pytest.mark.parametrize("wrapped", [False, True])
def test_ranks_get_what_one_process_gets_over_all_examples(base: Path, wrapped: bool) -> None:
    results = run_ranks(collected, 2, base, wrapped)
    for fisher, gram in results:
        assert_same(fisher, collect_fisher(classifier(base), batches()), 1e-5)
        assert_same(gram, collect_gram(classifier(base), batches()), 1e-5)


def failing(rank: int, base: Path) -> None:
    dist.init_process_group("gloo")
    collect_fisher(classifier(base), batches() if rank == 0 else batch_with(labels=None))


def test_a_failure_on_one_rank_is_an_error_on_all(base: Path) -> None:
    ends = outcomes(failing, 2, base)
    assert [end.error for end in ends] == ["RankError", "ConfigError"]
    assert "rank 1 failed: batches: expected an output with a loss" in ends[0].message


# Files.


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: generator.random(shape, np.float32)
        for name, shape in {"b": (3, 3), "a.weight": (5, 5), "empty": (0, 0)}.items()
    }


@pytest.mark.parametrize("kind", ["fisher", "gram"])
@pytest.mark.parametrize(
    "convert",
    [np.asarray, torch.from_numpy, np.asfortranarray, lambda array: torch.from_numpy(array.T.copy()).T],
)
def test_files_round_trip(tmp_path: Path, kind: Any, convert: Callable[[np.ndarray], Any]) -> None:
    path = save_statistics(
        tmp_path / "deep/down/x.safetensors", kind, {n: convert(a) for n, a in arrays().items()}, examples=7
    )
    assert [found.name for found in path.parent.iterdir()] == ["x.safetensors"]
    file = StatisticsFile.open(path, kind)
    assert (file.path, file.kind, file.examples, file.tensors.keys()) == (path, kind, 7, arrays().keys())
    assert load_file(path).keys() == arrays().keys()  # the safetensors library reads it too
    for name, array in arrays().items():
        assert file.tensors[name].shape == array.shape
        assert file.whole(name).dtype == np.float32
        np.testing.assert_array_equal(file.whole(name), array)
        np.testing.assert_array_equal(load_file(path)[name].numpy(), array)
    np.testing.assert_array_equal(file.read("a.weight", 3, 9), arrays()["a.weight"].reshape(-1)[3:12])


def test_scalars_and_vectors_round_trip(tmp_path: Path) -> None:
    values = {"scalar": torch.tensor(0.5), "vector": torch.arange(3.0, requires_grad=True)}
    file = StatisticsFile.open(save_statistics(tmp_path / "f", "fisher", values, examples=1), "fisher")
    assert (file.whole("scalar").shape, file.whole("scalar").item(), file.whole("vector").tolist()) == (
        (),
        0.5,
        [0, 1, 2],
    )


def test_an_older_file_is_replaced_and_a_failure_keeps_it(tmp_path: Path) -> None:
    path = save_statistics(tmp_path / "f", "fisher", arrays(), examples=1)
    save_statistics(path, "fisher", {"b": arrays()["b"]}, examples=2)

    class Broken:
        dtype, shape = "float32", (3,)

        def detach(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"f: found No space left on device .* nothing was left behind"):
        save_statistics(path, "fisher", {"b": arrays()["b"], "c": Broken()}, examples=3)
    assert StatisticsFile.open(path, "fisher").examples == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="nothing was left behind"):
        save_statistics(tmp_path / "file/f", "fisher", arrays(), examples=1)
    with pytest.raises(OutputExists, match="folder: expected a file there, or nothing, found a folder"):
        save_statistics(tmp_path / "folder", "fisher", arrays(), examples=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("kind", "tensors", "examples", "message"),
    [
        ("hessian", {}, 1, "kind: expected one of fisher, gram, found 'hessian'"),
        ("fisher", {}, 0, "examples: expected a positive number of examples, found 0"),
        ("fisher", {}, True, "examples: expected a positive number of examples, found True"),
        ("fisher", {"a": np.zeros(3)}, 1, "a: expected float32, found float64"),
        (
            "fisher",
            {"a": torch.zeros(3, dtype=torch.bfloat16)},
            1,
            "a: expected float32, found torch.bfloat16",
        ),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, kind: Any, tensors: Any, examples: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        save_statistics(tmp_path / "f", kind, tensors, examples=examples)
    assert list(tmp_path.iterdir()) == []


def written(path: Path, tensors: State, metadata: dict[str, str] | None) -> Path:
    save_file(tensors, path, metadata)
    return path


OURS = {"format": "dare_train statistics", "kind": "gram", "examples": "3"}
SQUARE = {"a": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (SQUARE, None, "expected gram statistics, found a safetensors file of something else"),
        (SQUARE, {"format": "pt"}, "expected gram statistics, found a safetensors file of something else"),
        (SQUARE, {**OURS, "kind": "fisher"}, "expected gram statistics, found fisher statistics"),
        (SQUARE, {**OURS, "examples": "many"}, "examples: expected a positive number, found 'many'"),
        (SQUARE, {**OURS, "examples": "0"}, "examples: expected a positive number"),
        (SQUARE, {**OURS, "examples": "9" * 5000}, "examples: expected a positive number"),
        (
            SQUARE,
            {"format": OURS["format"], "kind": "gram"},
            "examples: expected a positive number, found ''",
        ),
        ({"a": torch.zeros(2, 3)}, OURS, r"a: expected a square matrix, found shape \(2, 3\)"),
        ({"a": torch.zeros(2)}, OURS, "a: expected a square matrix"),
        ({"a": torch.zeros(2, 2).bfloat16()}, OURS, "a: expected F32, found BF16"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, tensors: State, metadata: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        StatisticsFile.open(written(tmp_path / "f", tensors, metadata), "gram")


def cut(data: bytes) -> bytes:
    return data[:-4]


def longer(data: bytes) -> bytes:
    return data + b"\0" * 4


def huge_header(data: bytes) -> bytes:
    return (1 << 60).to_bytes(8, "little") + data[8:]


def overlapping(data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["b"]["data_offsets"] = header["a.weight"]["data_offsets"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize(
    "damage", [cut, longer, huge_header, overlapping, lambda data: b"", lambda data: b"\0" * 100]
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = save_statistics(tmp_path / "f", "fisher", arrays(), examples=1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="f: expected a safetensors file"):
        StatisticsFile.open(path, "fisher")


def test_a_missing_file_and_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: expected a safetensors file, found no such file"):
        StatisticsFile.open(tmp_path / "nothing", "gram")
    with pytest.raises(ConfigError, match="kind: expected one of fisher, gram"):
        StatisticsFile.open(tmp_path / "nothing", "hessian")  # type: ignore[arg-type]


def test_statistics_lie_beside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statistics_path("out/dare/final/", "fisher") == Path("out/dare/final.fisher.safetensors")
    assert statistics_path(Path("v1.5"), "gram") == Path("v1.5.gram.safetensors")
    monkeypatch.chdir(tmp_path)
    assert statistics_path(".", "gram") == tmp_path.parent / f"{tmp_path.name}.gram.safetensors"
    with pytest.raises(ConfigError, match="kind"):
        statistics_path("x", "other")  # type: ignore[arg-type]
