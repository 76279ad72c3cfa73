"""The type that a merge is written in, as a configuration says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...dtypes import DTYPE_NAMES, code_named
from ...errors import ConfigError, brief


def result_dtype(fields: Mapping[str, Any]) -> str | None:
    """The code of `out_dtype`, or else of `dtype`; None where a configuration says nothing.

    Raises:
        ConfigError: one of them names no such type.
    """
    said = {key: fields[key] for key in ("out_dtype", "dtype") if fields.get(key) is not None}
    for key, name in said.items():
        if code_named(name) is None:
            expected = f"one of {', '.join(DTYPE_NAMES.values())}"
            raise ConfigError(
                key, expected=expected, found=brief(name), remedy="without it the base's is kept"
            )
    return next(map(code_named, said.values()), None)
