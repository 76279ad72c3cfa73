"""Tensors that old files hold and newer ones do not: buffers that a model works out for itself from its
configuration. What they hold decides nothing.
"""

from __future__ import annotations

import re

_ENDINGS = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|masked_bias|position_ids|_float_tensor|embed_positions\._float_tensor)$"
)
_MASKS = re.compile(r"(^|\.)(attn|attention|self_attention|self_attn)\.bias$")
_OF_A_MASK = 4
"""Dimensions of a causal mask [1, 1, n, n], where a layer's own bias has one."""


def is_derived(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is such a buffer."""
    return bool(_ENDINGS.search(name)) or (len(shape) == _OF_A_MASK and bool(_MASKS.search(name)))
