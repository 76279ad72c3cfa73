"""Quantised checkpoints × whatever reads weights: right to the bit, or one line with scheme and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import dare_train
from fine_tunes import lora
from quantised_models import LLAMA, SCHEMES, State, quantised, save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from dare_train import (
    DareConfig,
    DeltaPackage,
    Snapshotter,
    apply,
    apply_,
    compare,
    diagnose,
    extract,
    extract_lora,
    find_q,
    inside,
    merge,
    rates,
    subnetwork,
    sweep,
    verify,
)
from dare_train.errors import DareError

CONFIG = {**LLAMA, "intermediate_size": 32, "max_position_embeddings": 16}
BATCH = {"input_ids": torch.arange(8).reshape(1, 8)}
Model = Any
Command = Callable[["Case"], object]


class Case(NamedTuple):
    scheme: str
    base: Path
    """Quantised."""
    tuned: Path
    """In the same scheme."""
    full_base: Path
    full_tuned: Path
    adapter: Path
    tensors: State
    """The quantised fine-tune's."""
    model: Model
    """The fine-tune in full precision, in memory."""
    out: Path


def full_weights(seed: int) -> State:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).bfloat16()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, fine-tune and adapter in full precision."""
    place = tmp_path_factory.mktemp("plain")
    folders = [
        save_model(full_weights(seed), place / name, CONFIG) for name, seed in (("base", 1), ("tuned", 2))
    ]
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    lora(model, init_lora_weights=False).save_pretrained(place / "adapter")
    return folders[0], folders[1], place / "adapter"


@pytest.fixture(scope="module")
def live(plain: tuple[Path, Path, Path]) -> Model:
    """The fine-tune, as it is left by whoever refuses."""
    return AutoModelForCausalLM.from_pretrained(plain[1])


@pytest.fixture(params=[(scheme, said) for scheme in SCHEMES for said in (True, False)], ids=str)
def case(request: pytest.FixtureRequest, plain: tuple[Path, Path, Path], live: Model, tmp_path: Path) -> Case:
    scheme, said = request.param
    full_base, full_tuned, adapter = plain
    folders = []
    for name, folder, seed in (("base", full_base, 0), ("tuned", full_tuned, 900)):
        state, config = quantised(scheme, load_file(folder / "model.safetensors"), seed=seed)
        config = {**CONFIG, **{key: value for key, value in config.items() if said and "quant" in key}}
        folders.append(save_model(state, tmp_path / name, config))
    return Case(scheme, *folders, full_base, full_tuned, adapter, state, live, tmp_path / "out")


def metric(model: Model) -> dict[str, float]:
    return {"loss": 1.0}


REFUSED: dict[str, Command] = {
    "extract": lambda case: extract(case.base, case.tuned, case.out, p=0.9),
    "extract some": lambda case: extract(case.base, case.tuned, case.out, p={"*.k_proj.*": 0.5, "*": 0}),
    "extract from full": lambda case: extract(case.full_base, case.tuned, case.out, p=0),
    "extract to full": lambda case: extract(case.base, case.full_tuned, case.out, p=0),
    "extract an adapter": lambda case: extract(case.base, case.adapter, case.out, p=0),
    "extract from memory": lambda case: extract(case.base, case.model, case.out, p=0),
    "apply a package of full precision": lambda case: apply(case.base, full_package(case), case.out),
    "the same, rounded": lambda case: apply(case.base, full_package(case), case.out, cast_base=True),
    "apply to full precision": lambda case: apply(case.full_base, lossless(case), case.out),
    "apply in memory": lambda case: apply_(case.model, lossless(case)),
    "apply with a weight": lambda case: apply(case.base, lossless(case), case.out, weights=[0.5]),
    "apply two": lambda case: apply(case.base, [lossless(case)] * 2, case.out),
    "merge": lambda case: merge(case.base, [case.tuned], case.out, weights=[0.5]),
    "merge one": lambda case: merge(case.base, [case.tuned], case.out),
    "merge into a package": lambda case: merge(case.base, [case.tuned], case.out, package=True),
    "ties": lambda case: merge(case.base, [case.tuned] * 2, case.out, method="ties"),
    "dare_ties": lambda case: merge(case.base, [case.tuned] * 2, case.out, method="dare_ties", p=0.5),
    "slerp": lambda case: merge(case.base, [case.base, case.tuned], case.out, method="slerp"),
    "average with full": lambda case: merge(
        case.full_base, [case.full_tuned, case.tuned], case.out, method="average"
    ),
    "merge full into quantised": lambda case: merge(case.base, [case.full_tuned], case.out),
    "merge a package": lambda case: merge(case.base, [lossless(case)], case.out),
    "merge a package into full": lambda case: merge(case.full_base, [lossless(case)], case.out),
    "merge a package of full precision": lambda case: merge(case.base, [full_package(case)], case.out),
    "merge an adapter": lambda case: merge(case.base, [case.adapter], case.out),
    "diagnose": lambda case: diagnose(case.base, case.tuned),
    "diagnose from full": lambda case: diagnose(case.full_base, case.tuned),
    "diagnose to full": lambda case: diagnose(case.base, case.full_tuned),
    "lora": lambda case: extract_lora(case.base, case.tuned, case.out, rank=2),
    "lora from full": lambda case: extract_lora(case.full_base, case.tuned, case.out, rank=2),
    "sweep": lambda case: sweep(case.model, case.base, metric, out=case.out / "sweep", p=[0.5], seeds=1),
    "sweep the files": lambda case: sweep(
        case.model, case.full_base, metric, out=case.out / "sweep", tuned=case.tuned, p=[0.5], seeds=1
    ),
    "compare": lambda case: compare(
        case.model, case.base, case.tuned, metric, out=case.out / "compare", p=[0.5], seeds=1
    ),
    "compare to full": lambda case: compare(
        case.model, case.base, case.full_tuned, metric, out=case.out / "compare", p=[0.5], seeds=1
    ),
    "inside": lambda case: inside(case.model, case.base, [BATCH], tokens=8, masks=1, seeds=1, p=[0.5]),
    "find_q": lambda case: find_q(case.model, case.base, [BATCH], p=0.5),
    "rates": lambda case: rates.largest_rate(case.model, case.base, metric, out=case.out / "rates"),
    "subnetwork": lambda case: subnetwork.by_size(case.base, case.tuned, density=0.5),
    "snapshots": lambda case: snapshots(case),
}


def snapshots(case: Case) -> None:
    """A training on a quantised base, of a model in full precision."""
    taker = Snapshotter.begin(case.model, case.out / "run", DareConfig(p=0.5), base=case.base)
    taker.take(case.model, case.out / "run/package", step=1)
    taker.close()


def lossless(case: Case) -> DeltaPackage:
    place = case.out.parent / "lossless"
    return DeltaPackage.open(place) if place.exists() else extract(case.base, case.tuned, place, p=0)


def full_package(case: Case) -> DeltaPackage:
    place = case.out.parent / "full-package"
    made = place.exists()
    return DeltaPackage.open(place) if made else extract(case.full_base, case.full_tuned, place, p=0)


def bits(state: State) -> dict[str, tuple[torch.dtype, list[int]]]:
    return {
        name: (tensor.dtype, tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in state.items()
    }


def complaint(command: Command, case: Case) -> str:
    """What is wrong with how a command refuses; nothing where it is a line with scheme and remedy."""
    try:
        return f"gave {command(case)}"
    except DareError as error:
        text = str(error)
    told = all(word in text for word in ("quantised", SCHEMES[case.scheme], ";"))
    return "" if told and "\n" not in text else text


def test_right_to_the_bit_or_refused_in_one_line(case: Case) -> None:
    package = lossless(case)
    apply(case.base, package, case.out / "applied")
    assert bits(load_file(case.out / "applied/model.safetensors")) == bits(case.tensors)
    verify(package, case.base)
    before = bits(case.model.state_dict())
    wrong = {name: text for name, command in REFUSED.items() if (text := complaint(command, case))}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
    assert bits(case.model.state_dict()) == before
    assert [path.name for path in case.out.rglob("*.safetensors")] == ["model.safetensors"]


COMMANDS = {
    "extract": ["extract", "base", "tuned", "--out", "out"],
    "merge": ["merge", "base", "tuned", "--out", "out"],
    "merge two": ["merge", "base", "tuned", "tuned", "--method", "ties", "--out", "out"],
    "diagnose": ["diagnose", "base", "tuned"],
    "lora": ["lora", "base", "tuned", "--rank", "2", "--out", "out"],
    "passthrough": ["merge", "stack.yml", "--out", "out"],
}


@pytest.mark.parametrize("scheme", ["fp8", "gptq", "bnb 4"])
def test_commands_end_with_one_line_and_exit_code_1(
    scheme: str, plain: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    for name, folder in (("base", plain[0]), ("tuned", plain[1])):
        state, config = quantised(scheme, load_file(folder / "model.safetensors"))
        save_model(state, tmp_path / name, {**CONFIG, "quantization_config": config["quantization_config"]})
    slices = [{"sources": [{"model": "tuned", "layer_range": [0, 1]}]}]
    (tmp_path / "stack.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    for name, words in COMMANDS.items():
        done = dare_train(*words, cwd=tmp_path)
        assert done.returncode == 1, (name, done.stderr)
        assert done.stderr.strip().count("\n") == 0, (name, done.stderr)
        assert f"found quantised weights: {SCHEMES[scheme]}" in done.stderr, name
        assert "give the model in full precision" in done.stderr, name
        assert not (tmp_path / "out").exists(), name
