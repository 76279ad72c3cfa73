"""Which row of an embedding belongs to which token, when models of one base are merged and some of them have
added tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError, ConfigError, TensorMismatch
from .model_files import files_in, is_package, own_files

TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_SPECIAL = "special_tokens_map.json"
_NAMES = {
    TOKENIZER,
    CONFIG,
    ADDED,
    _SPECIAL,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
}
_SEALED = {".model", ".spm", ".tiktoken"}
"""Endings of vocabularies whose ids depend on the class that loads them, and so cannot be told from the
file."""
_SAVE_AGAIN = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it anew"

Entry = dict[str, Any]
"""An added token as tokenizer.json describes it: content, id, special, and how text around it is treated."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The tokens of a merged model, and where each model that goes into it has them."""

    tokens: dict[str, int]
    """Token -> id: the base's as they are, then the added ones."""
    added: tuple[str, ...]
    """Tokens that the base lacks, by id."""
    rows: tuple[NDArray[np.int64], ...]
    """For each input, for each row of the result's embedding: the row of the input's, or -1 where the input
    has none for it."""
    embedding_rows: int
    """Rows of the result's embedding: all of the base's, and more when added tokens do not fit into those."""

    @property
    def size(self) -> int:
        """The largest id, plus one."""
        return max(self.tokens.values(), default=-1) + 1

    @property
    def moved(self) -> bool:
        """Whether a row of any input has another place in the result."""
        places = np.arange(self.embedding_rows)
        return any(bool(((rows >= 0) & (rows != places)).any()) for rows in self.rows)


def read_tokens(folder: Path, base: Path | None = None) -> dict[str, int] | None:
    """Token -> id of the tokenizer in a folder, as loading it gives them; None when it has none.

    Tokens that were added have no id but their place in the list: the first follows the vocabulary, whatever
    the file says.

    Args:
        base: the base's folder. A package has only those files that differ from the base's, which complete
            it; of its own, those count that its manifest lists.

    Raises:
        CheckpointError: a file is damaged, two tokens have one id, or tokens were added to a vocabulary that
            cannot be read.
    """
    tokenizer = _Tokenizer.read(folder, base)
    return None if tokenizer is None else tokenizer.tokens


def unite(
    base: Mapping[str, int],
    inputs: Sequence[Mapping[str, int] | None],
    *,
    labels: Sequence[str],
    base_rows: int,
    input_rows: Sequence[int],
) -> Vocabulary:
    """One vocabulary for the base and all that its fine-tunes added.

    An added token keeps its id where every input that has it agrees and no other token wants that id; the
    others get the next free ids after the base's, in the order of inputs and of ids in them. Rows that belong
    to no token (padding) stay where they are. A base token whose row an input has given to another token (a
    reserved token that was renamed) is one that this input lacks.

    Args:
        base: token -> id.
        inputs: token -> id of each; None stands for the base's.
        labels: what errors call the inputs.
        base_rows: rows of the base's embedding; may exceed its tokens.
        input_rows: rows of each input's embedding.

    Raises:
        TensorMismatch: a token of the base has another id in an input, or no model has a row for an added
            token.
    """
    for tokens, label in zip(inputs, labels, strict=True):
        _check_same_ids(base, tokens or {}, label)
    own = [{token: id for token, id in (tokens or {}).items() if token not in base} for tokens in inputs]
    ids = _placed(base, own)
    tokens = {**base, **ids}
    embedding_rows = max(base_rows, max(tokens.values(), default=-1) + 1)
    rows = tuple(
        _rows(base, base if held is None else held, ids, height, embedding_rows)
        for held, height in zip(inputs, input_rows, strict=True)
    )
    _check_sources(ids, rows, own, labels, input_rows)
    return Vocabulary(tokens=tokens, added=tuple(ids), rows=rows, embedding_rows=embedding_rows)


def _check_same_ids(base: Mapping[str, int], tokens: Mapping[str, int], label: str) -> None:
    other = [token for token, id in base.items() if tokens.get(token, id) != id]
    if other:
        token = min(other, key=base.__getitem__)
        remedy = (
            "merge only models that kept the base's ids; this one's tokenizer was trained "
            "anew, or it is of another base"
        )
        expected = f"id {base[token]}, as in the base"
        raise TensorMismatch(
            f"{label}: token {token!r}", expected=expected, found=f"id {tokens[token]}", remedy=remedy
        )


