"""Weights on disk, for tests that may run without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from format_reader import Tensor

_CODES = {"f": "F", "i": "I", "u": "U"}


def save_weights(tensors: Mapping[str, Any], path: Path) -> None:
    """A safetensors file of torch's tensors; or of numpy's arrays and `format_reader.Tensor`s, which needs no
    torch.
    """
    if all(isinstance(tensor, (np.ndarray, Tensor)) for tensor in tensors.values()):
        _write({name: _typed(tensor) for name, tensor in tensors.items()}, path)
        return
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def _typed(tensor: np.ndarray | Tensor) -> Tensor:
    if isinstance(tensor, Tensor):
        return tensor
    code = f"{_CODES[tensor.dtype.kind]}{8 * tensor.itemsize}"
    return Tensor(code, tensor.shape, np.ascontiguousarray(tensor).reshape(-1))


def _wide_ones_first(item: tuple[str, Tensor]) -> tuple[int, str]:
    """As safetensors orders them, so that each begins at a multiple of its words' size."""
    name, tensor = item
    return -tensor.words.itemsize, name


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, tensor in sorted(tensors.items(), key=_wide_ones_first):
        data = tensor.words.tobytes()
        place = [len(content), len(content) + len(data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        content += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
