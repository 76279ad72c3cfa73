"""What wandb was told, read back from the file of an offline run."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768


def records(path: Path) -> Iterator[Record]:
    """Records of a `.wandb` file: after 7 bytes, blocks of <crc32, length, type> pieces, joined where type is
    2, 3 or 4.
    """
    data, position, whole = path.read_bytes(), 7, b""
    while position < len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([kind]) + piece) == crc
        position += 7 + length
        whole += piece
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def offline_run(folder: Path) -> list[Record]:
    """What was logged, once wandb's service has written all of it and is gone: `finish` does not wait for
    that.
    """
    wandb.teardown()
    files = list(folder.rglob("*.wandb"))
    assert len(files) == 1
    return list(records(files[0]))


def history(found: list[Record]) -> list[dict[str, Any]]:
    """The rows that `log` was called with, without wandb's own columns."""
    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in r.history.item}
        for r in found
        if r.history.item
    ]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
