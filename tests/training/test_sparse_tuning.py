"""Sparse tuning: kept elements train as they would among all, the others stay as they are, and the optimizer
knows no others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import run_ranks, train_on
from tiny import refusal
from training import classifier, examples, make_trainer, save_base, train, weights_print
from transformers import PreTrainedModel

from dare_train import DareCallback, SparseTuningCallback, apply_, extract, sparse_tuning
from dare_train.config import threshold_of
from dare_train.errors import ConfigError
from dare_train.package.masks import Mask, key_of
from dare_train.training.sparse_tuning import SparseTuning
from dare_train.weights.live.live import LiveWeights

KEY = "bert.encoder.layer.0.attention.self.key.weight"
HEAD = {"classifier*": 0.0, "*": 0.9}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def kept(name: str, numel: int, p: float = 0.9, seed: int = 0) -> np.ndarray:
    return Mask(kind="seeded", key=key_of(seed, name), threshold=threshold_of(p)).positions(0, numel)


def batch(number: int) -> dict[str, torch.Tensor]:
    rows = examples()[8 * number : 8 * number + 8]
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def steps(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, after: Callable[[], None] = lambda: None
) -> None:
    for number in range(4):
        optimizer.zero_grad()
        model.train(False)(**batch(number)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        after()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, nesterov=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, centered=True),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_elements_train_as_among_all(base: Path, name: str, dtype: torch.dtype) -> None:
    """As a dense optimizer's whose gradients are masked and whose other elements are put back, up to how
    torch rounds in vectors and in what is left over at their ends."""
    sparse, dense = classifier(base, dtype=dtype), classifier(base, dtype=dtype)
    start = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    masks = {key: torch.zeros(p.numel(), dtype=torch.bool) for key, p in dense.named_parameters()}
    for key, mask in masks.items():
        mask[kept(key, mask.numel()) if not key.startswith("classifier") else slice(None)] = True
    for key, parameter in dense.named_parameters():
        parameter.register_hook(lambda gradient, mask=masks[key]: gradient * mask.reshape(gradient.shape))

    def put_back() -> None:
        with torch.no_grad():
            for key, parameter in dense.named_parameters():
                parameter.copy_(torch.where(masks[key].reshape(parameter.shape), parameter, start[key]))

    optimizer = OPTIMIZERS[name](sparse.parameters())
    with sparse_tuning(sparse, optimizer, p=HEAD) as tuning:
        steps(sparse, optimizer)
        sizes = [
            value.numel() for state in optimizer.state.values() for value in state.values() if value.dim()
        ]
        assert max(sizes) < 60 * 32 * 0.2
        assert tuning.trained == sum(int(mask.sum()) for mask in masks.values())
        assert tuning.elements == sparse.num_parameters()
    steps(dense, OPTIMIZERS[name](dense.parameters()), put_back)
    for key, parameter in dense.named_parameters():
        moved = sparse.state_dict()[key] != start[key]
        assert not (moved.reshape(-1) & ~masks[key]).any(), key
        close = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=2**-6, atol=1e-4)
        torch.testing.assert_close(sparse.state_dict()[key], parameter.detach(), **close)
    assert (sparse.state_dict()[KEY] != start[KEY]).any()


def test_the_package_of_what_was_trained_loses_nothing(base: Path, tmp_path: Path) -> None:
    model = classifier(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with sparse_tuning(model, optimizer, p=HEAD, seed=5):
        steps(model, optimizer)
    options: dict[str, Any] = dict(p=HEAD, seed=5, rescale="none", values="exact", whole=["classifier*"])
    package = extract(base, model, tmp_path / "package", **options)
    assert package.stats["density"] < 0.15
    received = classifier(base)
    apply_(received, package)
    assert weights_print(received) == weights_print(model)


def test_masks_of_ones_own(base: Path) -> None:
    model = classifier(base)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[3] = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with sparse_tuning(model, optimizer, p=0.99, masks={KEY: mask}):
        steps(model, optimizer)
    moved = model.state_dict()[KEY] != start[KEY]
    assert moved[3].any()
    assert not (moved & ~mask).any()


def test_afterwards_the_optimizer_is_whole_again(base: Path) -> None:
    model = classifier(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parameters = list(model.parameters())
    with sparse_tuning(model, optimizer):
        steps(model, optimizer)
        assert optimizer.state[parameters[0]]["exp_avg"].numel() < 0.2 * parameters[0].numel()
    assert all(
        one is other for one, other in zip(optimizer.param_groups[0]["params"], parameters, strict=True)
    )
    assert not optimizer.state
    start = model.state_dict()[KEY].clone()
    steps(model, optimizer)
    assert (model.state_dict()[KEY] != start).float().mean() > 0.9


def test_state_from_before_is_kept_where_it_belongs(base: Path) -> None:
    model = classifier(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer)
    before = optimizer.state[dict(model.named_parameters())[KEY]]["exp_avg"].clone()
    with sparse_tuning(model, optimizer):
        found = [state["exp_avg"] for state in optimizer.state.values()]
        places = torch.from_numpy(kept(KEY, 32 * 32))
        assert any(one.shape == places.shape and torch.equal(one, before.take(places)) for one in found)


def test_a_trainer_resumes_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    through = train(
        classifier(base),
        tmp_path / "through",
        SparseTuningCallback(p=HEAD),
        DareCallback(p=HEAD, rescale="none", when="end"),
    )
    train(classifier(base), tmp_path / "resumed", SparseTuningCallback(p=HEAD), max_steps=4, save_steps=2)
    resumed = train(
        classifier(base),
        tmp_path / "resumed",
        SparseTuningCallback(p=HEAD),
        resume=tmp_path / "resumed/checkpoint-2",
        save_steps=2,
    )
    assert weights_print(through.model) == weights_print(resumed.model)
    callback = SparseTuningCallback(p=HEAD)
    dense = train(classifier(base), tmp_path / "sparse", callback)
    assert 0.08 < callback.trained / callback.elements < 0.15
    assert weights_print(dense.model) == weights_print(through.model)
    assert weights_print(train(classifier(base), tmp_path / "dense").model) != weights_print(dense.model)


def test_checkpoints_are_small(base: Path, tmp_path: Path) -> None:
    train(classifier(base), tmp_path / "sparse", SparseTuningCallback(p=HEAD))
    train(classifier(base), tmp_path / "dense")
    sizes = [sum(v.numel() for v in _state(tmp_path / name)) for name in ("sparse", "dense")]
    assert sizes[0] < 0.15 * sizes[1]


def _state(out: Path) -> list[torch.Tensor]:
    saved = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    return [value for state in saved.values() for value in state.values()]


def on_ranks(rank: int, engine: str, base: str, out: str) -> tuple[dict[str, float], int]:
    """Shares of elements that moved, of each tensor, and how many elements the optimizer has state for."""
    start = {name: tensor.detach().clone() for name, tensor in classifier(Path(base)).state_dict().items()}
    callback = SparseTuningCallback(p=HEAD)
    seen: list[int] = []

    class Look(DareCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
            inner = callback._tuning._optimizer if callback._tuning is not None else None
            seen.append(
                sum(
                    v.numel()
                    for s in inner.state.values()
                    for v in s.values()
                    if hasattr(v, "numel") and v.dim()
                )
            )
            return super().on_step_end(args, state, control, **rest)

    trainer = train_on(engine, lambda: classifier(Path(base)), Path(out), callback, Look(p=0.0, when="end"))
    live = LiveWeights(trainer.model)
    shares = {}
    for name, spans in live.held.items():
        for first, stop in spans:
            now = live.read(name, first, stop - first)
            was = (
                start[name].reshape(-1)[first:stop].numpy().view(now.dtype)
                if start[name].dtype == torch.float32
                else None
            )
            if was is not None:
                inside = (
                    kept(name, start[name].numel())
                    if not name.startswith("classifier")
                    else np.arange(start[name].numel())
                )
                moved = np.flatnonzero(now != was) + first
                assert np.isin(moved, inside).all(), name
                shares[name] = float(len(moved)) / (stop - first)
    return shares, max(seen)


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_on_two_processes(base: Path, tmp_path: Path, engine: str) -> None:
    found = run_ranks(on_ranks, 2, engine, str(base), str(tmp_path / "out"))
    for shares, state in found:
        assert 0.02 < shares[KEY] < 0.2
        assert state < 0.35 * classifier(base).num_parameters()


def refused(rank: int, engine: str, base: str, out: str) -> str:
    """What a Trainer under this engine says to the callback."""
    with pytest.raises(ConfigError) as caught:
        train_on(engine, lambda: classifier(Path(base)), Path(out), SparseTuningCallback(p=HEAD))
    return str(caught.value)


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
def test_fsdp_is_refused(base: Path, tmp_path: Path, engine: str) -> None:
    expected, found = (
        "one on one device, under DDP, or under DeepSpeed ZeRO",
        "one under FSDP, or with DTensors; use ZeRO to spread it",
    )
    text = f"model: expected {expected}, found {found}"
    assert run_ranks(refused, 2, engine, str(base), str(tmp_path / "out")) == [text] * 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(p=1.0), "p: expected a number in [0, 1)"),
        (
            dict(masks={KEY: torch.ones(3, dtype=torch.bool)}),
            f"masks['{KEY}']: expected bool [32, 32], found bool [3]",
        ),
        (
            dict(masks={"nothing": torch.ones(3, dtype=torch.bool)}),
            "masks['nothing']: expected a tensor of the model",
        ),
    ],
)
def test_what_means_nothing_is_refused(base: Path, options: dict[str, Any], text: str) -> None:
    model = classifier(base)
    with pytest.raises(ConfigError) as caught:
        SparseTuning(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    refusal(caught.value, ConfigError, text)


def test_optimizers_that_do_not_fit_are_refused(base: Path) -> None:
    model, other = classifier(base), torch.nn.Linear(3, 3)
    with pytest.raises(ConfigError) as caught:
        SparseTuning(model, torch.optim.SGD(other.parameters(), lr=0.1))
    refusal(caught.value, ConfigError, "optimizer: expected parameters of this model, found none of them")
    with pytest.raises(ConfigError) as caught:
        SparseTuning(model, "adam")
    refusal(
        caught.value, ConfigError, "optimizer: expected one of torch.optim, or one that wraps it, found str"
    )
    optimizer = torch.optim.LBFGS(model.parameters())
    with (
        sparse_tuning(model, optimizer),
        pytest.raises(ConfigError, match="expected steps without a closure"),
    ):
        optimizer.step(lambda: model(**batch(0)).loss)
    assert make_trainer
