# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Taking host clusters, and making the refcount structures larger when they run out.

Invariant (I8): a new refcount block, or a new refcount table, is durable before
the entry or header field that points at it, and that before anything counted
by it is published: blocks and tables go out in PREPARE, pointers in GROW.
A new block describes the cluster it lies in.
"""

from __future__ import annotations

import errno

from qcowlib.errors import CorruptImage, StorageError
from qcowlib.ondisk import MAX_REFCOUNT_TABLE_BYTES
from qcowlib.qcow2.ordering import Mutex
from qcowlib.units import ceil_div

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.qcow2.ordering import Writeback
    from qcowlib.storage.base import Storage

__all__ = ["Allocator", "is_device"]

_OK, _NEED, _NO_BLOCK = range(3)
NEVER_FRESH = 1 << 63


def is_device(storage: Storage) -> bool:
    """Whether *storage* is a block device, whose unused space holds anything."""
    return bool(getattr(storage, "is_block", False))


class Allocator:
    """Gives out host clusters with refcount 1, lowest free place from a moving hint."""

    __slots__ = ("_compressed_at", "_mutex", "_releases", "writeback")

    def __init__(self, writeback: Writeback) -> None:
        self.writeback = writeback
        self._compressed_at = 0
        self._releases = 0
        self._mutex = Mutex(writeback.runtime)
        storage, size = writeback.storage, writeback.header.cluster_size
        writeback.refs.high_water = NEVER_FRESH if is_device(storage) else ceil_div(storage.size, size)

    async def clusters(self, count: int, *, contiguous: bool = False) -> tuple[int, int, bool]:
        """Allocate up to *count* clusters (exactly, if *contiguous*).

        Returns ``(host offset, clusters, fresh)``; *fresh* space reads as zeros.
        Raises CorruptImage when the counts call metadata free (I9).
        """
        store = self.writeback.store
        while True:
            code, where, got, fresh = store.refs.allocate(count, contiguous)
            if code == _OK:
                offset = where << self.writeback.header.cluster_bits
                if not fresh:
                    self.writeback.check_overlap(offset, got * self.writeback.header.cluster_size)
                return offset, got, fresh
            if code == _NEED:
                await store.load(where)
            else:
                self._add_block(where)

    def lower_water(self, cluster: int) -> None:
        """The file was cut: from *cluster* on it has nothing, so space there reads as zeros again."""
        self.writeback.refs.high_water = cluster
        self._compressed_at = 0

    async def release(self, offset: int, count: int) -> None:
        """Take back clusters that were never published (a failed operation)."""
        await self.writeback.store.change(offset >> self.writeback.header.cluster_bits, count, False)

    async def release_compressed(self, offset: int, length: int) -> None:
        """Take back what :meth:`compressed` gave; nothing is packed behind it any more."""
        bits = self.writeback.header.cluster_bits
        self.writeback.releases += 1
        first = offset >> bits
        await self.writeback.store.change(first, ((offset + length - 1) >> bits) - first + 1, False)

    def _add_block(self, index: int) -> None:
        """Make refcount block *index*, at the first cluster it describes."""
        refs = self.writeback.refs
        if index >= refs.table_size:
            self._grow_table(index)
            return
        cluster = index * refs.per_block
        if index == 0:
            raise CorruptImage("the refcount block of the header is missing", path=self.writeback.storage.name)
        refs.make(index, cluster << self.writeback.header.cluster_bits)
        refs.change(cluster, 1, True)
        self._guard(cluster, 1)

    def _guard(self, cluster: int, count: int) -> None:
        refs = self.writeback.refs
        refs.high_water = max(refs.high_water, cluster + count)
        header = self.writeback.header
        self.writeback.cmap.guard(cluster << header.cluster_bits, count * header.cluster_size)

    def _grow_table(self, index: int) -> None:
        """Make a larger refcount table, and the blocks that describe it, behind everything counted.

        Source: qemu takes half more than is needed, in whole clusters.
        """
        writeback = self.writeback
        header, refs = writeback.header, writeback.refs
        per_table = header.cluster_size // 8
        blocks, clusters = 1, 1
        while True:
            clusters = ceil_div((index + blocks) * 3 // 2, per_table)
            needed = ceil_div(blocks + clusters, refs.per_block)
            if needed <= blocks:
                break
            blocks = needed
        entries = clusters * per_table
        if entries * 8 > MAX_REFCOUNT_TABLE_BYTES:
            entries = MAX_REFCOUNT_TABLE_BYTES // 8
            clusters = entries // per_table
            if entries < index + blocks:
                raise StorageError(
                    errno.EFBIG,
                    path=writeback.storage.name,
                    operation="allocate",
                    message="Reference count table too large",
                )
        old, old_clusters = header.refcount_table_offset, header.refcount_table_clusters
        first = index * refs.per_block
        refs.grow_table(entries)
        for number in range(blocks):
            refs.make(index + number, (first + number) << header.cluster_bits)
        refs.change(first, blocks + clusters, True)
        self._guard(first, blocks + clusters)
        header.refcount_table_offset = (first + blocks) << header.cluster_bits
        header.refcount_table_clusters = clusters
        writeback.move_refcount_table()
        writeback.freed.add(2, old, old_clusters << header.cluster_bits, old)

    async def compressed(self, length: int) -> int:
        """Allocate *length* bytes (at most one cluster) for compressed data: the host byte offset.

        Packed behind the last one while its host cluster has room and its
        refcount is below the maximum, as qemu does; but never behind one that
        may have been released meanwhile.
        """
        async with self._mutex:
            at = await self._pack(length)
            self._compressed_at = at + length
            return at

    async def _pack(self, length: int) -> int:
        writeback = self.writeback
        bits, size = writeback.header.cluster_bits, writeback.header.cluster_size
        store = writeback.store
        at = self._compressed_at
        room = -at % size
        if self._releases != writeback.releases:
            self._releases = writeback.releases
            room = 0
        if not room or await store.get(at >> bits) >= store.refs.maximum:
            return (await self.clusters(1))[0]
        if room < length:
            place, _, _ = await self.clusters(1)
            if place != at + room:
                return place
        if self._releases != writeback.releases:
            return (await self.clusters(1))[0] if room >= length else place
        await store.change(at >> bits, 1, True)
        return at
