"""Packages of quantised checkpoints: bit for bit, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_models import FORMULAS, OTHER_FORMULAS, SCHEMES, State, quantised, save_model, weights
from safetensors.torch import load_file

from dare_train import apply, diagnose, extract, merge
from dare_train.errors import CheckpointError, ConfigError, DareError, TensorMismatch
from dare_train.weights.lora.opening import open_weights

QUANTISED = r"full precision.*found quantised weights: .*give the model in full"
PACKED = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, State]:
    """A base and a fine-tune in one scheme, and the latter's tensors."""
    scheme = getattr(request, "param", "fp8")
    base, config = quantised(scheme, weights())
    tuned, _ = quantised(scheme, {name: tensor * 1.3 for name, tensor in weights().items()}, seed=9)
    return save_model(base, tmp_path / "base", config), save_model(tuned, tmp_path / "tuned", config), tuned


def same_bits(folder: Path, state: State) -> bool:
    found = load_file(folder / "model.safetensors")
    return found.keys() == state.keys() and all(
        found[name].dtype == tensor.dtype and bits(found[name]) == bits(tensor)
        for name, tensor in state.items()
    )


def bits(tensor: torch.Tensor) -> list[int]:
    flat: list[int] = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return flat


@pytest.mark.parametrize("pair", SCHEMES, indirect=True)
def test_two_checkpoints_in_one_scheme_come_back_bit_for_bit(
    pair: tuple[Path, Path, State], tmp_path: Path
) -> None:
    base, tuned, state = pair
    package = extract(base, tuned, tmp_path / "package", p=0)
    assert all(record.mask == "all" and record.values == "exact" for record in package.manifest.tensors)
    apply(base, package, tmp_path / "result")
    assert same_bits(tmp_path / "result", state)
    told = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "result", tuned)]
    assert told[0].get("quantization_config") == told[1].get("quantization_config")


@pytest.mark.parametrize("pair", SCHEMES, indirect=True)
def test_nothing_is_dropped_from_them(pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    base, tuned, _ = pair
    for action in (
        lambda out: extract(base, tuned, out, p=0.9),
        lambda out: extract(base, tuned, out, p={"*.k_proj.*": 0.5, "*": 0}),
        lambda out: merge(base, [tuned], out, weights=[0.5]),
        lambda out: merge(base, [tuned, tuned], out, method="ties"),
        lambda out: diagnose(base, tuned),
    ):
        with pytest.raises(CheckpointError, match=QUANTISED):
            action(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_and_full_precision_do_not_meet(scheme: str, tmp_path: Path) -> None:
    plain = save_model(weights(), tmp_path / "plain", {})
    packed = save_model(
        *(quantised(scheme, weights())[0], tmp_path / "packed"), quantised(scheme, weights())[1]
    )
    for base, tuned in ((plain, packed), (packed, plain)):
        for p in (0.0, 0.9):
            with pytest.raises(CheckpointError, match="found quantised weights"):
                extract(base, tuned, tmp_path / "out", p=p)
        for action in (
            lambda base=base, tuned=tuned: merge(base, [tuned], tmp_path / "out"),
            lambda base=base, tuned=tuned: merge(base, [tuned], tmp_path / "out", package=True),
            lambda base=base, tuned=tuned: diagnose(base, tuned),
        ):
            with pytest.raises(DareError, match="quantised weights"):
                action()


def test_two_schemes_do_not_meet(tmp_path: Path) -> None:
    folders = [
        save_model(state, tmp_path / scheme, config)
        for scheme in ("awq", "gptq")
        for state, config in [quantised(scheme, weights())]
    ]
    with pytest.raises(CheckpointError, match=r"and .*awq is quantised otherwise: AWQ"):
        extract(*folders, tmp_path / "out", p=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"exclude": "*_scale_inv"},
            "include, exclude and whole to name all of .*_scale_inv.*, found some",
        ),
        ({"include": "*.weight"}, "include, exclude and whole to name all of"),
        ({"whole": PACKED}, "include, exclude and whole to name all of"),
        ({"values": "rounded"}, "values of .*: expected exact: it is quantised, found 'rounded'"),
        (
            {"masks": {f"{PACKED}_scale_inv": [[True]]}},
            "masks.*expected a weight in full precision, found fp8",
        ),
    ],
)
def test_no_option_tears_a_unit_apart(
    options: dict[str, Any], text: str, pair: tuple[Path, Path, State], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        extract(*pair[:2], tmp_path / "out", p=0, **options)


def test_a_whole_unit_may_stay_or_travel(pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    base, tuned, state = pair
    package = extract(base, tuned, tmp_path / "package", p=0, exclude="*q_proj*", whole="*k_proj*")
    apply(base, package, tmp_path / "result")
    before = load_file(base / "model.safetensors")
    assert same_bits(
        tmp_path / "result",
        {name: before[name] if "q_proj" in name else tensor for name, tensor in state.items()},
    )


def test_such_packages_are_not_multiplied_nor_added(pair: tuple[Path, Path, State], tmp_path: Path) -> None:
    base, tuned, _ = pair
    package = extract(base, tuned, tmp_path / "package", p=0)
    for packages, given in (([package], [0.5]), ([package, package], None)):
        with pytest.raises(TensorMismatch, match="expected weight 1 and no package beside it"):
            apply(base, packages, tmp_path / "out", weights=given)
    with pytest.raises(CheckpointError, match="found quantised"):
        merge(base, [package], tmp_path / "out")


@pytest.mark.parametrize("pair", [*FORMULAS, *OTHER_FORMULAS], indirect=True)
def test_with_dequantize_all_is_as_of_the_models_in_full_precision(
    pair: tuple[Path, Path, State], tmp_path: Path
) -> None:
    base, tuned, _ = pair
    full = []
    for folder in (base, tuned):
        opened = open_weights(folder, dequantize=True)
        state = {
            name: torch.from_numpy(opened.read(name, 0, info.numel).view("i2").copy())
            .view(torch.bfloat16)
            .view(info.shape)
            for name, info in opened.tensors.items()
        }
        full.append(save_model(state, tmp_path / "full" / folder.name, {"model_type": "llama"}))
    package = extract(base, tuned, tmp_path / "package", p=0.5, dequantize=True)
    expected = extract(*full, tmp_path / "expected", p=0.5)
    assert package.manifest.result == expected.manifest.result
    apply(base, package, tmp_path / "result", dequantize=True)
    apply(full[0], expected, tmp_path / "of-full")
    assert same_bits(tmp_path / "result", load_file(tmp_path / "of-full/model.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / "result/config.json").read_text())
    with pytest.raises(CheckpointError, match=r"as the package has its base.*dequantize=True"):
        apply(base, package, tmp_path / "refused")
    merge(base, [tuned], tmp_path / "merged", weights=[0.5], dequantize=True)
    merge(full[0], [full[1]], tmp_path / "merged-of-full", weights=[0.5])
    assert same_bits(tmp_path / "merged", load_file(tmp_path / "merged-of-full/model.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert diagnose(base, tuned, dequantize=True).verdict == diagnose(*full).verdict


def test_a_quantised_tuned_model_on_a_full_base_leaves_no_word_of_it(tmp_path: Path) -> None:
    base = save_model(weights(), tmp_path / "base", {"model_type": "llama", "torch_dtype": "bfloat16"})
    tuned = save_model(quantised("fp8", weights())[0], tmp_path / "tuned", quantised("fp8", weights())[1])
    package = extract(base, tuned, tmp_path / "package", p=0, dequantize=True)
    apply(base, package, tmp_path / "result")
    assert "quantization_config" not in json.loads((tmp_path / "result/config.json").read_text())
