"""What a merged model has beside its weights: configuration, tokenizer, a card, and a record of the merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..dtypes import DTYPE_NAMES
from ..package.companion_files import copy_carried, copy_companions
from ..package.model_config import Facts, settle_config, vocabulary_sizes
from ..parallel.scratch_folder import temporary_folder
from ..weights.files.checkpoint import MERGE_RECORD
from ..weights.files.config_file import CONFIG, read_config
from ..weights.files.module_folders import MODULES, module_folders
from .merge_report import MergeReport
from .merged_weights import Merged
from .models.chat_templates import write_template
from .models.chosen_vocabulary import ChosenVocabulary
from .models.inputs import Input, PackageInput
from .models.layers import LAYER_COUNTS, layer_of, with_layers
from .models.matching import Fate
from .models.merged_tokenizer import write_chosen, write_tokenizer
from .models.model_files import config_of, files_in, own_files
from .models.settings_of_use import settled_use, with_settings
from .models.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from .models.tokenizer_files import TOKENIZER, tokenizer_files
from .models.vocabulary import Vocabulary

CARD = """\
---
library_name: transformers
tags:
- merge
- dare_train
{models}---

# A merge by {method}

Made by `dare_train` from {count} models on `{base}`. `{record}` says what became of every
tensor, and this makes it again:

```bash
dare-train merge {recipe} --out model
```
"""
RECIPE = "dare_merge.yml"


def write(
    merged: Merged,
    base_folder: Path | None,
    vocabulary: Vocabulary | None,
    staging: Path,
    *,
    prefixed: bool,
    chosen: ChosenVocabulary | None = None,
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """Put the base's files into a folder, then what a model brings whose configuration fits the result
    better, then a tokenizer. Returns sentences on what the configuration contradicted.

    `prefixed`: the result has more around it than the base, such as a head. `numbers`: of the result's layers
    in the base, where they moved.
    """
    model = _described_by(merged, prefixed=prefixed or base_folder is None)
    if base_folder is not None:
        copy_companions(base_folder, staging)
    if isinstance(model, PackageInput):
        copy_carried(model.package, staging)
    elif model is not None and model.folder is not None:
        if tokenizer_files(model.folder, None).keys() & {TOKENIZER_CONFIG, TOKENIZER}:
            _remove_tokenizer(staging)
        copy_companions(model.folder, staging)
    if chosen is not None:
        write_chosen(chosen, [model.folder for model in merged.inputs], staging)
    elif model is not None and merged.recipe.tokenizer == "base":
        _keep_tokenizer(base_folder, staging)
    elif vocabulary is not None and base_folder is not None:
        write_tokenizer(vocabulary, base_folder, [model.folder for model in merged.inputs], staging)
    if numbers is not None:
        _write_layers(numbers, staging)
    if merged.recipe.chat_template:
        folders = [base_folder, *(model.folder for model in merged.inputs)]
        write_template(merged.recipe.chat_template, folders, staging)
    sizes = chosen.sizes if chosen is not None else frozenset[int]()
    notes = _settle_use(merged, base_folder, staging)
    return [*notes, *settle_config(staging, _facts(merged, sizes, described=model is not None))]


def _settle_use(merged: Merged, base_folder: Path | None, staging: Path) -> Sequence[str]:
    """Have the configuration say how the models' weights are used. Returns sentences on what they and the
    base contradict one another in.
    """
    base = config_of(files_in(base_folder))
    models = [(model.label, config_of(own_files(model.folder))) for model in merged.inputs]
    settled = settled_use(base, models, labels=_merges_labels(merged, base))
    config = read_config(staging / CONFIG)
    if config and settled.changes:
        (staging / CONFIG).write_text(json.dumps(with_settings(config, settled.changes), indent=2) + "\n")
    return settled.notes


def _write_layers(numbers: Sequence[int], staging: Path) -> None:
    config = read_config(staging / CONFIG)
    before = next((config[key] for key in LAYER_COUNTS if key in config), len(numbers))
    if config:
        settled = with_layers(config, before, numbers)
        (staging / CONFIG).write_text(json.dumps(settled, indent=2) + "\n")


def modules_of(merged: Merged, base_folder: Path | None, *, prefixed: bool) -> dict[str, str]:
    """The later modules of the result, by the list that `write` puts there; see `module_folders`."""
    model = _described_by(merged, prefixed=prefixed or base_folder is None)
    folders = [base_folder, model.folder if model is not None else None]
    listing = [folder for folder in folders if folder is not None and MODULES in own_files(folder)]
    return module_folders(listing[-1]) if listing else {}


def _described_by(merged: Merged, *, prefixed: bool) -> Input | None:
    """The model whose configuration fits the result: that of the head, where the base has none or another
    one; or, where the base's configuration does not fit anyway, the first that has any."""
    heads = [fate for fate in merged.fates.values() if fate.how == "carried" and _is_news(fate, merged)]
    for model in [merged.inputs[fate.models[0]] for fate in heads] + (
        list(merged.inputs) if prefixed else []
    ):
        if model.folder is not None:
            return model
    return None


