"""The tokenizer in a folder, as far as the ids of its tokens are concerned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError, brief
from ...reading.plain_files import FETCH_AGAIN, content, reason
from ...reading.structures import LARGEST, json_in
from .model_files import files_in, is_package, own_files

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"
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
SAVE_AGAIN = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it anew"

MOST_TOKENS = 1 << 22
"""Ids are below; sixteen times the largest vocabulary. Arrays are made of as many rows."""

Entry = dict[str, Any]
"""An added token as tokenizer.json describes it: content, id, special, and how text around it is treated."""


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
    tokenizer = Tokenizer.read(folder, base)
    return None if tokenizer is None else tokenizer.tokens


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
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
    def read(cls, folder: Path, base: Path | None = None) -> Tokenizer | None:
        files = tokenizer_files(folder, base)
        document = read_json(files[TOKENIZER]) if TOKENIZER in files else {}
        entries = _added_entries(files, document)
        vocabulary = _vocabulary(files, document)
        if vocabulary is None:
            sealed = [path for name, path in files.items() if Path(name).suffix in _SEALED]
            if sealed and entries:
                raise CheckpointError(
                    str(sealed[0]),
                    expected=f"a {TOKENIZER} beside it",
                    found="added tokens",
                    remedy=SAVE_AGAIN,
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
        id_in_file = self.entries[token]["id"]
        loaded = self.tokens[token]
        if id_in_file != loaded:
            remedy = f"see which of them the model was trained with; {SAVE_AGAIN}"
            raise CheckpointError(
                where,
                expected=f"id {loaded}, with which it loads",
                found=f"id {id_in_file} in its file",
                remedy=remedy,
            )
        return self.entries[token]

    def contents(self) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in self.files.items()}


def tokenizer_files(folder: Path, base: Path | None) -> dict[str, Path]:
    """Tokenizer files by name."""
    if not folder.is_dir():
        raise CheckpointError(str(folder), expected="a folder", found="none")
    files = files_in(folder) if base is None else own_files(folder)
    of_tokenizer = {name: path for name, path in files.items() if is_tokenizer_file(path)}
    if base is None or not is_package(folder):
        return of_tokenizer
    return {**tokenizer_files(base, None), **of_tokenizer}


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file is a part of a tokenizer, by its name."""
    return path.name in _NAMES or path.suffix in _SEALED


def _vocabulary(files: Mapping[str, Path], document: Mapping[str, Any]) -> tuple[dict[str, int], int] | None:
    """Token -> id without the added tokens, and the id of the first that is added."""
    if TOKENIZER in files:
        model = document.get("model")
        return _ids(model.get("vocab") if isinstance(model, dict) else None, files[TOKENIZER])
    if "vocab.json" in files:
        return _ids(read_json(files["vocab.json"]), files["vocab.json"])
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
        str(path), expected="a vocabulary of tokens with ids", found=brief(vocabulary), remedy=SAVE_AGAIN
    )


def _added_entries(files: Mapping[str, Path], document: Mapping[str, Any]) -> dict[str, Entry]:
    """Added tokens by content: those of tokenizer.json, then those that only the older lists have."""
    config = read_json(files[CONFIG]) if CONFIG in files else {}
    listed = _checked(document.get("added_tokens") or [], files.get(TOKENIZER))
    if "added_tokens_decoder" in config:
        older = _checked(_from_decoder(config["added_tokens_decoder"], files[CONFIG]), files[CONFIG])
    else:  # as transformers does: the decoder, where there is one, is what counts
        older = _checked(_from_map(files, config), files.get(ADDED))
    older.sort(key=lambda entry: int(entry["id"]))
    by_content: dict[str, Entry] = {}
    for entry in (*listed, *older):
        by_content.setdefault(entry["content"], entry)
    by_content.pop("", None)
    return by_content


def _from_decoder(decoder: Any, path: Path) -> list[Any]:
    if not isinstance(decoder, dict) or not all(
        isinstance(entry, dict) and _is_number(id) for id, entry in decoder.items()
    ):
        raise CheckpointError(
            str(path),
            expected="added_tokens_decoder with tokens by id",
            found=brief(decoder),
            remedy=SAVE_AGAIN,
        )
    return [{**entry, "id": int(id)} for id, entry in decoder.items()]


def _from_map(files: Mapping[str, Path], config: Mapping[str, Any]) -> list[Any]:
    """`added_tokens.json` says nothing but ids; special are the tokens that the configuration gives a
    role.
    """
    if ADDED not in files:
        return []
    special = _special_tokens({**(read_json(files[_SPECIAL]) if _SPECIAL in files else {}), **config})
    return [
        {"id": id, "content": token, "special": token in special}
        for token, id in read_json(files[ADDED]).items()
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
            str(path), expected="a list of added tokens", found=brief(entries), remedy=SAVE_AGAIN
        )
    for entry in entries:
        if not (
            isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_id(entry.get("id"))
        ):
            raise CheckpointError(
                str(path),
                expected="added tokens with content and id",
                found=brief(entry),
                remedy=SAVE_AGAIN,
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
    return type(value) is int and 0 <= value < MOST_TOKENS


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 20


def _check_distinct(ids: Iterable[tuple[str, int]], path: Path | None) -> None:
    holders: dict[int, str] = {}
    for token, id in ids:
        if holders.setdefault(id, token) != token:
            raise CheckpointError(
                str(path),
                expected=f"one token with id {id}",
                found=f"{holders[id]!r} and {token!r}",
                remedy=SAVE_AGAIN,
            )


def read_json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json_in(path)
    return document


def _text(path: Path) -> str:
    try:
        return content(path, at_most=LARGEST).decode()
    except UnicodeDecodeError as error:
        found = reason(error)
        raise CheckpointError(str(path), expected="text in UTF-8", found=found, remedy=FETCH_AGAIN) from error
