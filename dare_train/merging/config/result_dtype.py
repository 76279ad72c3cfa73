"""What a merge can be written as: in a safetensors code, and in the words of configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, brief

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""By code, the name in a configuration."""

_CODES = {name: code for code, name in DTYPE_NAMES.items()}
_SHORT = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def full_name(name: str) -> str:
    """Of a type that goes by several."""
    plain = name.removeprefix("torch.")
    return _SHORT.get(plain, plain)


def code_named(name: object) -> str | None:
    """The safetensors code of a type's name; None where it is none that a merge is written in."""
    return _CODES.get(full_name(name)) if isinstance(name, str) else None


def result_dtype(fields: Mapping[str, Any]) -> str | None:
    """The code of `out_dtype`, or else of `dtype`; None where a configuration says nothing.

    Raises:
        ConfigError: one of them names no such type.
    """
    said = {key: fields[key] for key in ("out_dtype", "dtype") if fields.get(key) is not None}
    for key, name in said.items():
        if code_named(name) is None:
            expected = f"one of {', '.join(_CODES)}"
            raise ConfigError(
                key, expected=expected, found=brief(name), remedy="without it the base's is kept"
            )
    return next(map(code_named, said.values()), None)
