"""Trainers × adapters × bases: the package is what the live model computes, or training is refused before its
first step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tunes import (
    ADAPTERS,
    BASES,
    OF_TIED,
    QUANTISED,
    load,
    logits,
    lora,
    make_trainer,
    save_decoder,
    save_in_fp8,
)
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import FineGrainedFP8Config

from dare_train import DareCallback, DeltaPackage, apply, extract
from dare_train.errors import BaseMismatch, CheckpointError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Each base once for all tests."""
    place = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = BASES[kind](place / kind)
        return made[kind]

    return folder


RECEIVED = [
    *((adapter, base) for adapter in ADAPTERS for base in ("fp32", "bf16")),
    *((adapter, "shards") for adapter in ("none", "lora", "dora", "fresh layer", "head too")),
]
"""In how many files a base lies matters to what reads them, not to every adapter."""


@pytest.mark.parametrize(("adapter", "base_kind"), RECEIVED)
def test_a_receiver_computes_what_the_live_model_does(
    base_folder: Folders, tmp_path: Path, adapter: str, base_kind: str
) -> None:
    base = base_folder(base_kind)
    model = ADAPTERS[adapter](load(base))
    make_trainer(model, tmp_path / "out", DareCallback(p=0.0, values="exact", when="end")).train()
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    apply(package.manifest.base_model, package, tmp_path / "received")
    _same_results(model, load(tmp_path / "received"), load(base))


def _same_results(model: Any, received: Any, before: Any) -> None:
    live = logits(model)
    moved = float((live - logits(before)).abs().max())
    off = float((live - logits(received)).abs().max())
    near = 1e-4 if before.dtype == torch.float32 else 0.1 * moved
    assert moved > 1e-2, "training moved nothing: equality would prove nothing"
    assert off <= near


@pytest.mark.parametrize("adapter", ["lora", "pissa", "olora", "native", "nested", "two active", "embedding"])
def test_adapters_go_on_the_base_that_the_model_was_loaded_from(
    base_folder: Folders, tmp_path: Path, adapter: str
) -> None:
    """No copy, and deltas: what is under an adapter counts as the base's, moved by how the adapter begins."""
    base = base_folder("fp32")
    make_trainer(ADAPTERS[adapter](load(base)), tmp_path / "out", DareCallback(p=0.9, when="end")).train()
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(base)
    assert {record.kind for record in package.manifest.tensors} == {"delta"}
    assert not (tmp_path / "out/dare/base").exists()


