"""How much can be dropped on this model? A metric against the drop rate, by several rules, over several masks.

One model stays in memory; between two points its weights are overwritten in place. What a sweep has measured is kept point by
point, so that one that was killed, or asked for more points, goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from ._version import __version__
from .config import check_drop_rate
from .dtypes import Words
from .errors import CheckpointError, ConfigError
from .fingerprint import Fingerprint, model_fingerprint, total
from .merge.driver import merged_weights
from .merge.merged import Merged
from .merge.task import task_of
from .parallel import ordered_map
from .plan import WeightsLike, open_weights
from .shards import LiveWeights
from .weights import TensorInfo, Weights, runs

if TYPE_CHECKING:
    import torch

Evaluate = Callable[["torch.nn.Module"], Union[float, Mapping[str, float]]]
"""Called with the model at each point; returns a number, or several by name. It leaves the weights alone."""

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_RUN = 1 << 20
_JOURNAL = "sweep.jsonl"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A rule by which elements are dropped."""

    label: str
    """For legends."""
    settings: Mapping[str, Any]
    """Arguments of `merge`; the drop rate goes to `p`, or where the rule has a density, 1 - p to that."""
    seeded: bool = True
    """Whether masks are drawn, so that there are several."""
    of_weights: bool = False
    """Whether the fine-tuned weights themselves are dropped, instead of the delta."""


VARIANTS: Mapping[str, Variant] = {
    "dare": Variant(label="DARE", settings={"method": "dare_linear"}),
    "drop_only": Variant(label="drop only", settings={"method": "drop_only"}),
    "magnitude": Variant(label="magnitude pruning", settings={"method": "magnitude"}, seeded=False),
    "weights": Variant(label="DARE on the weights themselves", settings={"method": "dare_linear"}, of_weights=True),
    "norm": Variant(label="L1 norm kept", settings={"method": "dare_linear", "rescale": "norm"}),
}
"""What arXiv 2311.03099 compares: DARE (§3.1), drop only and magnitude pruning (§4.4), weights instead of deltas (§4.5); and
mergekit's rescale rule."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement."""

    variant: str
    p: float
    seed: int
    metrics: Mapping[str, float]

    @property
    def key(self) -> tuple[str, float, int]:
        return self.variant, self.p, self.seed


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was measured, and of what."""

    base: str
    """Fingerprint of the base's weights (docs/format.md §3.3)."""
    tuned: str
    """Of the fine-tuned model's."""
    points: tuple[Point, ...]
    """By variant, drop rate and seed."""

    def values(self, variant: str, p: float, metric: str) -> list[float]:
        """A metric at one place, of each seed."""
        return [point.metrics[metric] for point in self.points if (point.variant, point.p) == (variant, p)]

    @property
    def metrics(self) -> list[str]:
        return list(self.points[0].metrics) if self.points else []

    def as_json(self) -> dict[str, Any]:
        """Everything, in an order that does not depend on how it was measured."""
        points = [{"variant": one.variant, "p": one.p, "seed": one.seed, "metrics": dict(one.metrics)} for one in self.points]
        return {"written_by": f"dare_train {__version__}", "base": self.base, "tuned": self.tuned, "points": points}


