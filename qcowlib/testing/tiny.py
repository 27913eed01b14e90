# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Small valid images with a known layout, for tests that then break them.

Invariant: made from the format description alone, with nothing of the
engine; every image is clean for ``qemu-img check``, reads as
:attr:`TinyImage.guest` says, and each field that a test may want to change has
its place in :class:`TinyImage`.

Guest clusters: 0 and 3 have data, 1 reads as zeros (version 3), 2 is
compressed, the others are holes.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from backports.zstd import compress as zstd_compress

from qcowlib.units import ceil_div

__all__ = ["HEADER_FIELDS", "TinyImage", "TinySpec", "build"]

COPIED = 1 << 63
COMPRESSED = 1 << 62

#: Name -> (offset, bytes) of the fields of a version 3 header.
HEADER_FIELDS: dict[str, tuple[int, int]] = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
}


class TinySpec(NamedTuple):
    """What :func:`build` makes; ``size`` in bytes, at least five clusters."""

    version: int = 3
    cluster_bits: int = 12
    size: int = 256 << 10
    refcount_order: int = 4
    extended_l2: bool = False
    zstd: bool = False
    compressed: bool = True
    backing: bytes = b""
    backing_format: bytes = b""
    data_file: bytes | None = None
    snapshot: bool = False
    bitmap: bool = False
    extensions: tuple[tuple[int, bytes], ...] = ()
    compatible: int = 0


class TinyImage(NamedTuple):
    """An image and where its parts are (file offsets in bytes; 0 where there is no such part)."""

    raw: bytes
    #: What the guest reads, holes as zeros.
    guest: bytes
    #: Content of the data file, if it has one.
    data_file: bytes
    cluster: int
    table: int
    block: int
    l1: int
    l2: int
    data: int
    compressed: int
    snapshot_l1: int
    snapshot_table: int
    bitmap_directory: int
    bitmap_table: int
    #: Extension type -> offset of its header; key -1: where the list ends.
    extensions: dict[int, int]

    def with_bytes(self, offset: int, data: bytes) -> bytes:
        """Return the image with *data* at *offset*, longer if need be."""
        raw = bytearray(self.raw) + bytes(max(0, offset + len(data) - len(self.raw)))
        raw[offset : offset + len(data)] = data
        return bytes(raw)

    def with_field(self, name: str, value: int) -> bytes:
        """Return the image with one header field changed, cut to the field's width."""
        offset, width = HEADER_FIELDS[name]
        return self.with_bytes(offset, (value & (1 << 8 * width) - 1).to_bytes(width, "big"))

    def with_word(self, offset: int, value: int) -> bytes:
        """Return the image with a 64-bit word changed."""
        return self.with_bytes(offset, struct.pack(">Q", value & (1 << 64) - 1))


