"""Ways in which people fine-tune a tiny decoder: bases as they lie on disk, adapters as they are put on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

Model = Any
VOCABULARY = 96


def save_decoder(
    folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False, **saving: Any
) -> Path:
    set_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, **saving)
    return folder


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


BASES: dict[str, Callable[[Path], Path]] = {
    "fp32": lambda folder: save_decoder(folder),
    "bf16": lambda folder: save_decoder(folder, dtype=torch.bfloat16),
    "tied": lambda folder: save_decoder(folder, tied=True),
    "shards": lambda folder: save_decoder(folder, max_shard_size="20KB"),
}

QUANTISED: dict[str, Callable[[], Any]] = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "nf4 in bf16": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    ),
    "double nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: _torchao(),
}


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def save_in_fp8(folder: Path, *, block: int = 4) -> Path:
    """A checkpoint of linear layers in blocks of fp8 with scales, as DeepSeek's and Qwen's are."""
    save_decoder(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor.bfloat16()
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            blocks = tensor.reshape(rows // block, block, columns // block, block)
            scale = blocks.abs().amax((1, 3)) / 448
            scaled = (blocks / scale[:, None, :, None]).reshape(rows, columns)
            tensors[name] = scaled.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [block, block],
        "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lora(model: Model, **options: Any) -> Model:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of second adapters and tied weights
        return get_peft_model(model, LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options}))


def _native(model: Model) -> Model:
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    return model


def _moved(model: Model, by: float = 0.02) -> Model:
    """As a stage of training before this one leaves a model."""
    generator = torch.Generator().manual_seed(29)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def _second_stage(model: Model) -> Model:
    return lora(_moved(lora(model)).merge_and_unload())


def _fresh_layer(model: Model) -> Model:
    """One layer begun anew in memory, under an adapter."""
    set_seed(31)
    torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.weight, std=0.3)
    return lora(model)


def _two_active(model: Model) -> Model:
    adapted = lora(model)
    adapted.add_adapter(
        "second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    adapted.base_model.set_adapter(["default", "second"])
    return _moved(adapted)


def _unfrozen(model: Model) -> Model:
    """An adapter whose base is trained, too."""
    adapted = lora(model)
    adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    return adapted


ADAPTERS: dict[str, Callable[[Model], Model]] = {
    "none": lambda model: model,
    "moved before": _moved,
    "lora": lora,
    "rslora": lambda model: lora(model, use_rslora=True),
    "dora": lambda model: lora(model, use_dora=True),
    "pissa": lambda model: lora(model, init_lora_weights="pissa"),
    "olora": lambda model: lora(model, init_lora_weights="olora"),
    "native": _native,
    "nested": lambda model: lora(lora(model)),
    "second stage": _second_stage,
    "fresh layer": _fresh_layer,
    "two active": _two_active,
    "unfrozen": _unfrozen,
    "head too": lambda model: lora(model, modules_to_save=["lm_head"]),
    "embedding": lambda model: lora(model, target_modules=["embed_tokens", "q_proj"]),
}
"""Put on a model that was just loaded."""

OF_TIED: dict[str, Callable[[Model], Model]] = {
    "head": lambda model: lora(model, target_modules=["lm_head"]),
    "embedding": lambda model: lora(model, target_modules=["embed_tokens"]),
    "copy of the embedding": lambda model: lora(model, modules_to_save=["embed_tokens"]),
}
"""What trains apart what is tied."""


def rows(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(
    model: Model, out: Path, *callbacks: TrainerCallback, eval_dataset: Any = None, **options: Any
) -> Trainer:
    settings: dict[str, Any] = dict(
        output_dir=str(out), max_steps=2, save_strategy="no", learning_rate=1e-2,
        per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    arguments = TrainingArguments(**{**settings, **options})
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )


def logits(model: Model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 40)[None]).logits.float()
    return found
