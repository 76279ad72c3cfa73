"""Delta packages: what fine-tuning changed, dropped and rescaled (DARE), compressed, verifiable, applied to the bit.

Names resolve on first use, so that importing this package loads no framework.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .apply import apply as apply
    from .cache import PackageCache as PackageCache
    from .callback import DareCallback as DareCallback
    from .config import DareConfig as DareConfig
    from .continual import ContinualRun as ContinualRun
    from .continual import ContinualTask as ContinualTask
    from .diagnose import diagnose as diagnose
    from .errors import DareError as DareError
    from .extract import extract as extract
    from .inplace import applied as applied
    from .inplace import apply_ as apply_
    from .merge.driver import merge as merge
    from .merge.methods import register_merge_method as register_merge_method
    from .package import DeltaPackage as DeltaPackage
    from .rescaling import find_q as find_q
    from .snapshot import Snapshotter as Snapshotter
    from .statistics import StatisticsCallback as StatisticsCallback
    from .statistics import collect_fisher as collect_fisher
    from .statistics import collect_gram as collect_gram
    from .statistics_file import save_statistics as save_statistics
    from .study.comparison import compare as compare
    from .study.inside import inside as inside
    from .study.reporting import write_report as write_report
    from .study.sweep import sweep as sweep
    from .tickets import TicketSearch as TicketSearch
    from .tuning import SparseTuningCallback as SparseTuningCallback
    from .tuning import sparse_tuning as sparse_tuning

_HOMES = {
    "ContinualRun": "continual",
    "ContinualTask": "continual",
    "DareCallback": "callback",
    "DareConfig": "config",
    "DareError": "errors",
    "DeltaPackage": "package",
    "PackageCache": "cache",
    "Snapshotter": "snapshot",
    "SparseTuningCallback": "tuning",
    "StatisticsCallback": "statistics",
    "TicketSearch": "tickets",
    "applied": "inplace",
    "apply": "apply",
    "apply_": "inplace",
    "collect_fisher": "statistics",
    "collect_gram": "statistics",
    "compare": "study.comparison",
    "diagnose": "diagnose",
    "extract": "extract",
    "find_q": "rescaling",
    "inside": "study.inside",
    "merge": "merge.driver",
    "register_merge_method": "merge.methods",
    "save_statistics": "statistics_file",
    "sparse_tuning": "tuning",
    "sweep": "study.sweep",
    "write_report": "study.reporting",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `dare_train.apply` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
