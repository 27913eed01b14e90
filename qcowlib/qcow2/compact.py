# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Moving the clusters of the tail into free ones below, so that the file can be cut.

For a stretch of clusters, of guest data, then of L2 tables, then of refcount blocks:

======= ==================================================================
PREPARE their content at the new places, each counted as often as the old
        one                                                        barrier
PUBLISH the new places in whatever points to them, in place, word by word;
        old and new hold the same until the last one is written    barrier
RECLAIM the counts of the old ones; these are never used again, since all
        free clusters that are taken lie before the end to be
======= ==================================================================

Invariants: at every cut each pointer is the old or the new one, and both
clusters are counted at least as often as they are pointed to (I1, I2, I4, I8);
a snapshot that shares a cluster follows it (I7); COPIED flags keep their
meaning, as the counts of both are the same (I3).

What stays where it is: the header, L1 tables, the refcount table, the snapshot
table, bitmaps and clusters that hold compressed data; the last of them is
where the file can be cut at best.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from qcowlib.errors import CorruptImage, UnsupportedFeature
from qcowlib.native import (
    BLOCK_CLUSTER,
    DATA_CLUSTER,
    FIXED,
    FREE,
    TABLE_CLUSTER,
    add_counts,
    assign,
    clear_counts,
    copy_counts,
    mark_table,
    moves,
    repoint,
)
from qcowlib.ondisk import OFFSET_MASK
from qcowlib.qcow2.directories import check_snapshot_l1, read_snapshots
from qcowlib.units import MiB, ceil_div

if TYPE_CHECKING:
    from qcowlib.ondisk import Header
    from qcowlib.storage.base import Storage

__all__ = ["Compaction", "Moves"]

#: Bytes that are moved between two passes over the tables.
_BATCH: Final = 1024 * MiB
_PIECE: Final = 2 * MiB
_REFTABLE: Final = 0xFFFF_FFFF_FFFF_FE00


class Moves(NamedTuple):
    """What a compaction moves: clusters of each kind, where the file ends after it, and how much is free below."""

    data: int
    tables: int
    blocks: int
    end: int
    free: int
    #: Used clusters that cannot move lie up to here (in bytes).
    fixed_end: int