def sweep(
    model: torch.nn.Module,
    base: WeightsLike,
    evaluate: Evaluate,
    *,
    out: str | os.PathLike[str],
    p: Sequence[float] = RATES,
    seeds: int = 5,
    first_seed: int = 0,
    variants: Sequence[str] = ("dare", "drop_only", "magnitude", "weights"),
    tuned: WeightsLike | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Sweep:
    """Measure a fine-tuned model at each drop rate, by each variant, with each of several masks.

    At drop rate 0 every variant is the fine-tuned model itself, which is measured once. Masks are those of packages: `dare` with
    seed s has the weights that a package of `DareConfig(p=p, seed=s)` gives.

    Args:
        model: the fine-tuned model. Its weights are overwritten, and put back in the end, to the bit.
        base: what it was fine-tuned from; tensors that this lacks, such as a head, stay as they are.
        evaluate: see `Evaluate`. The same call on the same weights should give the same numbers.
        out: folder for what is measured, point by point, and for sweep.json. Points that are there already are not measured
            again; a folder of another model's is refused.
        p: drop rates, in [0, 1).
        seeds: masks at each rate, of seeds `first_seed` onwards, for variants that draw them.
        variants: names in `VARIANTS`.
        tuned: the same weights on disk, so that they need not be copied.
        progress: called with (points done, points in all).

    Raises:
        ConfigError: a value is out of range, or `evaluate` gives no finite numbers.
        CheckpointError: `out` holds another sweep, or `tuned` is not what the model holds; and as `merge`.
    """
    wanted = planned(p, seeds, first_seed, variants)
    live = LiveWeights(model)
    weights = _Copy(live) if tuned is None else open_weights(tuned)
    kept = open_weights(base)
    prints = _print_of(kept), _print_of(weights)
    if tuned is not None and _print_of(live) != prints[1]:
        raise CheckpointError(weights.label, expected="the weights that the model has", found="others", remedy="leave tuned= out")
    journal = _Journal(Path(out), prints)
    found = {point.key: point for point in journal.read()}
    with _given_back(live, weights):
        for number, key in enumerate(wanted):
            if key not in found:
                _overwrite(live, _weights_at(kept, weights, *key))
                found[key] = Point(variant=key[0], p=key[1], seed=key[2], metrics=_numbers(evaluate(model)))
                journal.add(found[key])
            if progress is not None:
                progress(number + 1, len(wanted))
    result = Sweep(base=prints[0], tuned=prints[1], points=tuple(found[key] for key in wanted))
    (Path(out) / "sweep.json").write_text(json.dumps(result.as_json(), indent=1) + "\n")
    return result


def load_model(folder: str) -> torch.nn.Module:
    """The model of a folder or a Hub id, of the class that its configuration names, on the CPU, not training.

    Raises:
        CheckpointError: the configuration names none that transformers knows.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    kind = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if kind is None:
        expected, remedy = "architectures that transformers knows in config.json", "call dare_train.sweep with a model of your own"
        raise CheckpointError(folder, expected=expected, found=", ".join(names) or "none", remedy=remedy)
    model: torch.nn.Module = kind.from_pretrained(folder, dtype="auto").train(False)
    return model


def planned(p: Sequence[float], seeds: int, first_seed: int, variants: Sequence[str]) -> list[tuple[str, float, int]]:
    """Variant, drop rate and seed of each point of a sweep.

    Raises:
        ConfigError: a value is out of range.
    """
    if seeds < 1:
        raise ConfigError("seeds", expected="at least 1", found=repr(seeds))
    for name in variants:
        if name not in VARIANTS:
            raise ConfigError("variants", expected=f"one of {', '.join(VARIANTS)}", found=repr(name))
    rates = sorted({check_drop_rate(rate) for rate in p})
    if not rates or not variants:
        raise ConfigError("p" if not rates else "variants", expected="at least one", found="none")
    dense = [("dense", 0.0, 0)] if rates[0] == 0 else []
    return dense + [
        (name, rate, first_seed + n)
        for name in dict.fromkeys(variants)
        for rate in rates
        for n in range(seeds if VARIANTS[name].seeded else 1)
        if rate > 0
    ]


def _weights_at(base: Weights, tuned: Weights, name: str, p: float, seed: int) -> Weights:
    if name == "dense":
        return tuned
    return dropped(base, tuned, VARIANTS[name], p=p, seed=seed)


def dropped(base: WeightsLike, tuned: WeightsLike, variant: Variant, *, p: float, seed: int) -> Merged:
    """The fine-tuned weights after dropping, worked out when they are read. Rounded once, to the fine-tuned model's dtypes.

    Raises:
        As `merge`.
    """
    settings = dict(variant.settings)
    settings |= {"density": 1 - p} if settings["method"] == "magnitude" else {"p": p}
    start = _Zeros(open_weights(base)) if variant.of_weights else base
    return merged_weights(task_of(start, [tuned], seed=seed, cast_base=True, **settings))


class _Zeros:
    """A base of zeros: what is dropped then is the weights themselves."""

    def __init__(self, like: Weights) -> None:
        self.label, self.tensors = f"zeros like {like.label}", like.tensors

    def read(self, name: str, start: int, count: int) -> Words:
        return np.zeros(count, self.tensors[name].dtype.word)


class _Copy:
    """Implements `Weights`: a model's as they are now."""

    def __init__(self, live: LiveWeights) -> None:
        self.label = live.label
        self.tensors: Mapping[str, TensorInfo] = live.tensors
        self._words = {name: np.array(live.read(name, 0, info.numel)) for name, info in live.tensors.items()}

    def read(self, name: str, start: int, count: int) -> Words:
        return self._words[name][start : start + count]


def _overwrite(live: LiveWeights, weights: Weights) -> None:
    """Give a model those of its tensors that differ from point to point; no others ever change."""
    fates = weights.fates if isinstance(weights, Merged) else None
    names = [name for name in live.tensors if name in weights.tensors and (fates is None or fates[name].how == "merged")]
    work = ((name, start, count) for name in names for start, count in runs(live.tensors[name].numel, _RUN))

    def one(run: tuple[str, int, int]) -> None:
        live.overwrite(run[0], run[1], weights.read(*run))

    with closing(ordered_map(one, work)) as done:
        for _ in done:
            pass


@contextmanager
def _given_back(live: LiveWeights, tuned: Weights) -> Iterator[None]:
    """The model has its own weights again afterwards, whatever happened."""
    try:
        yield
    finally:
        _overwrite(live, tuned)


def _print_of(weights: Weights) -> str:
    """The fingerprint of all weights."""

    def one(name: str) -> tuple[str, str, tuple[int, ...], Fingerprint]:
        info = weights.tensors[name]
        shares = (Fingerprint.of(np.ascontiguousarray(weights.read(name, s, n)), s) for s, n in runs(info.numel, _RUN))
        return name, info.dtype.code, info.shape, total(shares)

    with closing(ordered_map(one, weights.tensors)) as prints:
        return model_fingerprint(prints)


def _numbers(given: float | Mapping[str, float]) -> dict[str, float]:
    metrics = dict(given) if isinstance(given, Mapping) else {"metric": given}
    try:
        numbers = {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError):
        numbers = {}
    if not numbers or not all(np.isfinite(value) for value in numbers.values()):
        raise ConfigError("evaluate", expected="a finite number, or several by name", found=repr(given))
    return numbers


class _Journal:
    """Points as they are measured, a line for each, below a line that says of which weights."""

    def __init__(self, folder: Path, prints: tuple[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._head = folder / _JOURNAL, {"base": prints[0], "tuned": prints[1]}

    def read(self) -> list[Point]:
        """Raises CheckpointError: these are another model's."""
        lines = self._path.read_text().split("\n") if self._path.exists() else []
        if not lines or not lines[0]:
            self._path.write_text(json.dumps(self._head) + "\n")
            return []
        if json.loads(lines[0]) != self._head:
            found = f"one of a model {json.loads(lines[0])['tuned'][:12]}…"
            expected = f"a sweep of {self._head['tuned'][:12]}… on {self._head['base'][:12]}…"
            raise CheckpointError(str(self._path), expected=expected, found=found, remedy="choose another folder")
        whole = lines[1:-1]  # a line without its end was being written when the process died
        self._path.write_text("".join(f"{line}\n" for line in (lines[0], *whole)))
        return [Point(**json.loads(line)) for line in whole]

    def add(self, point: Point) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"variant": point.variant, "p": point.p, "seed": point.seed, "metrics": dict(point.metrics)}) + "\n")
