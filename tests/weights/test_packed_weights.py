"""Integers that lie several in a word, against what libraries make of them, or their definition element by
element.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_models import OTHER_FORMULAS, quantised, save_model, weights

from dare_train.errors import CheckpointError
from dare_train.weights.files.dequantise import is_formula
from dare_train.weights.files.quantised import Quantised
from dare_train.weights.lora.opening import open_weights

NAME = "model.layers.0.self_attn.q_proj"
Parts = dict[str, torch.Tensor]
KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies at each place of a word, the lowest first."""


def save(parts: Parts, folder: Path, said: dict[str, Any], dtype: str = "bfloat16") -> Path:
    state = {f"{NAME}.{leaf}": tensor for leaf, tensor in parts.items()}
    return save_model(state, folder, {"quantization_config": said, "dtype": dtype})


def dequantised(folder: Path) -> torch.Tensor:
    opened = open_weights(folder, dequantize=True)
    info = opened.tensors[f"{NAME}.weight"]
    words = np.array(opened.read(f"{NAME}.weight", 0, info.numel))
    return (
        torch.from_numpy(words.view(f"i{info.dtype.itemsize}")).view(KINDS[info.dtype.code]).view(info.shape)
    )


def field(word: int, place: int, bits: int) -> int:
    return (word & 0xFFFFFFFF) >> (place * bits) & ((1 << bits) - 1)


def drawn(shape: tuple[int, ...], seed: int, mask: int = -1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator) & mask


def scales_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.01).to(dtype)


# bitsandbytes


def by_blocks(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """What `dequantize_4bit` is to give, and gives but on processors with AVX-512: there version 0.50 takes
    wrong scales where rows are no whole number of blocks.
    """
    from bitsandbytes.functional import dequantize_blockwise

    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1)
    values = state.code[codes.long()] * scales.repeat_interleave(state.blocksize)[: codes.numel()]
    return values[: state.shape.numel()].view(state.shape).to(state.dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 48), (16, 24), (3, 34)])
def test_four_bits_of_bitsandbytes_are_read_in_its_bits(
    kind: str, nested: bool, dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path
) -> None:
    """The last block may be a shorter one."""
    from bitsandbytes.functional import quantize_4bit

    full = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = quantize_4bit(full, blocksize=64, quant_type=kind, compress_statistics=nested)
    parts = {"weight": packed} | {
        f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()
    }
    folder = save(parts, tmp_path / "model", {"quant_method": "bitsandbytes", "load_in_4bit": True})
    found = dequantised(folder)
    assert found.dtype == dtype
    assert torch.equal(found, by_blocks(packed, state))
    storage = save(
        {**parts, "weight": packed.reshape(-1).view(torch.bfloat16).reshape(-1, 1)}, tmp_path / "stored",
        {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "bfloat16"},
    ) if packed.numel() % 2 == 0 else folder  # fmt: skip
    assert torch.equal(dequantised(storage), found)


# GPTQ


