"""LoRA adapters as the tuned side: what PEFT itself merges, without PEFT, and packages that give the merged
model.
"""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from adapting import State, adapt, differing, merged_by_definition, rounded, seen
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training import LABELS, classifier, examples, save_base
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    set_seed,
)

from dare_train import DeltaPackage, apply, diagnose, extract
from dare_train.cli.main import main
from dare_train.weights.lora.lora_checkpoint import AdapterWeights
from dare_train.weights.protocol import runs

KINDS: dict[str, dict[str, Any]] = {
    "all linear": dict(target_modules="all-linear"),
    "patterns": dict(
        target_modules=["query", "value", "key"],
        rank_pattern={
            "layer.0.attention.self.query": 2,
            "value": 3,
            r"bert\.encoder\.layer\.\d+\.attention\.self\.key": 5,
        },
        alpha_pattern={
            "encoder.layer.1.attention.self.value": 7,
            "uery": 100,
            "layer.0.attention.self.query": 2.5,
        },
    ),
    "rank-stabilized": dict(target_modules=["query", "dense"], use_rslora=True, r=3),
    "DoRA": dict(target_modules=["query", "dense"], use_dora=True),
    "embeddings": dict(target_modules=["query", "word_embeddings", "position_embeddings"]),
    "biases of adapted modules": dict(target_modules=["query"], bias="lora_only"),
    "all biases": dict(target_modules=["query"], bias="all"),
    "biases of factors": dict(target_modules=["query", "dense"], lora_bias=True),
    "random start": dict(target_modules=["query"], init_lora_weights="gaussian"),
    "minor components": dict(target_modules=["query"], init_lora_weights="mica", r=2),
}


class Bases:
    """Models on disk that every test reads and none writes to, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encoder(self, dtype: torch.dtype = torch.float32) -> Path:
        folder = self._folder / f"encoder-{dtype}"
        return folder if folder.exists() else save_base(folder, dtype=dtype)

    def classifier(self, dtype: torch.dtype = torch.float32) -> Path:
        """With its head, so that every tensor of a merged model has a counterpart."""
        folder = self._folder / f"classifier-{dtype}"
        if not folder.exists():
            classifier(self.encoder(dtype), dtype=dtype).save_pretrained(folder)
        return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)


def tiny_gpt(folder: Path) -> GPT2LMHeadModel:
    set_seed(3)
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder)


def merged_state(model: PeftModel) -> State:
    return {name: tensor.detach() for name, tensor in model.merge_and_unload().state_dict().items()}


def check_close(weights: AdapterWeights, expected: State, tolerance: float) -> None:
    assert weights.tensors.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = (
            torch.from_numpy(weights.read(name, 0, theirs.numel()).copy())
            .view(theirs.dtype)
            .reshape(theirs.shape)
        )
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""PEFT computes in the dtype of the factors, and rounds some updates to that of the weights before it adds
them."""

