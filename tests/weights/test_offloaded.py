"""Models that accelerate's hooks keep in CPU memory or on disk between forward passes, as `device_map="auto"`
leaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from merging import files_of
from tiny import refusal
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from dare_train import DeltaPackage, applied, apply_, extract
from dare_train.errors import ConfigError

IDS = torch.arange(12).reshape(2, 6)


def model() -> PreTrainedModel:
    """Its embeddings are its head, too."""
    set_seed(5)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


def logits(one: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = one(input_ids=IDS).logits
    return found


def tuned() -> dict[str, Tensor]:
    return {name: tensor * 1.25 for name, tensor in model().state_dict().items() if name != "lm_head.weight"}


@pytest.fixture
def package(tmp_path: Path) -> DeltaPackage:
    return extract(model(), tuned(), tmp_path / "package", p=0.5, base_model="base")


def everything(one: PreTrainedModel) -> None:
    cpu_offload(one, execution_device=torch.device("cpu"))


def one_part(one: PreTrainedModel) -> None:
    cpu_offload(one.model.layers[1], execution_device=torch.device("cpu"))


def layer_by_layer(one: PreTrainedModel) -> None:
    """A hook of a layer has the weights of all that is in it."""
    cpu_offload(one, execution_device=torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"])


@pytest.mark.parametrize("offload", [everything, one_part, layer_by_layer])
def test_packages_are_applied_where_the_weights_are_kept(
    offload: Callable[[PreTrainedModel], None], package: DeltaPackage
) -> None:
    plain, kept = model(), model()
    before = logits(plain)
    offload(kept)
    assert any(parameter.is_meta for parameter in kept.parameters())
    apply_(plain, package)
    expected = logits(plain)
    assert not torch.equal(expected, before)
    with applied(kept, package):
        assert torch.equal(logits(kept), expected)
        assert torch.equal(logits(kept), expected), "the pass before put other weights back"
    assert torch.equal(logits(kept), before)
    assert any(parameter.is_meta for parameter in kept.parameters())


def test_the_package_of_an_offloaded_model_is_that_of_its_weights(
    package: DeltaPackage, tmp_path: Path
) -> None:
    one = model()
    one.load_state_dict(tuned() | {"lm_head.weight": tuned()["model.embed_tokens.weight"]})
    everything(one)
    found = extract(model(), one, tmp_path / "offloaded", p=0.5, base_model="base")
    assert files_of(found.path) == files_of(package.path)


@pytest.mark.parametrize("work", ["apply_", "extract"])
def test_weights_on_disk_are_refused_by_name(work: str, package: DeltaPackage, tmp_path: Path) -> None:
    one: Any = model()
    disk_offload(one, str(tmp_path / "disk"), execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError) as caught:
        apply_(one, package) if work == "apply_" else extract(model(), one, tmp_path / "out")
    refusal(
        caught.value,
        ConfigError,
        "model.embed_tokens.weight: expected weights in memory, found weights that accelerate keeps on disk",
        "work on the checkpoint's files",
    )
    assert not (tmp_path / "out").exists()
