# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Moving clusters into free ones below, in an order that is right at every cut, so that the file can be shorter.

For each batch of clusters (:mod:`.relocation` says which):

======= ==================================================================
PREPARE their content at the new places, each counted as often as the old
        one                                                        barrier
PUBLISH the new places in whatever points to them, in place, word by word;
        old and new hold the same until the last one is written    barrier
RECLAIM the counts of the old ones, durable before the next batch publishes
======= ==================================================================

What points to guest data, compressed or not, are L2 tables; to L2 tables, L1
tables; to bits, bitmap tables; to refcount blocks, the refcount table.  Each
table that is moved as a whole has one pointer of eight bytes inside one
sector: a field of the header or of an extension, or an entry of the snapshot
table or the bitmap directory.  A table and the table that points to it may
move in one batch: the new copy names the new place from the start.

Invariants: at every cut each pointer is the old or the new one, and both
clusters are counted at least as often as they are pointed to (I1, I2, I4, I5,
I8); a snapshot that shares a cluster follows it (I7); COPIED flags keep their
meaning, as the counts of both are the same (I3).

Source: LUKS makes the initial vector of a sector from its place in the file,
so guest data of such an image is encrypted anew on its way; the older AES
makes it from the guest's sector, and ciphertext moves as it is.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from qcowlib.errors import CorruptImage
from qcowlib.native import (
    BLOCK_CLUSTER,
    DATA_CLUSTER,
    FIXED,
    FREE,
    PACKED,
    TABLE_CLUSTER,
    add_count,
    clear_counts,
    copy_counts,
    repoint,
    repoint_packed,
    spanning,
    spread,
)
from qcowlib.ondisk import AUTOCLEAR_MASK, CRYPT_LUKS
from qcowlib.qcow2.anatomy import Anatomy
from qcowlib.qcow2.relocation import ALONE, BITS, BLOCKS_GONE, FREE_RUN, ITEM, UNCOUNTED, Relocation
from qcowlib.units import SECTOR, MiB

if TYPE_CHECKING:
    from qcowlib.ondisk import Header
    from qcowlib.qcow2.anatomy import Table
    from qcowlib.qcow2.read import Cipher
    from qcowlib.qcow2.relocation import Batch, Run
    from qcowlib.storage.base import Storage

__all__ = ["Compaction", "Moves"]

#: Bytes that are moved between two passes over the tables.
_BATCH: Final = 1024 * MiB
_PIECE: Final = 2 * MiB
_AT_AUTOCLEAR: Final = 88


class Moves(NamedTuple):
    """What a compaction moves: clusters of each kind, where the file ends after it, and how much is free below."""

    data: int
    tables: int
    blocks: int
    #: L1 tables, the refcount table, the snapshot table, bitmaps, the LUKS header.
    other: int
    end: int
    free: int
    #: Used clusters that cannot move lie up to here (in bytes).
    fixed_end: int