def gptq_by_definition(parts: Parts, bits: int, before: int, groups: list[int]) -> torch.Tensor:
    in_word = 32 // bits
    rows, outputs = parts["qweight"].shape
    full = torch.zeros(outputs, rows * in_word, dtype=torch.float64)
    for i in range(rows * in_word):
        for o in range(outputs):
            q = field(int(parts["qweight"][i // in_word, o]), i % in_word, bits)
            z = field(int(parts["qzeros"][groups[i], o // in_word]), o % in_word, bits) + before
            full[o, i] = (q - z) * parts["scales"][groups[i], o].double()
    return full


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gptq_is_its_definition(
    bits: int, form: str | None, in_order: bool, dtype: str, tmp_path: Path
) -> None:
    outputs, rows, groups = 32, 2 * bits, 4
    inputs = rows * 32 // bits
    # No field of zeros is the largest, which readers add 1 to in two ways.
    parts = {
        "qweight": drawn((rows, outputs), 1),
        "qzeros": drawn(
            (groups, outputs * bits // 32), 2, {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}[bits]
        ),
        "scales": scales_of((groups, outputs), getattr(torch, dtype)),
    }
    of = [i * groups // inputs for i in range(inputs)]
    if not in_order:
        of = of[::-1]
        parts["g_idx"] = torch.tensor(of, dtype=torch.int32)
    said = {"quant_method": "gptq", "bits": bits, **({"checkpoint_format": form} if form else {})}
    expected = gptq_by_definition(parts, bits, int(form != "gptq_v2"), of)
    assert torch.equal(
        dequantised(save(parts, tmp_path / "model", said, dtype)), expected.to(getattr(torch, dtype))
    )


def test_zeros_of_gptq_that_readers_do_not_agree_on_are_refused(tmp_path: Path) -> None:
    state, config = quantised("gptq by groups", weights())
    state[f"{NAME}.qzeros"][1, 2] = -1
    with pytest.raises(
        CheckpointError, match=r"q_proj.qzeros: expected zeros that .* found 15, to which 1 is added"
    ):
        open_weights(save_model(state, tmp_path / "model", config), dequantize=True)
    config["quantization_config"] = {**config["quantization_config"], "checkpoint_format": "gptq_v2"}
    open_weights(save_model(state, tmp_path / "v2", config), dequantize=True).read(f"{NAME}.weight", 0, 4)


# AWQ


@pytest.mark.parametrize(
    "said", [{"bits": 4, "version": "gemm"}, {"w_bit": 4, "version": "GEMM"}, {"bits": 4}]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_awq_is_its_definition(said: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    inputs, outputs, groups = 24, 16, 3
    parts = {
        "qweight": drawn((inputs, outputs // 8), 1),
        "qzeros": drawn((groups, outputs // 8), 2),
        "scales": scales_of((groups, outputs), getattr(torch, dtype)),
    }
    expected = torch.zeros(outputs, inputs, dtype=torch.float64)
    for i in range(inputs):
        for o in range(outputs):
            group, place = i * groups // inputs, _AWQ_ORDER.index(o % 8)
            q, z = (
                field(int(parts[name][row, o // 8]), place, 4)
                for name, row in (("qweight", i), ("qzeros", group))
            )
            expected[o, i] = (q - z) * parts["scales"][group, o].double()
    found = dequantised(save(parts, tmp_path / "model", {"quant_method": "awq", **said}, dtype))
    assert torch.equal(found, expected.to(getattr(torch, dtype)))


# compressed-tensors


def packing(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("strategy", "groups"), [("channel", 1), ("group", 5), ("tensor", 0)])
def test_packed_rows_are_their_definition(bits: int, strategy: str, groups: int, tmp_path: Path) -> None:
    """20 inputs, so that the last word of a row is not full."""
    outputs, inputs, in_word = 6, 20, 32 // bits
    parts = {
        "weight_packed": drawn((outputs, -(-inputs // in_word)), 1),
        "weight_scale": scales_of((outputs, groups) if groups else (1,), torch.bfloat16),
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    expected = torch.zeros(outputs, inputs, dtype=torch.float64)
    for o in range(outputs):
        for i in range(inputs):
            q = field(int(parts["weight_packed"][o, i // in_word]), i % in_word, bits) - (1 << bits - 1)
            scale = parts["weight_scale"][o, i * groups // inputs] if groups else parts["weight_scale"][0]
            expected[o, i] = q * scale.double()
    found = dequantised(save(parts, tmp_path / "model", packing(bits, strategy)))
    assert torch.equal(found, expected.bfloat16())


def test_runs_of_rows_come_to_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, scheme in enumerate(("gptq by groups", "awq gemm", "packed rows")):
        state, config = quantised(scheme, weights())
        folder = save_model(state, tmp_path / str(number), config)
        whole = dequantised(folder)
        with monkeypatch.context() as patch:
            patch.setattr("dare_train.weights.files.packed_weights._ROWS", 3)
            assert torch.equal(dequantised(folder), whole)


# torchao


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        ("Int8", "PerRow"),
        ("Int8", "PerTensor"),
        ("Int8", "PerGroup"),
        ("Float8", "PerRow"),
        ("Float8", "PerTensor"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.skipif(find_spec("torchao") is None, reason="no torchao: pip install -e '.[torchao]'")
def test_eight_bits_of_torchao_are_read_in_its_bits(
    kind: str, granularity: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    layer = torch.nn.Linear(32, 24, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(24, 32, generator=torch.Generator().manual_seed(0)))
    by = getattr(quantization, granularity)(*([8] if granularity == "PerGroup" else []))
    if kind == "Int8":
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig(granularity=by))
    else:
        weight = quantization.Float8Tensor.from_hp(layer.weight.detach(), granularity=by)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    flat, _ = flatten_tensor_state_dict({"x.weight": layer.weight})
    parts = {name.removeprefix("x."): tensor for name, tensor in flat.items()}
    assert {"_weight_qdata", "_weight_scale"} <= parts.keys()
    said = {"quant_method": "torchao"}
    found = dequantised(save(parts, tmp_path / "model", said, str(dtype).removeprefix("torch.")))
    assert torch.equal(found, layer.weight.dequantize())


# What stays refused.


def _groups(bits: int, name: str) -> dict[str, Any]:
    return {name: packing(bits, "group")["config_groups"]["group_0"]}


NOT_KNOWN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "3 bits": ("gptq by groups", {"bits": 3}, {}),
    "a layout of kernels": ("gptq by groups", {"checkpoint_format": "marlin"}, {}),
    "GPTQ with more beside it": ("gptq by groups", {}, {"workspace": torch.ones(3)}),
    "GPTQ of 64 bits": ("gptq by groups", {}, {"qweight": torch.ones(4, 32, dtype=torch.int64)}),
    "AWQ for GEMV": ("awq gemm", {"version": "gemv"}, {}),
    "AWQ of 8 bits": ("awq gemm", {"bits": 8}, {}),
    "zeros": ("packed rows", {}, {"weight_zero_point": torch.ones(4, 2, dtype=torch.int32)}),
    "groups in another order": ("packed rows", {}, {"weight_g_idx": torch.zeros(32, dtype=torch.int32)}),
    "two layouts": ("packed rows", {"config_groups": {**_groups(4, "a"), **_groups(8, "b")}}, {}),
    "floats": ("packed rows", packing(4, "group", type="float"), {}),
    "not about 0": ("packed rows", packing(4, "group", symmetric=False), {}),
    "blocks": ("packed rows", packing(4, "block"), {}),
    "another format": ("packed rows", {"format": "marlin-24"}, {}),
    "a rotation": ("packed rows", {"transform_config": {"config_groups": {}, "x": 1}}, {}),
    "a rotation of int8": ("int8 zeros", {"transform_config": {"x": 1}}, {}),
    "a factor of inputs": ("torchao", {}, {"_weight_act_pre_scale": torch.ones(32)}),
    "zeros that are no integers": ("torchao", {}, {"_weight_zero_point": torch.ones(32, 1)}),
    "integers that are none": ("awq gemm", {}, {"qweight": torch.ones(32, 4)}),
    "no state": ("bnb 4", {}, {"weight.quant_state.bitsandbytes__nf4": None}),
    "another state": ("bnb 4", {}, {"weight.quant_state.bitsandbytes__int4": torch.zeros(3).byte()}),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_KNOWN)
def test_what_is_not_certain_stays_refused(what: str, tmp_path: Path) -> None:
    scheme, said, changes = NOT_KNOWN[what]
    state, config = quantised(scheme, weights())
    for leaf, tensor in changes.items():
        state.pop(f"{NAME}.{leaf}", None)
        state |= {} if tensor is None else {f"{NAME}.{leaf}": tensor}
    config["quantization_config"] = {**config["quantization_config"], **said}
    folder = save_model(state, tmp_path / "model", config)
    opened = open_weights(folder)
    assert not is_formula(Quantised.of(opened), opened.tensors)
    with pytest.raises(CheckpointError, match="expected a scheme that is a formula"):
        open_weights(folder, dequantize=True)


_BAD_STATES: dict[str, Any] = {
    "no JSON": "{",
    "a list": [1],
    "no shape": {"shape": None},
    "sizes of none": {"shape": [0, 32]},
    "more numbers than there are": {"shape": [64, 32]},
    "blocks of another size": {"blocksize": 128},
    "no size of blocks": {"blocksize": 65},
    "a dtype that there is not": {"dtype": "int8"},
    "no dtype": {"dtype": ["bfloat16"]},
    "no number": {"nested_offset": 10**400},
    "scales of scales, of which there are none": {"nested_offset": 0.5},
}


@pytest.mark.parametrize("what", _BAD_STATES)
def test_states_that_do_not_fit_are_refused(what: str, tmp_path: Path) -> None:
    state, config = quantised("bnb 4", weights())
    name = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
    bad = _BAD_STATES[what]
    text = bad if isinstance(bad, str) else json.dumps(bad)
    if isinstance(bad, dict):
        text = json.dumps({**json.loads(bytes(state[name].tolist())), **bad})
    state[name] = torch.tensor([*text.encode()], dtype=torch.uint8)
    with pytest.raises(CheckpointError) as caught:
        open_weights(save_model(state, tmp_path / "model", config), dequantize=True)
    assert "q_proj.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def _misfits() -> Iterator[tuple[str, str, torch.Tensor]]:
    yield "gptq by groups", "scales", torch.ones(2, 31).half()
    yield "gptq by groups", "qzeros", torch.ones(3, 4).int()
    yield "gptq by groups", "g_idx", torch.zeros(31, dtype=torch.int32)
    yield "gptq by groups", "g_idx", torch.full((32,), 2, dtype=torch.int32)
    yield "gptq by groups", "g_idx", torch.full((32,), -1, dtype=torch.int32)
    yield "awq gemm", "scales", torch.ones(5, 32).half()
    yield "awq gemm", "qzeros", torch.ones(2, 5).int()
    yield "packed rows", "weight_scale", torch.ones(32, 3).bfloat16()
    yield "packed rows", "weight_scale", torch.ones(31, 2).bfloat16()
    yield "packed rows", "weight_shape", torch.tensor([32, 33])
    yield "packed rows", "weight_shape", torch.tensor([32.0, 32.0])
    yield "packed rows", "weight_shape", torch.tensor([32, 32, 1])
    yield "bnb 4", "weight.absmax", torch.ones(15)
    yield "bnb 4", "weight.absmax", torch.ones(16, dtype=torch.uint8)
    yield "bnb 4", "weight.quant_map", torch.ones(17)
    yield "gptq by groups", "scales", torch.ones(2, 32).int()
    yield "bnb 4 nested", "weight.nested_absmax", torch.ones(2)
    yield "bnb 4 nested", "weight.nested_quant_map", torch.ones(255)
    yield "torchao zeros", "_weight_scale", torch.ones(31, 1)


@pytest.mark.parametrize(("scheme", "leaf", "tensor"), [*_misfits()])
def test_parts_that_do_not_fit_are_refused(
    scheme: str, leaf: str, tensor: torch.Tensor, tmp_path: Path
) -> None:
    state, config = quantised(scheme, weights())
    state[f"{NAME}.{leaf}"] = tensor
    with pytest.raises(CheckpointError) as caught:
        open_weights(save_model(state, tmp_path / "model", config), dequantize=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", OTHER_FORMULAS)
def test_any_run_is_the_same_as_the_whole(scheme: str, tmp_path: Path) -> None:
    state, config = quantised(scheme, weights())
    opened = open_weights(save_model(state, tmp_path / "model", config), dequantize=True)
    name = f"{NAME}.weight"
    assert opened.tensors.keys() == weights().keys()
    assert opened.tensors[name].shape == (32, 32)
    whole = opened.read(name, 0, 1024)
    for start, count in ((0, 0), (1, 5), (95, 100), (1021, 3)):
        assert np.array_equal(opened.read(name, start, count), whole[start : start + count])
