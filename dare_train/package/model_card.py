"""The model card that a package carries, so that it explains itself on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import printable
from .manifest import Manifest

_TEXT = """\
---
library_name: dare_train
tags:
- dare
- delta
{base_line}---

# Delta package for {base}

This folder is not a model: it holds what fine-tuning changed in `{base}`, thinned by
[DARE](https://arxiv.org/abs/2311.03099) (drop and rescale) and compressed by `dare_train`.

```python
import dare_train

dare_train.apply("{base}", ["path/to/this/folder"], out="model")    # a checkpoint folder for from_pretrained
```

or, on the command line, `dare-train apply {base} path/to/this/folder --out model`.

| | |
|---|---|
| drop rate p | {rates} |
| seed | {seed} |
| rescale | {rescale} |
| tensors | {deltas} as deltas, {whole} whole, {base_count} as in the base |
| result fingerprint | `{result}` |
{note}"""


def text(manifest: Manifest, note: str = "") -> str:
    """Markdown with the Hub's metadata block; `base_model` is given there only when it is a Hub id. `note` is
    a paragraph for the end.
    """
    kinds = [record.kind for record in manifest.tensors]
    rates = sorted({record.p for record in manifest.tensors if record.kind == "delta"})
    base = manifest.base_model
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", base, re.ASCII) is not None and not Path(base).exists()
    return _TEXT.format(
        base_line=f"base_model: {base}\n" if on_hub else "",
        base=base if on_hub else printable(Path(base).name, 200),
        rates=", ".join(f"{rate:g}" for rate in rates) or "none",
        seed=manifest.seed,
        rescale=manifest.rescaled,
        deltas=kinds.count("delta"),
        whole=kinds.count("whole"),
        base_count=kinds.count("base"),
        result=manifest.result,
        note=note and f"\n{note}\n",
    )
