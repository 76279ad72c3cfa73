"""Which elements of a tensor are kept: all, those a seed selects, or those a stored bitmap names."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..kernels import cpu

MaskKind = Literal["all", "seeded", "stored"]

MASK_DOMAIN = 0
"""Third Philox counter word of the draws that decide what is kept."""
DITHER_DOMAIN = 1
"""Third Philox counter word of the draws that round quantized values."""
LANDING_DOMAINS = (2, 3)
"""Those of the upper and the lower half of the draws by which elements land on the base's grid."""


@functools.lru_cache(1 << 12)
def key_of(seed: int, tensor: str) -> int:
    """The 64-bit Philox key of one tensor: the first 8 bytes, little-endian, of
    SHA-256("dare_train\\0" + seed as 8 bytes little-endian + name in UTF-8)."""
    digest = hashlib.sha256(b"dare_train\0" + seed.to_bytes(8, "little") + tensor.encode()).digest()
    return int.from_bytes(digest[:8], "little")


def generator_of(seed: int, name: str) -> np.random.Generator:
    """For random orders, the same every time, where no other program has to make a mask of the same seed."""
    return np.random.Generator(np.random.Philox(key=key_of(seed, name)))


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The mask of one tensor. `threshold` counts for `seeded` only: draws below it are dropped."""

    kind: MaskKind
    key: int = 0
    threshold: int = 0

    def positions(self, start: int, length: int, bitmap: bytes | None = None) -> NDArray[np.int64]:
        """Ascending positions, relative to `start`, of the kept elements among `length`.

        A `stored` mask reads them from `bitmap`, one bit per element, least significant bit first.
        """
        if self.kind == "all":
            return np.arange(length)
        if self.kind == "seeded":
            return cpu.kept_positions(self.key, start, length, self.threshold)
        bits = np.unpackbits(np.frombuffer(bitmap or b"", np.uint8), bitorder="little", count=length)
        return np.flatnonzero(bits)


def largest(scores: NDArray[np.floating], density: float) -> NDArray[np.bool_]:
    """Where the largest of flat scores are, a share `density` of all; of equals the first, and NaN last."""
    count = round(density * scores.size)
    if count == 0:
        return np.zeros(scores.size, np.bool_)
    known = np.where(np.isnan(scores), -np.inf, scores)
    border = np.partition(known, scores.size - count)[scores.size - count]
    kept: NDArray[np.bool_] = known > border
    kept[np.flatnonzero(known == border)[: count - int(kept.sum())]] = True
    return kept
