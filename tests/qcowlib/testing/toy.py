# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A small qcow2 writer with a right order of writes and several wrong ones.

It exists to prove that the crash explorer finds mistakes; it knows one
geometry: 1 KiB clusters, 16-bit refcounts, one refcount block.
"""

from __future__ import annotations

import struct

from qcowlib.storage.base import Storage

CLUSTER = 1024
ENTRIES = CLUSTER // 8
COPIED = 1 << 63
ZERO = 1
SIZE = 2 * ENTRIES * CLUSTER * 9 // 16  # two L2 tables, the second in part

BUGS = (
    "l2 before refcounts",
    "no first barrier",
    "flush without sync",
    "l2 before data",
    "unfilled cluster",
    "early reuse",
    "decrement before publish",
    "copied on shared",
)


def make(storage: Storage) -> None:
    """Lay out an empty image."""
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 10, SIZE, 0, 2, 3 * CLUSTER, CLUSTER, 1, 0, 0)
    header += struct.pack(">QQQII8x", 0, 0, 0, 4, 112)
    storage.write(0, [header + bytes(CLUSTER - len(header))])
    storage.write(CLUSTER, [struct.pack(">Q", 2 * CLUSTER) + bytes(CLUSTER - 8)])
    storage.write(2 * CLUSTER, [struct.pack(">4H", 1, 1, 1, 1) + bytes(CLUSTER - 8)])
    storage.write(3 * CLUSTER, [bytes(CLUSTER)])
    storage.flush()


class ToyWriter:
    """Writes one image; *bug* is one of :data:`BUGS` or empty."""

    def __init__(self, storage: Storage, bug: str = "") -> None:
        self.storage = storage
        self.bug = bug
        self.refcounts = [1, 1, 1, 1] + [0] * (CLUSTER // 2 - 4)
        self.pending: dict[int, int] = {}
        self.freed: list[int] = []
        self.l1 = [0, 0]
        self.tables: list[list[int]] = [[], []]
        self.new_tables: set[int] = set()
        self.dirty: set[tuple[int, int]] = set()
        self.refs_dirty = False

    def _allocate(self) -> int:
        cluster = self.refcounts.index(0)
        while cluster in self.freed or cluster in self.pending:
            cluster = self.refcounts.index(0, cluster + 1)
        self.refcounts[cluster] = 1
        self.refs_dirty = True
        return cluster

    def _free(self, cluster: int) -> None:
        self.refcounts[cluster] = 0
        if self.bug != "early reuse":
            self.freed.append(cluster)
            self.pending[cluster] = 1
        if self.bug == "decrement before publish":
            self.pending.clear()
        self.refs_dirty = True

    def _table(self, index: int) -> list[int]:
        if not self.l1[index]:
            self.l1[index] = self._allocate()
            self.tables[index] = [0] * ENTRIES
            self.new_tables.add(index)
        return self.tables[index]

    def write(self, offset: int, data: bytes) -> None:
        """Write sectors inside one cluster."""
        index, slot = divmod(offset // CLUSTER, ENTRIES)
        inside = offset % CLUSTER
        table = self._table(index)
        entry = table[slot]
        if entry & COPIED and not entry & ZERO:
            self.storage.write((entry & ~COPIED) + inside, [data])
            return
        cluster = self._allocate()
        flag = COPIED
        table[slot] = cluster * CLUSTER | flag
        self.dirty.add((index, slot))
        if self.bug == "l2 before data" and self.l1[index] and index not in self.new_tables:
            self._write_entry(index, slot)
            self._write_refcounts()
            self.storage.flush()
        if self.bug == "unfilled cluster":
            self.storage.write(cluster * CLUSTER + inside, [data])
        else:
            whole = bytes(inside) + data
            self.storage.write(cluster * CLUSTER, [whole + bytes(CLUSTER - len(whole))])

    def discard(self, offset: int) -> None:
        """Make one cluster zero and free what it had."""
        index, slot = divmod(offset // CLUSTER, ENTRIES)
        table = self._table(index)
        if table[slot] & COPIED:
            self._free((table[slot] & ~COPIED) // CLUSTER)
        table[slot] = ZERO
        self.dirty.add((index, slot))

    def _write_refcounts(self) -> None:
        values = [count + self.pending.get(cluster, 0) for cluster, count in enumerate(self.refcounts)]
        if self.bug == "copied on shared":
            values = [value + (value == 1 and cluster > 12) for cluster, value in enumerate(values)]
        block = struct.pack(f">{len(values)}H", *values)
        for sector in range(0, CLUSTER, 512):
            self.storage.write(2 * CLUSTER + sector, [block[sector : sector + 512]])

    def _write_entry(self, index: int, slot: int) -> None:
        sector = slot // 64 * 64
        data = struct.pack(">64Q", *self.tables[index][sector : sector + 64])
        self.storage.write(self.l1[index] * CLUSTER + sector * 8, [data])

    def _publish(self) -> None:
        for index, slot in sorted({(index, slot // 64 * 64) for index, slot in self.dirty}):
            self._write_entry(index, slot)
        if self.new_tables:
            words = [cluster * CLUSTER | COPIED if cluster else 0 for cluster in self.l1]
            self.storage.write(3 * CLUSTER, [struct.pack(">2Q", *words) + bytes(496)])

    def flush(self) -> None:
        """Make everything durable: prepare, barrier, publish, barrier, reclaim."""
        if not (self.dirty or self.refs_dirty or self.new_tables):
            self.storage.flush()
            return
        for index in self.new_tables:
            # Nothing points at it yet, so all of it is written before it is published.
            self.storage.write(self.l1[index] * CLUSTER, [struct.pack(f">{ENTRIES}Q", *self.tables[index])])
        self.dirty = {(index, slot) for index, slot in self.dirty if index not in self.new_tables}
        if self.bug == "l2 before refcounts":
            self._publish()
            self.storage.flush()
            self._write_refcounts()
        else:
            self._write_refcounts()
            if self.bug != "no first barrier":
                self.storage.flush()
            self._publish()
        if self.bug != "flush without sync":
            self.storage.flush()
        self.dirty.clear()
        self.new_tables.clear()
        if self.pending:
            self.pending.clear()
            self._write_refcounts()
        # Their release is durable only with the next barrier.
        self.refs_dirty = bool(self.freed)
        self.freed.clear()
