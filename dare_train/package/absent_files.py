"""Files of a base's tokenizer that a fine-tuned model's does not have, and that would speak for it beside the
files that a package brings: what stands in their place there says what their absence does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..weights.files.config_file import read_config

_CONFIG = "tokenizer_config.json"
_TOKENIZER = "tokenizer.json"
_TEMPLATE = "chat_template.jinja"
_FURTHER = "additional_chat_templates"
_PLAIN = re.compile(r"[\w-]{1,100}", re.ASCII)
_SPECIAL = "special_tokens_map.json"
_ADDED = "added_tokens.json"


def in_place_of_absent(base: Path, tuned: Path) -> Iterator[tuple[str, str]]:
    """Names of such files, and what they say."""
    config = read_config(tuned / _CONFIG)
    if not config:
        return
    gone = {name for name in (_TEMPLATE, _SPECIAL, _ADDED) if _is_gone(name, base, tuned)}
    if _TEMPLATE in gone:
        templates = _templates(config.get("chat_template"))
        yield _TEMPLATE, templates.pop("default", "")
        for name, template in templates.items():
            yield f"{_FURTHER}/{name}.jinja", template
    said = read_config(base / _SPECIAL) if _SPECIAL in gone else {}
    if any(_content(config.get(key)) != _content(token) for key, token in said.items()):
        yield _SPECIAL, "{}\n"
    if _ADDED in gone and read_config(base / _ADDED):
        yield _ADDED, "{}\n"


def notes_on_absent(base: Path | None, tuned: Path | None) -> list[str]:
    """A sentence for each file that nothing can say of that it is absent."""
    if base is None or tuned is None or not (tuned / _CONFIG).is_file():
        return []
    further = sorted(f"{_FURTHER}/{path.name}" for path in (base / _FURTHER).glob("*.jinja"))
    remedies = {_TOKENIZER: f"save the tokenizer of {tuned} with one"} | dict.fromkeys(
        further, "remove it from the result if nobody is to ask for it"
    )
    return [
        f"{name}: that of {base} counts in the result: {remedy}"
        for name, remedy in remedies.items()
        if _is_gone(name, base, tuned)
    ]


def _templates(said: object) -> dict[str, str]:
    """By name, what a configuration has: one, or a list of several; none whose name no file can have."""
    if isinstance(said, str):
        return {"default": said}
    entries = [entry for entry in said if isinstance(entry, dict)] if isinstance(said, list) else []
    named = {str(entry.get("name")): entry.get("template") for entry in entries}
    return {
        name: template
        for name, template in named.items()
        if isinstance(template, str) and _PLAIN.fullmatch(name)
    }


def _is_gone(name: str, base: Path, tuned: Path) -> bool:
    return (base / name).is_file() and not (tuned / name).exists()


def _content(token: object) -> object:
    """A token's text, however it is written."""
    return token.get("content") if isinstance(token, dict) else token