class Compaction:
    """One image whose metadata is sound and settled; nobody else uses *storage*.  All calls block.

    *cipher* is that of a LUKS image; without it its guest data stays.
    Raises: CorruptImage, FormatError, StorageError.
    """

    def __init__(self, storage: Storage, header: Header, cipher: Cipher | None = None) -> None:
        self.storage = storage
        self.header = header
        self.cipher = cipher if header.crypt_method == CRYPT_LUKS else None
        moving = header.crypt_method != CRYPT_LUKS or cipher is not None
        self.anatomy = Anatomy(storage, header, moving=moving)
        self.size = header.cluster_size
        self.bits = header.cluster_bits
        self.order = header.refcount_order
        self.blocks = self.anatomy.blocks
        self.changed: dict[int, None] = {}
        #: Clusters up to the last one that is in use.
        self.used = len(self.anatomy.kinds.rstrip(bytes([FREE, UNCOUNTED])))

    def relocation(self) -> Relocation:
        """Return what would move where; its map is a copy."""
        anatomy = self.anatomy
        items = [(table.start, len(table.content) >> self.bits) for table in anatomy.tables.values()]
        movable = [item for item in items if anatomy.kinds[item[0]] == ITEM]
        blocks = {index: anatomy.block_offset(index) >> self.bits for index in self.blocks}
        limit = max(1, _BATCH >> self.bits)
        return Relocation(bytearray(anatomy.kinds), movable, blocks, anatomy.per_block, limit)

    def plan(self) -> Moves:
        """Count what :meth:`run` will do."""
        work = self.relocation()
        moved: dict[int, int] = {}
        for batch in work.batches():
            count = sum(run[2] for run in batch.runs) + batch.head
            moved[batch.kind] = moved.get(batch.kind, 0) + count
        fixed_end = 1 + self.anatomy.kinds.rfind(FIXED) << self.bits
        if work.end >= self.used:
            # Room in one piece for what is shared can cost as much as it gives.
            free = self.anatomy.kinds.count(FREE, 0, self.used) << self.bits
            return Moves(0, 0, 0, 0, self.used << self.bits, free, fixed_end)
        data = sum(moved.get(kind, 0) for kind in (DATA_CLUSTER, ALONE, PACKED))
        other = moved.get(BITS, 0) + moved.get(ITEM, 0)
        free = work.kinds.count(FREE, 0, work.end) << self.bits
        tables, blocks = moved.get(TABLE_CLUSTER, 0), moved.get(BLOCK_CLUSTER, 0)
        return Moves(data, tables, blocks, other, work.end << self.bits, free, fixed_end)

    # -- moving ----------------------------------------------------------------

    def run(self, moved: Callable[[int], object]) -> None:
        """Move everything behind the end, then cut the file; *moved* hears of bytes and may raise."""
        known = self.header.autoclear_features & AUTOCLEAR_MASK
        if known != self.header.autoclear_features:
            # Invariant: I10
            self.storage.write(_AT_AUTOCLEAR, [known.to_bytes(8, "big")])
            self.storage.flush()
        work = self.relocation()
        worth = self.plan().end < self.used << self.bits
        for batch in work.batches() if worth else ():
            if batch.kind == BLOCK_CLUSTER:
                self._move_blocks(batch)
            elif batch.kind == ITEM:
                self._move_tables(batch)
            elif batch.kind == BLOCKS_GONE:
                self._drop_blocks(batch)
            else:
                self._move(batch, moved)
        self._finish(work.kinds, work.end if worth else self.used)

    def _move(self, batch: Batch, moved: Callable[[int], object]) -> None:
        for old, new, count in batch.runs:
            self._copy(old, new, count, batch.kind, moved)
        self._count(batch.runs)
        shared = self._prepare_head(batch, moved) if batch.head else 0
        self._write_blocks()
        # Invariant: I1, I2
        self.storage.flush()
        base = min(run[0] for run in batch.runs)
        self._repoint(batch.kind, base, self._places(base, batch.runs))
        self.storage.flush()
        self._release(batch.runs)
        if batch.head:
            self._add(batch.runs[0][0] - 1, -shared)
        self._write_blocks()

    def _prepare_head(self, batch: Batch, moved: Callable[[int], object]) -> int:
        """Copy and count the beginning of what a run shares with the cluster before; returns how often it is named."""
        ((old, new, _),) = batch.runs
        weights, anatomy = self.anatomy.l2_weights(), self.anatomy
        shared = sum(
            weights[offset] * spanning(table, anatomy.stride, self.bits, old - 1)
            for offset, table in anatomy.l2_tables()
        )
        self._copy(old - 1, new - 1, 1, batch.kind, moved)
        self._add(new - 1, shared)
        return shared

    @staticmethod
    def _places(base: int, runs: list[Run]) -> array[int]:
        places = array("Q", bytes(8 * (max(old + count for old, _, count in runs) - base)))
        spread(places, base, runs)
        return places

    def _repoint(self, kind: int, base: int, places: array[int]) -> None:
        anatomy = self.anatomy
        if kind in (TABLE_CLUSTER, BITS):
            for table in anatomy.l1s if kind == TABLE_CLUSTER else anatomy.bitmaps:
                if repoint(table.words, 8, False, self.bits, base, places):
                    self.storage.write(table.start << self.bits, [table.words])
            return
        for offset, l2 in anatomy.l2_tables():
            if kind == DATA_CLUSTER:
                found = repoint(l2, anatomy.stride, True, self.bits, base, places)
            else:
                found = repoint_packed(l2, anatomy.stride, self.bits, base, places)
            if found:
                self.storage.write(offset, [l2])

    def _copy(self, old: int, new: int, count: int, kind: int, moved: Callable[[int], object]) -> None:
        start, target, left = old << self.bits, new << self.bits, count << self.bits
        while left:
            length = min(left, max(_PIECE, self.size))
            data = bytearray(length)
            self.storage.read_into(start, [data])
            if self.cipher is not None and kind == DATA_CLUSTER:
                self.cipher.decrypt(data, start // SECTOR)
                self.cipher.encrypt(data, target // SECTOR)
            self.storage.write(target, [data])
            start, target, left = start + length, target + length, left - length
            moved(length)

    # -- refcount blocks ---------------------------------------------------------

    def _move_blocks(self, batch: Batch) -> None:
        self._count(batch.runs)
        self._write_blocks()
        self.storage.flush()
        owner = {self.anatomy.block_offset(index) >> self.bits: index for index in self.blocks}
        for old, new, count in batch.runs:
            for number in range(count):
                self.storage.write((new + number) << self.bits, [self.blocks[owner[old + number]]])
        # Invariant: I8
        self.storage.flush()
        base = min(run[0] for run in batch.runs)
        repoint(self.anatomy.refcounts.content, 8, False, self.bits, base, self._places(base, batch.runs))
        self._write_refcount_table()
        self._release(batch.runs)
        self._write_blocks()

    def _drop_blocks(self, batch: Batch) -> None:
        """Forget blocks that count nothing: out of the refcount table, then given back."""
        for cluster, index, _ in batch.runs:
            if any(self.blocks[index]):
                text = f"the refcount block at {cluster << self.bits:#x} counts what nothing points to"
                raise CorruptImage(text, path=self.storage.name)
        self.storage.flush()
        for _, index, _ in batch.runs:
            self.anatomy.refcounts.content[8 * index : 8 * index + 8] = bytes(8)
            del self.blocks[index]
        self._write_refcount_table()
        self._release([(cluster, 0, 1) for cluster, _, _ in batch.runs])
        self._write_blocks()

    def _write_refcount_table(self) -> None:
        table = self.anatomy.refcounts
        self.storage.write(table.start << self.bits, [table.content])
        self.storage.flush()

    # -- tables that move as a whole ------------------------------------------------

    def _move_tables(self, batch: Batch) -> None:
        going = {old: new for old, new, _ in batch.runs}
        tables = self.anatomy.tables
        switches: list[tuple[Table | None, int, bytes]] = []
        for old, new in going.items():
            word = (new << self.bits).to_bytes(8, "big")
            for owner, at in tables[old].owners:
                if owner is not None:
                    owner.content[at : at + 8] = word
                if owner is None or owner.start not in going:
                    switches.append((owner, at, word))
        for old, new in going.items():
            self.storage.write(new << self.bits, [tables[old].content])
        self._count(batch.runs)
        self._write_blocks()
        # Invariant: I2, I8
        self.storage.flush()
        for owner, at, word in switches:
            # Invariant: I5
            self.storage.write((owner.start << self.bits if owner is not None else 0) + at, [word])
        self.storage.flush()
        for old, new in going.items():
            table = tables.pop(old)
            table.start = new
            tables[new] = table
        self._release(batch.runs)
        self._write_blocks()

    # -- counts ----------------------------------------------------------------

    def _count(self, runs: list[Run]) -> None:
        per = self.anatomy.per_block
        for start, target, length in runs:
            old, new, left = start, target, length
            while left:
                count = min(left, per - old % per, per - new % per)
                source, block = self.blocks[old // per], self.blocks[new // per]
                copy_counts(source, old % per, block, new % per, count, self.order)
                self.changed[new // per] = None
                old, new, left = old + count, new + count, left - count

    def _release(self, runs: list[Run]) -> None:
        per = self.anatomy.per_block
        for start, _, length in runs:
            old, left = start, length
            while left:
                count = min(left, per - old % per)
                clear_counts(self.blocks[old // per], old % per, count, self.order)
                self.changed[old // per] = None
                old, left = old + count, left - count

    def _add(self, cluster: int, amount: int) -> None:
        index, place = divmod(cluster, self.anatomy.per_block)
        add_count(self.blocks[index], place, amount, self.order)
        self.changed[index] = None

    def _write_blocks(self) -> None:
        for index in self.changed:
            self.storage.write(self.anatomy.block_offset(index), [self.blocks[index]])
        self.changed.clear()

    # -- giving back -----------------------------------------------------------

    def _finish(self, kinds: bytearray, clusters: int) -> None:
        """Cut the file behind its last used cluster and punch what is free before it."""
        self.storage.flush()
        end = clusters << self.bits
        if not getattr(self.storage, "is_block", False) and self.storage.size > end:
            self.storage.resize(end)
        for run in FREE_RUN.finditer(kinds, 0, clusters):
            start = run.start() << self.bits
            length = min(run.end() << self.bits, self.storage.size) - start
            if length > 0:
                self.storage.discard(start, length)
        self.storage.flush()
