"""One architecture, tried: each step's result compared bit for bit with what `save_pretrained` and PEFT
write.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

import dare_train
from dare_train.errors import DareError

from .catalogue import Architecture
from .tiny import Unbuildable, build

STEPS = ("snapshot", "extract and apply", "apply_ and revert", "merge", "LoRA live", "LoRA from its folder")
State = dict[str, torch.Tensor]


class Wrong(Exception):
    """A result that is not what it should be; the text says what is not."""


class Outcome(NamedTuple):
    """Of a step: `right`, `wrong` without a word, `refused` with one, or `not possible` for transformers
    or PEFT.
    """

    verdict: str
    why: str = ""


@dataclass
class Record:
    """What became of an architecture."""

    name: str
    kind: str
    model_type: str
    unbuilt: str = ""
    """Why there was no model to try."""
    seconds: float = 0.0
    steps: dict[str, Outcome] = field(default_factory=dict)


def tried(architecture: Architecture) -> Record:
    """Try every step."""
    began = time.monotonic()
    record = Record(architecture.name, architecture.kind, architecture.model_type)
    with tempfile.TemporaryDirectory(prefix="zoo-") as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = _Trial(architecture.model_class, Path(place))
        except Unbuildable as error:
            record.unbuilt = str(error)
        except Exception as error:  # noqa: BLE001 - transformers cannot save and load it
            record.unbuilt = f"is not saved and loaded: {type(error).__name__}: {error}".replace("\n", " ")[
                :160
            ]
        else:
            record.steps = {name: _outcome(step) for name, step in trial.steps()}
    record.seconds = time.monotonic() - began
    return record


def _outcome(step: Callable[[], None]) -> Outcome:
    try:
        step()
    except Wrong as error:
        return Outcome("wrong", str(error)[:200])
    except DareError as error:
        return Outcome("refused", str(error).replace("\n", " ")[:300])
    except _NotPossible as error:
        return Outcome("not possible", str(error).replace("\n", " ")[:160])
    except Exception as error:  # noqa: BLE001 - the table has a row for it
        return Outcome("wrong", f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
    return Outcome("right")


class _NotPossible(Exception):
    """PEFT cannot do it either; the text says why."""


class _Trial:
    """The files of an architecture, and its steps."""

    def __init__(self, model_class: Any, place: Path) -> None:
        self._class = model_class
        self._place = place
        self._base = place / "base"
        build(model_class).save_pretrained(self._base)
        _check_whole(_loading(model_class, self._base))
        self._tuned = [place / f"tuned-{number}" for number in (1, 2)]
        for number, folder in enumerate(self._tuned):
            model = self._load()
            _move(model, seed=number + 1)
            model.save_pretrained(folder)

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield from zip(
            STEPS,
            (self._snapshot, self._apply, self._apply_, self._merge, self._lora_live, self._lora_folder),
            strict=True,
        )

    def _load(self) -> Any:
        return self._class.from_pretrained(self._base).eval()

    def _snapshot(self) -> None:
        """A package of the live model is that of its files."""
        model = self._load()
        taker = dare_train.Snapshotter.begin(model, self._place / "begun", dare_train.DareConfig(p=0.5))
        if taker.origin.checkpoint.folder.resolve() != self._base.resolve():
            raise Wrong("its base is not recognised: a copy of it is kept")
        _move(model, seed=1)
        taker.take(model, self._place / "live", step=1)
        last = taker.close()
        assert last is not None
        on_disk = dare_train.extract(self._base, self._tuned[0], self._place / "extracted", p=0.5)
        _same_package(last.package, on_disk)

    def _apply(self) -> None:
        """A lossless package makes the tuned files of the base's."""
        dare_train.extract(self._base, self._tuned[0], self._place / "lossless", p=0)
        dare_train.apply(self._base, self._place / "lossless", self._place / "applied")
        _same(_state(self._place / "applied"), _state(self._tuned[0]))

    def _apply_(self) -> None:
        """The same in a live model, saved afterwards; and back."""
        model = self._load()
        before = _bits(model)
        undo = dare_train.apply_(model, self._place / "lossless")
        model.save_pretrained(self._place / "live-applied")
        _same(_state(self._place / "live-applied"), _state(self._tuned[0]))
        undo.revert()
        _same(_bits(model), before)

    def _merge(self) -> None:
        """Two packages give what their models give; it loads with no tensor missing, and ties as the base
        does.
        """
        packages = [
            dare_train.extract(self._base, folder, self._place / f"of-{folder.name}", p=0)
            for folder in self._tuned
        ]
        merged = self._place / "merged"
        dare_train.merge(self._base, packages, merged, method="average")
        dare_train.merge(self._base, self._tuned, self._place / "merged-folders", method="average")
        found = _state(merged)
        _same(found, _state(self._place / "merged-folders"))
        base, one, two = (_state(folder) for folder in (self._base, *self._tuned))
        if found.keys() != base.keys():
            raise Wrong(f"tensors {sorted(found.keys() ^ base.keys())[:3]}")
        for name, tensor in found.items():
            if tensor.is_floating_point():
                mean = (one[name].double() + two[name].double()) / 2
                if not torch.allclose(tensor.double(), mean, atol=1e-6):
                    raise Wrong(f"{name} is not the mean")
        loaded, told = _loading(self._class, merged)
        _check_whole((loaded, told))
        if _ties(loaded) != _ties(self._load()):
            raise Wrong("it ties other tensors than the base")

    def _lora_live(self) -> None:
        """A package of a model with adapters is that of the model that PEFT merges."""
        from peft import get_peft_model

        config = _lora_config(self._load())
        try:
            model = get_peft_model(self._load(), config)
            saved = get_peft_model(self._load(), config)
            for adapted in (model, saved):
                _exact_factors(adapted)
            saved.save_pretrained(self._place / "adapter", save_embedding_layers=False)
            saved.merge_and_unload().save_pretrained(self._place / "lora")
        except Exception as error:
            shutil.rmtree(self._place / "lora", ignore_errors=True)
            raise _NotPossible(f"PEFT: {type(error).__name__}: {error}") from error
        live = dare_train.extract(self._base, model, self._place / "lora-live", p=0)
        right = dare_train.extract(self._base, self._place / "lora", self._place / "lora-right", p=0)
        if not any(record.changed for record in right.records.values()):
            raise _NotPossible("PEFT: merging changes nothing")
        _same_package(live, right)
        taker = dare_train.Snapshotter.begin(model, self._place / "lora-begun", dare_train.DareConfig(p=0))
        taker.take(model, self._place / "lora-taken", step=1)
        last = taker.close()
        assert last is not None
        _same_package(last.package, right)

    def _lora_folder(self) -> None:
        """The same of the adapter's folder."""
        if not (self._place / "lora").is_dir():
            raise _NotPossible("no model that PEFT merged")
        right = dare_train.extract(self._base, self._place / "lora", self._place / "lora-again", p=0)
        if not any(record.changed for record in right.records.values()):
            raise _NotPossible("PEFT: merging changes nothing")
        found = dare_train.extract(self._base, self._place / "adapter", self._place / "lora-folder", p=0)
        _same_package(found, right)


