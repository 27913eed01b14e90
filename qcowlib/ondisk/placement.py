# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Where things go in a new file: first fit from a hint, refcount structures on the way.

Tools and tests patch images at the offsets QEMU gives, so this allocator takes
the same decisions: the lowest free cluster from a hint that goes back when
something is freed; a refcount block is placed the moment a cluster outside
the described area is used, and the search then starts again; a refcount table that is too
small moves behind a fresh, self-describing area of half as many blocks again.

Invariant: pure.  ``used`` holds disjoint ranges in ascending order, and each
used cluster is described by a block of ``blocks``, itself used.
Source: behaviour observed on files that ``qemu-img create`` and ``convert`` wrote.
"""

from __future__ import annotations

from bisect import bisect_right

from qcowlib.errors import UsageError
from qcowlib.ondisk.constants import MAX_REFCOUNT_TABLE_BYTES
from qcowlib.ondisk.geometry import refcounts_per_block
from qcowlib.units import ceil_div, round_up

__all__ = ["Placement"]


class Placement:
    """Allocator of host clusters; all numbers are cluster indexes.

    Starts as a new image does: header in cluster 0, refcount table in 1, first
    refcount block in 2.  ``blocks`` maps an index of the refcount table to the
    cluster of the block; ``table`` and ``table_clusters`` are the table's place.
    ``retired`` are the places tables had before, each with its blocks: free
    again, but what QEMU wrote there stays in its files.
    """

    def __init__(self, cluster_bits: int, refcount_order: int) -> None:
        self._cluster_size = 1 << cluster_bits
        self.per_block = refcounts_per_block(cluster_bits, refcount_order)
        self.per_table_cluster = 1 << (cluster_bits - 3)
        self._most_tables = MAX_REFCOUNT_TABLE_BYTES >> cluster_bits
        self.table = 1
        self.table_clusters = 1
        self.blocks: dict[int, int] = {}
        self.retired: list[tuple[int, int, dict[int, int]]] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.hint = 0
        # The image is born with these three; the block describes itself.
        self.blocks[0] = 2
        self._use(0, 3)
        self.hint = 3

    # -- used ranges -------------------------------------------------------------

    def used(self) -> list[tuple[int, int]]:
        """Return the used ranges ``(start, end)``."""
        return list(zip(self._starts, self._ends, strict=True))

    def is_used(self, cluster: int) -> bool:
        """Return whether *cluster* is allocated."""
        return self._free_from(cluster)[0] != cluster

    @property
    def end(self) -> int:
        """One past the last used cluster."""
        return self._ends[-1]

    def _use(self, start: int, end: int) -> None:
        """Mark a free range used, joining its neighbours."""
        at = bisect_right(self._starts, start)
        if at and self._ends[at - 1] == start:
            at -= 1
            self._ends[at] = end
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)
        if at + 1 < len(self._starts) and self._starts[at + 1] == end:
            self._ends[at] = self._ends.pop(at + 1)
            del self._starts[at + 1]

    def _release(self, start: int, end: int) -> None:
        at = bisect_right(self._starts, start) - 1
        first, last = self._starts[at], self._ends[at]
        pieces = [(a, b) for a, b in ((first, start), (end, last)) if a < b]
        self._starts[at : at + 1] = [a for a, _ in pieces]
        self._ends[at : at + 1] = [b for _, b in pieces]
        self.hint = min(self.hint, start)

    def _free_from(self, start: int) -> tuple[int, int | None]:
        """Return the first free range at or after *start*; the last has no end."""
        at = bisect_right(self._starts, start)
        if at and self._ends[at - 1] > start:
            start = self._ends[at - 1]
        return start, self._starts[at] if at < len(self._starts) else None

    def _search(self, count: int) -> int:
        """Return the first fit from the hint, and move the hint behind it."""
        start, end = self._free_from(self.hint)
        while end is not None and end - start < count:
            start, end = self._free_from(end)
        self.hint = start + count
        return start

    # -- allocation --------------------------------------------------------------

    def allocate(self, count: int) -> int:
        """Allocate *count* contiguous clusters and return the first."""
        while True:
            start = self._search(count)
            if self._describe(start, start + count):
                return start

    def allocate_at(self, start: int, count: int) -> int:
        """Allocate up to *count* clusters from *start*; return how many were free."""
        while True:
            free, end = self._free_from(start)
            got = 0 if free != start else count if end is None else min(count, end - start)
            if not got or self._describe(start, start + got):
                return got

    def allocate_bytes(self, offset: int, size: int) -> int:
        """Allocate *size* bytes (less than a cluster) and return their byte offset.

        They follow the byte *offset*, the end of what was allocated before, if
        its cluster has the room or the next cluster is the first free one;
        an *offset* of 0 asks for a new cluster.  Counting references is the caller's.
        """
        room = -offset % self._cluster_size
        while not offset or room < size:
            cluster = self._search(1)
            if not offset or offset + room != cluster * self._cluster_size:
                offset = cluster * self._cluster_size
            if self._describe(cluster, cluster + 1):
                break
            offset = 0
        return offset

    def tail_room(self) -> int:
        """Return how many clusters the next allocation may take without any decision.

        That is, behind everything used and without a new refcount block; else 0.
        """
        start, end = self._free_from(self.hint)
        return self.described_until(start) - start if end is None else 0

    def described_until(self, start: int) -> int:
        """Return the end of the range from *start* that needs no new refcount block."""
        index = start // self.per_block
        while index in self.blocks:
            index += 1
        return max(start, index * self.per_block)

    def _describe(self, start: int, end: int) -> bool:
        """Use a free range; ``False`` where a refcount block was added and the search starts again."""
        for index in range(start // self.per_block, (end - 1) // self.per_block + 1):
            if index not in self.blocks:
                cluster = max(start, index * self.per_block)
                # What precedes is taken while the block looks for its place, then given back.
                if start < cluster:
                    self._use(start, cluster)
                self._add_block(index, cluster)
                if start < cluster:
                    self._release(start, cluster)
                self.hint = min(self.hint, start)
                return False
        self._use(start, end)
        return True

    def _add_block(self, index: int, cluster: int) -> None:
        """Place the refcount block that describes *cluster*."""
        block = self._search(1)
        if block // self.per_block == index:
            self._use(block, block + 1)
        elif not self._describe(block, block + 1):
            return
        if index < self.table_clusters * self.per_table_cluster:
            self.blocks[index] = block
            return
        described = ceil_div(max(cluster + 1, block), self.per_block)
        self.grow_table(described * self.per_block, new_block=(index, block))

    def grow_table(
        self, start: int, extra: int = 0, *, exact: bool = False, new_block: tuple[int, int] | None = None
    ) -> int:
        """Move the refcount table behind new blocks from *start* on; return the first cluster after it.

        The new table describes *extra* clusters after itself.
        Raises: UsageError where the table would pass its limit.
        """
        total = self._blocks_for(start + extra, generous=not exact)
        entries = round_up(total if exact else total + ceil_div(total, 2), self.per_table_cluster)
        clusters = entries // self.per_table_cluster
        if clusters > self._most_tables:
            raise UsageError("The image size is too large for its refcount width and cluster size")
        self.retired.append((self.table, self.table_clusters, dict(self.blocks)))
        if new_block is not None:
            self.blocks[new_block[0]] = new_block[1]
        place = start
        for index in range(start // self.per_block, total):
            if index not in self.blocks:
                self.blocks[index] = place
                place += 1
        old, old_clusters = self.table, self.table_clusters
        self.table, self.table_clusters = place, clusters
        self._use(start, place + clusters)
        self._release(old, old + old_clusters)
        return place + clusters

    def _blocks_for(self, clusters: int, *, generous: bool) -> int:
        """Return how many blocks describe *clusters*, the blocks and their table."""
        tables = blocks = total = 0
        while True:
            last = total
            blocks = ceil_div(clusters + tables + blocks, self.per_block)
            tables = ceil_div(blocks, self.per_table_cluster)
            total = clusters + blocks + tables
            if total == last:
                if not generous:
                    return blocks
                # Room for the half that the table is given in advance.
                clusters += ceil_div(tables, 2)
                generous = False
                total = -1
