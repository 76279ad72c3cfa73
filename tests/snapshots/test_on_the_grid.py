"""Snapshots whose elements land on the base's grid: the package is that of `extract` with what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tunes import ADAPTERS, QUANTISED, load, lora, make_trainer, rows, save_decoder
from peft import prepare_model_for_kbit_training
from safetensors.torch import load_file

from dare_train import DareCallback, apply, extract
from dare_train.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]
LANDING: dict[str, Any] = {"dtype": "base", "p": 0.5, "seed": 3}
SMALL = 2e-4
"""A learning rate whose steps are mostly below half a step of bf16."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("grid") / "base", dtype=torch.bfloat16)


def trained(model: Any, out: Path, *callbacks: DareCallback, **options: Any) -> Any:
    trainer = make_trainer(model, out, *callbacks, learning_rate=SMALL, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_of_fp32_weights(base: Path, tmp_path: Path, rounding: str) -> None:
    model = load(base, dtype=torch.float32)
    callback = DareCallback(**LANDING, rounding=rounding, when="end")
    trained(model, tmp_path / "out", callback)
    model.save_pretrained(tmp_path / "saved")
    theirs = extract(base, tmp_path / "saved", tmp_path / "package", rounding=rounding, **LANDING)
    ours = callback.package
    assert ours is not None
    assert ours.manifest.landed == (rounding, "paper")
    assert ours.manifest.result == theirs.manifest.result
    apply(base, ours, tmp_path / "received")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "received/model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("adapter", ["lora", "dora", "two active", "head too", "nested"])
def test_of_adapters(base: Path, tmp_path: Path, adapter: str) -> None:
    """What is merged is not rounded before it lands: p = 0 and the nearest give what merging in fp64 and
    rounding once would.
    """
    model = ADAPTERS[adapter](load(base))
    callbacks = [
        DareCallback(**LANDING, when="end", name="landed"),
        DareCallback(0, dtype="base", rounding="nearest", when="end", name="nearest"),
        DareCallback(0, when="end", name="rounded"),
    ]
    trained(model, tmp_path / "out", *callbacks)
    landed, nearest, rounded = (callback.package for callback in callbacks)
    assert landed is not None
    assert nearest is not None
    assert rounded is not None
    assert nearest.manifest.result == rounded.manifest.result
    assert landed.manifest.landed == ("stochastic", "paper")
    assert landed.stats["changed"] > 0.5 * nearest.stats["changed"]
    if adapter in ("lora", "dora", "head too"):
        model.save_pretrained(tmp_path / "adapter")
        theirs = extract(base, tmp_path / "adapter", tmp_path / "package", **LANDING)
        assert landed.manifest.result == theirs.manifest.result


@pytest.mark.parametrize("adapter", ["pissa", "olora", "fresh layer", "unfrozen", "second stage"])
def test_of_adapters_over_another_base(base: Path, tmp_path: Path, adapter: str) -> None:
    model = ADAPTERS[adapter](load(base))
    callbacks = [
        DareCallback(0, dtype=dtype, rounding="nearest", when="end", name=dtype)
        for dtype in ("base", "trained")
    ]
    trained(model, tmp_path / "out", *callbacks)
    landed, rounded = (callback.package for callback in callbacks)
    assert landed is not None
    assert rounded is not None
    assert landed.manifest.result == rounded.manifest.result


def test_of_adapters_over_a_quantised_base(base: Path, tmp_path: Path) -> None:
    packed = load(base, quantization_config=QUANTISED["nf4"](), device_map="cpu")
    model = lora(prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False))
    callback = DareCallback(**LANDING, when="end")
    trained(model, tmp_path / "out", callback)
    model.save_pretrained(tmp_path / "adapter")
    theirs = extract(base, tmp_path / "adapter", tmp_path / "package", **LANDING)
    assert callback.package is not None
    assert callback.package.manifest.result == theirs.manifest.result


def test_a_chain_arrives_where_the_package_on_the_base_does(base: Path, tmp_path: Path) -> None:
    callbacks = [
        DareCallback(**LANDING, when=1, incremental=True, name="chain"),
        DareCallback(**LANDING, when=1, name="each"),
    ]
    trained(load(base, dtype=torch.float32), tmp_path / "out", *callbacks)
    links, packages = ([one.package for one in callback.packages] for callback in callbacks)
    assert len(links) == 2
    assert [link.manifest.result for link in links] == [package.manifest.result for package in packages]
    apply(base, links, tmp_path / "received")