def _placed(base: Mapping[str, int], own: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Token -> id in the result, by id, for all that the base lacks."""
    wanted: dict[str, set[int]] = {}
    for tokens in own:
        for token, id in sorted(tokens.items(), key=lambda item: item[1]):
            wanted.setdefault(token, set()).add(id)
    claims = Counter(id for ids in wanted.values() for id in ids) + Counter(base.values())
    placed = {token: min(ids) for token, ids in wanted.items() if len(ids) == 1 and claims[min(ids)] == 1}
    taken = set(placed.values())
    free = (id for id in count(max(base.values(), default=-1) + 1) if id not in taken)
    placed.update({token: next(free) for token in wanted if token not in placed})
    return dict(sorted(placed.items(), key=lambda item: item[1]))


def _rows(
    base: Mapping[str, int],
    tokens: Mapping[str, int],
    ids: Mapping[str, int],
    height: int,
    embedding_rows: int,
) -> NDArray[np.int64]:
    rows = np.arange(embedding_rows, dtype=np.int64)
    own = set(tokens.values())
    rows[[id for token, id in base.items() if token not in tokens and id in own]] = -1
    rows[list(ids.values())] = [tokens.get(token, -1) for token in ids]
    rows[rows >= height] = -1
    return rows


def _check_sources(
    ids: Mapping[str, int],
    rows: Sequence[NDArray[np.int64]],
    own: Sequence[Mapping[str, int]],
    labels: Sequence[str],
    input_rows: Sequence[int],
) -> None:
    """Every added token has a row somewhere. Tokenizers may know tokens for which the model was never
    resized.
    """
    for token, id in ids.items():
        if all(each[id] < 0 for each in rows):
            number = next(index for index, tokens in enumerate(own) if token in tokens)
            expected = f"a row of its embedding, of number {own[number][token]}"
            remedy = (
                "resize it: model.resize_token_embeddings(len(tokenizer)); or save it with "
                "a tokenizer that lacks the token"
            )
            raise TensorMismatch(
                f"{labels[number]}: token {token!r}",
                expected=expected,
                found=f"{input_rows[number]} rows",
                remedy=remedy,
            )


def write_tokenizer(
    vocabulary: Vocabulary, base_folder: Path, input_folders: Sequence[Path | None], staging: Path
) -> list[str]:
    """Write the result's tokenizer and return the names of its files; nothing, and no names, when no token
    was added.

    Where an input's tokenizer is the result's already, the first such is taken as it is, with its special
    tokens and chat template; otherwise the base's, with the added tokens appended. Tokenizer files that lie
    in `staging` make room.

    Raises:
        ConfigError: a token was put into an input's vocabulary itself, where it changes how other text is
            cut.
        CheckpointError: a file is damaged or contradicts itself, or the tokenizer would not load with the
            vocabulary's ids.
    """
    if not vocabulary.added:
        return []
    base = _Tokenizer.read(base_folder)
    if base is None:
        raise CheckpointError(
            str(base_folder), expected=TOKENIZER, found="none to append tokens to", remedy=_SAVE_AGAIN
        )
    inputs = [_Tokenizer.read(folder, base_folder) for folder in input_folders if folder is not None]
    known = [tokenizer for tokenizer in inputs if tokenizer is not None]
    entries = _entries_to_append(vocabulary, known)
    ready = next((tokenizer for tokenizer in known if tokenizer.tokens == vocabulary.tokens), None)
    contents = ready.contents() if ready else _extended(base, {**base.entries, **entries}, vocabulary)
    for name in _files(staging, None):
        (staging / name).unlink()
    for name, content in contents.items():
        (staging / name).write_bytes(content)
    return sorted(contents)


def _entries_to_append(vocabulary: Vocabulary, inputs: Iterable[_Tokenizer]) -> dict[str, Entry]:
    """One entry for each added token: that of the first input that has it."""
    entries: dict[str, Entry] = {}
    for tokenizer in inputs:
        entries = {
            **{token: tokenizer.entry(token) for token in vocabulary.added if token in tokenizer.tokens},
            **entries,
        }
    absent = [token for token in vocabulary.added if token not in entries]
    if absent:
        raise ConfigError(
            f"token {absent[0]!r}", expected="a tokenizer among the inputs that has it", found="none"
        )
    return entries


def _extended(base: _Tokenizer, entries: Mapping[str, Entry], vocabulary: Vocabulary) -> dict[str, bytes]:
    """The base's files with those entries that they lack, under the vocabulary's ids."""
    _check_follow(base, vocabulary)
    contents = base.contents()
    ordered = sorted(
        ({**entry, "id": vocabulary.tokens[token]} for token, entry in entries.items()),
        key=lambda entry: entry["id"],
    )
    if TOKENIZER in contents:
        document = _json(base.files[TOKENIZER])
        present = document.get("added_tokens") or []
        contained = {entry["content"] for entry in present}
        document["added_tokens"] = [
            *present,
            *(entry for entry in ordered if entry["content"] not in contained),
        ]
        contents[TOKENIZER] = _dump(document)
    config = _json(base.files[CONFIG]) if CONFIG in contents else {}
    if "added_tokens_decoder" in config:
        listed = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in ordered
        }
        config["added_tokens_decoder"] = {**listed, **config["added_tokens_decoder"]}
        contents[CONFIG] = _dump(config)
    if ADDED in contents or TOKENIZER not in contents:
        earlier = _json(base.files[ADDED]) if ADDED in contents else {}
        contents[ADDED] = _dump(
            {**earlier, **{token: vocabulary.tokens[token] for token in vocabulary.added}}
        )
    return contents


def _check_follow(base: _Tokenizer, vocabulary: Vocabulary) -> None:
    """What is appended gets the ids after the base's by its order alone, whatever is written."""
    for id, token in enumerate(vocabulary.added, start=base.end):
        if id != vocabulary.tokens[token]:
            remedy = (
                "the base's ids have gaps: give every id up to the largest a token, in the "
                "base and in the models"
            )
            expected = f"to load with id {vocabulary.tokens[token]}"
            raise CheckpointError(
                f"{base.folder}: token {token!r}", expected=expected, found=f"id {id}", remedy=remedy
            )


@dataclass(frozen=True, kw_only=True)
class _Tokenizer:
    """The tokenizer in a folder, as far as ids are concerned."""

    folder: Path
    files: dict[str, Path]
    tokens: dict[str, int]
    """As loading gives them."""
    end: int
    """The id that the next added token would get."""
    entries: dict[str, Entry]
    """Added tokens by content, in the order of loading, each with the id that its file says."""

    @classmethod
    def read(cls, folder: Path, base: Path | None = None) -> _Tokenizer | None:
        files = _files(folder, base)
        document = _json(files[TOKENIZER]) if TOKENIZER in files else {}
        entries = _added_entries(files, document)
        vocabulary = _vocabulary(files, document)
        if vocabulary is None:
            sealed = [path for name, path in files.items() if Path(name).suffix in _SEALED]
            if sealed and entries:
                raise CheckpointError(
                    str(sealed[0]),
                    expected=f"a {TOKENIZER} beside it",
                    found="added tokens",
                    remedy=_SAVE_AGAIN,
                )
            return None
        tokens, first = vocabulary
        beyond = [content for content in entries if content not in tokens]
        tokens.update(zip(beyond, count(first)))
        _check_distinct(tokens.items(), folder)
        return cls(folder=folder, files=files, tokens=tokens, end=first + len(beyond), entries=entries)

    def entry(self, token: str) -> Entry:
        """How an added token is described. Refused where its id depends on who loads the file, or where it
        cannot be appended.
        """
        where = f"{self.folder}: token {token!r}"
        if token not in self.entries:
            remedy = "add it with tokenizer.add_tokens: appending it here would change how text is cut"
            raise ConfigError(
                where, expected="added beside the base's vocabulary", found="put into it", remedy=remedy
            )
        found, loaded = self.entries[token]["id"], self.tokens[token]
        if found != loaded:
            remedy = f"see which of them the model was trained with; {_SAVE_AGAIN}"
            raise CheckpointError(
                where,
                expected=f"id {loaded}, with which it loads",
                found=f"id {found} in its file",
                remedy=remedy,
            )
        return self.entries[token]

    def contents(self) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in self.files.items()}


