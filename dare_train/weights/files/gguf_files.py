"""GGUF files, whose weights are quantised, as checkpoints: packages need a base of plain weights."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError, brief
from ...parallel.staged_folder import staged_folder
from ...reading.plain_files import is_text
from ..skeletons import asks_for
from .checkpoint import Checkpoint

_MAGIC = b"GGUF"
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")
_CONFIG_MARKS = ("quantization_config", "_pre_quantization_dtype")
"""What transformers leaves on a model from a GGUF. It does not save a model that has them."""


def dequantize(
    file: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False
) -> dict[str, int]:
    """Write a GGUF file as a checkpoint in bfloat16, with its tokenizer, chat template and generation
    settings. transformers reads it: which architectures are known is its affair.

    Args:
        file: one file that holds a whole causal language model.
        out: folder to create.
        overwrite: replace a folder that is already there.

    Returns:
        `parameters`, of which tied ones count once, and `bytes` of the weights in files.

    Raises:
        CheckpointError: there is no such file, it is no GGUF, transformers cannot read it, or it holds a part
            of the weights.
        ConfigError: the library `gguf` is not installed, or transformers cannot write to `out`.
        OutputExists: `out` exists.
    """
    path = Path(file)
    _check_file(path)
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "dequantize", expected="the library gguf", found="not installed", remedy="pip install gguf"
        )
    if not is_text(os.fspath(out)):
        raise ConfigError("out", expected="a path that is UTF-8", found=brief(os.fspath(out)))
    with staged_folder(Path(out), overwrite=overwrite, inputs=[path], read_back=Checkpoint.open) as folder:
        model, tokenizer = _loaded(path)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(weights.stat().st_size for weights in folder.glob("*.safetensors"))
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "bytes": size}


def _check_file(path: Path) -> None:
    found = None
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
    else:
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
        if begin != _MAGIC:
            found = f"one that begins with {begin!r}"
    if found is not None:
        raise CheckpointError(str(path), expected="a GGUF file", found=found)


def _loaded(path: Path) -> tuple[Any, Any]:
    """The model in plain weights, and its tokenizer."""
    import torch
    import transformers

    # Where transformers has kernels for blocks, weights would stay packed without this.
    kind = getattr(transformers, "GgufConfig", None)
    plain = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    try:
        config = transformers.AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        for name, value in asks_for(config.to_dict()):
            raise ValueError(f"{name} {value}, more than models have")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            output_loading_info=True,
            trust_remote_code=False,
            **plain,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
    except Exception as error:  # a stranger's file may raise anything
        expected = "a GGUF of a causal language model that transformers reads"
        remedy = "take the model's safetensors, or a newer transformers"
        found = f"{type(error).__name__}: {str(error)[:300]}"
        raise CheckpointError(str(path), expected=expected, found=found, remedy=remedy) from error
    if missing := sorted(report["missing_keys"]):
        remedy = "a split GGUF has to be joined first: llama-gguf-split --merge"
        found = f"no {missing[0]}"
        raise CheckpointError(str(path), expected="all weights in one file", found=found, remedy=remedy)
    for owner, marks in ((model, _MARKS), (model.config, _CONFIG_MARKS)):
        for mark in marks:
            vars(owner).pop(mark, None)
    return model, tokenizer
