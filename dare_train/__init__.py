"""Delta packages: what fine-tuning changed, dropped and rescaled (DARE), compressed, verifiable,
applied to the bit.

Names resolve on first use, so that importing this package loads no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .adapters.extracted_lora import ExtractedLora as ExtractedLora
    from .adapters.extracted_lora import extract_lora as extract_lora
    from .applying.apply import apply as apply
    from .applying.apply import verify as verify
    from .applying.cache import PackageCache as PackageCache
    from .applying.in_place import applied as applied
    from .applying.in_place import apply_ as apply_
    from .config import DareConfig as DareConfig
    from .errors import DareError as DareError
    from .evaluation.lm_harness import HarnessTasks as HarnessTasks
    from .evaluation.measurements import MeasurementRecord as MeasurementRecord
    from .evaluation.model_loading import load_model as load_model
    from .evaluation.swapped_model import SwappedModel as SwappedModel
    from .evaluation.texts import Texts as Texts
    from .evaluation.texts import batched as batched
    from .evaluation.texts import encode_rows as encode_rows
    from .evaluation.texts import load_texts as load_texts
    from .evaluation.texts import read_rows as read_rows
    from .extracting.extract import extract as extract
    from .merging.merge import merge as merge
    from .merging.methods.registry import MERGE_METHODS as MERGE_METHODS
    from .merging.methods.registry import register_merge_method as register_merge_method
    from .merging.mixture import mixture_of_experts as mixture_of_experts
    from .merging.regmean_plus_plus import regmean_plus_plus as regmean_plus_plus
    from .merging.stack_layers import Layers as Layers
    from .merging.stack_layers import stack_layers as stack_layers
    from .merging.statistics.fisher_and_gram import collect_fisher as collect_fisher
    from .merging.statistics.fisher_and_gram import collect_gram as collect_gram
    from .merging.statistics.statistics_callback import StatisticsCallback as StatisticsCallback
    from .merging.statistics.statistics_file import StatisticsKind as StatisticsKind
    from .merging.statistics.statistics_file import save_statistics as save_statistics
    from .merging.statistics.statistics_file import statistics_path as statistics_path
    from .package.reader import DeltaPackage as DeltaPackage
    from .package.sharing import pull as pull
    from .package.sharing import push as push
    from .parallel.ranks import Ranks as Ranks
    from .reports.document import Cell as Cell
    from .reports.document import Chart as Chart
    from .reports.document import Curve as Curve
    from .reports.document import Study as Study
    from .reports.document import Table as Table
    from .reports.document import with_interval as with_interval
    from .reports.masks_report import masks_study as masks_study
    from .reports.rates_report import rates_study as rates_study
    from .reports.sweep_report import sweeps_study as sweeps_study
    from .reports.writing import write_report as write_report
    from .reports.writing import write_study as write_study
    from .snapshots.callback import DareCallback as DareCallback
    from .snapshots.shared_pass import Snapshot as Snapshot
    from .snapshots.snapshotter import Snapshotter as Snapshotter
    from .studies import drop_rates
    from .studies.comparison import CONTENDERS as CONTENDERS
    from .studies.comparison import Comparison as Comparison
    from .studies.comparison import compare as compare
    from .studies.diagnosis import diagnose as diagnose
    from .studies.inside import inside as inside
    from .studies.rescaling import find_q as find_q
    from .studies.sweep import SWEEP_RATES as SWEEP_RATES
    from .studies.sweep import Sweep as Sweep
    from .studies.sweep import sweep as sweep
    from .studies.variants import DROP_VARIANTS as DROP_VARIANTS
    from .studies.variants import base_weights_only as base_weights_only
    from .studies.variants import dropped_weights as dropped_weights
    from .training import subnetwork as subnetwork
    from .training.continual import ContinualRun as ContinualRun
    from .training.continual import ContinualTask as ContinualTask
    from .training.continual import Strategy as Strategy
    from .training.continual_result import Continual as Continual
    from .training.lottery_tickets import TICKET_ABLATIONS as TICKET_ABLATIONS
    from .training.lottery_tickets import TicketSearch as TicketSearch
    from .training.sparse_tuning import SparseTuningCallback as SparseTuningCallback
    from .training.sparse_tuning import sparse_tuning as sparse_tuning
    from .weights.files.gguf_files import dequantize as dequantize

    rates = drop_rates

_PUBLIC = {
    "adapters.extracted_lora": "ExtractedLora extract_lora",
    "applying.apply": "apply verify",
    "applying.cache": "PackageCache",
    "applying.in_place": "applied apply_",
    "config": "DareConfig",
    "errors": "DareError",
    "evaluation.lm_harness": "HarnessTasks",
    "evaluation.measurements": "MeasurementRecord",
    "evaluation.model_loading": "load_model",
    "evaluation.swapped_model": "SwappedModel",
    "evaluation.texts": "Texts batched encode_rows load_texts read_rows",
    "extracting.extract": "extract",
    "merging.merge": "merge",
    "merging.methods.registry": "MERGE_METHODS register_merge_method",
    "merging.mixture": "mixture_of_experts",
    "merging.regmean_plus_plus": "regmean_plus_plus",
    "merging.stack_layers": "Layers stack_layers",
    "merging.statistics.fisher_and_gram": "collect_fisher collect_gram",
    "merging.statistics.statistics_callback": "StatisticsCallback",
    "merging.statistics.statistics_file": "StatisticsKind save_statistics statistics_path",
    "package.reader": "DeltaPackage",
    "package.sharing": "pull push",
    "parallel.ranks": "Ranks",
    "reports.document": "Cell Chart Curve Study Table with_interval",
    "reports.masks_report": "masks_study",
    "reports.rates_report": "rates_study",
    "reports.sweep_report": "sweeps_study",
    "reports.writing": "write_report write_study",
    "snapshots.callback": "DareCallback",
    "snapshots.shared_pass": "Snapshot",
    "snapshots.snapshotter": "Snapshotter",
    "studies.comparison": "CONTENDERS Comparison compare",
    "studies.diagnosis": "diagnose",
    "studies.inside": "inside",
    "studies.rescaling": "find_q",
    "studies.sweep": "SWEEP_RATES Sweep sweep",
    "studies.variants": "DROP_VARIANTS base_weights_only dropped_weights",
    "training.continual": "ContinualRun ContinualTask Strategy",
    "training.continual_result": "Continual",
    "training.lottery_tickets": "TICKET_ABLATIONS TicketSearch",
    "training.sparse_tuning": "SparseTuningCallback sparse_tuning",
    "weights.files.gguf_files": "dequantize",
}
"""Public names, by the module in which each is defined."""

_HOMES = {name: module for module, names in _PUBLIC.items() for name in names.split()}

_NAMESPACES = {"errors": "errors", "rates": "studies.drop_rates", "subnetwork": "training.subnetwork"}
"""Modules that are public as they are: `dare_train.rates.largest_rate`, `dare_train.subnetwork.by_size`."""

__all__ = ["__version__", *_HOMES, *_NAMESPACES]


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        value = importlib.import_module(f".{_NAMESPACES[name]}", __name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
