"""What configurations for mergekit say in several ways, said in one: `modules:` as models or slices, a model
that is a mapping as its name, types by their other names; without keys that nobody reads, each of which is
told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...dtypes import full_name
from ...errors import ConfigError, brief
from .foreign import is_parameter, is_typo
from .yaml_parts import REMEDIES, SLICE, SOURCE, TOKENIZER, WHOLE

_MODULE = ("models", "slices", "parameters")


def spelt_out(
    document: object, known: Collection[str], *, strict: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """A configuration as it is read here, and a sentence for each thing that was left out.

    What is nearly a key that is known, or asks for something that is not done here, stays, and will be
    refused; so does what is no configuration at all.

    Args:
        known: keys at the top.
        strict: leave nothing out.

    Raises:
        ConfigError: it is another kind of configuration, or says something where it does not count.
    """
    if not isinstance(document, dict):
        return document, []  # type: ignore[return-value]
    if "experts" in document and "merge_method" not in document:
        raise ConfigError(
            "merge_method",
            expected="a name",
            found="experts instead",
            remedy="dare-train moe makes mixtures of experts",
        )
    stray = _Stray(leave_out=not strict)
    top = stray.without(document, (*known, "modules"), "")
    if isinstance(top.get("modules"), dict) and top["modules"]:
        top = _of_modules(top, top.pop("modules"), stray)
    _each(top, "models", lambda each, where: _model(each, WHOLE, where, stray))
    _each(top, "slices", lambda each, where: _slice(each, where, stray))
    if isinstance(top.get("tokenizer"), dict):
        top["tokenizer"] = stray.without(top["tokenizer"], TOKENIZER, "tokenizer")
    for key in ("dtype", "out_dtype"):
        if isinstance(top.get(key), str):
            top[key] = full_name(top[key])
    for key in ("base_model", "tokenizer_source"):
        if key in top:
            top[key] = model_name(top[key])
    return top, stray.notes


def model_name(value: object) -> object:
    """What a model is called: `model@revision+adapter`, where a file may have its parts; anything else as it
    is.
    """
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("path"), str) and value.keys() <= {"path", "revision"}:
        return f"{value['path']}@{value['revision']}" if value.get("revision") else value["path"]
    if "model" in value and value.keys() <= {"model", "lora"}:
        parts = [model_name(value[key]) for key in ("model", "lora") if value.get(key) is not None]
        return "+".join(parts) if all(isinstance(part, str) for part in parts) else value  # type: ignore[arg-type]
    return value


class _Stray:
    """Leaves out what nobody reads, and remembers it."""

    def __init__(self, *, leave_out: bool) -> None:
        self._leave_out = leave_out
        self._said: dict[str, None] = {}

    @property
    def notes(self) -> list[str]:
        return [*self._said]

    def say(self, note: str) -> None:
        self._said[note] = None

    def without(self, fields: Mapping[Any, Any], known: Collection[str], where: str) -> dict[Any, Any]:
        names = [
            key
            for key in fields
            if isinstance(key, str) and key not in known and key not in REMEDIES and not is_typo(key, known)
        ]
        misplaced = next((key for key in names if where and is_parameter(key)), None)
        if misplaced is not None:
            raise ConfigError(
                f"{where}.{misplaced}",
                expected=f"{misplaced} among the parameters",
                found=brief(fields[misplaced]),
                remedy=f"write parameters: {{{misplaced}: ...}} there",
            )
        stray = names if self._leave_out else []
        for key in stray:
            self.say(
                f"{where}.{key} is ignored: nothing reads it there"
                if where
                else f"{key} is ignored: no merge here or in mergekit reads it"
            )
        return {key: value for key, value in fields.items() if key not in stray}


def _each(fields: dict[str, Any], key: str, change: Callable[[Any, str], Any]) -> None:
    """Replace the entries of a list that are mappings."""
    entries = fields.get(key)
    if isinstance(entries, list):
        fields[key] = [
            change(each, f"{key}[{place}]") if isinstance(each, dict) else each
            for place, each in enumerate(entries)
        ]


def _slice(fields: Mapping[Any, Any], where: str, stray: _Stray) -> dict[Any, Any]:
    found = stray.without(fields, SLICE, where)
    if isinstance(found.get("sources"), list):
        found["sources"] = [
            _model(each, SOURCE, f"{where}.sources[{place}]", stray) if isinstance(each, dict) else each
            for place, each in enumerate(found["sources"])
        ]
    if "base_model" in found:
        found["base_model"] = model_name(found["base_model"])
    return found


def _model(fields: Mapping[Any, Any], known: Collection[str], where: str, stray: _Stray) -> dict[Any, Any]:
    found = stray.without(fields, (*known, "revision"), where)
    found["model"] = model_name(found.get("model"))
    revision = found.pop("revision", None)
    if revision is not None:
        if not isinstance(found["model"], str) or "@" in found["model"] or "+" in found["model"]:
            raise ConfigError(
                f"{where}.revision",
                expected="beside the name of one model without another revision",
                found=brief(found["model"]),
                remedy="write model@revision",
            )
        stray.say(f"{where}.revision is read as {found['model']}@{revision}; mergekit takes the newest")
        found["model"] = f"{found['model']}@{revision}"
    return found


# modules


def _of_modules(top: dict[str, Any], modules: Mapping[Any, Any], stray: _Stray) -> dict[str, Any]:
    """The one module of a file, or what all of them say, where models and slices stand elsewhere."""
    given = [
        stray.without(each, _MODULE, f"modules.{name}") if isinstance(each, dict) else each
        for name, each in modules.items()
    ]
    first = given[0]
    beside = sorted({"models", "slices"} & top.keys())
    if not isinstance(first, dict) or beside or any(each != first for each in given):
        raise ConfigError(
            "modules",
            expected="one, or several that list the same models with the same parameters",
            found=f"{', '.join(map(str, modules))}{' beside ' + beside[0] if beside else ''}",
            remedy="list models: all parts of a model are merged by one method, and filters such as "
            "vision_tower give a part settings of its own",
        )
    if len(given) > 1 and "slices" in first:
        raise ConfigError(
            "modules",
            expected="models: each module has layers of its own",
            found="slices",
            remedy="list models in place of slices",
        )
    inner = {key: first[key] for key in ("models", "slices") if key in first}
    parameters = _over(first.get("parameters"), top.get("parameters"))
    return {**top, **inner, **({"parameters": parameters} if parameters else {})}


def _over(first: object, then: object) -> Any:
    """Parameters that say what `first` says, and what `then` says where that says nothing."""
    if not isinstance(first, dict) or not isinstance(then, dict):
        return first or then
    both = {name: [*_cases(first[name]), *_cases(then[name])] for name in first.keys() & then.keys()}
    return {**then, **first, **both}


def _cases(setting: Any) -> list[Any]:
    if isinstance(setting, dict):
        return [setting]
    if isinstance(setting, list) and setting and all(isinstance(each, dict) for each in setting):
        return setting
    return [{"value": setting}]
