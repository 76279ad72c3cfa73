"""The chat template of a merged model: the one that most of its inputs have, one of those here by name, or a
text of the user's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ...errors import ConfigError
from .model_files import own_files
from .tokenizer_files import CONFIG, read_json

TEMPLATE = "chat_template.jinja"
_OLD = "chat_template.json"
_KEY = "chat_template"
_WORD = re.compile(r"[A-Za-z0-9_-]+")

NAMED = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
        "{% else %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
}
"""Formats that many models were trained with."""


def write_template(choice: str, folders: Iterable[Path | None], staging: Path) -> None:
    """Put the template that was asked for into a folder; nothing where it is `auto` and no input has one.

    Args:
        choice: `auto`, a name, or Jinja.
        folders: of the base and the models.
    """
    template = _most_frequent(folders) if choice == "auto" else NAMED.get(choice, choice)
    if template is None:
        return
    (staging / TEMPLATE).write_text(template)
    (staging / _OLD).unlink(missing_ok=True)
    config = read_json(staging / CONFIG) if (staging / CONFIG).is_file() else {}
    if _KEY in config:  # one of the two would count with some versions, the other with others
        del config[_KEY]
        (staging / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check_template(choice: object) -> None:
    """
    Raises:
        ConfigError: it is no template, and no name of one.
    """
    if not isinstance(choice, str) or (_WORD.fullmatch(choice) and choice not in ("auto", *NAMED)):
        raise ConfigError(
            _KEY, expected=f"auto, one of {', '.join(NAMED)}, or Jinja", found=repr(choice)[:80],
            remedy="put the text itself there",
        )  # fmt: skip


def template_of(folder: Path | None) -> str | None:
    """The template in a folder."""
    files = own_files(folder)
    if TEMPLATE in files:
        return files[TEMPLATE].read_text(encoding="utf-8")
    for name in (CONFIG, _OLD):
        found = read_json(files[name]).get(_KEY) if name in files else None
        if isinstance(found, list):  # several, by name
            listed = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = listed.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def _most_frequent(folders: Iterable[Path | None]) -> str | None:
    """The first of those that most have."""
    found = Counter(template.strip() for folder in folders if (template := template_of(folder)))
    return found.most_common(1)[0][0] if found else None
