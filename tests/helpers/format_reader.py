"""A second reader and applier of packages, written from docs/format.md alone.

It imports nothing of dare_train and reads every number by hand, so that whatever it agrees on with the
package is what the document says, not what the code happens to do. Clear and slow on purpose. (§n) names the
section of the document.

Weights are {name: Tensor}, a Tensor holding the safetensors dtype code, the shape and the elements' words.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
}
QUIET_NAN = {"F64": 0x7FF8 << 48, "F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}
EXPONENT = {
    "F64": (52, 11),
    "F32": (23, 8),
    "F16": (10, 5),
    "BF16": (7, 8),
}  # lowest bit and width of the exponent field
LEVELS = {"int8": 127, "int4": 7, "sign": 1}


@dataclass
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    words: np.ndarray  # flat, unsigned


def bytes_of(dtype: str) -> int:
    return BITS.get(dtype, 8) // 8


def word_type(dtype: str) -> np.dtype:
    return np.dtype(f"<u{bytes_of(dtype)}")


# safetensors: an eight-byte length, a JSON header, the data


def read_safetensors(path: Path) -> dict[str, Tensor]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:end]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            words = np.frombuffer(raw[end + first : end + last], word_type(entry["dtype"])).copy()
            tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), words)
    return tensors


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_safetensors(path).items()
    }


# §3 fingerprints


def split_mix(n: np.ndarray) -> np.ndarray:
    v = (n + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return v ^ (v >> np.uint64(31))


def fingerprint(words: np.ndarray) -> str:
    raw = words.astype(words.dtype.newbyteorder("<")).tobytes()
    u = np.frombuffer(raw + bytes(-len(raw) % 4), "<u4").astype(np.uint64)
    t, one, half = np.arange(len(u), dtype=np.uint64), np.uint64(1), np.uint64(32)
    m, f = split_mix(t // np.uint64(1024)), split_mix(np.uint64(1 << 63) + t % np.uint64(1024))
    a = u * (m | one) * ((f & np.uint64(0xFFFFFFFF)) | one)
    b = u * ((m << half) | (m >> half) | one) * ((f >> half) | one)
    lanes = [(len(words) + int(lane.sum(dtype=np.uint64))) % 2**64 for lane in (a, b)]
    return f"{lanes[0]:016x}{lanes[1]:016x}"


def fingerprint_of_set(rows: list[tuple[str, str, list[int], str]]) -> str:
    lines = [
        f"{name}\0{dtype}\0{','.join(map(str, shape))}\0{tensor}\n" for name, dtype, shape, tensor in rows
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


# §2, §4 the manifest and the parts


@dataclass
class Package:
    manifest: dict[str, Any]
    frames: dict[
        str, list[tuple[int, int, int, int, bytes]]
    ]  # tensor → (start, length, kept, changed, content's frame)


def read_package(folder: Path) -> Package:
    raw = (folder / "dare_config.json").read_bytes()
    manifest = json.loads(raw)
    assert (manifest["format"], manifest["format_version"]) == ("dare_train", 1)
    assert (
        hashlib.sha256(raw.replace(manifest["digest"].encode(), b"0" * 64)).hexdigest() == manifest["digest"]
    )  # (2.1)
    for entry in manifest["files"] + manifest["parts"]:  # (2.3)
        content = (folder / entry["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"]), (
            entry["file"]
        )
    check_set_fingerprints(manifest)
    frames: dict[str, list[Any]] = {tensor["name"]: [] for tensor in manifest["tensors"]}
    for entry in manifest["parts"]:
        part = read_safetensors(folder / entry["file"])
        assert set(part) == {"segments", "data"}
        assert (part["segments"].dtype, part["data"].dtype) == ("I64", "U8")
        data, at = part["data"].words.tobytes(), 0
        for tensor, start, length, kept, changed, size in (
            part["segments"].words.astype(np.int64).reshape(-1, 6).tolist()
        ):
            frames[manifest["tensors"][tensor]["name"]].append(
                (start, length, kept, changed, data[at : at + size])
            )
            at += size
        assert at == len(data)
    return Package(manifest, frames)


def check_set_fingerprints(manifest: dict[str, Any]) -> None:
    """(2.4) `result` covers all tensors, `parent` those that have a `base`, with the base's shape."""
    result, parent = [], []
    for t in manifest["tensors"]:
        result.append((t["name"], t["dtype"], t["shape"], t.get("result", t.get("base"))))
        if "base" in t:
            rows = [t["base_rows"]] if "base_rows" in t else t["shape"][:1]
            parent.append((t["name"], t["dtype"], rows + t["shape"][1:], t["base"]))
    assert fingerprint_of_set(result) == manifest["result"]
    assert fingerprint_of_set(parent) == manifest["parent"]["fingerprint"]


