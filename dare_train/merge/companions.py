"""What a merged model has beside its weights: configuration, tokenizer, a card, and a record of the merge."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..apply import copy_carried, copy_companions
from ..checkpoint import MERGE_RECORD
from .inputs import PackageInput
from .merged import Merged
from .naming import EMBEDDINGS, HEADS, config_of
from .recipe import DTYPE_NAMES
from .report import MergeReport
from .vocabulary import Vocabulary, write_tokenizer

CARD = """\
---
library_name: transformers
tags:
- merge
- dare_train
{models}---

# A merge by {method}

Made by `dare_train` from {count} models on `{base}`. `{record}` says what became of every tensor, and this makes it again:

```bash
dare-train merge {recipe} --out model
```
"""
RECIPE = "dare_merge.yml"


def write(merged: Merged, base_folder: Path | None, vocabulary: Vocabulary | None, staging: Path, *, prefixed: bool) -> None:
    """Put the base's files into a folder, then what models bring, with the configuration that fits the result.

    `prefixed`: the result has more around it than the base, such as a head; then the first model's configuration fits it.
    """
    models = [one.folder for one in merged.inputs if one.folder is not None]
    for folder in ([base_folder] if base_folder is not None else []) + (models[:1] if prefixed or base_folder is None else []):
        copy_companions(folder, staging)
    for one in merged.inputs:
        if isinstance(one, PackageInput) and prefixed:
            copy_carried(one.package, staging)
    if vocabulary is not None and base_folder is not None:
        write_tokenizer(vocabulary, base_folder, [one.folder for one in merged.inputs], staging)
    _settle_config(merged, staging)


def _settle_config(merged: Merged, staging: Path) -> None:
    config = config_of(staging)
    changes: dict[str, object] = {}
    if merged.recipe.out_dtype is not None:
        changes["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPE_NAMES[merged.recipe.out_dtype]
    rows = {info.shape[0] for name, info in merged.tensors.items() if name.endswith(EMBEDDINGS)}
    grew = any(fate.added is not None and fate.added.rows.size for fate in merged.fates.values())
    if grew and len(rows) == 1 and "vocab_size" in config:
        changes["vocab_size"] = rows.pop()
    head = any(name.endswith(HEADS) for name in merged.tensors)
    if head and config.get("tie_word_embeddings", False):
        changes["tie_word_embeddings"] = False
    if config and any(config.get(key) != value for key, value in changes.items()):
        (staging / "config.json").write_text(json.dumps({**config, **changes}, indent=2) + "\n")


def write_record(report: MergeReport, staging: Path) -> None:
    """The report, the recipe, and a card for the Hub."""
    (staging / MERGE_RECORD).write_text(json.dumps(report.as_json(), indent=1) + "\n")
    names = [report.recipe.base, *(one.model for one in report.recipe.models)]
    on_hub = [name for name in names if name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()]
    lines = "".join(f"- {name}\n" for name in on_hub)
    text = CARD.format(
        models=f"base_model:\n{lines}base_model_relation: merge\n" if lines else "",
        method=report.recipe.method, count=len(report.labels), base=Path(report.recipe.base).name,
        record=MERGE_RECORD, recipe=RECIPE,
    )  # fmt: skip
    (staging / RECIPE).write_text(report.recipe.to_yaml())
    (staging / "README.md").write_text(text)


@contextmanager
def folder(merged: Merged, base_folder: Path | None, vocabulary: Vocabulary | None, *, prefixed: bool) -> Iterator[Path]:
    """A folder with these files alone, for a package to carry what differs from the base's."""
    with tempfile.TemporaryDirectory(prefix="dare-merge-") as name:
        write(merged, base_folder, vocabulary, Path(name), prefixed=prefixed)
        yield Path(name)