def test_evaluated_as_the_receiver_has_it(base: Path, tmp_path: Path) -> None:
    callback = DareCallback(**LANDING, when="end", evaluate=True)
    model = load(base, dtype=torch.float32)
    trainer = trained(
        model, tmp_path / "out", callback, eval_strategy="steps", eval_steps=2, eval_dataset=rows(8)
    )
    logged = next(entry for entry in trainer.state.log_history if "eval_dare_loss" in entry)
    apply(base, tmp_path / "out/dare/final", tmp_path / "received")
    received = make_trainer(
        load(tmp_path / "received", dtype=torch.float32), tmp_path / "again", eval_dataset=rows(8)
    )
    assert received.evaluate()["eval_loss"] == pytest.approx(logged["eval_dare_loss"], rel=1e-6)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_run_in_lower_precision_than_its_base_is_refused_at_train_begin(tmp_path: Path) -> None:
    fp32 = save_decoder(tmp_path / "base")
    model = load(fp32, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"BF16.*F32.*trained"):
        trained(model, tmp_path / "out", DareCallback(**LANDING))


def test_several_callbacks_share_a_training(base: Path, tmp_path: Path) -> None:
    """One that lands and one that does not."""
    callbacks = [
        DareCallback(**LANDING, when="end", name="landed"),
        DareCallback(0.5, seed=3, dtype="trained", when="end", name="trained"),
    ]
    trained(load(base, dtype=torch.float32), tmp_path / "out", *callbacks)
    landed, plain = (callback.package for callback in callbacks)
    assert landed is not None
    assert plain is not None
    assert {record.info.dtype.code for record in landed.manifest.tensors} == {"BF16"}
    assert {record.info.dtype.code for record in plain.manifest.tensors} == {"F32"}


def test_a_resumed_run_lands_as_before(base: Path, tmp_path: Path) -> None:
    whole = DareCallback(**LANDING, when="end")
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    trained(load(base, dtype=torch.float32), tmp_path / "out", whole, **options)
    again = DareCallback(**LANDING, when="end")
    trainer = make_trainer(
        load(base, dtype=torch.float32), tmp_path / "out", again, learning_rate=SMALL, **options
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert whole.package is not None
    assert again.package is not None
    assert whole.package.manifest.parent == again.package.manifest.parent
    assert whole.package.manifest.result == again.package.manifest.result


def test_adapters_of_a_base_in_fp32_are_as_without(tmp_path: Path) -> None:
    """There is no grid to land on."""
    fp32 = save_decoder(tmp_path / "base")
    callbacks = [DareCallback(0.5, dtype=dtype, when="end", name=dtype) for dtype in ("base", "trained")]
    trained(lora(load(fp32)), tmp_path / "out", *callbacks)
    landed, plain = (callback.package for callback in callbacks)
    assert landed is not None
    assert plain is not None
    assert landed.manifest.landed is None
    assert landed.manifest.result == plain.manifest.result


def test_by_default_elements_land_where_something_is_dropped(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not what keeps everything, nor what says how values are kept."""
    callbacks = [
        DareCallback(0.5, when="end", name="default"),
        DareCallback(0, when="end", name="whole"),
        DareCallback(0.5, values="exact", when="end", name="exact"),
        DareCallback(0.5, dtype="trained", when="end", name="trained"),
    ]
    trained(load(base, dtype=torch.float32), tmp_path / "out", *callbacks)
    landed = [callback.package is not None and callback.package.manifest.landed for callback in callbacks]
    assert landed == [("stochastic", "paper"), None, None, None]
    told = [record.message for record in caplog.records if "a base in BF16" in record.message]
    assert len(told) == 3
    assert "trained in F32: packages land on its grid" in told[0]
    assert 'dtype="trained"' in told[0]
    assert "packages are in F32" in told[1]
    assert 'dtype="base"' in told[1]


def test_by_default_adapters_land_and_say_so(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = DareCallback(0.5, when="end")
    model = lora(load(base))
    trained(model, tmp_path / "out", callback)
    model.save_pretrained(tmp_path / "adapter")
    package = extract(base, tmp_path / "adapter", tmp_path / "package", p=0.5)
    assert callback.package is not None
    assert package.manifest.landed == ("stochastic", "paper")
    assert callback.package.manifest.result == package.manifest.result
    assert sum("trained by adapters" in record.message for record in caplog.records) == 1


def test_a_training_in_the_bases_dtype_says_nothing(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = DareCallback(0.5, when="end")
    trained(load(base), tmp_path / "out", callback)
    assert callback.package is not None
    assert callback.package.manifest.landed is None
    assert not [record for record in caplog.records if "a base in" in record.message]
