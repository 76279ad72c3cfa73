"""Packages and diagnoses as tables for a terminal, as JSON, and as pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, brief, printable
from ..package.manifest import LANDED, TensorRecord
from ..package.reader import DeltaPackage
from ..parallel.staged_file import staged_file
from ..reading.plain_files import instead_of_file
from ..studies.diagnosis import DROP_RATES, PAPER_MAGNITUDES, TOLERANCE, Diagnosis
from ..weights.layer_names import kind_of, layer_of, natural

_PANELS = (
    ("density", "measured density\n(kept / total)"),
    ("bits", "bits per\nparameter"),
    ("delta", "|δ|\n(median to 99 %)"),
)
_PICTURES = ("png", "svg", "pdf", "jpg", "jpeg", "webp")

_LONGEST = 200
"""Characters of a cell."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Some tensors of a package together."""

    label: str
    records: tuple[TensorRecord, ...]
    compressed: int
    """Bytes of their frames."""

    @property
    def elements(self) -> int:
        return sum(record.info.numel for record in self.records)

    @property
    def kept(self) -> int:
        return sum(
            record.kept if record.kind == "delta" else record.info.numel if record.kind == "whole" else 0
            for record in self.records
        )

    @property
    def density(self) -> float:
        return self.kept / self.elements if self.elements else 0.0

    @property
    def bits(self) -> float:
        """Bits per parameter."""
        return 8 * self.compressed / self.elements if self.elements else 0.0

    @property
    def delta(self) -> tuple[float, float, float]:
        """|δ|: the median of the tensors' medians, and the largest 99th percentile and maximum."""
        sizes = [record.delta for record in self.records if record.kind == "delta"]
        if not sizes:
            return 0.0, 0.0, 0.0
        medians = sorted(size[0] for size in sizes)
        return medians[len(medians) // 2], max(size[1] for size in sizes), max(size[2] for size in sizes)

    @property
    def mask(self) -> str:
        """How the tensors travel."""
        return ", ".join(sorted({_manner(record) for record in self.records}))


def _manner(record: TensorRecord) -> str:
    if record.kind != "delta":
        return "as in base" if record.kind == "base" else "whole"
    dropped = {"all": "all kept", "stored": "stored mask"}.get(record.mask, f"p = {record.p:g}")
    return f"{dropped}, {record.values}"


def rows(package: DeltaPackage, *, key: Any) -> list[Row]:
    """The package's tensors grouped by `key(name)`, in the order of their first names as people count."""
    groups: dict[str, list[TensorRecord]] = defaultdict(list)
    for record in sorted(package.manifest.tensors, key=lambda record: natural(record.name)):
        groups[key(record.name)].append(record)
    return [
        Row(
            label=label,
            records=tuple(records),
            compressed=sum(package.compressed_bytes(record.name) for record in records),
        )
        for label, records in groups.items()
    ]


def inspect_table(package: DeltaPackage, *, every_tensor: bool = False) -> RenderableType:
    """What a package holds: a summary, and a row for each kind of tensor (or each tensor)."""
    table = Table(box=None, header_style="bold", pad_edge=False, row_styles=["", "dim"])
    for heading in ("tensors", "", "elements", "kept", "bits/param", "|δ| median", "99 %", "max", "how"):
        table.add_column(
            heading, justify="left" if heading in ("tensors", "how") else "right", overflow="fold"
        )
    for row in rows(package, key=(lambda name: name) if every_tensor else kind_of):
        count = f"×{len(row.records)}" if len(row.records) > 1 else ""
        sizes = [f"{size:.2g}" if size else "·" for size in row.delta]
        kept = f"{row.density:.1%}"
        bits = f"{row.bits:.3f}"
        table.add_row(_text(row.label), count, f"{row.elements:,}", kept, bits, *sizes, _text(row.mask))
    return Group(_summary(package), Text(), table)


def _text(words: str) -> Text:
    """For a cell: what comes from a package is neither markup nor an order to the terminal."""
    return Text(printable(words, _LONGEST))


def _summary(package: DeltaPackage) -> RenderableType:
    stats = package.stats
    manifest = package.manifest
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    on = "the base" if manifest.continues == "base" else "another package"
    grid.add_row("package", _text(f"{package.name}  ({stats['bytes']:,} bytes)"))
    grid.add_row(
        "size",
        f"{stats['bits_per_parameter']:.3f} bits per parameter, "
        f"{stats['compression_ratio']:.1f}× smaller than the model",
    )
    grid.add_row("base model", _text(f"{manifest.base_model}  (continues {on} {manifest.parent[:12]}…)"))
    grid.add_row(
        "result",
        _text(f"{manifest.result[:12]}…  {stats['parameters']:,} parameters in {stats['tensors']} tensors"),
    )
    grid.add_row(
        "delta",
        _text(
            f"{stats['density']:.2%} kept, {stats['changed']:,} of them not zero; seed "
            f"{manifest.seed}, rescale {manifest.rescaled}"
        ),
    )
    grid.add_row("|δ|", _text("  ".join(f"{name} {value:.3g}" for name, value in stats["delta"].items())))
    return grid


def inspect_json(package: DeltaPackage) -> dict[str, Any]:
    """The same as plain data; sizes in bytes."""
    manifest = package.manifest
    tensors = [_tensor_json(row, row.records[0]) for row in rows(package, key=lambda name: name)]
    return {
        "package": package.name, "base_model": manifest.base_model, "continues": manifest.continues,
        "parent": manifest.parent,
        "result": manifest.result, "seed": manifest.seed, "rescale": manifest.rescale,
        "landed": manifest.landed and dict(zip(LANDED, manifest.landed, strict=True)), **package.stats,
        "per_tensor": tensors,
    }  # fmt: skip


def _tensor_json(row: Row, record: TensorRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "dtype": record.info.dtype.code,
        "shape": list(record.info.shape),
        "kind": record.kind,
        "mask": record.mask,
        "p": record.p,
        "values": record.values,
        "elements": row.elements,
        "kept": row.kept,
        "changed": record.changed,
        "bytes": row.compressed,
        "delta": list(row.delta),
    }


def diagnosis_table(diagnosis: Diagnosis) -> RenderableType:
    """The answer, |δ| against the paper's bounds, and the expected error of the layers at each drop rate."""
    sizes = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("|δ|", *(f"≤ {bound:g}" for bound in PAPER_MAGNITUDES), "median", "99 %", "max"):
        sizes.add_column(heading, justify="right")
    median, most, largest = diagnosis.magnitudes.summary()
    sizes.add_row(
        "share",
        *(f"{diagnosis.share_within(bound):.1%}" for bound in PAPER_MAGNITUDES),
        f"{median:.2g}",
        f"{most:.2g}",
        f"{largest:.2g}",
    )
    errors = Table(box=None, header_style="bold", pad_edge=False, row_styles=["", "dim"])
    errors.add_column("expected relative error of a layer's output", overflow="fold")
    for p in DROP_RATES:
        errors.add_column(f"p = {p:g}", justify="right")
    for label, layers in _by_kind(diagnosis).items():
        errors.add_row(_text(label), *(_percent(max(layer.error(p) for layer in layers)) for p in DROP_RATES))
    errors.add_row(
        "nine layers in ten stay below", *(_percent(diagnosis.error(p)) for p in DROP_RATES), style="bold"
    )
    new = (
        [_text(f"carried whole, since the base has no counterpart: {', '.join(diagnosis.new)}")]
        if diagnosis.new
        else []
    )
    return Group(Text(diagnosis.verdict, style="bold"), Text(), sizes, Text(), errors, *new)


def _by_kind(diagnosis: Diagnosis) -> dict[str, list[Any]]:
    kinds: dict[str, list[Any]] = defaultdict(list)
    for layer in diagnosis.layers:
        kinds[kind_of(layer.name)].append(layer)
    return kinds


def _percent(share: float) -> Text:
    return Text(f"{share:.1%}", style="green" if share <= TOLERANCE else "red")


def diagnosis_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "verdict": diagnosis.verdict,
        "safe_drop_rate": diagnosis.safe_drop_rate(),
        "share_within": {str(bound): diagnosis.share_within(bound) for bound in PAPER_MAGNITUDES},
        "expected_error": {str(p): diagnosis.error(p) for p in DROP_RATES},
        "layers": {layer.name: {str(p): layer.error(p) for p in DROP_RATES} for layer in diagnosis.layers},
        "new": list(diagnosis.new),
    }


