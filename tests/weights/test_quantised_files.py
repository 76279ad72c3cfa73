"""Checkpoints that are quantised: what belongs to one weight, and what it is in full precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_models import FORMULAS, SCHEMES, quantised, save_model, weights

from dare_train.errors import CheckpointError
from dare_train.weights.files.checkpoint import Checkpoint
from dare_train.weights.files.dequantise import Dequantised, in_single, is_formula
from dare_train.weights.files.quantised import Quantised
from dare_train.weights.lora.opening import open_weights

NAME = "model.layers.0.self_attn.q_proj"


def dequantised(folder: Path, name: str = f"{NAME}.weight") -> torch.Tensor:
    opened = open_weights(folder, dequantize=True)
    info = opened.tensors[name]
    words = np.array(opened.read(name, 0, info.numel))
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return (
        torch.from_numpy(words.view(f"i{info.dtype.itemsize}")).view(kinds[info.dtype.code]).view(info.shape)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("said", [True, False])
def test_what_belongs_to_a_weight_is_one_unit(scheme: str, said: bool, tmp_path: Path) -> None:
    state, config = quantised(scheme, weights())
    opened = Checkpoint.open(save_model(state, tmp_path / "model", config if said else {}))
    found = Quantised.of(opened)
    units = {unit.weight: unit.parts for unit in found.units}
    assert len(units) == 4
    everything = frozenset().union(*units.values())
    assert everything == state.keys() - weights().keys() | {
        name for name in weights() if name in state and "proj" in name
    } - {name for name in state if name.endswith(".bias")}
    for parts in units.values():
        assert len({part.split("_proj")[0] for part in parts}) == 1
    assert SCHEMES[scheme] in str(found)


def test_what_is_no_weight_is_no_unit(tmp_path: Path) -> None:
    plain = {
        "norm.weight": torch.ones(3),
        "embeddings.position_ids": torch.arange(4).reshape(1, 4),
        "bn.num_batches_tracked": torch.tensor(3),
        "attn.relative_position_index": torch.zeros(3, 3, dtype=torch.int64),
        "attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "logit_scale": torch.ones(1),
        "q_proj.k_scale": torch.ones(1),
        "attn.causal_mask": torch.ones(4, 4, dtype=torch.uint8),
    }
    said = {"quantization_config": {"quant_method": "bitsandbytes"}}
    for number, config in enumerate(({}, said)):
        found = Quantised.of(open_weights(save_model(plain, tmp_path / f"model{number}", config)))
        assert not found, config


@pytest.mark.parametrize("name", ["q_proj.weight", "experts.gate_up_proj"])
def test_fp8_without_scales_is_what_it_says(name: str, tmp_path: Path) -> None:
    """As it is stored, it cannot be added up; the formula is the number itself."""
    packed = torch.randn(3, 5, generator=torch.Generator().manual_seed(7)).to(torch.float8_e4m3fn)
    folder = save_model({name: packed, "norm.weight": torch.ones(3)}, tmp_path / "model", {})
    found = Quantised.of(open_weights(folder))
    assert [unit.parts for unit in found.units] == [{name}]
    assert "fp8 without scales" in str(found)
    assert torch.equal(dequantised(folder, name), packed.float())


def test_scales_that_were_left_behind_are_not_passed_over(tmp_path: Path) -> None:
    """fp8 that somebody cast to bf16 without them: as a number, a weight is not what it was."""
    state, _ = quantised("fp8", weights())
    cast = {name: t.bfloat16() if t.dtype == torch.float8_e4m3fn else t for name, t in state.items()}
    opened = open_weights(save_model(cast, tmp_path / "model", {}))
    found = Quantised.of(opened)
    assert len(found.units) == 4
    assert not is_formula(found, opened.tensors)


@pytest.mark.parametrize("made_of", ["codes and codebooks", "trellis", "indices"])
def test_integers_that_stand_where_a_weight_would_are_one(made_of: str, tmp_path: Path) -> None:
    """AQLM, QTIP and VPTQ, where no configuration says so: whatever lies in the layer belongs to it."""
    integers = torch.arange(8, dtype=torch.int16).reshape(4, 2)
    parts = {
        "codes and codebooks": {
            "codes": integers,
            "codebooks": torch.ones(1, 8, 1, 4),
            "scales": torch.ones(4),
        },
        "trellis": {"trellis": integers, "suh": torch.ones(4), "svh": torch.ones(2)},
        "indices": {"indices": integers.int(), "weight_scale": torch.ones(4), "weight_bias": torch.ones(4)},
    }[made_of]
    state = {f"{NAME}.{leaf}": tensor for leaf, tensor in parts.items()}
    plain = {
        f"{NAME}.bias": torch.ones(4),
        "norm.weight": torch.ones(3),
        "norm.steps": torch.ones(2, 2).int(),
    }
    found = Quantised.of(open_weights(save_model(state | plain, tmp_path / "model", {})))
    assert [unit.parts for unit in found.units] == [
        state.keys() - {name for name in state if name.endswith("bias")}
    ]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_small_floats_are_what_torch_says(dtype: torch.dtype) -> None:
    words = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(words).view(dtype).float().numpy()
    codes = {
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.float8_e8m0fnu: "F8_E8M0",
    }
    from dare_train.dtypes import dtype_of

    found = in_single(words, dtype_of(codes[dtype]))
    finite = ~np.isnan(expected)
    assert np.array_equal(found[finite], expected[finite])
    assert np.isnan(found[~finite]).all() or dtype == torch.float8_e8m0fnu


@pytest.mark.parametrize("scheme", sorted({*FORMULAS} - {"mxfp4"}))
def test_formulas_are_a_product_and_a_rounding(scheme: str, tmp_path: Path) -> None:
    state, config = quantised(scheme, weights())
    folder = save_model(state, tmp_path / "model", config)
    packed = state[f"{NAME}.weight"].float()
    known = ("weight_scale_inv", "weight_scale", "SCB")
    scale = next((state[f"{NAME}.{leaf}"] for leaf in known if f"{NAME}.{leaf}" in state), torch.ones(()))
    grid = scale.float().reshape(*(scale.shape if scale.dim() > 1 else (-1, 1)))
    wide = grid.repeat_interleave(32 // grid.shape[0], 0).repeat_interleave(32 // grid.shape[1], 1)
    product = packed * wide * (7.874015718698502e-3 if scheme == "bnb 8" else 1)
    assert torch.equal(dequantised(folder), product.bfloat16())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (32, 1), (8, 2)])
def test_fp8_is_read_in_the_bits_of_transformers(grid: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(32, 32, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=generator) * 1e-2
    state = {f"{NAME}.weight": packed, f"{NAME}.weight_scale_inv": scales, "norm.weight": torch.ones(2)}
    config = {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": dtype}
    folder = save_model(state, tmp_path / "model", config)
    expected = Fp8Dequantize(None)._dequantize_one(packed, scales, getattr(torch, dtype))
    assert torch.equal(dequantised(folder), expected)


def test_blocks_that_do_not_come_out_even_are_cut(tmp_path: Path) -> None:
    packed = torch.ones(6, 5).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 5).reshape(2, 2)
    state = {f"{NAME}.weight": packed, f"{NAME}.weight_scale_inv": scales}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}, "dtype": "float32"}
    found = dequantised(save_model(state, tmp_path / "model", config))
    assert torch.equal(found, scales.repeat_interleave(4, 0)[:6].repeat_interleave(4, 1)[:, :5])
    del config["quantization_config"]["weight_block_size"]
    state[f"{NAME}.weight"] = torch.ones(7, 5).to(torch.float8_e4m3fn)
    without = save_model(state, tmp_path / "without", config)
    with pytest.raises(
        CheckpointError, match=r"expected scales for blocks of \[7, 5\], found a grid of \[2, 2\]"
    ):
        open_weights(without, dequantize=True)


def test_mxfp4_is_read_in_the_bits_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    state = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(2, 6)}
    folder = save_model(state, tmp_path / "model", {"quantization_config": {"quant_method": "mxfp4"}})
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(dequantised(folder, name), expected)
    opened = open_weights(folder, dequantize=True)
    assert sorted(opened.tensors) == [name, f"{name}_bias"]
    whole = opened.read(name, 0, opened.tensors[name].numel)
    for start, count in ((0, 0), (1, 5), (95, 100), (len(whole) - 3, 3)):
        assert np.array_equal(opened.read(name, start, count), whole[start : start + count])


def test_eight_bits_of_bitsandbytes_are_read_in_its_bits(tmp_path: Path) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(-127, 128, (32, 16), generator=generator, dtype=torch.int8)
    scales = torch.rand(32, generator=generator)
    state = {f"{NAME}.weight": packed, f"{NAME}.SCB": scales, f"{NAME}.weight_format": torch.tensor(0).byte()}
    config: dict[str, Any] = {"quantization_config": {"quant_method": "bitsandbytes"}, "dtype": "float16"}
    folder = save_model(state, tmp_path / "model", config)
    assert torch.equal(dequantised(folder), int8_vectorwise_dequant(packed, scales).half())


@pytest.mark.parametrize("shape", [(32, 1), (1,), (32,), (32, 4)])
def test_int8_with_scales_is_their_product(shape: tuple[int, ...], tmp_path: Path) -> None:
    """compressed-tensors: in the dtype of the scales, which has room for any of 256 integers."""
    generator = torch.Generator().manual_seed(4)
    packed = torch.randint(-128, 128, (32, 16), generator=generator, dtype=torch.int8)
    scales = torch.rand(shape, generator=generator).bfloat16()
    state = {f"{NAME}.weight": packed, f"{NAME}.weight_scale": scales}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}, "dtype": "bfloat16"}
    found = dequantised(save_model(state, tmp_path / "model", config))
    wide = scales.reshape(-1, scales.shape[-1] if scales.dim() > 1 else 1)
    wide = wide.repeat_interleave(32 // wide.shape[0], 0).repeat_interleave(16 // wide.shape[1], 1)
    assert torch.equal(found, packed.bfloat16() * wide)


@pytest.mark.parametrize("shape", [(32, 1), (32, 4)])
def test_zero_points_come_off_first(shape: tuple[int, ...], tmp_path: Path) -> None:
    """compressed-tensors: in bfloat16, which has room for any difference of two bytes."""
    packed = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(2).reshape(32, 16)
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    zeros = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(5)).to(torch.int8)
    parts = {"weight": packed, "weight_scale": scales, "weight_zero_point": zeros}
    state = {f"{NAME}.{leaf}": tensor for leaf, tensor in parts.items()}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}, "dtype": "bfloat16"}
    found = dequantised(save_model(state, tmp_path / "model", config))
    scales, zeros = (each.repeat_interleave(16 // shape[1], 1) for each in (scales, zeros))
    assert torch.equal(found, (packed.bfloat16() - zeros.bfloat16()) * scales)


def test_zero_points_of_an_unknown_scheme_are_no_formula(tmp_path: Path) -> None:
    state = {
        f"{NAME}.weight": torch.ones(4, 4, dtype=torch.int8),
        f"{NAME}.weight_scale": torch.ones(4, 1),
        f"{NAME}.weight_zero_point": torch.ones(4, 1, dtype=torch.int8),
    }
    with pytest.raises(CheckpointError, match="expected a scheme that is a formula"):
        open_weights(save_model(state, tmp_path / "model", {}), dequantize=True)


def test_what_is_no_formula_is_refused(tmp_path: Path) -> None:
    state, config = quantised("gptq", weights())
    folder = save_model(state, tmp_path / "model", config)
    assert not is_formula(Quantised.of(open_weights(folder)), open_weights(folder).tensors)
    with pytest.raises(
        CheckpointError, match=r"expected a scheme that is a formula: .* found GPTQ \(I32 .*qweight"
    ):
        open_weights(folder, dequantize=True)


def test_a_checkpoint_in_full_precision_stays_what_it_is(tmp_path: Path) -> None:
    opened = open_weights(save_model(weights(), tmp_path / "model", {}), dequantize=True)
    assert isinstance(opened, Checkpoint)
    assert not isinstance(opened, Dequantised)


def test_a_configuration_that_is_no_json_says_nothing(tmp_path: Path) -> None:
    folder = save_model(weights(), tmp_path / "model", {})
    (folder / "config.json").write_text(json.dumps(["quantization_config"]))
    assert not Quantised.of(open_weights(folder))


def test_integers_in_rows_are_a_weight_where_a_configuration_says_so(tmp_path: Path) -> None:
    """SpQR: no matrix, and no scales that are floating-point numbers."""
    module = "model.layers.0.self_attn.q_proj"
    parts = {
        f"{module}.dense_weights": torch.arange(64),
        f"{module}.row_offsets": torch.arange(17, dtype=torch.int32),
        f"{module}.in_perm": torch.arange(16),
    }
    plain = {"model.norm.weight": torch.ones(16), "model.position_ids": torch.arange(4)}
    config = {"quantization_config": {"quant_method": "spqr"}}
    folder = save_model({**parts, **plain}, tmp_path / "said", config)
    (unit,) = Quantised.of(Checkpoint.open(folder)).units
    assert (unit.weight, unit.parts, unit.scheme) == (f"{module}.weight", {*parts}, "spqr")
    assert not Quantised.of(Checkpoint.open(save_model({**parts, **plain}, tmp_path / "not", {})))
