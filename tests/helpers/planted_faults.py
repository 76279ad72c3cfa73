"""Every function that a callback uses once training has begun, made to fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

PLACES = (
    "dare_train.snapshots.shared_pass.LiveWeights",
    "dare_train.snapshots.shared_pass._copied",
    "dare_train.snapshots.shared_pass.gathered",
    "dare_train.snapshots.shared_pass.take_run",
    "dare_train.snapshots.capture.encode",
    "dare_train.snapshots.snapshotter.shared_staging",
    "dare_train.snapshots.snapshotter.write_parts",
    "dare_train.snapshots.snapshotter.save_tallies",
    "dare_train.snapshots.snapshotter.load_tallies",
    "dare_train.snapshots.snapshotter.carry_files",
    "dare_train.snapshots.snapshotter.write_manifest",
    "dare_train.snapshots.snapshotter.DeltaPackage.open",
    "dare_train.snapshots.snapshotter.Snapshotter.plans_for",
    "dare_train.snapshots.snapshotter.Snapshotter.submit",
    "dare_train.snapshots.snapshotter.Snapshotter.finished",
    "dare_train.snapshots.snapshotter.Snapshotter.wait",
    "dare_train.snapshots.snapshotter.Snapshotter.close",
    "dare_train.snapshots.snapshotter.Snapshotter.preview",
    "dare_train.snapshots.callback.take_together",
    "dare_train.snapshots.callback.evaluate_received",
    "dare_train.snapshots.callback.wandb_snapshots.log",
    "dare_train.snapshots.callback.remove_waiting",
    "dare_train.snapshots.received_weights.silenced",
    "dare_train.snapshots.received_weights.LiveWeights",
    "dare_train.snapshots.run_folder.RunFolder.forget_old",
    "dare_train.package.writer.PackageWriter.add",
    "dare_train.package.writer.PackageWriter.close",
    "dare_train.parallel.staged_folder.sync_tree",
    "dare_train.package.model_card.text",
)


@contextmanager
def planted(place: str, error: Exception) -> Iterator[list[int]]:
    """Within the block, whoever uses what is at `place` gets `error`. Gives a list that grows by one each
    time.
    """
    calls: list[int] = []

    def fail(*_: Any, **__: Any) -> Any:
        calls.append(len(calls))
        raise error

    with mock.patch(place, fail):
        yield calls
