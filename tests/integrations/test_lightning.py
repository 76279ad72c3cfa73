"""Lightning's Trainer with our callback: one device, DDP and FSDP, gone on from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import pytest
import pytorch_lightning
import torch
from engines import run_ranks
from fine_tunes import lora
from hub_server import HubServer, hub_of
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from tiny import refusal
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from training import classifier, examples, save_base, weights_print
from transformers import default_data_collator

from dare_train import DeltaPackage, apply, extract
from dare_train.errors import BaseMismatch, ConfigError, DareError
from dare_train.integrations.lightning import DareCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:::(lightning|pytorch_lightning|torch|importlib|_pytest)"
)  # their own


def classifying(kind: Any = lightning.LightningModule) -> Any:
    """A classifier, and beside it a module without weights."""

    class Classifying(kind):  # type: ignore[misc]
        def __init__(self, base: Path) -> None:
            super().__init__()
            self.network = classifier(base)
            self.loss = torch.nn.CrossEntropyLoss()

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            labels = batch.pop("labels")
            return self.loss(self.network(**batch).logits, labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Classifying


Classifying = classifying()


def rows() -> DataLoader[Any]:
    data: Any = examples(24)
    return DataLoader(data, batch_size=6, collate_fn=default_data_collator)


def trainer(place: Path, *callbacks: Any, kind: Any = lightning.Trainer, **options: Any) -> Any:
    settings = {
        "default_root_dir": place, "accelerator": "cpu", "devices": 1, "max_steps": 4, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [*callbacks, _saving(kind, place)],
    }  # fmt: skip
    return kind(**{**settings, **options})


def _saving(kind: Any, place: Path) -> Any:
    saves = ModelCheckpoint if kind is lightning.Trainer else pytorch_lightning.callbacks.ModelCheckpoint
    return saves(dirpath=place / "checkpoints", filename="{step}", every_n_train_steps=2, save_top_k=-1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (lightning.Trainer, Classifying),
        (pytorch_lightning.Trainer, classifying(pytorch_lightning.LightningModule)),
    ],
    ids=["lightning", "pytorch_lightning"],
)
def test_packages_of_the_model_in_the_module(tmp_path: Path, base: Path, kind: Any, module: Any) -> None:
    callback = DareCallback(p=0.0)
    model = module(base)
    trainer(tmp_path, callback, kind=kind).fit(model, rows())
    assert sorted(path.name for path in (tmp_path / "dare").iterdir()) == ["final", "step-2", "step-4"]
    assert [snapshot.step for snapshot in callback.packages] == [2, 4, 4]
    package = DeltaPackage.open(tmp_path / "dare/final")
    assert package.manifest.base_model == str(base)
    assert package.manifest.result == weights_print(model.network)
    apply(base, package, tmp_path / "received")
    received = type(model.network).from_pretrained(tmp_path / "received")
    assert weights_print(received) == weights_print(model.network)


def test_packages_are_pushed_behind_training(tmp_path: Path, base: Path) -> None:
    with HubServer() as hub, hub_of(hub.environment):
        callback = DareCallback(p=0.5, push_to_hub="me/run")
        trainer(tmp_path, callback).fit(Classifying(base), rows())
    assert callback.failures == []
    pushed = hub.files("me/run")
    for name in ("step-2", "step-4", "final"):
        for file in (tmp_path / "dare" / name).iterdir():
            assert pushed[f"{name}/{file.name}"] == file.read_bytes()


def test_when_and_how_many(tmp_path: Path, base: Path) -> None:
    callbacks = (
        DareCallback(when=1, keep=2, name="each"),
        DareCallback(when="epoch", name="epochs", incremental=True, folder=tmp_path / "elsewhere"),
    )
    trainer(tmp_path, *callbacks, max_steps=8).fit(Classifying(base), rows())
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == ["step-7", "step-8"]
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["step-4", "step-8"]


def test_gone_on_with_from_a_checkpoint_it_has_the_true_base(tmp_path: Path, base: Path) -> None:
    trainer(tmp_path, DareCallback(p=0.5), max_steps=2).fit(Classifying(base), rows())
    module, second = Classifying(base), DareCallback(p=0.5)
    trainer(tmp_path, second).fit(module, rows(), ckpt_path=tmp_path / "checkpoints/step=2.ckpt")
    package = DeltaPackage.open(tmp_path / "dare/final")
    package.verify(base)
    expected = extract(base, module.network, tmp_path / "extracted", p=0.5, whole="classifier.*")
    assert package.manifest.result == expected.manifest.result
    names = sorted(path.name for path in (tmp_path / "dare").iterdir())
    assert names == ["final", "step-2", "step-4"]
    assert not (tmp_path / "dare-earlier-1").exists()


def test_a_checkpoint_without_the_callback_needs_the_base(tmp_path: Path, base: Path) -> None:
    trainer(tmp_path, max_steps=2).fit(Classifying(base), rows())
    checkpoint = tmp_path / "checkpoints/step=2.ckpt"
    with pytest.raises(DareError) as caught:
        trainer(tmp_path, DareCallback()).fit(Classifying(base), rows(), ckpt_path=checkpoint)
    refusal(caught.value, BaseMismatch, "step 2", "pass base=")
    trainer(tmp_path, DareCallback(base=base)).fit(Classifying(base), rows(), ckpt_path=checkpoint)
    DeltaPackage.open(tmp_path / "dare/final").verify(base)


def test_a_second_training_goes_on_from_the_same_base(tmp_path: Path, base: Path) -> None:
    callback, module = DareCallback(p=0.5, when="end"), Classifying(base)
    fits = trainer(tmp_path, callback, max_steps=2)
    fits.fit(module, rows())
    fits.fit_loop.epoch_loop.max_steps = 4
    fits.fit(module, rows())
    assert [snapshot.step for snapshot in callback.packages] == [2, 4]
    expected = extract(base, module.network, tmp_path / "extracted", p=0.5, whole="classifier.*")
    package = DeltaPackage.open(tmp_path / "dare/final")
    assert (package.manifest.base_model, package.manifest.result) == (str(base), expected.manifest.result)
    assert not (tmp_path / "dare/base").exists()


def test_what_fails_ends_no_training(tmp_path: Path, base: Path) -> None:
    class InTheWay(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            (tmp_path / "dare/step-2").write_text("a file")

    callback = DareCallback(when=2)
    fits = trainer(tmp_path, callback, InTheWay())
    fits.fit(Classifying(base), rows())
    assert fits.global_step == 4
    assert len(callback.failures) == 1
    assert [path.name for path in (tmp_path / "dare").iterdir() if path.is_dir()] == ["step-4"]


def test_adapters_give_the_merged_model(tmp_path: Path) -> None:
    from fine_tunes import load, save_decoder

    class Adapted(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = lora(load(tmp_path / "base"))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.network(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    save_decoder(tmp_path / "base")
    module = Adapted()
    data: Any = torch.arange(96).reshape(12, 8)
    trainer(tmp_path, DareCallback(p=0.0, when="end")).fit(module, DataLoader(data, batch_size=3))
    package = DeltaPackage.open(tmp_path / "dare/final")
    module.network.save_pretrained(tmp_path / "adapter")
    theirs = extract(tmp_path / "base", tmp_path / "adapter", tmp_path / "extracted", p=0.0)
    assert package.manifest.result == theirs.manifest.result


def test_a_strategy_that_is_not_known(tmp_path: Path, base: Path) -> None:
    class DeepSpeedStrategy(lightning.pytorch.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(DareError) as caught:
        trainer(tmp_path, DareCallback(), strategy=DeepSpeedStrategy("cpu")).fit(Classifying(base), rows())
    refusal(caught.value, ConfigError, "one device, DDP or FSDP", "DeepSpeedStrategy")


class OnCpu(FSDPStrategy):
    """Lightning refuses FSDP without a GPU by this class's exact type, and torch where no device is named."""

    def _setup_model(self, model: torch.nn.Module) -> Any:
        with patch.object(FullyShardedDataParallel, "__init__", _on_cpu):
            return super()._setup_model(model)


