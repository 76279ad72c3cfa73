"""`exact` values encoded on a device: the contents, cuts, sizes and fingerprints of the CPU's kernels, for
every dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bit_patterns import FLOATS, random_words, tuned_from
from device_states import base_state, tuned_state
from hypothesis import given
from hypothesis import strategies as st
from merging import files_of
from numpy.typing import NDArray
from torch_words import as_tensor

from dare_train import extract
from dare_train.dtypes import DType, Words
from dare_train.extracting import device_encoding
from dare_train.kernels import pack_in_torch as pack
from dare_train.kernels.launch_tables import INTEGERS
from dare_train.package.codec import encode_exact, packed_exact
from dare_train.package.magnitudes import Magnitudes

KEPT = st.lists(st.sampled_from([0, 1, 7, 8, 9, 300, 5000]), max_size=4)
SEEDS = st.integers(0, 2**32 - 1)


def by_code() -> Any:
    return pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.code)


def pairs(dtype: DType, kept: Sequence[int], seed: int) -> list[tuple[Words, Words]]:
    """Of each segment the words of base and tuned: anything at all, and some that are equal or close."""
    made = []
    for number, size in enumerate(kept):
        base = random_words(dtype, size, seed + number)
        near = np.random.default_rng(seed + number).random(size) < 0.5
        made.append((base, np.where(near, tuned_from(base, seed), random_words(dtype, size, seed + 99))))
    return made


def on_device(words: list[Words], dtype: DType, device: torch.device) -> torch.Tensor:
    whole = np.concatenate([np.empty(0, dtype.word), *words])
    return as_tensor(whole, dtype).view(INTEGERS[dtype.itemsize]).to(device)


def host(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.cpu().numpy()


@pytest.mark.gpu
@by_code()
@given(kept=KEPT, seed=SEEDS)
def test_contents_and_cuts(dtype: DType, kept: list[int], seed: int, device: torch.device) -> None:
    segments = pairs(dtype, kept, seed)
    own, new = (on_device([pair[side] for pair in segments], dtype, device) for side in (0, 1))
    made = pack.exact(own, new, kept, dtype)
    data, done = host(made.contents).data, 0
    for (base, tuned), changed, starts, before in zip(
        segments, made.changed.tolist(), host(made.starts), host(made.before), strict=True
    ):
        expected = encode_exact(base, tuned, dtype)
        content = packed_exact(data[done : done + len(expected.data)], base.size, starts, before, dtype)
        assert bytes(content.data) == bytes(expected.data)
        assert content.cuts == expected.cuts
        assert changed == np.count_nonzero(base != tuned)
        done += len(expected.data)
    assert done == len(data)


@pytest.mark.gpu
@by_code()
@given(kept=KEPT, seed=SEEDS)
def test_magnitudes(dtype: DType, kept: list[int], seed: int, device: torch.device) -> None:
    segments = pairs(dtype, kept, seed)
    own, new = (on_device([pair[side] for pair in segments], dtype, device) for side in (0, 1))
    made = pack.magnitudes(own, new, kept, dtype)
    for (base, tuned), counts, largest, strange in zip(
        segments, host(made.counts), made.largest.tolist(), made.strange.tolist(), strict=True
    ):
        expected, not_finite = Magnitudes.between(base, tuned, dtype)
        assert np.array_equal(counts, expected.counts)
        assert (largest, strange) == (expected.largest, not_finite)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "cuda"])
@pytest.mark.parametrize("at_once", [1, 5000])
def test_runs_that_are_encoded_a_few_at_a_time(
    kernels: str, at_once: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_encoding, "_AT_ONCE", at_once)
    monkeypatch.setattr(device_encoding, "_fetched", lambda *_: pytest.fail("kept words crossed"))
    base, tuned = (
        {name: tensor.to(device) for name, tensor in state.items()}
        for state in (base_state(), tuned_state(1))
    )
    masks = {"f32": np.random.default_rng(1).random((50, 70)) < 0.2}
    extract(base, tuned, tmp_path / "device", p=0.5, values="exact", masks=masks, kernels=kernels)
    extract(
        base_state(), tuned_state(1), tmp_path / "host", p=0.5, values="exact", masks=masks, kernels="cpu"
    )
    assert files_of(tmp_path / "device") == files_of(tmp_path / "host")