def picture_format(path: Path) -> str:
    """By a picture's ending; without one it is a PNG.

    Raises:
        ConfigError: there is no such format, or no picture can lie there.
    """
    ending = path.suffix.removeprefix(".").lower() or "png"
    instead = instead_of_file(path)
    if ending not in _PICTURES or instead:
        found = f"{instead}: {path}" if instead else brief(str(path))
        expected = f"a file that ends in {', '.join(f'.{one}' for one in _PICTURES)}, or in nothing"
        raise ConfigError("--plot", expected=expected, found=found)
    return ending


def plot(package: DeltaPackage, path: Path) -> None:
    """Draw density, bits per parameter and |δ| for each layer as a picture: see `picture_format`.

    Raises:
        ConfigError: matplotlib is not installed, or cannot draw such a file.
    """
    ending = picture_format(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot", expected="matplotlib", found="not installed", remedy='pip install "dare_train[plot]"'
        ) from error
    layers = rows(package, key=layer_of)
    figure = Figure(figsize=(max(7.0, 0.34 * len(layers) + 2), 7.5), layout="constrained")
    axes = figure.subplots(len(_PANELS), 1, sharex=True)
    _draw(axes, layers)
    for axis, (_, label) in zip(axes, _PANELS, strict=True):
        axis.set_ylabel(label)
        axis.grid(axis="y", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    axes[-1].set_xticks(
        range(len(layers)),
        [printable(layer.label, 40) for layer in layers],
        rotation=60 if len(layers) > 8 else 0,
        parse_math=False,
    )
    axes[-1].set_xlabel("layer")
    stats = package.stats
    figure.suptitle(
        f"{printable(Path(package.name).name, 100)}: {stats['bits_per_parameter']:.3f} bits per parameter, "
        f"{stats['density']:.1%} of the delta kept",
        parse_math=False,
    )
    with staged_file(path) as file:
        figure.savefig(file, dpi=150, format=ending)


def _draw(axes: Sequence[Any], layers: Iterable[Row]) -> None:
    layers = list(layers)
    places = range(len(layers))
    axes[0].bar(places, [layer.density for layer in layers], color="#4c72b0")
    axes[1].bar(places, [layer.bits for layer in layers], color="#dd8452")
    drawn = [(place, layer.delta) for place, layer in zip(places, layers, strict=True) if layer.delta[1] > 0]
    low = [max(delta[0], delta[1] / 1000) for _, delta in drawn]
    at = [place for place, _ in drawn]
    axes[2].vlines(at, low, [delta[1] for _, delta in drawn], color="#55a868", linewidth=5)
    axes[2].plot(at, low, "_", color="#55a868", markersize=9)  # where all sizes are one, a line has no length
    axes[2].set_yscale("log")