def _files(folder: Path, base: Path | None) -> dict[str, Path]:
    """Tokenizer files by name."""
    if not folder.is_dir():
        raise CheckpointError(str(folder), expected="a folder", found="none")
    files = files_in(folder) if base is None else own_files(folder)
    found = {name: path for name, path in files.items() if is_tokenizer_file(path)}
    return {**_files(base, None), **found} if base is not None and is_package(folder) else found


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file is a part of a tokenizer, by its name."""
    return path.name in _NAMES or path.suffix in _SEALED


def _vocabulary(files: Mapping[str, Path], document: Mapping[str, Any]) -> tuple[dict[str, int], int] | None:
    """Token -> id without the added tokens, and the id of the first that is added."""
    if TOKENIZER in files:
        model = document.get("model")
        return _ids(model.get("vocab") if isinstance(model, dict) else None, files[TOKENIZER])
    if "vocab.json" in files:
        return _ids(_json(files["vocab.json"]), files["vocab.json"])
    if "vocab.txt" in files:
        lines = _text(files["vocab.txt"]).removesuffix("\n").split("\n")
        tokens = {token: id for id, token in enumerate(lines)}
        return tokens, len(tokens)
    return None


def _ids(vocabulary: Any, path: Path) -> tuple[dict[str, int], int]:
    """From {token: id}, or from [[token, score], ...] as Unigram has it, where the last of equal tokens
    counts.
    """
    if isinstance(vocabulary, list) and all(
        isinstance(piece, list) and piece and isinstance(piece[0], str) for piece in vocabulary
    ):
        return {piece[0]: id for id, piece in enumerate(vocabulary)}, len(vocabulary)
    if isinstance(vocabulary, dict) and all(map(_is_id, vocabulary.values())):
        _check_distinct(vocabulary.items(), path)
        return dict(vocabulary), len(vocabulary)
    raise CheckpointError(
        str(path), expected="a vocabulary of tokens with ids", found=repr(vocabulary)[:80], remedy=_SAVE_AGAIN
    )


def _added_entries(files: Mapping[str, Path], document: Mapping[str, Any]) -> dict[str, Entry]:
    """Added tokens by content: those of tokenizer.json, then those that only the older lists have."""
    config = _json(files[CONFIG]) if CONFIG in files else {}
    listed = _checked(document.get("added_tokens") or [], files.get(TOKENIZER))
    if "added_tokens_decoder" in config:
        older = _checked(_from_decoder(config["added_tokens_decoder"], files[CONFIG]), files[CONFIG])
    else:  # as transformers does: the decoder, where there is one, is what counts
        older = _checked(_from_map(files, config), files.get(ADDED))
    older.sort(key=lambda entry: int(entry["id"]))
    found: dict[str, Entry] = {}
    for entry in (*listed, *older):
        found.setdefault(entry["content"], entry)
    found.pop("", None)
    return found


def _from_decoder(decoder: Any, path: Path) -> list[Any]:
    if not isinstance(decoder, dict) or not all(
        isinstance(entry, dict) and _is_number(id) for id, entry in decoder.items()
    ):
        raise CheckpointError(
            str(path),
            expected="added_tokens_decoder with tokens by id",
            found=repr(decoder)[:80],
            remedy=_SAVE_AGAIN,
        )
    return [{**entry, "id": int(id)} for id, entry in decoder.items()]


def _from_map(files: Mapping[str, Path], config: Mapping[str, Any]) -> list[Any]:
    """`added_tokens.json` says nothing but ids; special are the tokens that the configuration gives a
    role.
    """
    if ADDED not in files:
        return []
    special = _special_tokens({**(_json(files[_SPECIAL]) if _SPECIAL in files else {}), **config})
    return [
        {"id": id, "content": token, "special": token in special} for token, id in _json(files[ADDED]).items()
    ]


def _special_tokens(config: Mapping[str, Any]) -> set[str]:
    named = [value for key, value in config.items() if key.endswith("_token")]
    lists = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    named += [value for values in lists if isinstance(values, list) for value in values]
    contents = [value.get("content") if isinstance(value, dict) else value for value in named]
    return {content for content in contents if isinstance(content, str)}


def _checked(entries: Any, path: Path | None) -> list[Entry]:
    """Entries that have a content and an id, no two of them the same id."""
    if not isinstance(entries, list):
        raise CheckpointError(
            str(path), expected="a list of added tokens", found=repr(entries)[:80], remedy=_SAVE_AGAIN
        )
    for entry in entries:
        if not (
            isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_id(entry.get("id"))
        ):
            raise CheckpointError(
                str(path),
                expected="added tokens with content and id",
                found=repr(entry)[:80],
                remedy=_SAVE_AGAIN,
            )
    _check_distinct(((entry["content"], entry["id"]) for entry in entries), path)
    return [_complete(entry) for entry in entries]


def _complete(entry: Mapping[str, Any]) -> Entry:
    """With every field that tokenizer.json must have, and no other."""
    special = bool(entry.get("special"))
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=not special, special=special)
    given = {name: bool(entry.get(name, value)) for name, value in flags.items()}
    return {"id": entry["id"], "content": entry["content"], **given}


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 20


def _check_distinct(ids: Iterable[tuple[str, int]], path: Path | None) -> None:
    holders: dict[int, str] = {}
    for token, id in ids:
        if holders.setdefault(id, token) != token:
            found = f"{holders[id]!r} and {token!r}"
            raise CheckpointError(
                str(path), expected=f"one token with id {id}", found=found, remedy=_SAVE_AGAIN
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            str(path), expected="JSON", found=repr(error)[:200], remedy="fetch it again"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(
            str(path), expected="a JSON object", found=repr(document)[:80], remedy="fetch it again"
        )
    return document


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            str(path), expected="text in UTF-8", found=repr(error)[:200], remedy="fetch it again"
        ) from error


def _dump(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
