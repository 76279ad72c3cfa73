"""Adapters in training: the package is that of the merged model, the live model stays as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import outcomes, run_ranks, train_on
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from training import classifier, save_base, train
from transformers import AutoModelForSequenceClassification, BertModel, PreTrainedModel, set_seed

from dare_train import DareCallback, DeltaPackage, apply, extract
from dare_train.errors import ConfigError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT reads it

TARGETS = ["query", "value", "dense"]
KINDS = {
    "lora": {"r": 4, "lora_alpha": 8},
    "patterns": {"r": 4, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 32}, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "embedding": {"r": 4, "target_modules": ["word_embeddings", "key"]},
    "bias": {"r": 4, "bias": "all"},
    "lora_bias": {"r": 4, "lora_bias": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("lora") / "base")


def adapted(base: Path, kind: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    model = classifier(base, dtype=dtype)
    set_seed(23)
    options: dict[str, Any] = {"target_modules": TARGETS, "modules_to_save": ["classifier"], **KINDS[kind]}
    return get_peft_model(model, LoraConfig(**options))


def merged_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT itself makes of it."""
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("lora", torch.float32),
        ("lora", torch.bfloat16),
        ("patterns", torch.bfloat16),
        ("dora", torch.float32),
        ("dora", torch.bfloat16),
        ("embedding", torch.float32),
        ("bias", torch.bfloat16),
        ("lora_bias", torch.float32),
    ],
    ids=str,
)
def test_packages_are_of_the_merged_model(base: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = adapted(base, kind, dtype)
    callback = DareCallback(p=0.0, values="exact")
    saving = "no" if kind == "lora_bias" else "steps"  # PEFT warns of what it saves itself then
    train(model, tmp_path / "out", callback, learning_rate=0.05, save_strategy=saving)
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(base)
    assert {record.name for record in package.manifest.tensors if record.kind == "whole"} == {
        "classifier.weight",
        "classifier.bias",
    }
    plain = base if dtype == torch.float32 else rounded(base, tmp_path / "rounded")
    apply(plain, package, tmp_path / "result")
    result, merged = load_file(tmp_path / "result/model.safetensors"), merged_state(model)
    assert result.keys() == merged.keys() - {"bert.embeddings.position_ids"}
    changed = [
        name
        for name in result
        if not torch.equal(result[name], load_with_prefix(plain).get(name, result[name]))
    ]
    assert len(changed) >= 2 * (2 if kind == "embedding" else 5) - 2
    for name, tensor in result.items():
        bound = 1e-5 if dtype == torch.float32 else 2**-7
        assert torch.allclose(
            tensor.float(),
            merged[name].float(),
            rtol=bound,
            atol=bound * float(merged[name].float().abs().max()),
        ), name


def rounded(base: Path, out: Path) -> Path:
    BertModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(out)
    return out


def load_with_prefix(base: Path) -> dict[str, torch.Tensor]:
    return {f"bert.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}


def test_extract_takes_a_live_adapter_as_it_takes_its_folder(base: Path, tmp_path: Path) -> None:
    model = adapted(base, "lora")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = extract(base, model, tmp_path / "live", p=0.5)
    model.save_pretrained(tmp_path / "adapter")
    folder = extract(base, tmp_path / "adapter", tmp_path / "folder", p=0.5)
    assert live.manifest.result == folder.manifest.result
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_applied_packages_load_with_from_pretrained(base: Path, tmp_path: Path) -> None:
    model = adapted(base, "lora")
    train(model, tmp_path / "out", DareCallback(p=0.0, values="exact"), learning_rate=0.05)
    apply(base, tmp_path / "out/dare/final", tmp_path / "result")
    receiver = AutoModelForSequenceClassification.from_pretrained(tmp_path / "result").eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        ours, theirs = receiver(input_ids=ids).logits, model.eval().cpu()(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def make(base: Path, kind: str) -> PreTrainedModel:
    return adapted(base, kind)  # type: ignore[return-value]


def on_ranks(rank: int, engine: str, base: Path, out: Path, resume: Path | None) -> list[tuple[int, str]]:
    callback = DareCallback(p=0.5, seed=3)
    options = {"learning_rate": 0.05}
    train_on(engine, partial(make, base, "lora"), out, callback, resume=resume, **options)
    return [(snapshot.step, snapshot.package.manifest.parent) for snapshot in callback.packages]


@pytest.mark.parametrize(("engine", "world"), [("ddp", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)], ids=str)
def test_adapters_on_engines(base: Path, tmp_path: Path, engine: str, world: int) -> None:
    out = tmp_path / "out"
    first, second = run_ranks(on_ranks, world, engine, base, out, None)
    assert first == second
    assert [step for step, _ in first] == [2, 4, 4]
    for step in (2, 4):
        package = DeltaPackage.open(out / f"dare/step-{step}")
        package.verify(base)
        theirs = extract(base, out / f"checkpoint-{step}", tmp_path / f"extracted-{step}", p=0.5, seed=3)
        ours = {r.name: (r.kind, r.kept, r.changed, r.result) for r in package.manifest.tensors}
        assert ours == {r.name: (r.kind, r.kept, r.changed, r.result) for r in theirs.manifest.tensors}
    resumed, _ = run_ranks(on_ranks, world, engine, base, out, out / "checkpoint-2")
    assert resumed == first[1:]


def test_adapters_under_fsdp1_are_refused_when_training_begins(base: Path, tmp_path: Path) -> None:
    for outcome in outcomes(on_ranks, 2, "fsdp1", base, tmp_path / "out", None):
        assert outcome.error == "ConfigError"
        assert "adapters: expected FSDP2, DDP, DeepSpeed ZeRO or one process, found FSDP1" in outcome.message


def test_what_merging_cannot_express_is_refused_when_training_begins(base: Path, tmp_path: Path) -> None:
    ia3 = get_peft_model(classifier(base), IA3Config(target_modules=["key"], feedforward_modules=[]))
    with pytest.raises(
        ConfigError,
        match=r"adapter 'default': expected a LoRA adapter, found IA3; merge_and_unload\(\) and save",
    ):
        train(ia3, tmp_path / "ia3", DareCallback())
    prompts = get_peft_model(classifier(base), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="found PROMPT_TUNING; what it trains changes no weights"):
        train(prompts, tmp_path / "prompts", DareCallback())
    tokens = get_peft_model(
        classifier(base),
        LoraConfig(target_modules=["query"], trainable_token_indices={"word_embeddings": [1]}),
    )
    with pytest.raises(ConfigError, match="adapter 'default': expected no trainable_token_indices"):
        train(tokens, tmp_path / "tokens", DareCallback())
