"""The tokenizer of a merged model: an input's, or the base's with the tokens that models added."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...errors import CheckpointError, ConfigError
from .chosen_vocabulary import ChosenVocabulary
from .tokenizer_files import (
    ADDED,
    CONFIG,
    SAVE_AGAIN,
    TOKENIZER,
    Entry,
    Tokenizer,
    read_json,
    tokenizer_files,
)
from .vocabulary import Vocabulary


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
    base = Tokenizer.read(base_folder)
    if base is None:
        raise CheckpointError(
            str(base_folder), expected=TOKENIZER, found="none to append tokens to", remedy=SAVE_AGAIN
        )
    inputs = [Tokenizer.read(folder, base_folder) for folder in input_folders if folder is not None]
    known = [tokenizer for tokenizer in inputs if tokenizer is not None]
    entries = _entries_to_append(vocabulary, known)
    ready = next((tokenizer for tokenizer in known if tokenizer.tokens == vocabulary.tokens), None)
    contents = ready.contents() if ready else _extended(base, {**base.entries, **entries}, vocabulary)
    for name in tokenizer_files(staging, None):
        (staging / name).unlink()
    for name, content in contents.items():
        (staging / name).write_bytes(content)
    return sorted(contents)


def write_chosen(chosen: ChosenVocabulary, input_folders: Sequence[Path | None], staging: Path) -> None:
    """Write the tokenizer that was chosen, with the tokens that it lacks appended, in place of those that lie
    in `staging`.

    Raises:
        As `write_tokenizer`.
    """
    source = Tokenizer.read(chosen.folder)
    if source is None:
        raise CheckpointError(
            str(chosen.folder), expected=TOKENIZER, found="none to append tokens to", remedy=SAVE_AGAIN
        )
    others = [Tokenizer.read(folder) for folder in input_folders if folder is not None]
    added = sorted(chosen.tokens.keys() - source.tokens.keys(), key=chosen.tokens.__getitem__)
    entries = {token: _plain_entry(token, chosen.tokens[token]) for token in added}
    for tokenizer in reversed([each for each in others if each is not None]):
        entries |= {token: tokenizer.entry(token) for token in added if token in tokenizer.tokens}
    vocabulary = Vocabulary(
        tokens=dict(chosen.tokens), added=tuple(added), rows=(), embedding_rows=len(chosen.tokens)
    )
    known = {**source.entries, **entries}
    contents = _extended(source, known, vocabulary) if added else source.contents()
    for name in tokenizer_files(staging, None):
        (staging / name).unlink()
    for name, content in contents.items():
        (staging / name).write_bytes(content)


def _plain_entry(token: str, id: int) -> Entry:
    """As `add_tokens` of a text makes it."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=True, special=False)
    return {"id": id, "content": token, **flags}


def _entries_to_append(vocabulary: Vocabulary, inputs: Iterable[Tokenizer]) -> dict[str, Entry]:
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


def _extended(base: Tokenizer, entries: Mapping[str, Entry], vocabulary: Vocabulary) -> dict[str, bytes]:
    """The base's files with those entries that they lack, under the vocabulary's ids."""
    _check_follow(base, vocabulary)
    contents = base.contents()
    ordered = sorted(
        ({**entry, "id": vocabulary.tokens[token]} for token, entry in entries.items()),
        key=lambda entry: entry["id"],
    )
    if TOKENIZER in contents:
        document = read_json(base.files[TOKENIZER])
        present = document.get("added_tokens") or []
        contained = {entry["content"] for entry in present}
        document["added_tokens"] = [
            *present,
            *(entry for entry in ordered if entry["content"] not in contained),
        ]
        contents[TOKENIZER] = _dump(document)
    config = read_json(base.files[CONFIG]) if CONFIG in contents else {}
    if "added_tokens_decoder" in config:
        listed = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in ordered
        }
        config["added_tokens_decoder"] = {**listed, **config["added_tokens_decoder"]}
        contents[CONFIG] = _dump(config)
    if ADDED in contents or TOKENIZER not in contents:
        earlier = read_json(base.files[ADDED]) if ADDED in contents else {}
        contents[ADDED] = _dump(
            {**earlier, **{token: vocabulary.tokens[token] for token in vocabulary.added}}
        )
    return contents


def _check_follow(base: Tokenizer, vocabulary: Vocabulary) -> None:
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


def _dump(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