_make = FullyShardedDataParallel.__init__


def _on_cpu(self: Any, *given: Any, **named: Any) -> None:
    _make(self, *given, **{**named, "device_id": torch.device("cpu")})


class Sharded(Classifying):
    """FSDP2, as Lightning has it: the module shards itself."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.network, FSDPModule):
            for layer in self.network.bert.encoder.layer:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


def _strategy(engine: str) -> tuple[Any, type[Classifying]]:
    if engine == "fsdp1":
        from transformers.models.bert.modeling_bert import BertLayer

        options = {"process_group_backend": "gloo", "state_dict_type": "sharded"}  # a full one crashes
        return OnCpu(auto_wrap_policy={BertLayer}, **options), Classifying
    if engine == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), Sharded
    return "ddp", Classifying


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fsdp1": FullyShardedDataParallel,
    "fsdp2": lightning.LightningModule,
}


class AtWork(lightning.Callback):
    """Fails the run unless the engine that the test believes in trains."""

    def __init__(self, engine: str) -> None:
        self.engine = engine

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert isinstance(trainer.strategy.model, WRAPPERS[self.engine])
        spread = [isinstance(parameter, DTensor) for parameter in pl_module.parameters()]
        assert all(spread) == any(spread) == (self.engine == "fsdp2")


def on_ranks(_: int, engine: str, base: Path, place: Path) -> list[str]:
    os.environ["TORCHELASTIC_RUN_ID"] = "lightning"  # by which Lightning knows a launcher's child
    results = []
    for steps, last in ((2, None), (4, place / "checkpoints/step=2.ckpt")):
        strategy, module = _strategy(engine)
        callback = DareCallback(p=0.5, when=("save", "end"))
        fits = trainer(place, callback, AtWork(engine), strategy=strategy, devices=2, max_steps=steps)
        fits.fit(module(base), rows(), ckpt_path=last)
        assert callback.failures == []
        results += [snapshot.package.manifest.result for snapshot in callback.packages]
    return results


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2"])
def test_on_two_ranks_and_gone_on_with(tmp_path: Path, base: Path, engine: str) -> None:
    first, second = run_ranks(on_ranks, 2, engine, base, tmp_path / "out")
    assert first == second
    assert len(first) == 4
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    assert package.manifest.base_model == str(base)
    package.verify(base)