class Compaction:
    """One image whose metadata is sound and settled; nobody else uses *storage*.  All calls block.

    Raises: UnsupportedFeature for an encrypted image (its data depends on the
    host offset) and for an external data file; CorruptImage; StorageError.
    """

    def __init__(self, storage: Storage, header: Header) -> None:
        self.require(header, storage.name)
        self.storage = storage
        self.header = header
        self.size = header.cluster_size
        self.bits = header.cluster_bits
        self.stride = 16 if header.extended_l2 else 8
        self.order = header.refcount_order
        self.per_block = self.size * 8 >> self.order
        self.count = ceil_div(storage.size, self.size)
        self.table = bytearray(header.refcount_table_clusters * self.size)
        storage.read_into(header.refcount_table_offset, [self.table])
        self.blocks: dict[int, bytearray] = {}
        self.changed: dict[int, None] = {}
        self.l1s: list[tuple[int, bytearray]] = []
        self.kinds = bytearray(self.count)
        self._load()
        self.end = self._end()

    @staticmethod
    def require(header: Header, path: str) -> None:
        """Raise UnsupportedFeature for what cannot be compacted."""
        if header.crypt_method or header.has_data_file:
            what = "an encrypted image" if header.crypt_method else "an image with an external data file"
            raise UnsupportedFeature(f"{what} cannot be compacted in place", path=path)

    # -- looking ---------------------------------------------------------------

    def _load(self) -> None:
        header, storage = self.header, self.storage
        places = [(header.l1_table_offset, 8 * header.l1_size)]
        for entry in read_snapshots(storage, header):
            check_snapshot_l1(entry, self.size, storage)
            places.append((entry.l1_table_offset, 8 * entry.l1_size))
        for offset, length in places:
            l1 = bytearray(length)
            storage.read_into(offset, [l1])
            self.l1s.append((offset, l1))
        for offset, table in self._l2_tables():
            if not mark_table(self.kinds, table, self.bits, self.stride):
                raise self._broken(offset)
        for offset in self._l2_offsets():
            self._mark(offset, TABLE_CLUSTER)
        for index in range(len(self.table) // 8):
            offset = self._block_offset(index)
            if offset:
                self._mark(offset, BLOCK_CLUSTER)
                block = bytearray(self.size)
                storage.read_into(offset, [block])
                self.blocks[index] = block
        for index in range(ceil_div(self.count, self.per_block)):
            first = index * self.per_block
            if index in self.blocks:
                if not add_counts(self.kinds, self.blocks[index], self.order, first):
                    raise self._broken(first << self.bits)
            else:
                # Without a block they cannot be taken.
                last = min(first + self.per_block, self.count)
                self.kinds[first:last] = bytes([_UNCOUNTED]) * (last - first)

    def _mark(self, offset: int, kind: int) -> None:
        cluster = offset >> self.bits
        if offset % self.size or cluster >= self.count or self.kinds[cluster] not in (FREE, kind):
            raise self._broken(offset)
        self.kinds[cluster] = kind

    def _broken(self, offset: int) -> CorruptImage:
        return CorruptImage(f"the metadata about the cluster at {offset:#x} contradicts itself", path=self.storage.name)

    def _block_offset(self, index: int) -> int:
        return int.from_bytes(self.table[8 * index : 8 * index + 8], "big") & _REFTABLE

    def _l2_offsets(self) -> list[int]:
        found: set[int] = set()
        for _, l1 in self.l1s:
            found.update(word & OFFSET_MASK for word in struct.unpack(f">{len(l1) // 8}Q", l1))
        return sorted(found - {0})

    def _l2_tables(self) -> Iterator[tuple[int, bytearray]]:
        """Every L2 table with its offset, once, in file order."""
        for offset in self._l2_offsets():
            if offset % self.size or offset >> self.bits >= self.count:
                raise self._broken(offset)
            table = bytearray(self.size)
            self.storage.read_into(offset, [table])
            yield offset, table

    def _end(self) -> int:
        """The least number of clusters with room for all: what is fixed, and what must move there."""
        kinds = self.kinds
        low = 1 + max(kinds.rfind(FIXED), 0)
        high = max(low, 1 + max(kinds.rfind(kind) for kind in (FIXED, *_MOVABLE)))
        while low < high:
            middle = (low + high) // 2
            if kinds.count(FREE, 0, middle) >= sum(kinds.count(kind, middle) for kind in _MOVABLE):
                high = middle
            else:
                low = middle + 1
        return low

    def plan(self) -> Moves:
        """Count what :meth:`run` will do."""
        kinds, end = self.kinds, self.end
        data, tables, blocks = (kinds.count(kind, end) for kind in _MOVABLE)
        free = kinds.count(FREE, 0, end) - data - tables - blocks
        return Moves(data, tables, blocks, end << self.bits, free << self.bits, 1 + kinds.rfind(FIXED) << self.bits)

    # -- moving ----------------------------------------------------------------

    def run(self, moved: Callable[[int], object]) -> None:
        """Move everything behind the end, then cut the file; *moved* hears of bytes and may raise."""
        places = array("Q", bytes(8 * (self.count - self.end)))
        limit = max(1, _BATCH >> self.bits)
        for kind in _MOVABLE:
            free, source = 0, self.end
            while True:
                first = source
                free, source, got = assign(self.kinds, self.end, kind, places, free, source, limit)
                if not got:
                    break
                runs = moves(places, self.end, first - self.end, source - self.end)
                if kind == BLOCK_CLUSTER:
                    self._move_blocks(runs, places)
                else:
                    self._move(kind, runs, places, moved)
                for old, new, count in runs:
                    self.kinds[old : old + count] = bytes(count)
                    self.kinds[new : new + count] = bytes([kind]) * count
                places[first - self.end : source - self.end] = array("Q", bytes(8 * (source - first)))
        self._finish()

    def _move(
        self, kind: int, runs: list[tuple[int, int, int]], places: array[int], moved: Callable[[int], object]
    ) -> None:
        for old, new, count in runs:
            self._copy(old, new, count, moved)
        self._count(runs)
        # Invariant: I1, I2
        self.storage.flush()
        if kind == DATA_CLUSTER:
            for offset, table in self._l2_tables():
                if repoint(table, self.stride, True, self.bits, self.end, places):
                    self.storage.write(offset, [table])
        else:
            for offset, l1 in self.l1s:
                if repoint(l1, 8, False, self.bits, self.end, places):
                    self.storage.write(offset, [l1])
        self.storage.flush()
        self._release(runs)

    def _copy(self, old: int, new: int, count: int, moved: Callable[[int], object]) -> None:
        start, target, left = old << self.bits, new << self.bits, count << self.bits
        while left:
            length = min(left, max(_PIECE, self.size))
            data = bytearray(length)
            self.storage.read_into(start, [data])
            self.storage.write(target, [data])
            start, target, left = start + length, target + length, left - length
            moved(length)

    def _move_blocks(self, runs: list[tuple[int, int, int]], places: array[int]) -> None:
        self._count(runs)
        self.storage.flush()
        owner = {self._block_offset(index) >> self.bits: index for index in self.blocks}
        for old, new, count in runs:
            for number in range(count):
                self.storage.write((new + number) << self.bits, [self.blocks[owner[old + number]]])
        # Invariant: I8
        self.storage.flush()
        repoint(self.table, 8, False, self.bits, self.end, places)
        self.storage.write(self.header.refcount_table_offset, [self.table])
        self.storage.flush()
        self._release(runs)

    # -- counts ----------------------------------------------------------------

    def _count(self, runs: list[tuple[int, int, int]]) -> None:
        per = self.per_block
        for start, target, length in runs:
            old, new, left = start, target, length
            while left:
                count = min(left, per - old % per, per - new % per)
                source, block = self.blocks[old // per], self.blocks[new // per]
                copy_counts(source, old % per, block, new % per, count, self.order)
                self.changed[new // per] = None
                old, new, left = old + count, new + count, left - count
        self._write_blocks()

    def _release(self, runs: list[tuple[int, int, int]]) -> None:
        per = self.per_block
        for start, _, length in runs:
            old, left = start, length
            while left:
                count = min(left, per - old % per)
                clear_counts(self.blocks[old // per], old % per, count, self.order)
                self.changed[old // per] = None
                old, left = old + count, left - count
        self._write_blocks()

    def _write_blocks(self) -> None:
        for index in self.changed:
            self.storage.write(self._block_offset(index), [self.blocks[index]])
        self.changed.clear()

    # -- giving back -----------------------------------------------------------

    def _finish(self) -> None:
        """Cut the file behind the last used cluster and punch what is free before it."""
        self.storage.flush()
        if not getattr(self.storage, "is_block", False) and self.storage.size > self.end << self.bits:
            self.storage.resize(self.end << self.bits)
        for run in _FREE_RUN.finditer(self.kinds, 0, self.end):
            start = run.start() << self.bits
            length = min(run.end() << self.bits, self.storage.size) - start
            if length > 0:
                self.storage.discard(start, length)
        self.storage.flush()


_UNCOUNTED: Final = 5
_FREE_RUN: Final = re.compile(b"\0+")
_MOVABLE: Final = (DATA_CLUSTER, TABLE_CLUSTER, BLOCK_CLUSTER)
