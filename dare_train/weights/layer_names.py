"""What a tensor's name says: the layer it belongs to, and its kind within it."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\.(\d+)\.")


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by as people count: `layer.10` after `layer.9`."""
    return [
        (int(part), "") if re.fullmatch("[0-9]{1,18}", part) else (-1, part)
        for part in re.split("([0-9]+)", name)
    ]


def kind_of(name: str) -> str:
    """A tensor's place in a layer, whichever layer: numbers become `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def within_layer(name: str) -> str:
    """A tensor's name in any of such layers: its layer's number becomes `*`, others in it stay."""
    return _NUMBER.sub(".*.", name, count=1)


def layer_of(name: str) -> str:
    """The layer a tensor belongs to: its number, or the outermost name that tells it from its siblings."""
    number = _NUMBER.search(name)
    if number:
        return number.group(1)
    parts = name.split(".")
    encoders = ("bert", "model", "roberta", "transformer", "distilbert")
    return parts[1] if len(parts) > 2 and parts[0] in encoders else parts[0]
