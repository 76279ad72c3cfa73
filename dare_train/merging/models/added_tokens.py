"""Models that added tokens: which rows their embeddings gained, whose they are, and where the result has
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from ...errors import ConfigError, TensorMismatch
from ...weights.heads import biases_in, embeddings_in, heads_in
from ...weights.protocol import Weights
from .added_rows import AddedRows
from .inputs import CheckpointInput, Input
from .matching import Read, equal
from .model_files import files_in, own_files
from .padded_rows import padded
from .tokenizer_files import TOKENIZER, read_tokens
from .vocabulary import Vocabulary, unite

Tokenizer = Literal["base", "union"]
_NONE = AddedRows(rows=np.empty(0, np.int64), sources=np.empty((0, 0), np.int64))


class Growth:
    """Decides on the rows that a tensor has beyond the base's.

    Where every model that grew has its tokenizer, rows belong to tokens: the result has the union of them, a
    token that several models added once. Where tokenizers are missing, one model alone may have added rows;
    they stay where they are.

    Args:
        tokenizer: `base` leaves all added rows out; `union` insists on tokenizers; None does what can be done
            safely.
        decided: whether the user has said what becomes of a tensor.

    Raises:
        ConfigError, TensorMismatch: `union` without tokenizers, or tokenizers that do not fit together.
    """

    def __init__(
        self,
        base: Weights,
        base_folder: Path | None,
        inputs: Sequence[Input],
        tokenizer: Tokenizer | None,
        *,
        decided: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._decided = decided
        self._base = base
        self._inputs = inputs
        self._tokenizer = tokenizer
        self._folder = base_folder
        self.vocabulary = None if tokenizer == "base" else self._united(base_folder)

    def rows(self, name: str, larger: Sequence[int]) -> AddedRows | None:
        """The rows that a tensor gains, of which models `larger` have more than the base; None: they are left
        out.

        Raises:
            TensorMismatch: several models added rows, and nothing says which belong together; or no model has
                those of a token; or the rows are not those of tokens.
        """
        if larger and self._axis and not self._is_vocabulary(name):
            self._refuse(name, self._inputs[larger[0]])
        if self._tokenizer == "base":
            return None if larger else self._of_base_alone(name)
        if self.vocabulary is not None and self._is_vocabulary(name):
            return self._of_tokens(self.vocabulary, name)
        return self._in_place(name, larger) if larger else _NONE

    def padded(self) -> list[Input]:
        """The models, with the base's rows for those of its tokens that they lack.

        Raises:
            TensorMismatch: a model has fewer rows than the base, and nothing says whose they are.
        """
        return [self._padded(number, model) for number, model in enumerate(self._inputs)]

    def _padded(self, number: int, model: Input) -> Input:
        shorter = [
            name for name in sorted(self._axis) if self._is_shorter(model, name) and not self._decided(name)
        ]
        if not shorter or not isinstance(model, CheckpointInput):
            return model
        if self.vocabulary is None and not self._knows_base_tokens(model):
            rows, own = (of.tensors[shorter[0]].shape[0] for of in (self._base, model))
            raise TensorMismatch(
                f"{model.label}: {shorter[0]}",
                expected=f"{rows} rows, as in the base",
                found=f"{own}",
                remedy="put both tokenizers beside the models, and its rows are told by their tokens; "
                f"exclude={shorter[0]!r} (--exclude) leaves the base's",
            )
        return padded(model, self._base, shorter)

    def _of_base_alone(self, name: str) -> AddedRows:
        """Rows of which no model but the base has any, where methods that look at whole tensors would move
        them.
        """
        others = [model for model in self._inputs if name in model.tensors and model.folder != self._folder]
        height = max(
            (model.tensors[name].shape[0] for model in others if model.tensors[name].shape), default=0
        )
        if name not in self._axis or not others or height >= self._base.tensors[name].shape[0]:
            return _NONE
        rows = np.arange(height, self._base.tensors[name].shape[0])
        return AddedRows(rows=rows, sources=np.full((len(self._inputs), rows.size), -1))

    def _is_shorter(self, model: Input, name: str) -> bool:
        own, base = model.tensors.get(name), self._base.tensors[name]
        return own is not None and own.shape[1:] == base.shape[1:] and own.shape[:1] < base.shape[:1]

    def _knows_base_tokens(self, model: Input) -> bool:
        """Whether the tokens that a model has are the base's, under the same ids."""
        if self._folder is None or model.folder is None:
            return False
        base, own = read_tokens(self._folder), read_tokens(model.folder, self._folder)
        if base is None or own is None:
            return False
        rows = [max(own.values(), default=0) + 1]
        unite(base, [own], labels=[model.label], base_rows=self._height, input_rows=rows)
        return True

    def _refuse(self, name: str, model: Input) -> NoReturn:
        raise TensorMismatch(
            name,
            expected=f"shape {list(self._base.tensors[name].shape)}, as in the base",
            found=f"{list(model.tensors[name].shape)} in {model.label}",
            remedy=f"exclude={name!r} (--exclude) leaves the base's, take={{{name!r}: model}} "
            "(--take) takes a model's",
        )

    # Rows that belong to tokens

    def _united(self, folder: Path | None) -> Vocabulary | None:
        grown = [
            number
            for number, model in enumerate(self._inputs)
            if any(self._grew(model, name) for name in model.tensors)
        ]
        if (
            not grown
            and self._tokenizer is None
            and not any(other_tokenizer(model.folder, folder) for model in self._inputs)
        ):
            return None
        base = read_tokens(folder) if folder is not None else None
        tokens = [
            read_tokens(model.folder, folder) if model.folder is not None else None for model in self._inputs
        ]
        missing = [self._inputs[number].label for number in grown if tokens[number] is None]
        if base is None or missing:
            if self._tokenizer == "union":
                lacking = ", ".join(missing) or self._base.label
                raise ConfigError(
                    "tokenizer",
                    expected="a tokenizer beside every model that added rows, and the base",
                    found=f"none in {lacking}",
                )
            return None
        heights = [
            max(
                (model.tensors[name].shape[0] for name in self._axis if name in model.tensors),
                default=self._height,
            )
            for model in self._inputs
        ]
        return unite(
            base,
            tokens,
            labels=[model.label for model in self._inputs],
            base_rows=self._height,
            input_rows=heights,
        )

    @cached_property
    def _axis(self) -> set[str]:
        """Embeddings, heads and their biases in the base: tensors with a row for each token."""
        tensors = self._base.tensors
        embeddings = embeddings_in(tensors)
        heights = {tensors[name].shape[0] for name in embeddings}
        known = (*embeddings, *heads_in(tensors), *biases_in(tensors))
        return {name for name in known if tensors[name].shape and tensors[name].shape[0] in heights}

    @cached_property
    def _height(self) -> int:
        return max((self._base.tensors[name].shape[0] for name in self._axis), default=0)

    def _is_vocabulary(self, name: str) -> bool:
        """Whether the tensor has a row for each token: embeddings, heads, and what grew as they did."""
        shape = self._base.tensors[name].shape
        return name in self._axis or (
            bool(shape)
            and shape[0] == self._height
            and any(self._grew(model, name) for model in self._inputs)
        )

    def _grew(self, model: Input, name: str) -> bool:
        info = model.tensors.get(name)
        base_info = self._base.tensors.get(name)
        return (
            info is not None
            and base_info is not None
            and bool(base_info.shape)
            and info.shape != base_info.shape
            and info.shape[0] > base_info.shape[0]
        )

    def _of_tokens(self, vocabulary: Vocabulary, name: str) -> AddedRows:
        renamed = [
            np.flatnonzero(rows[: self._height] != np.arange(self._height)) for rows in vocabulary.rows
        ]
        rows = np.unique(
            np.concatenate([[vocabulary.tokens[token] for token in vocabulary.added], *renamed]).astype(
                np.int64
            )
        )
        sources = np.stack([rows_of_model[rows] for rows_of_model in vocabulary.rows])
        for number, model in enumerate(self._inputs):
            height = model.tensors[name].shape[0] if name in model.tensors else 0
            sources[number, sources[number] >= height] = -1
        lacking = rows[(rows >= self._base.tensors[name].shape[0]) & (sources < 0).all(axis=0)]
        if lacking.size:
            token = next(token for token, id in vocabulary.tokens.items() if id == lacking[0])
            raise TensorMismatch(
                name,
                expected="a row for each added token",
                found=f"none for {token!r} in any model",
                remedy="merge a model that has it; or tokenizer='base' (--tokenizer base) "
                "leaves added tokens out",
            )
        return AddedRows(rows=rows, sources=sources)

    # Rows without tokenizers

    def _in_place(self, name: str, larger: Sequence[int]) -> AddedRows:
        first, *others = larger
        height = self._base.tensors[name].shape[0]
        info = self._inputs[first].tensors[name]
        for number in others:
            model = self._inputs[number]
            if model.tensors[name] != info or not self._same_rows(name, first, number):
                raise TensorMismatch(
                    name,
                    expected=f"at most one model that adds rows to the base's {height}",
                    found=f"{info.shape[0]} in {self._inputs[first].label}, "
                    f"{model.tensors[name].shape[0]} in {model.label}",
                    remedy="put each model's tokenizer into its folder, so that rows are told "
                    "by their tokens; "
                    "or tokenizer='base' (--tokenizer base) leaves them out",
                )
        rows = np.arange(height, info.shape[0])
        sources = np.full((len(self._inputs), rows.size), -1)
        sources[first] = rows
        return AddedRows(rows=rows, sources=sources)

    def _same_rows(self, name: str, left: int, right: int) -> bool:
        skipped = self._base.tensors[name].numel

        def beyond(model: Input) -> Read:
            return lambda name, start, count: model.words(name, skipped + start, count)

        rest = self._inputs[left].tensors[name].numel - skipped
        return equal(name, rest, beyond(self._inputs[left]), beyond(self._inputs[right]))


def other_tokenizer(folder: Path | None, base: Path | None) -> bool:
    """Whether a folder has a tokenizer of its own that differs from the base's."""
    file = own_files(folder).get(TOKENIZER)
    base_file = files_in(base).get(TOKENIZER)
    if file is None or base_file is None:
        return False
    return file.stat().st_size != base_file.stat().st_size or file.read_bytes() != base_file.read_bytes()