def _move(model: torch.nn.Module, seed: int) -> None:
    """Noise in the place of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)


def _exact_factors(model: torch.nn.Module) -> None:
    """Factors whose products float32 holds exactly: so it does not matter in which precision they are
    merged.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator) / 8)


def _lora_config(model: Any) -> Any:
    """Adapters on all linear layers but the head's, and on the stacked weights of experts."""
    from peft import LoraConfig

    stacked = sorted(
        {
            ".".join(name.split(".")[-2:])
            for name, parameter in model.named_parameters()
            if parameter.ndim == 3 and name.rpartition(".")[2] in ("gate_up_proj", "down_proj")
        }
    )
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", target_parameters=stacked or None)


def _loading(model_class: Any, folder: Path) -> tuple[Any, Mapping[str, Any]]:
    model, told = model_class.from_pretrained(folder, output_loading_info=True)
    return model, told


def _check_whole(loading: tuple[Any, Mapping[str, Any]]) -> None:
    _, told = loading
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[what]:
            raise Wrong(f"{what} {sorted(map(str, told[what]))[:3]}")


def _ties(model: torch.nn.Module) -> set[frozenset[str]]:
    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in places.values() if len(names) > 1}


def _state(folder: Path) -> State:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _bits(model: torch.nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(found: State, expected: State) -> None:
    if found.keys() != expected.keys():
        raise Wrong(f"tensors {sorted(found.keys() ^ expected.keys())[:3]}")
    for name, tensor in expected.items():
        one, other = (of.contiguous().reshape(-1).view(torch.uint8) for of in (found[name], tensor))
        if found[name].shape != tensor.shape or not torch.equal(one, other):
            raise Wrong(f"{name} differs")


def _same_package(found: Any, expected: Any) -> None:
    if found.records.keys() != expected.records.keys():
        raise Wrong(f"tensors {sorted(found.records.keys() ^ expected.records.keys())[:3]}")
    for name, record in expected.records.items():
        if found.records[name].info != record.info:
            raise Wrong(f"{name}: {found.records[name].info} for {record.info}")
        if found.records[name].result != record.result:
            raise Wrong(f"{name} differs")
