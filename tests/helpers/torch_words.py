"""Words as torch sees them, and back."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dare_train.dtypes import DType, Words

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_int64(words: Words) -> torch.Tensor:
    """Words as the reference kernels take them."""
    return torch.from_numpy(words.astype(np.uint64).view(np.int64))


def as_words(integers: torch.Tensor, dtype: DType) -> Words:
    return integers.numpy().view(np.uint64).astype(dtype.word)


def as_tensor(words: Words, dtype: DType) -> torch.Tensor:
    """The torch tensor that has these bits, shape (size,)."""
    signed = np.ascontiguousarray(words).view(np.dtype(f"i{dtype.itemsize}"))
    return torch.from_numpy(signed.copy()).view(TORCH[dtype.code])


def words_of(tensor: torch.Tensor) -> NDArray[np.unsignedinteger]:
    """A tensor's bits, flat."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().reshape(-1).view(integers).numpy()
    return flat.view(np.dtype(f"u{flat.itemsize}"))