def content_of(frame: bytes, size: int) -> bytes:
    assert zstandard.frame_content_size(frame) == size  # (§4.4)
    return zstandard.ZstdDecompressor().decompress(frame)


# §4.3 masks


def philox(counter: list[np.ndarray], key: list[int]) -> list[np.ndarray]:
    """Philox4x32-10 on arrays of counters; every word a uint64 below 2³²."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def key_of(seed: int, name: str) -> int:
    return int.from_bytes(
        hashlib.sha256(b"dare_train\0" + seed.to_bytes(8, "little") + name.encode()).digest()[:8], "little"
    )


def draws(seed: int, name: str, start: int, length: int, domain: int = 0) -> np.ndarray:
    index = np.arange(start, start + length, dtype=np.uint64)
    block, r = index // np.uint64(8192), index % np.uint64(8192)
    counter = block * np.uint64(1024) + r % np.uint64(1024)
    zero, key = np.zeros_like(counter), key_of(seed, name)
    words = philox(
        [counter & np.uint64(0xFFFFFFFF), counter >> np.uint64(32), zero + np.uint64(domain), zero],
        [key % 2**32, key >> 32],
    )
    word = np.choose((r // np.uint64(2048)).astype(np.intp), words)
    return np.where(r // np.uint64(1024) % np.uint64(2) == 0, word & np.uint64(0xFFFF), word >> np.uint64(16))


def bits(raw: bytes, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=count, bitorder="little").astype(bool)


# §4.4 frames: one segment to its kept positions (relative to start) and, for each, either its tuned word or
# its δ


def planes(raw: bytes, count: int, width: int) -> np.ndarray:
    columns = np.frombuffer(raw, np.uint8).reshape(width, count).astype(np.uint64)
    return sum((columns[i] << np.uint64(8 * i) for i in range(width)), np.zeros(count, np.uint64))


def symbols(raw: bytes, kept: int, changed: int, width: int) -> np.ndarray:
    changes = bits(raw[: (kept + 7) // 8], kept)
    assert changes.sum() == changed
    out = np.zeros(kept, np.uint64)
    out[changes] = planes(raw[(kept + 7) // 8 :], changed, width) + np.uint64(1)
    return out


def exact_words(symbol: np.ndarray, base: np.ndarray, dtype: str) -> np.ndarray:
    """The tuned words from the distances in ordered bits, which lie sorted by the base's exponent."""
    low, width = EXPONENT[dtype]
    by_exponent = np.argsort(
        (base.astype(np.uint64) >> np.uint64(low)) & np.uint64(2**width - 1), kind="stable"
    )
    unsorted = np.empty_like(symbol)
    unsorted[by_exponent] = symbol
    total = 8 * bytes_of(dtype)
    tuned = []
    for word, zigzag in zip(base.tolist(), unsorted.tolist(), strict=True):
        distance = zigzag >> 1 if zigzag % 2 == 0 else -(zigzag >> 1) - 1
        sign, mask = 1 << total - 1, (1 << total) - 1
        ordered = ((word ^ mask if word & sign else word | sign) + distance) & mask
        tuned.append(ordered ^ sign if ordered & sign else ordered ^ mask)
    return np.array(tuned, word_type(dtype))