def _is_news(fate: Fate, merged: Merged) -> bool:
    return fate.name not in merged.base.tensors or fate.info.shape != merged.base.tensors[fate.name].shape


def _merges_labels(merged: Merged, base: Mapping[str, Any]) -> bool:
    """Whether a head is merged that has a row for each label."""
    labels = base.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else 0
    return any(
        fate.how == "merged" and fate.info.shape[:1] == (count,) and layer_of(fate.name) is None
        for fate in merged.fates.values()
    )


def _remove_tokenizer(staging: Path) -> None:
    """What one tokenizer lacks would be said by another's files beside it."""
    for name in tokenizer_files(staging, None):
        (staging / name).unlink()


def _keep_tokenizer(base_folder: Path | None, staging: Path) -> None:
    """The base's tokenizer, whatever a model brought."""
    _remove_tokenizer(staging)
    files = tokenizer_files(base_folder, None) if base_folder is not None else {}
    for name, path in files.items():
        shutil.copyfile(path, staging / name)


def _facts(merged: Merged, sizes: frozenset[int], *, described: bool) -> Facts:
    """What a configuration has to say of the weights. `sizes`: of vocabularies before. `described`: it is a
    model's own.
    """
    codes = {
        info.dtype.code
        for name, info in merged.tensors.items()
        if info.dtype.can_be_delta and name in merged.base.tensors
    }
    dtype = None
    if merged.recipe.out_dtype is not None or (len(codes) == 1 and (merged.recipe.cast_base or described)):
        dtype = DTYPE_NAMES[merged.recipe.out_dtype or codes.pop()]
    before = [merged.base.tensors, *(model.tensors for model in merged.inputs)]
    return Facts(
        tensors=merged.tensors,
        sizes=sizes.union(*map(vocabulary_sizes, before)),
        untied=merged.untied,
        dtype=dtype,
        dequantised=merged.recipe.dequantize,
    )


def write_record(report: MergeReport, staging: Path) -> None:
    """The report, the recipe, and a card for the Hub."""
    (staging / MERGE_RECORD).write_text(json.dumps(report.as_json(), indent=1) + "\n")
    names = [report.recipe.base, *(model.model for model in report.recipe.models)]
    on_hub = [
        name
        for name in names
        if name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    ]
    lines = "".join(f"- {name}\n" for name in on_hub)
    text = CARD.format(
        models=f"base_model:\n{lines}base_model_relation: merge\n" if lines else "",
        method=report.recipe.method, count=len(report.labels), base=Path(report.recipe.base).name,
        record=MERGE_RECORD, recipe=RECIPE,
    )  # fmt: skip
    (staging / RECIPE).write_text(report.recipe.to_yaml())
    (staging / "README.md").write_text(text)


@contextmanager
def folder(
    merged: Merged, base_folder: Path | None, vocabulary: Vocabulary | None, *, prefixed: bool
) -> Iterator[tuple[Path, list[str]]]:
    """A folder with these files alone, for a package to carry what differs from the base's; and what `write`
    returns.
    """
    with temporary_folder("dare-merge") as place:
        notes = write(merged, base_folder, vocabulary, place, prefixed=prefixed)
        yield place, notes
