"""Where a model's files and its modules name, cut and lay out their tensors differently: fused experts,
old names, joined projections, transposed matrices.

transformers joins and turns some tensors of a checkpoint when it loads it, and undoes that when it saves.
What it would save is found by letting it do so with stand-ins whose elements say where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...errors import ConfigError
from .layouts import Block, Place, blocks_of, widened
from .sharding import Held
from .views import numbered

_WIDTH = 8
"""Elements that stand in for a row, where a conversion keeps rows whole."""
_KEEP_ROWS = {"Chunk", "Concatenate", "SplitModulelist", "MergeModulelist", "Transpose"}
"""Operations for which the length of a row does not matter, unless they cut it."""

Places = Mapping[str, Place]
"""By the name in files."""
Shapes = Mapping[str, tuple[int, ...]]

_known: WeakKeyDictionary[torch.nn.Module, tuple[Shapes, Places]] = WeakKeyDictionary()


def places_in_files(model: Any, held: Mapping[str, Held]) -> Places:
    """Where each tensor that `save_pretrained` would write lies in the model's own.

    Args:
        model: out of its wrappers.
        held: what is held of the model's tensors.

    Raises:
        ConfigError: a tensor of the files is no view of the model's.
    """
    return file_places(model, {name: tensor.shape for name, tensor in held.items()})


def file_places(model: Any, shapes: Shapes) -> Places:
    """The same of a model's tensors that have these shapes, wherever they are."""
    conversions = _conversions(model) if _is_pretrained(model) else []
    if not conversions:
        return {name: Place.whole(name, shape) for name, shape in shapes.items()}
    known = _known.get(model)
    if known is None or known[0] != shapes:
        known = _known[model] = shapes, _places(_Configured(model, conversions, shapes), conversions, shapes)
    return known[1]


def renamed(model: Any, name: str) -> str:
    """What files call a tensor that they have as it is."""
    conversions = [conversion for conversion in _conversions(model) if not hasattr(conversion, "operations")]
    (in_files,) = _reverted(_Configured(model, conversions, {}), {name: torch.zeros(1)})
    return in_files


def loads_without(model: Any, prefix: str, name: str) -> bool:
    """Whether transformers takes a prefix away from a name in a file, when it loads the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = get_model_conversion_mapping(model, add_legacy=False)
    return any(not conversion.rename_source_key(name)[0].startswith(prefix) for conversion in known)


def _is_pretrained(model: Any) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(model, "base_model_prefix")


def _conversions(model: Any) -> list[Any]:
    """What transformers did to names and tensors when it loaded the model, or would do.

    Under ZeRO-3 it does not sort out which of the conversions of old names a file really needed; then none of
    them counts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        known = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in known if type(conversion).__name__ != "PrefixChange"]
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        known = get_model_conversion_mapping(model, add_legacy=False)
        settled = {_patterns(conversion) for conversion in known}
        conversions = [conversion for conversion in conversions if _patterns(conversion) in settled]
    return [conversion for conversion in conversions if not _unpacks(conversion)]


def _unpacks(conversion: Any) -> bool:
    """Whether it made other values of what the files had, for a quantisation library; saving need not undo
    it.
    """
    operations = getattr(conversion, "operations", None) or ()
    return any(".integrations." in type(operation).__module__ for operation in operations)


def _patterns(conversion: Any) -> tuple[str, ...]:
    return (*conversion.source_patterns, "->", *conversion.target_patterns)


class _Configured:
    """A model as far as taking its tensors apart needs one, with conversions of our choice."""

    def __init__(self, model: Any, conversions: list[Any], shapes: Shapes) -> None:
        self._weight_conversions = conversions
        self._model = model
        self._shapes = shapes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        """A tensor of the model's that has its whole shape, whoever holds it, and under adapters its own
        name.
        """
        if name in self._shapes:
            return torch.empty(self._shapes[name], device="meta")
        found: torch.Tensor = self._model.get_parameter(name)
        return found


def _reverted(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


def _places(model: Any, conversions: list[Any], shapes: Shapes) -> Places:
    converters = [
        conversion.reverse_transform()
        for conversion in conversions[::-1]
        if hasattr(conversion, "operations")
    ]
    places: dict[str, Place] = {}
    plain: list[str] = []
    for names, converter in _together(shapes, converters):
        if converter is None:
            plain += names
        else:
            places.update(_converted(model, converter, {name: shapes[name] for name in names}))
    numbers = {name: torch.tensor([number]) for number, name in enumerate(plain)}
    for file, number in _reverted(model, numbers).items():
        name = plain[int(number)]
        places[file] = Place.whole(name, shapes[name])
    _check(model, shapes, places)
    return places


def _together(shapes: Shapes, converters: Iterable[Any]) -> list[tuple[list[str], Any]]:
    """Names of the tensors that one conversion takes together, and what undoes it; None where none
    applies.
    """
    groups: dict[str, tuple[list[str], Any]] = {}
    for name in shapes:
        renamed_by = ((converter, *converter.rename_source_key(name)) for converter in converters)
        converter, key, _ = next((found for found in renamed_by if found[2] is not None), (None, name, None))
        groups.setdefault(key if converter is not None else f"{name} alone", ([], converter))[0].append(name)
    return list(groups.values())


def _converted(model: Any, converter: Any, shapes: Shapes) -> dict[str, Place]:
    """Where files have what one conversion makes of some tensors."""
    keeps_rows = all(
        type(operation).__name__ in _KEEP_ROWS and not getattr(operation, "check_dims", False)
        for operation in converter.operations
    )
    places = _looked_up(model, shapes, _WIDTH) if keeps_rows else None
    places = places or _looked_up(model, shapes, None)
    assert places is not None
    return places


def _looked_up(model: Any, shapes: Shapes, width: int | None) -> dict[str, Place] | None:
    """The places, found with rows of `width` elements; None where these do not tell."""
    narrow = {
        name: shape if width is None or len(shape) < 2 else (*shape[:-1], min(shape[-1], width))
        for name, shape in shapes.items()
    }
    widths = {name: (narrow[name][-1], shape[-1]) if shape else (1, 1) for name, shape in shapes.items()}
    stand_ins, bounds = numbered(narrow)
    places = {}
    for file, part in _reverted(model, stand_ins).items():
        blocks: tuple[Block, ...] | None = blocks_of(file, part.reshape(-1).numpy(), bounds)
        if width is not None:
            blocks = widened(blocks or (), widths)
        if blocks is None:
            return None
        places[file] = Place(tuple(part.shape), blocks)
    return places


def _check(model: Any, shapes: Shapes, places: dict[str, Place]) -> None:
    """What was found piece by piece is what transformers makes of all together; shapes are those.

    Raises:
        ConfigError: it is not.
    """
    everything = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    whole = _reverted(model, everything)
    for file in sorted(whole.keys() | places.keys()):
        found = sum(block.length for block in places[file].blocks) if file in places else None
        if file not in whole or found != whole[file].numel():
            expected = "a tensor that files have cut, joined or turned"
            remedy = "extract from the saved checkpoint instead"
            raise ConfigError(file, expected=expected, found="one that is converted otherwise", remedy=remedy)
        places[file] = Place(tuple(whole[file].shape), places[file].blocks)