def group_size(threshold: int) -> int:
    return int(2 ** max(7, round(7 - math.log2(1 - threshold / 2**16))))


def quantized(
    raw: bytes, values: str, threshold: int, start: int, length: int, positions: np.ndarray
) -> np.ndarray:
    group = group_size(threshold)
    first, last = start // group, (start + length - 1) // group
    scales = as_float(np.frombuffer(raw[: 2 * (last - first + 1)], "<u2"), "BF16")
    codes, k = np.frombuffer(raw[2 * len(scales) :], np.uint8), len(positions)
    if values == "int8":
        code = codes.view(np.int8).astype(np.float32)
    elif values == "int4":
        code = np.stack([codes & 15, codes >> 4], 1).reshape(-1)[:k].astype(np.float32) - np.float32(8)
    else:
        code = np.where(bits(codes.tobytes(), k), np.float32(1), np.float32(-1))
    return code * (scales / np.float32(LEVELS[values]))[(positions + start) // group - first]


def content_size(
    values: str, bitmap: int, kept: int, changed: int, start: int, length: int, dtype: str, threshold: int
) -> int:
    if values in ("exact", "rounded"):
        return bitmap + (kept + 7) // 8 + changed * (2 if values == "rounded" else bytes_of(dtype))
    groups = (start + length - 1) // group_size(threshold) - start // group_size(threshold) + 1
    return bitmap + 2 * groups + {"int8": kept, "int4": (kept + 1) // 2, "sign": (kept + 7) // 8}[values]


# §5 the law


def as_float(words: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]).astype(
        work_type(dtype)
    )


def work_type(dtype: str) -> type:
    return np.float64 if dtype == "F64" else np.float32


def to_words(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        pattern = values.view(np.uint32).astype(np.uint64)
        words = (
            (pattern + np.uint64(0x7FFF) + (pattern >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        ).astype(np.uint16)
    else:
        words = values.astype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]).view(
            word_type(dtype)
        )
    return np.where(np.isnan(values), word_type(dtype).type(QUIET_NAN[dtype]), words)


@dataclass
class Change:
    """What one package says about one tensor: per element whether its delta is non-zero, δ, and the tuned
    word if exact.
    """

    factor: float
    moves: np.ndarray
    delta: np.ndarray
    tuned: np.ndarray | None


def read_change(package: Package, entry: dict[str, Any], base: np.ndarray, weight: float) -> Change:
    dtype, work = entry["dtype"], work_type(entry["dtype"])
    threshold, values, name = entry["threshold"], entry["values"], entry["name"]
    rescaled = entry["mask"] == "seeded" and package.manifest["rescale"] == "paper"  # (5.2)
    change = Change(
        weight * (2**16 / (2**16 - threshold) if rescaled else 1.0),
        np.zeros(len(base), bool),
        np.zeros(len(base), work),
        None,
    )
    change.tuned = base.copy() if values == "exact" else None
    for start, length, kept, changed, frame in package.frames[name]:
        if start >= len(base):  # rows beyond the base's
            continue
        bitmap = (length + 7) // 8 if entry["mask"] == "stored" else 0
        raw = content_of(frame, content_size(values, bitmap, kept, changed, start, length, dtype, threshold))
        keep = np.ones(length, bool)
        if entry["mask"] == "seeded":
            keep = draws(package.manifest["seed"], name, start, length) >= threshold
        elif entry["mask"] == "stored":
            keep = bits(raw[:bitmap], length)
        positions, raw = np.flatnonzero(keep), raw[bitmap:]
        assert len(positions) == kept
        at = positions + start
        if change.tuned is not None:
            change.tuned[at] = exact_words(symbols(raw, kept, changed, bytes_of(dtype)), base[at], dtype)
            change.delta[at] = as_float(change.tuned[at], dtype) - as_float(base[at], dtype)
            change.moves[at] = change.tuned[at] != base[at]
            continue
        if values == "rounded":
            symbol = symbols(raw, kept, changed, 2).astype(np.uint16)
            change.delta[at] = as_float((symbol >> np.uint16(1)) | (symbol << np.uint16(15)), "BF16")
        else:
            change.delta[at] = quantized(raw, values, threshold, start, length, positions)
        change.moves[at] = change.delta[at] != 0
    return change


def combine(base: np.ndarray, dtype: str, changes: list[Change]) -> np.ndarray:
    """(5.1) to (5.4). (5.3) holds for each element that one package alone moves, whatever the others do
    elsewhere.
    """
    if not changes:  # nothing to compute, and the dtype need not be a float
        return base
    work = work_type(dtype)
    total: np.ndarray = as_float(base, dtype).astype(work)
    movers = np.zeros(len(base), int)
    for change in changes:
        total = np.where(change.moves, total + work(change.factor) * change.delta, total)
        movers += change.moves
    out = np.where(movers > 0, to_words(total, dtype), base)
    for change in changes:
        if work(change.factor) == 1 and change.tuned is not None:
            out = np.where(change.moves & (movers == 1), change.tuned, out)
    return out


def whole_words(package: Package, entry: dict[str, Any], begin: int, count: int) -> np.ndarray:
    out, seen = np.zeros(count, word_type(entry["dtype"])), 0
    for start, length, _, _, frame in package.frames[entry["name"]]:
        if start >= begin:
            raw = content_of(frame, length * bytes_of(entry["dtype"]))
            out[start - begin : start - begin + length] = planes(raw, length, bytes_of(entry["dtype"]))
            seen += length
    assert seen == count  # (4.2)
    return out


def base_name(prefix: str, name: str) -> str:
    if prefix.startswith("-"):
        return prefix[1:] + name
    return name.removeprefix(prefix)


def apply_side_by_side(
    base: dict[str, Tensor], packages: list[Package], weights: list[float]
) -> dict[str, Tensor]:
    """Packages whose parent is the same base, added up in order (5.4); a single package is the case of
    one.
    """
    out = {}
    entries = [{entry["name"]: entry for entry in package.manifest["tensors"]} for package in packages]
    for name, entry in entries[0].items():
        mine = [(p, e[name], w) for p, e, w in zip(packages, entries, weights, strict=True)]
        source = base.get(base_name(packages[0].manifest["prefix"], name))
        if "base" in entry:
            assert source is not None
            assert fingerprint(source.words) == entry["base"]  # (3.4)
        whole = [(p, e) for p, e, _ in mine if e["kind"] == "whole"]
        if whole:
            out[name] = Tensor(
                entry["dtype"], tuple(entry["shape"]), whole_words(*whole[0], 0, math.prod(entry["shape"]))
            )
            continue
        assert source is not None
        with np.errstate(all="ignore"):
            changes = [read_change(p, e, source.words, w) for p, e, w in mine if e["kind"] == "delta"]
            words = combine(source.words, entry["dtype"], changes)
        grown = math.prod(entry["shape"]) - len(words)
        if grown:
            words = np.concatenate([words, whole_words(packages[0], entry, len(words), grown)])
        out[name] = Tensor(entry["dtype"], tuple(entry["shape"]), words)
    return out


def apply_chain(base: dict[str, Tensor], packages: list[Package]) -> dict[str, Tensor]:
    """(5.5), (5.6): one after the other with weight 1, each result compared with the fingerprints on
    record.
    """
    weights = base
    for package in packages:
        weights = apply_side_by_side(weights, [package], [1.0])
        for entry in package.manifest["tensors"]:
            assert fingerprint(weights[entry["name"]].words) == entry.get("result", entry.get("base")), entry[
                "name"
            ]
    return weights