@pytest.mark.parametrize("adapter", OF_TIED)
def test_what_has_no_tensor_of_its_own_is_refused_by_name(
    base_folder: Folders, tmp_path: Path, adapter: str
) -> None:
    """A package of it would lose the update: a checkpoint of this model has one tensor for the two."""
    model = OF_TIED[adapter](load(base_folder("tied")))
    trainer = make_trainer(model, tmp_path / "out")
    trainer.add_callback(DareCallback())
    with pytest.raises(ConfigError, match=r"(lm_head|embed_tokens)\.weight: .*tie_word_embeddings=False"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("how", ["factors", "copies"])
def test_what_is_tied_may_be_adapted_as_one(base_folder: Folders, tmp_path: Path, how: str) -> None:
    base = base_folder("tied")
    options = {"target_modules": ["embed_tokens", "lm_head"]} if how == "factors" else {}
    copies = {"modules_to_save": ["embed_tokens"]} if how == "copies" else {}
    model = lora(load(base), ensure_weight_tying=True, **options, **copies)
    make_trainer(model, tmp_path / "out", DareCallback(p=0.0)).train()
    apply(base, tmp_path / "out/dare/final", tmp_path / "received")
    _same_results(model, load(tmp_path / "received"), load(base))


def test_what_is_tied_and_cast_apart_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    """PEFT gives factors of a 16-bit model float32 of their own: equal as they begin, trained apart."""
    base = save_decoder(tmp_path / "base", dtype=torch.bfloat16, tied=True)
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    trainer = make_trainer(lora(load(base), **options), tmp_path / "out", DareCallback(p=0.0))
    with pytest.raises(ConfigError, match=r"lm_head\.weight: .*autocast_adapter_dtype=False"):
        trainer.train()
    assert trainer.state.global_step == 0
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    model = get_peft_model(load(base), config, autocast_adapter_dtype=False)
    callback = DareCallback(p=0.0)
    make_trainer(model, tmp_path / "again", callback).train()
    assert callback.failures == []
    apply(base, tmp_path / "again/dare/final", tmp_path / "received")
    _same_results(model, load(tmp_path / "received"), load(base))


def _needed(kind: str) -> list[pytest.MarkDecorator]:
    """torchao is not among the tests' libraries: at import it tells of each file that it cannot load."""
    missing = "torchao" in kind and importlib.util.find_spec("torchao") is None
    return [pytest.mark.skip(reason="no torchao: pip install -e '.[torchao]'")] if missing else []


UPDATED = [
    *((kind, "lora") for kind in QUANTISED),
    *(
        (kind, adapter)
        for kind in ("nf4", "int8", "torchao int8")
        for adapter in ("rslora", "head too", "native")
    ),
]
"""Every packing, and every adapter on 4 bits, on 8, and on a subclass of tensors."""


@pytest.mark.parametrize(
    ("kind", "adapter"), [pytest.param(*cell, marks=_needed(cell[0])) for cell in UPDATED]
)
def test_on_a_quantised_base_the_package_is_that_of_the_saved_adapter(
    tmp_path: Path, base_folder: Folders, kind: str, adapter: str
) -> None:
    base = base_folder("fp32" if adapter == "rslora" else "bf16")
    quantised = load(base, quantization_config=QUANTISED[kind](), device_map="cpu")
    model = ADAPTERS[adapter](prepare_model_for_kbit_training(quantised, use_gradient_checkpointing=False))
    trainer = make_trainer(model, tmp_path / "out", DareCallback(p=0.0, when=("end",)))
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    expected = extract(base, tmp_path / "adapter", tmp_path / "extracted", p=0.0)
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.result == expected.manifest.result
    assert package.manifest.base_model == str(base)
    assert "trained on a quantised base" in (package.path / "README.md").read_text()


def test_a_quantised_checkpoint_needs_its_full_precision_base(tmp_path: Path, base_folder: Folders) -> None:
    base = base_folder("bf16")
    load(base, quantization_config=QUANTISED["nf4"](), device_map="cpu").save_pretrained(
        tmp_path / "four bit"
    )
    model = ADAPTERS["lora"](load(tmp_path / "four bit", device_map="cpu"))
    with pytest.raises(ConfigError, match=r"expected weights in full precision, found .*U8.*give base="):
        make_trainer(model, tmp_path / "out", DareCallback())
    make_trainer(model, tmp_path / "out", DareCallback(p=0.0, base=base)).train()
    model.save_pretrained(tmp_path / "adapter")
    expected = extract(base, tmp_path / "adapter", tmp_path / "extracted", p=0.0)
    assert DeltaPackage.open(tmp_path / "out/dare/final").manifest.result == expected.manifest.result


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_dequantised_models_base_is_what_was_loaded_and_a_line_says_so(
    tmp_path: Path, adapter: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_in_fp8(tmp_path / "fp8")
    unpacked = FineGrainedFP8Config(dequantize=True, weight_block_size=(4, 4))
    model = ADAPTERS[adapter](load(base, quantization_config=unpacked, dtype=torch.bfloat16))
    make_trainer(model, tmp_path / "out", DareCallback(p=0.0, values="exact")).train()
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    kept = tmp_path / "out/dare/base"
    assert package.manifest.base_model == str(kept)
    assert f"since the model's weights are not those of {base}" in caplog.text
    apply(kept, package, tmp_path / "received")
    _same_results(model, load(tmp_path / "received"), load(kept))


def test_a_quantised_base_is_refused_by_name(tmp_path: Path) -> None:
    base = save_in_fp8(tmp_path / "fp8")
    unpacked = FineGrainedFP8Config(dequantize=True, weight_block_size=(4, 4))
    model = load(base, quantization_config=unpacked, dtype=torch.bfloat16)
    trainer = make_trainer(model, tmp_path / "out", DareCallback(base=base))
    with pytest.raises(
        CheckpointError,
        match=r"full precision, as the model in training, found quantised weights: fp8 with scales",
    ):
        trainer.train()


def test_another_model_is_not_taken_for_the_quantised_ones_base(tmp_path: Path, base_folder: Folders) -> None:
    torch.manual_seed(99)
    other = load(base_folder("bf16"))
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.save_pretrained(tmp_path / "other")
    quantised = load(base_folder("bf16"), quantization_config=QUANTISED["nf4"](), device_map="cpu")
    trainer = make_trainer(
        ADAPTERS["lora"](quantised), tmp_path / "out", DareCallback(base=tmp_path / "other")
    )
    with pytest.raises(
        BaseMismatch, match="expected the full-precision model that was quantised, found another"
    ):
        trainer.train()


def test_dora_on_an_embedding_is_what_peft_merges(tmp_path: Path, base_folder: Folders) -> None:
    model = lora(load(base_folder("fp32")), target_modules=["embed_tokens"], use_dora=True)
    make_trainer(model, tmp_path / "out", DareCallback(p=0.0)).train()
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert [name for name, record in package.records.items() if record.changed] == [
        "model.embed_tokens.weight"
    ]
    apply(base_folder("fp32"), package, tmp_path / "received")
    received = load(tmp_path / "received").model.embed_tokens.weight
    torch.testing.assert_close(received, model.merge_and_unload().model.embed_tokens.weight)


def test_a_bias_that_the_base_has_not_is_refused(tmp_path: Path, base_folder: Folders) -> None:
    trainer = make_trainer(lora(load(base_folder("fp32")), lora_bias=True), tmp_path / "out", DareCallback())
    with pytest.raises(
        ConfigError, match=r"q_proj\.bias: .* found a module without bias; set lora_bias=False"
    ):
        trainer.train()


def test_a_model_from_nowhere_gets_a_base_and_one_line_about_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(save_decoder(tmp_path / "gone"))
    model.config.name_or_path = model.name_or_path = ""
    make_trainer(model, tmp_path / "out", DareCallback(p=0.0)).train()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dare_train"]
    assert line.startswith("base of the packages: a copy of the model as it is now, 0.1 MB in ")
    assert line.endswith(
        "since the model does not say where it was loaded from; base= names another, and saves the copy"
    )
