"""Which of a package's tensors are parts of quantised weights."""

from __future__ import annotations

from ..weights.files.config_file import CONFIG, read_config
from ..weights.files.quantised import Quantised
from .reader import DeltaPackage


def quantised_in(package: DeltaPackage) -> Quantised:
    """By its records, and by the configuration that it carries."""
    infos = {name: record.info for name, record in package.records.items()}
    return Quantised(infos, read_config(package.path / CONFIG))