CASES = [
    (kind, dtype)
    for kind in KINDS
    for dtype in TOLERANCE
    if (kind, dtype) != ("minor components", torch.float64)
]


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=[f"{kind}, {dtype}" for kind, dtype in CASES])
def test_merging_is_the_definition_to_the_bit_and_what_peft_does(
    kind: str, dtype: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    base = bases.classifier(dtype)
    model = adapt(load(base, dtype), tmp_path / "adapter", task_type="SEQ_CLS", **KINDS[kind])
    before = load_file(base / "model.safetensors")
    assert len(differing(base, tmp_path / "adapter", before)) >= 4
    if dtype != torch.float64:  # where sums in another order would show
        assert differing(base, tmp_path / "adapter", merged_by_definition(before, tmp_path / "adapter")) == []
    check_close(seen(base, tmp_path / "adapter"), merged_state(model), TOLERANCE[dtype])


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "wte"], ["c_proj"]], ids="+".join)
def test_conv1d_lies_transposed(targets: list[str], tmp_path: Path) -> None:
    model = adapt(tiny_gpt(tmp_path / "base"), tmp_path / "adapter", target_modules=targets)
    base = load_file(tmp_path / "base/model.safetensors")
    assert (
        differing(
            tmp_path / "base",
            tmp_path / "adapter",
            merged_by_definition(base, tmp_path / "adapter", transposed=True),
        )
        == []
    )
    expected = merged_state(model)
    assert torch.equal(expected.pop("lm_head.weight"), expected["transformer.wte.weight"])
    check_close(seen(tmp_path / "base", tmp_path / "adapter"), expected, 1e-6)


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.point = torch.nn.Conv2d(3, 6, (2, 3)), torch.nn.Conv2d(6, 4, 1)
        self.line = torch.nn.Conv1d(4, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(self.point(self.image(x)).flatten(2))


def test_convolutions_are_merged(tmp_path: Path) -> None:
    set_seed(1)
    (tmp_path / "base").mkdir()
    base = Convolutions()
    save_file(base.state_dict(), tmp_path / "base/model.safetensors")
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapt(base, tmp_path / "adapter", target_modules=["image", "point", "line"])
    assert (
        differing(tmp_path / "base", tmp_path / "adapter", merged_by_definition(state, tmp_path / "adapter"))
        == []
    )
    check_close(seen(tmp_path / "base", tmp_path / "adapter"), merged_state(model), 1e-6)


@pytest.mark.parametrize("length", [1, 37, 1000, 1 << 20])
def test_runs_do_not_matter(length: int, bases: Bases, tmp_path: Path) -> None:
    base = bases.classifier()
    adapt(load(base), tmp_path / "adapter", target_modules=["query", "word_embeddings"])
    weights = seen(base, tmp_path / "adapter")
    for name in (
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.attention.self.query.weight",
        "classifier.bias",
    ):
        numel = weights.tensors[name].numel
        parts = [weights.read(name, start, count) for start, count in runs(numel, length)]
        np.testing.assert_array_equal(np.concatenate(parts), weights.read(name, 0, numel))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_package_gives_the_merged_classifier(dtype: torch.dtype, bases: Bases, tmp_path: Path) -> None:
    base = bases.encoder(dtype)
    model = adapt(
        classifier(base, dtype=dtype),
        tmp_path / "adapter",
        target_modules=["query", "dense"],
        task_type="SEQ_CLS",
    )
    package = extract(base, tmp_path / "adapter", tmp_path / "package", p=0)
    assert package.manifest.prefix == "bert."
    assert {record.name for record in package.manifest.tensors if record.kind == "whole"} == {
        "classifier.weight",
        "classifier.bias",
    }
    apply(base, package, tmp_path / "result")
    result = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "result", num_labels=LABELS, dtype=dtype
    ).eval()
    ids = torch.tensor([row["input_ids"] for row in examples(8)])
    merged = model.merge_and_unload().eval()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    with torch.no_grad():
        torch.testing.assert_close(result(ids).logits, merged(ids).logits, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(
            result(ids).logits, classifier(base, dtype=dtype).eval()(ids).logits, atol=0.05
        )


@pytest.mark.parametrize("p", [0.0, 0.75])
def test_the_package_is_that_of_the_merged_checkpoint(p: float, bases: Bases, tmp_path: Path) -> None:
    base = bases.encoder(torch.bfloat16)
    adapt(
        classifier(base, dtype=torch.bfloat16),
        tmp_path / "adapter",
        target_modules=["query"],
        task_type="SEQ_CLS",
        bias="all",
    )
    state = {f"bert.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    (tmp_path / "merged").mkdir()
    save_file(merged_by_definition(state, tmp_path / "adapter"), tmp_path / "merged/model.safetensors")
    expected = extract(base, tmp_path / "merged", tmp_path / "expected", p=p, seed=3)
    package = extract(base, tmp_path / "adapter", tmp_path / "package", p=p, seed=3, dtype="trained")
    assert package.manifest.tensors == expected.manifest.tensors
    assert package.manifest.parts == expected.manifest.parts


def test_diagnose_looks_at_the_merged_model(bases: Bases, tmp_path: Path) -> None:
    base = bases.encoder()
    adapt(classifier(base), tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    report = diagnose(base, tmp_path / "adapter")
    assert [layer.name for layer in report.layers] == [
        f"bert.encoder.layer.{n}.attention.self.query.weight" for n in (0, 1)
    ]
    assert report.new == ("classifier.bias", "classifier.weight")


def test_options_work_as_for_any_weights(bases: Bases, tmp_path: Path) -> None:
    base = bases.encoder()
    adapt(
        classifier(base), tmp_path / "adapter", target_modules=["query", "key", "value"], task_type="SEQ_CLS"
    )
    package = extract(
        base,
        tmp_path / "adapter",
        tmp_path / "package",
        p={"*query*": 0.5, "*": 0},
        exclude="*key*",
        whole="*layer.0.*value.weight",
    )
    kinds = {record.name.removeprefix("bert.encoder."): record for record in package.manifest.tensors}
    assert kinds["layer.0.attention.self.key.weight"].kind == "base"
    assert kinds["layer.0.attention.self.value.weight"].kind == "whole"
    assert kinds["layer.1.attention.self.value.weight"].kind == "delta"
    assert kinds["layer.0.attention.self.query.weight"].p == 0.5
    assert kinds["classifier.weight"].kind == "whole"
    assert kinds["layer.0.output.dense.weight"].kind == "base"


def test_an_adapter_of_the_encoder_fits_a_task_model(bases: Bases, tmp_path: Path) -> None:
    encoder = bases.encoder()
    classifier(encoder).save_pretrained(tmp_path / "base")
    adapt(BertModel.from_pretrained(encoder), tmp_path / "adapter", target_modules=["query"])
    package = extract(tmp_path / "base", tmp_path / "adapter", tmp_path / "package", p=0)
    assert (package.manifest.prefix, package.manifest.base_only) == ("-bert.", ())
    apply(tmp_path / "base", package, tmp_path / "result")
    expected = merged_by_definition(load_file(encoder / "model.safetensors"), tmp_path / "adapter")
    result = load_file(tmp_path / "result/model.safetensors")
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def test_a_head_that_the_base_has_too_travels_whole(bases: Bases, tmp_path: Path) -> None:
    base = bases.classifier()
    adapt(load(base), tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    package = extract(base, tmp_path / "adapter", tmp_path / "package", p=0)
    assert package.records["classifier.weight"].kind == "whole"
    assert seen(base, tmp_path / "adapter").whole == {"classifier.weight", "classifier.bias"}


def test_a_head_of_another_shape_travels_whole(bases: Bases, tmp_path: Path) -> None:
    base = bases.classifier()
    set_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, ignore_mismatched_sizes=True
    )
    adapt(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    package = extract(base, tmp_path / "adapter", tmp_path / "package", p=0)
    assert package.records["classifier.weight"].kind == package.records["classifier.bias"].kind == "whole"
    assert package.records["classifier.weight"].info.shape == (2, 32)


def test_what_was_trained_in_full_gets_the_dtype_of_the_base(bases: Bases, tmp_path: Path) -> None:
    base = bases.classifier(torch.bfloat16)
    adapt(load(base), tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS", bias="all")
    package = extract(base, tmp_path / "adapter", tmp_path / "package", p=0)
    assert {record.info.dtype.code for record in package.manifest.tensors} == {"BF16"}
    head = load_file(tmp_path / "adapter/adapter_model.safetensors")["base_model.model.classifier.weight"]
    apply(base, package, tmp_path / "result")
    found = load_file(tmp_path / "result/model.safetensors")["classifier.weight"]
    assert torch.equal(found, rounded(head.double(), torch.bfloat16))


def test_rows_added_to_a_tied_embedding(tmp_path: Path) -> None:
    model = tiny_gpt(tmp_path / "base")
    model.resize_token_embeddings(53, mean_resizing=False)
    adapt(model, tmp_path / "adapter", target_modules=["c_attn"], task_type="CAUSAL_LM")
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter/adapter_model.safetensors")
    package = extract(tmp_path / "base", tmp_path / "adapter", tmp_path / "package", p=0.5)
    record = package.records["transformer.wte.weight"]
    assert (record.kind, record.base_rows, record.info.shape) == ("delta", 50, (53, 16))
    apply(tmp_path / "base", package, tmp_path / "result")
    rows = load_file(tmp_path / "result/model.safetensors")["transformer.wte.weight"][50:]
    assert torch.equal(rows, model.get_input_embeddings().weight[50:])


def test_an_adapted_embedding_that_was_resized_first(tmp_path: Path) -> None:
    model = tiny_gpt(tmp_path / "base")
    model.resize_token_embeddings(53, mean_resizing=False)
    adapt(model, tmp_path / "adapter", target_modules=["wte"], task_type="CAUSAL_LM")
    base = load_file(tmp_path / "base/model.safetensors")
    assert (
        differing(tmp_path / "base", tmp_path / "adapter", merged_by_definition(base, tmp_path / "adapter"))
        == []
    )


def test_only_the_model_s_files_are_carried(bases: Bases, tmp_path: Path) -> None:
    base = bases.encoder()
    adapt(classifier(base), tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    (tmp_path / "adapter/tokenizer.json").write_text('{"new": 1}')
    (tmp_path / "adapter/trainer_state.json").write_text("{}")
    package = extract(base, tmp_path / "adapter", tmp_path / "package")
    assert [record.file for record in package.manifest.files] == ["tokenizer.json"]
    assert {path.name for path in package.path.iterdir()} == {
        "README.md", "dare_config.json", "dare_delta.safetensors", "tokenizer.json",
    }  # fmt: skip
    copytree(base, tmp_path / "base")
    (tmp_path / "base/adapter_config.json").write_text("{}")
    apply(tmp_path / "base", package, tmp_path / "result")
    assert sorted(path.name for path in (tmp_path / "result").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_adapters_are_found_in_the_hub_s_cache(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases.encoder()
    place = tmp_path / "hub/models--someone--adapter"
    adapt(classifier(base), place / "snapshots/abc", target_modules=["query"], task_type="SEQ_CLS")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert extract(base, "someone/adapter", tmp_path / "package").records["classifier.weight"].kind == "whole"


def test_the_file_itself_can_be_given(bases: Bases, tmp_path: Path) -> None:
    base = bases.encoder()
    adapt(classifier(base), tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    folder = extract(base, tmp_path / "adapter", tmp_path / "one")
    file = extract(base, tmp_path / "adapter/adapter_model.safetensors", tmp_path / "two")
    assert folder.manifest.tensors == file.manifest.tensors


def test_the_command_line_takes_an_adapter(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases.encoder()
    adapt(classifier(base), tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    arguments = [
        "dare-train",
        "extract",
        str(base),
        str(tmp_path / "adapter"),
        "--out",
        str(tmp_path / "package"),
        "--p",
        "0.5",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    assert "bits per parameter" in capsys.readouterr().out
    assert (
        DeltaPackage.open(tmp_path / "package")
        .records["bert.encoder.layer.0.attention.self.query.weight"]
        .changed
    )
