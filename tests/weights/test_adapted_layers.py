"""Adapters on layers of every kind, live and from their folder, against the models that PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import DECODER
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3VLMoeForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.models.qwen3_vl_moe import Qwen3VLMoeConfig

from dare_train import DareConfig, Snapshotter, apply, extract

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]

IMAGE: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=16,
    patch_size=8,
)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def qwen3_vl_moe() -> Qwen3VLMoeConfig:
    text = {**DECODER, "moe_intermediate_size": 8, "num_experts": 3, "head_dim": 8, "mlp_only_layers": []}
    vision = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=16)
    return Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DoRA on Conv1D": (
        GPT2LMHeadModel,
        lambda: GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8),
        dict(target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True),
    ),
    "DoRA on an embedding": (
        GPT2LMHeadModel,
        lambda: GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8),
        dict(target_modules=["wpe"], use_dora=True),
    ),
    "DoRA on a convolution and on renamed layers": (
        ViTForImageClassification,
        lambda: ViTConfig(**IMAGE, num_labels=3),
        dict(target_modules=["projection", "q_proj", "fc1"], use_dora=True),
    ),
    "files without the prefix of their modules": (
        DINOv3ViTBackbone,
        lambda: DINOv3ViTConfig(**IMAGE),
        dict(target_modules="all-linear"),
    ),
    "rows that files join": (
        Dinov2ForImageClassification,
        lambda: Dinov2Config(**IMAGE, use_swiglu_ffn=True, num_labels=3),
        dict(target_modules="all-linear"),
    ),
    "a renamed layer trained in full": (
        GPTNeoXForSequenceClassification,
        lambda: GPTNeoXConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            num_labels=3,
        ),
        dict(target_modules=["query_key_value"], modules_to_save=["score"]),
    ),
    "a module of which files have a part, trained in full": (
        Dinov2ForImageClassification,
        lambda: Dinov2Config(**IMAGE, use_swiglu_ffn=True, num_labels=3),
        dict(target_modules=["q_proj"], modules_to_save=["gate_proj", "classifier"]),
    ),
    "experts that files have apart": (
        MixtralForCausalLM,
        lambda: MixtralConfig(**DECODER, num_local_experts=3),
        dict(target_modules=["q_proj"], target_parameters=EXPERTS),
    ),
    "experts that lie transposed": (
        GptOssForCausalLM,
        lambda: GptOssConfig(**DECODER, head_dim=8, num_local_experts=3),
        dict(target_modules=["q_proj"], target_parameters=EXPERTS),
    ),
    "experts that files have transposed": (
        Qwen3VLMoeForConditionalGeneration,
        qwen3_vl_moe,
        dict(target_modules=["q_proj"], target_parameters=EXPERTS),
    ),
}  # fmt: skip


def adapted(kind: Any, base: Path, options: dict[str, Any]) -> Any:
    """A model with adapters whose factors are exact in float32, so that merging rounds once."""
    torch.manual_seed(2)
    model = get_peft_model(kind.from_pretrained(base).eval(), LoraConfig(r=2, lora_alpha=4, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randint(-2, 3, parameter.shape, generator=generator) / 8
            if "magnitude" in name:
                parameter.add_(noise)
            elif parameter.requires_grad:
                parameter.copy_(noise)
    return model


@pytest.mark.parametrize("what", CASES)
def test_adapters_are_what_peft_merges(what: str, tmp_path: Path) -> None:
    kind, config, options = CASES[what]
    set_seed(3)
    kind(config()).save_pretrained(tmp_path / "base")
    model = adapted(kind, tmp_path / "base", options)
    taker = Snapshotter.begin(model, tmp_path / "begun", DareConfig(p=0))
    taker.take(model, tmp_path / "taken", step=1)
    taken = taker.close()
    assert taken is not None
    live = extract(tmp_path / "base", model, tmp_path / "live", p=0)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    base = load_file(tmp_path / "base/model.safetensors")
    moved = {name for name in merged if not torch.equal(merged[name], base[name])}
    assert moved
    folder = extract(tmp_path / "base", tmp_path / "adapter", tmp_path / "from-folder", p=0)
    for package in (taken.package, live, folder):
        apply(tmp_path / "base", package, tmp_path / "out", overwrite=True)
        received = load_file(tmp_path / "out/model.safetensors")
        assert received.keys() == merged.keys()
        assert {name for name in received if not torch.equal(received[name], base[name])} == moved
        for name, tensor in merged.items():
            if options.get("use_dora"):
                torch.testing.assert_close(received[name], tensor)
            else:
                assert torch.equal(received[name], tensor), name
