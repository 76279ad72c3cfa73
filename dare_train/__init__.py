"""Delta packages: what fine-tuning changed, dropped and rescaled (DARE), compressed, verifiable, applied to
the bit.

Names resolve on first use, so that importing this package loads no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .applying.apply import apply as apply
    from .applying.apply import verify as verify
    from .applying.cache import PackageCache as PackageCache
    from .applying.in_place import applied as applied
    from .applying.in_place import apply_ as apply_
    from .config import DareConfig as DareConfig
    from .errors import DareError as DareError
    from .extracting.extract import extract as extract
    from .merging.merge import merge as merge
    from .merging.methods.registry import register_merge_method as register_merge_method
    from .merging.statistics.fisher_and_gram import StatisticsCallback as StatisticsCallback
    from .merging.statistics.fisher_and_gram import collect_fisher as collect_fisher
    from .merging.statistics.fisher_and_gram import collect_gram as collect_gram
    from .merging.statistics.statistics_file import save_statistics as save_statistics
    from .package.reader import DeltaPackage as DeltaPackage
    from .parallel.ranks import Ranks as Ranks
    from .reports.writing import write_report as write_report
    from .snapshots.callback import DareCallback as DareCallback
    from .snapshots.snapshotter import Snapshotter as Snapshotter
    from .studies import drop_rates
    from .studies.comparison import compare as compare
    from .studies.diagnosis import diagnose as diagnose
    from .studies.inside import inside as inside
    from .studies.rescaling import find_q as find_q
    from .studies.sweep import sweep as sweep
    from .training import subnetwork as subnetwork
    from .training.continual import ContinualRun as ContinualRun
    from .training.continual import ContinualTask as ContinualTask
    from .training.lottery_tickets import TicketSearch as TicketSearch
    from .training.sparse_tuning import SparseTuningCallback as SparseTuningCallback
    from .training.sparse_tuning import sparse_tuning as sparse_tuning

    rates = drop_rates

_HOMES = {
    "ContinualRun": "training.continual",
    "ContinualTask": "training.continual",
    "DareCallback": "snapshots.callback",
    "DareConfig": "config",
    "DareError": "errors",
    "DeltaPackage": "package.reader",
    "PackageCache": "applying.cache",
    "Ranks": "parallel.ranks",
    "Snapshotter": "snapshots.snapshotter",
    "SparseTuningCallback": "training.sparse_tuning",
    "StatisticsCallback": "merging.statistics.fisher_and_gram",
    "TicketSearch": "training.lottery_tickets",
    "applied": "applying.in_place",
    "apply": "applying.apply",
    "apply_": "applying.in_place",
    "collect_fisher": "merging.statistics.fisher_and_gram",
    "collect_gram": "merging.statistics.fisher_and_gram",
    "compare": "studies.comparison",
    "diagnose": "studies.diagnosis",
    "extract": "extracting.extract",
    "find_q": "studies.rescaling",
    "inside": "studies.inside",
    "merge": "merging.merge",
    "register_merge_method": "merging.methods.registry",
    "save_statistics": "merging.statistics.statistics_file",
    "sparse_tuning": "training.sparse_tuning",
    "sweep": "studies.sweep",
    "verify": "applying.apply",
    "write_report": "reports.writing",
}
"""The module in which each public name is defined."""

_NAMESPACES = {"rates": "studies.drop_rates", "subnetwork": "training.subnetwork"}
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
