"""The base of a merge, and what its packages have on record of theirs."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import BaseMismatch
from ..parallel.ranks import Ranks
from ..parallel.threads import thread_share
from ..weights.fingerprint import Fingerprint, fingerprints
from .merged_weights import Merged
from .models.inputs import PackageInput


def recorded_bases(merged: Merged) -> dict[str, list[tuple[str, Fingerprint]]]:
    """What packages have on record of the base's tensors, by the result's names: package and fingerprint."""
    recorded: dict[str, list[tuple[str, Fingerprint]]] = {}
    for model in merged.inputs:
        if not isinstance(model, PackageInput):
            continue
        for name, name_in_package in model.names.items():
            print_ = model.package.records[name_in_package].base
            if print_ is not None and name in merged.base.tensors:
                recorded.setdefault(name, []).append((model.label, print_))
    return recorded


def check_base(
    merged: Merged, name: str, recorded: Sequence[tuple[str, Fingerprint]], base: Fingerprint
) -> None:
    for label, expected in recorded:
        if expected != base:
            raise BaseMismatch(
                f"{merged.base.label}: {name}",
                expected=f"fingerprint {expected.hex[:12]}…, as {label} has it on record",
                found=f"{base.hex[:12]}…",
                remedy="this is not the base that the package was made from",
            )


def check_bases(merged: Merged, ranks: Ranks) -> None:
    """Compare the base with what packages have on record of it, before anything is written."""
    recorded = recorded_bases(merged)
    spans = {name: ((0, merged.base_numel(name)),) for name in recorded}
    for name, print_ in fingerprints(merged.base, spans, threads=thread_share(ranks)).items():
        check_base(merged, name, recorded[name], print_)
