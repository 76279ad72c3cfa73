"""The model cards of packages, so that they explain themselves on the Hub."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from ..errors import printable
from .manifest import Manifest

_FRONT = """\
---
library_name: dare_train
tags:
- dare
- delta
{base_lines}---
"""

_TEXT = (
    _FRONT
    + """
# Delta package for {base}

This folder is not a model: it holds what fine-tuning changed in `{base}`, thinned by
[DARE](https://arxiv.org/abs/2311.03099) (drop and rescale) and compressed by `dare_train`.

```python
import dare_train

# A checkpoint folder for from_pretrained:
dare_train.apply({in_python}, ["path/to/this/folder"], out="model"{cast_argument})
```

or, on the command line, `dare-train apply {in_shell} path/to/this/folder --out model{cast_option}`.
A Hub id does in the place of a folder.

| | |
|---|---|
| drop rate p | {rates} |
| seed | {seed} |
| rescale | {rescale} |
| tensors | {deltas} as deltas, {whole} whole, {base_count} as in the base |
| result fingerprint | `{result}` |
{measured}{note}"""
)

_FOLDERS = (
    _FRONT
    + """
# Delta packages for {base}

Each folder is a package: what fine-tuning changed in `{base}`, thinned by
[DARE](https://arxiv.org/abs/2311.03099) (drop and rescale) and compressed by `dare_train`.

```bash
dare-train apply {in_shell} hf://{repo}/FOLDER --out model    # a checkpoint folder for from_pretrained
dare-train pull {repo} --out packages    # all of them
```

Packages of a chain continue one another, and `dare-train inspect` says so: these are applied together,
in order, from the first.
"""
)


_ON_HUB = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)


def text(
    manifest: Manifest,
    note: str = "",
    *,
    measured: Mapping[str, float] | None = None,
    cast_base: bool = False,
) -> str:
    """Markdown with the Hub's metadata block; `base_model` is given there only when it is a Hub id.

    Args:
        manifest: the package's.
        note: a paragraph for the end.
        measured: what an evaluation in training said, by name.
        cast_base: whether the base has other dtypes than the package is for.
    """
    kinds = [record.kind for record in manifest.tensors]
    rates = sorted({record.p for record in manifest.tensors if record.kind == "delta"})
    return _TEXT.format(
        base_lines=_base_lines(manifest.base_model),
        **_names_of(manifest.base_model),
        cast_argument=", cast_base=True" if cast_base else "",
        cast_option=" --cast-base" if cast_base else "",
        rates=", ".join(f"{rate:g}" for rate in rates) or "none",
        seed=manifest.seed,
        rescale=manifest.rescaled,
        deltas=kinds.count("delta"),
        whole=kinds.count("whole"),
        base_count=kinds.count("base"),
        result=manifest.result,
        measured=_measured(measured or {}),
        note=note and f"\n{note}\n",
    )


def of_folders(repo: str, manifest: Manifest) -> str:
    """The card of a repository with a package in each of several folders, one of which has this manifest.

    It is written once, and holds for packages that come later.
    """
    return _FOLDERS.format(
        base_lines=_base_lines(manifest.base_model),
        **_names_of(manifest.base_model),
        repo=repo,
    )


def _measured(figures: Mapping[str, float]) -> str:
    if not figures:
        return ""
    rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in figures.items())
    return f"\nMeasured in training, when the package was taken:\n\n| | |\n|---|---|\n{rows}"


def _base_lines(base: str) -> str:
    """What the Hub is told of the base: a package is an addition to it, and no model by itself."""
    if not _is_on_hub(base):
        return ""
    return f"base_model: {base.partition('@')[0]}\nbase_model_relation: adapter\n"


def _names_of(base: str) -> dict[str, str]:
    """The base as texts, Python and shells write it."""
    name = base if _is_on_hub(base) else printable(Path(base).name, 200)
    in_python = json.dumps(name, ensure_ascii=False)
    return {"base": name, "in_python": in_python, "in_shell": shlex.quote(name)}


def _is_on_hub(base: str) -> bool:
    return _ON_HUB.fullmatch(base) is not None and not Path(base).exists()
