# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The tables that every new image has, and the order in which they reach storage.

Invariant: I11, no magic before everything else is durable: :meth:`NewImage.begin`
takes an older one away, :meth:`NewImage.finish` writes the header last.

Used by :mod:`.create` (an empty image) and :mod:`.build` (one with data).
"""

from __future__ import annotations

from qcowlib.native import count_refcounts, fill_entries
from qcowlib.ondisk import COPIED, CryptoPointer, Header, l1_entries
from qcowlib.ondisk.placement import Placement
from qcowlib.storage.base import Storage
from qcowlib.units import SECTOR, MiB, ceil_div, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


__all__ = ["NewImage"]

_WRITE_PIECE: Final = 4 * MiB


class NewImage:
    """An image in the making.

    ``placement`` says what is used, ``l1`` is the L1 table, ``tail`` the length
    that the file must reach although nothing is written there.  Until
    :meth:`begin` nothing is written; without :meth:`finish` there is no image.
    """

    def __init__(self, storage: Storage, header: Header) -> None:
        self.storage = storage
        self.header = header
        self.placement = Placement(header.cluster_bits, header.refcount_order)
        self.l1 = bytearray()
        self.tail = 0

    def begin(self) -> None:
        """Make sure that no older image is found, and give the L1 table its place."""
        header = self.header
        if self.storage.size:
            # Invariant: I11 (an older image in the same place stops being one first).
            self.storage.zero(0, SECTOR)
            self.storage.flush()
        header.l1_size = l1_entries(header.size, header.cluster_bits, header.extended_l2)
        if header.l1_size:
            clusters = ceil_div(header.l1_size * 8, header.cluster_size)
            header.l1_table_offset = self.placement.allocate(clusters) << header.cluster_bits
            self.l1 = bytearray(header.l1_size * 8)

    def new_l2(self, l1_index: int) -> int:
        """Allocate the L2 table of *l1_index*, link it, and return its offset."""
        offset = self.placement.allocate(1) << self.header.cluster_bits
        fill_entries(self.l1, l1_index, 1, COPIED | offset, 0, 1, 0)
        return offset

    def link(self, table: bytearray, first: int, count: int, host_offset: int, bitmap: int = 0) -> None:
        """Map *count* entries of an L2 table from *first* to consecutive host clusters."""
        header = self.header
        fill_entries(table, first, count, COPIED | host_offset, header.cluster_size, header.l2_entry_size // 8, bitmap)

    def write_encryption_header(self, blob: bytes) -> None:
        """Store *blob* in clusters of its own, and point the header to it."""
        size = self.header.cluster_size
        padded = blob.ljust(round_up(len(blob), size), b"\0")
        offset = self.placement.allocate(len(padded) // size) * size
        self.storage.write(offset, [padded])
        self.header.crypto = CryptoPointer(offset, len(blob))

    def finish(self, counted: dict[int, bytearray] | None = None) -> Header:
        """Write L1, refcounts and what the header has behind its first sector, make all durable, then write that.

        *counted* are refcount blocks that hold refcounts already, by table
        index.
        """
        storage, header = self.storage, self.header
        if header.l1_size:
            self._write_l1()
        writer = _RefcountWriter(storage, header, self.placement)
        writer.write_retired()
        writer.write(counted)
        packed = header.pack()
        # The name of a backing file may lie behind the first sector: a write of both could be torn between them.
        if len(packed) > SECTOR:
            storage.write(SECTOR, [packed[SECTOR:]])
        if self.tail > storage.size:
            storage.resize(self.tail)
        storage.flush()
        # Invariant: I11
        storage.write(0, [packed[:SECTOR]])
        storage.flush()
        return header

    def _write_l1(self) -> None:
        offset, l1 = self.header.l1_table_offset, self.l1
        if len(l1) > MiB and not any(l1):
            # The largest L1 is 32 MiB: zeros need not travel.
            self.storage.zero(offset, len(l1))
            self.tail = max(self.tail, offset + len(l1))
        else:
            self.storage.write(offset, [l1])


class _RefcountWriter:
    """Writes the refcount table and blocks that a placement holds.

    ``counted`` are blocks with refcounts already above 1, by table index.
    """

    def __init__(self, storage: Storage, header: Header, placement: Placement) -> None:
        self._storage = storage
        self._header = header
        self._placement = placement

    def write(self, counted: dict[int, bytearray] | None = None) -> None:
        """Write everything in ascending order, and note the table in the header."""
        placement, header = self._placement, self._header
        table = self._table(placement.table_clusters, placement.blocks)
        header.refcount_table_offset = placement.table << header.cluster_bits
        header.refcount_table_clusters = placement.table_clusters
        self._write_blocks(counted or {})
        self._storage.write(header.refcount_table_offset, [table])

    def _table(self, clusters: int, blocks: dict[int, int]) -> bytearray:
        cluster_bits = self._header.cluster_bits
        table = bytearray(clusters << cluster_bits)
        for index, cluster in blocks.items():
            fill_entries(table, index, 1, cluster << cluster_bits, 0, 1, 0)
        return table

    def write_retired(self) -> None:
        """Leave what QEMU leaves in free clusters that held earlier refcount tables."""
        size = self._header.cluster_size
        for start, clusters, blocks in self._placement.retired:
            table = memoryview(self._table(clusters, blocks))
            for index in range(clusters):
                if not self._placement.is_used(start + index):
                    self._storage.write((start + index) * size, [table[index * size : (index + 1) * size]])

    def _write_blocks(self, counted: dict[int, bytearray]) -> None:
        placement, size = self._placement, self._header.cluster_size
        used = placement.used()
        position = 0
        pending: list[bytearray] = []
        start = 0
        # Blocks and used ranges both ascend, so one walk serves all.
        for index in sorted(placement.blocks):
            block = counted.get(index) or bytearray(size)
            first, last = index * placement.per_block, (index + 1) * placement.per_block
            while position < len(used) and used[position][1] <= first:
                position += 1
            for low, high in used[position:]:
                if low >= last:
                    break
                low, high = max(low, first), min(high, last)
                count_refcounts(block, low - first, high - low, self._header.refcount_order)
            offset = placement.blocks[index] * size
            if pending and (offset != start + len(pending) * size or len(pending) * size >= _WRITE_PIECE):
                self._storage.write(start, pending)
                pending = []
            if not pending:
                start = offset
            pending.append(block)
        self._storage.write(start, pending)
