"""Names of tensors that wrappers of training have left in files: DDP, FSDP, `torch.compile`, activation
checkpointing, PEFT. `from_pretrained` knows none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "_forward_module"}
"""Parts that no model gives to its own, wherever they stand."""
_STARTS = ("module.", "base_model.model.")
"""What stands before every name, if a wrapper put it there."""
_FACTORS = (".lora_", ".modules_to_save.", ".original_module.", ".base_layer.")
"""In names of adapters, which keep them."""


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """By each name as the model inside has it, the name that it has. Where two would become one, all stay as
    they are; so do those of adapters.
    """
    given = list(names)
    if any(part in name for name in given for part in _FACTORS):
        return {name: name for name in given}
    plain = [_without_parts(name) for name in given]
    while start := next((start for start in _STARTS if plain and _all_behind(plain, start)), None):
        plain = [_without_parts(name.removeprefix(start)) for name in plain]
    if len(set(plain)) < len(plain) or not all(plain):
        return {name: name for name in given}
    return dict(zip(plain, given, strict=True))


def wrappers_in(names: Collection[str]) -> str:
    """What `without_wrappers` takes out of names, in words."""
    known = sorted(f"{part}." for part in _PARTS if any(part in name.split(".") for name in names))
    plain = [_without_parts(name) for name in names]
    return " and ".join([*(start for start in _STARTS if _all_behind(plain, start)), *known])


def _all_behind(names: Collection[str], start: str) -> bool:
    return all(name.startswith(start) and len(name) > len(start) for name in names)


def _without_parts(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _PARTS)
