"""What adapters do to the tensors of files, where these are views of the modules' that are adapted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Union

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from ..low_rank import LowRank, Matrix, Places, Stacked, Update
from .layouts import Block, Place

Kind = Union[LowRank, Stacked]
_SPARE = 4
"""How many times as much may be worked out at once as is asked for."""


def in_files(
    found: Mapping[str, list[Kind]], places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Update]]:
    """Updates by the files' tensors.

    Args:
        found: by the model's.
        places: where in these the files' lie.
        shapes: of the model's tensors, of those that are not taken over as they are.

    Raises:
        ConfigError: an update takes norms over what files hold in several tensors.
    """
    updates: dict[str, list[Update]] = {}
    for file, place in places.items():
        for source in sorted(place.sources & found.keys()):
            for update in found[source]:
                one = isinstance(update, LowRank) and place.is_whole(shapes.get(source, place.shape))
                view = update if one else _viewed(file, update, source, place, shapes[source])
                updates.setdefault(file, []).append(view)  # type: ignore[arg-type]
    return updates


def _viewed(file: str, update: Kind, source: str, place: Place, shape: tuple[int, ...]) -> Viewed:
    blocks = tuple(block for block in place.blocks if block.source == source)
    columns = shape[-1] if isinstance(update, Stacked) else prod(shape[1:])
    width = prod(place.shape[1:])
    viewed = Viewed(update=update, blocks=blocks, columns=columns, width=width)
    if viewed.by_rows and sum(block.length for block in blocks) != prod(shape):
        expected = f"all of {source}, over which DoRA takes norms"
        remedy = "merge_and_unload() and save the model, then dare-train extract"
        raise ConfigError(file, expected=expected, found="a part of it", remedy=remedy)
    return viewed


@dataclass(frozen=True, kw_only=True, eq=False)
class Viewed:
    """An update of a module's tensor, as it is of a file's. An `Update`."""

    update: Kind
    blocks: tuple[Block, ...]
    """The parts of the file's tensor that lie in the module's."""
    columns: int
    """Of the module's tensor, as the update sees it."""
    width: int
    """Elements of a row of the file's tensor."""

    @cached_property
    def _magnitude(self) -> NDArray[np.float64] | None:
        return self.update.magnitude if isinstance(self.update, LowRank) else None

    @property
    def by_rows(self) -> bool:
        return self._magnitude is not None

    @property
    def by_all(self) -> bool:
        return self.by_rows

    def added(self, first: int, stop: int) -> Matrix:
        flat = np.zeros((stop - first) * self.width)
        for begin, places in self._parts(first, stop):
            flat[begin : begin + places.size] = self._at(places)
        return flat.reshape(stop - first, self.width)

    def squares(self, alone: Matrix, first: int) -> NDArray[np.float64]:
        assert self._magnitude is not None
        sums = np.zeros(self._magnitude.size)
        flat = np.square(alone).reshape(-1)
        for begin, places in self._parts(first, first + len(alone)):
            of = flat[begin : begin + places.size]
            sums += np.bincount(self._outputs(places), weights=of, minlength=sums.size)
        return sums

    def rescaled(
        self, total: Matrix, alone: Matrix, first: int, squares: NDArray[np.float64] | None
    ) -> Matrix:
        assert self._magnitude is not None
        assert squares is not None
        factors = self._magnitude / np.sqrt(squares)
        flat = total.reshape(-1).copy()
        for begin, places in self._parts(first, first + len(total)):
            flat[begin : begin + places.size] *= factors[self._outputs(places)]
        return flat.reshape(total.shape)

    def _outputs(self, places: Places) -> Places:
        """Which output of the module elements belong to."""
        assert isinstance(self.update, LowRank)
        return places % self.columns if self.update.transposed else places // self.columns

    def _parts(self, first: int, stop: int) -> Iterator[tuple[int, Places]]:
        """Of rows [first, stop): where each part begins there, flat, and where its elements lie in the
        module's tensor.
        """
        begin, end = first * self.width, stop * self.width
        for block in self.blocks:
            low, high = max(begin, block.start), min(end, block.start + block.length)
            if low < high:
                yield low - begin, block.places(low - block.start, high - block.start)

    def _at(self, places: Places) -> NDArray[np.float64]:
        """What is added to elements of the module's tensor."""
        rows, row_of = np.unique(places // self.columns, return_inverse=True)
        columns, column_of = np.unique(places % self.columns, return_inverse=True)
        if rows.size * columns.size > _SPARE * places.size:
            half = places.size // 2
            return np.concatenate([self._at(places[:half]), self._at(places[half:])])
        found: NDArray[np.float64] = self.update.at(rows, columns)[row_of, column_of]
        return found