def _pattern(cluster: int, seed: int) -> bytes:
    line = f"guest cluster {seed} ".encode()
    return (line * (cluster // len(line) + 1))[:cluster]


class _Builder:
    def __init__(self, spec: TinySpec) -> None:
        self.spec = spec
        self.cluster = 1 << spec.cluster_bits
        self.raw = bytearray()
        self.refcounts: list[int] = []

    def take(self, length: int, refcount: int = 1) -> int:
        """Allocate *length* bytes in whole clusters and return their offset."""
        count = -(-length // self.cluster)
        offset = len(self.raw)
        self.raw += bytes(count * self.cluster)
        self.refcounts += [refcount] * count
        return offset

    def put(self, offset: int, data: bytes) -> None:
        self.raw[offset : offset + len(data)] = data

    def compress(self, data: bytes) -> bytes:
        if self.spec.zstd:
            return bytes(zstd_compress(data))
        coder = zlib.compressobj(-1, zlib.DEFLATED, -12, 9)
        return coder.compress(data) + coder.flush()

    def refcount_block(self) -> bytes:
        width = 1 << self.spec.refcount_order
        block = bytearray(self.cluster)
        for index, value in enumerate(self.refcounts):
            if width >= 8:
                block[index * width // 8 : (index + 1) * width // 8] = value.to_bytes(width // 8, "big")
            else:
                block[index * width // 8] |= value << (index * width % 8)
        return bytes(block)


def build(spec: TinySpec) -> TinyImage:
    """Lay out one image.  Raises ValueError for a spec that does not fit."""
    make = _Builder(spec)
    cluster, external = make.cluster, spec.data_file is not None
    shared = 2 if spec.snapshot else 1
    if spec.size < 5 * cluster or (external and (spec.snapshot or spec.compressed)):
        raise ValueError("no image of this kind")
    step = 16 if spec.extended_l2 else 8
    l1_size = -(-spec.size // (cluster * (cluster // step)))
    make.take(cluster)
    table, block, l1, l2 = make.take(cluster), make.take(cluster), make.take(l1_size * 8), make.take(cluster, shared)
    guest = bytearray(spec.size)
    flag = 0 if spec.snapshot else COPIED
    entries = {}
    first = 0
    data_file = bytearray()
    for index in (0, 3):
        content = _pattern(cluster, index)
        guest[index * cluster : (index + 1) * cluster] = content
        if external:
            data_file += bytes(index * cluster - len(data_file)) + content
            entries[index] = COPIED | index * cluster
            continue
        host = make.take(cluster, shared)
        make.put(host, content)
        first = first or host
        entries[index] = flag | host
    packed = 0
    if spec.compressed:
        content = _pattern(cluster, 2)
        guest[2 * cluster : 3 * cluster] = content
        data = make.compress(content)
        packed = make.take(cluster, shared)
        make.put(packed, data)
        extra = (packed + len(data) - 1) // 512 - packed // 512
        entries[2] = COMPRESSED | extra << (70 - spec.cluster_bits) | packed
    bitmaps = {0: 0xFFFFFFFF, 3: 0xFFFFFFFF, 1: 0xFFFFFFFF << 32, 2: 0}
    if spec.version == 3:
        entries[1] = 0 if spec.extended_l2 else 1
    for index, entry in entries.items():
        make.put(l2 + index * step, struct.pack(">Q", entry))
        if spec.extended_l2:
            make.put(l2 + index * step + 8, struct.pack(">Q", bitmaps[index]))
    make.put(l1, struct.pack(">Q", flag | l2))
    snapshot_l1, snapshot_table = _snapshot(make, l1_size, l2) if spec.snapshot else (0, 0)
    directory, bitmap_table = _bitmap(make) if spec.bitmap else (0, 0)
    make.put(table, struct.pack(">Q", block))
    make.put(block, make.refcount_block())
    extensions = _header(make, (table, l1, l1_size, snapshot_table, directory))
    parts = (table, block, l1, l2, first, packed, snapshot_l1, snapshot_table, directory, bitmap_table)
    return TinyImage(bytes(make.raw), bytes(guest), bytes(data_file), cluster, *parts, extensions)


def _snapshot(make: _Builder, l1_size: int, l2: int) -> tuple[int, int]:
    l1 = make.take(l1_size * 8)
    make.put(l1, struct.pack(">Q", l2))
    table = make.take(128)
    entry = struct.pack(">QIHHIIQII", l1, l1_size, 1, 4, 1_700_000_000, 0, 0, 0, 24)
    entry += struct.pack(">QQQ", 0, make.spec.size, (1 << 64) - 1) + b"1" + b"snap"
    make.put(table, entry)
    return l1, table


def _bitmap(make: _Builder) -> tuple[int, int]:
    """One bitmap ``bits`` with 512-byte granularity times 128, every other bit set in its first byte."""
    data = make.take(make.cluster)
    make.put(data, b"\x55")
    granularity = 16
    bits = ceil_div(make.spec.size, 1 << granularity)
    count = ceil_div(ceil_div(bits, 8), make.cluster)
    table = make.take(count * 8)
    make.put(table, struct.pack(">Q", data))
    directory = make.take(32)
    make.put(directory, struct.pack(">QIIBBHI", table, count, 2, 1, granularity, 4, 0) + b"bits")
    return directory, table


def _header(make: _Builder, places: tuple[int, int, int, int, int]) -> dict[int, int]:
    """Write the header cluster and return the offsets of the extensions."""
    spec = make.spec
    table, l1, l1_size, snapshots, directory = places
    length = 112 if spec.version == 3 else 72
    wanted: list[tuple[int, bytes]] = []
    if spec.backing_format:
        wanted.append((0xE2792ACA, spec.backing_format))
    if spec.data_file:
        wanted.append((0x44415441, spec.data_file))
    if spec.bitmap:
        wanted.append((0x23852875, struct.pack(">IIQQ", 1, 0, 32, directory)))
    wanted += spec.extensions
    at = length
    found = {}
    for kind, data in wanted:
        found[kind] = at
        make.put(at, struct.pack(">II", kind, len(data)) + data)
        at += 8 + -(-len(data) // 8) * 8
    found[-1] = at
    at += 8
    backing_offset = at if spec.backing else 0
    make.put(at, spec.backing)
    if at + len(spec.backing) > make.cluster:
        raise ValueError("the header does not fit in a cluster")
    header = struct.pack(">4sIQIIQII", b"QFI\xfb", spec.version, backing_offset, len(spec.backing), spec.cluster_bits,
                         spec.size, 0, l1_size)  # fmt: skip
    header += struct.pack(">QQIIQ", l1, table, 1, 1 if snapshots else 0, snapshots)
    if spec.version == 3:
        incompatible = 4 * (spec.data_file is not None) | 8 * spec.zstd | 16 * spec.extended_l2
        header += struct.pack(">QQQII", incompatible, spec.compatible, int(spec.bitmap), spec.refcount_order, 112)
        header += bytes([spec.zstd]) + bytes(7)
    make.put(0, header)
    return found
