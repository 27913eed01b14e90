# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What the clusters of an image are, and the one place that points to each table.

Invariant: reading only.  Every counted cluster gets a kind; what nobody here
knows is fixed.  A table that is pointed to across a sector's border is fixed
too, as no write could switch it whole.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from qcowlib.errors import CorruptImage
from qcowlib.native import (
    BLOCK_CLUSTER,
    DATA_CLUSTER,
    FIXED,
    FREE,
    TABLE_CLUSTER,
    add_counts,
    mark_table,
)
from qcowlib.ondisk import (
    EXT_BITMAPS,
    EXT_CRYPTO,
    OFFSET_MASK,
    REFCOUNT_TABLE_OFFSET_MASK,
    snapshot_table_size,
)
from qcowlib.ondisk.extensions import walk_extensions
from qcowlib.qcow2.directories import check_snapshot_l1, read_bitmaps, read_snapshots
from qcowlib.qcow2.relocation import ALONE, BITS, ITEM, UNCOUNTED
from qcowlib.units import ceil_div, round_up

if TYPE_CHECKING:
    from qcowlib.ondisk import Header
    from qcowlib.storage.base import Storage

__all__ = ["Anatomy", "Table"]

_AT_L1: Final = 40
_AT_REFCOUNTS: Final = 48
_AT_SNAPSHOTS: Final = 64
#: Clusters behind the end of the file that a move may use on the way.
_SPARE: Final = 1024
_LONE: Final = re.compile(rb"(?<!\x08)\x07")
_AFTER_FIXED: Final = re.compile(rb"\x04\x08*\x07")


class Table:
    """One table of whole clusters: where it begins (cluster), its content, and what points to it.

    ``owners`` are ``(table, byte)`` of each 8-byte pointer; without a table it
    is a byte of the header cluster.  ``length`` bytes of the content are used.
    """

    __slots__ = ("content", "length", "owners", "start")

    def __init__(self, start: int, content: bytearray, length: int) -> None:
        self.start = start
        self.content = content
        self.length = length
        self.owners: list[tuple[Table | None, int]] = []

    @property
    def words(self) -> memoryview:
        """The part that is used."""
        return memoryview(self.content)[: self.length]


class Anatomy:
    """The clusters of the image in *storage*; *moving* says that guest data may move.

    Raises: CorruptImage, FormatError, StorageError.
    """

    def __init__(self, storage: Storage, header: Header, *, moving: bool) -> None:
        self.storage = storage
        self.header = header
        self.size = header.cluster_size
        self.bits = header.cluster_bits
        self.stride = 16 if header.extended_l2 else 8
        self.order = header.refcount_order
        self.per_block = self.size * 8 >> self.order
        self.tables: dict[int, Table] = {}
        self.l1s: list[Table] = []
        self.bitmaps: list[Table] = []
        self.blocks: dict[int, bytearray] = {}
        self.count = ceil_div(storage.size, self.size)
        self.spare = 0 if getattr(storage, "is_block", False) else _SPARE
        self.kinds = bytearray(self.count + self.spare)
        self.kinds[0] = FIXED
        self._read_tables()
        self._mark(moving)

    # -- tables ------------------------------------------------------------------

    def _read_tables(self) -> None:
        header, storage = self.header, self.storage
        length = header.refcount_table_clusters * self.size
        self.refcounts = self._table(header.refcount_table_offset, length, None, _AT_REFCOUNTS)
        if header.l1_size:
            self.l1s.append(self._table(header.l1_table_offset, 8 * header.l1_size, None, _AT_L1))
        self._read_snapshots()
        places = self._extension_places()
        if header.crypto is not None:
            self._table(header.crypto.offset, header.crypto.length, None, places[EXT_CRYPTO])
        if header.bitmaps is not None and header.bitmaps_valid:
            size = header.bitmaps.directory_size
            directory = self._table(header.bitmaps.directory_offset, size, None, places[EXT_BITMAPS] + 16)
            at = 0
            for bitmap in read_bitmaps(storage, header):
                self.bitmaps.append(self._table(bitmap.table_offset, 8 * bitmap.table_size, directory, at))
                at += len(bitmap.pack())

    def _read_snapshots(self) -> None:
        entries = read_snapshots(self.storage, self.header)
        if not entries:
            return
        table = self._table(self.header.snapshots_offset, snapshot_table_size(entries), None, _AT_SNAPSHOTS)
        at = 0
        for entry in entries:
            check_snapshot_l1(entry, self.size, self.storage)
            if entry.l1_size:
                self.l1s.append(self._table(entry.l1_table_offset, 8 * entry.l1_size, table, at))
            at = round_up(at + snapshot_table_size([entry]), 8)

    def _extension_places(self) -> dict[int, int]:
        """Where the data of each header extension begins."""
        area = bytearray(self.size)
        self.storage.read_into(0, [area])
        start, end = self.header.header_length, self.header.backing_file_offset or self.size
        return {kind: at for kind, at, _ in walk_extensions(bytes(area), start, end, path=self.storage.name)}

    def _table(self, offset: int, length: int, owner: Table | None, at: int) -> Table:
        start = offset >> self.bits
        table = self.tables.get(start)
        if offset % self.size or not length or start + ceil_div(length, self.size) > self.count:
            raise self._broken(offset)
        if table is None or table.length < length:
            content = bytearray(round_up(length, self.size))
            self.storage.read_into(offset, [content])
            if table is None:
                table = self.tables[start] = Table(start, content, length)
            else:
                table.content, table.length = content, length
        table.owners.append((owner, at))
        return table

    # -- clusters ----------------------------------------------------------------

    def _mark(self, moving: bool) -> None:
        kinds = self.kinds
        if not self.header.has_data_file:
            for offset, table in self.l2_tables():
                if not mark_table(kinds, table, self.bits, self.stride):
                    raise self._broken(offset)
            kinds[1:] = _AFTER_FIXED.sub(lambda match: bytes([FIXED]) * len(match[0]), kinds[1:])
            kinds[:] = _LONE.sub(bytes([ALONE]), kinds)
            if not moving:
                kinds[:] = kinds.replace(bytes([DATA_CLUSTER]), bytes([FIXED]))
        for offset in self.l2_offsets():
            self._set(offset, TABLE_CLUSTER)
        for bitmap in self.bitmaps:
            for word in struct.unpack(f">{bitmap.length // 8}Q", bitmap.words):
                if word & OFFSET_MASK:
                    self._set(word & OFFSET_MASK, BITS)
        for item in self.tables.values():
            whole = all(at % 8 == 0 for _, at in item.owners)
            for cluster in range(item.start, item.start + (len(item.content) >> self.bits)):
                if kinds[cluster]:
                    raise self._broken(cluster << self.bits)
                kinds[cluster] = ITEM if whole else FIXED
        self._mark_counts()

    def _mark_counts(self) -> None:
        kinds = self.kinds
        for index in range(self.refcounts.length // 8):
            offset = self.block_offset(index)
            if offset:
                self._set(offset, BLOCK_CLUSTER)
                self.blocks[index] = bytearray(self.size)
                self.storage.read_into(offset, [self.blocks[index]])
        for index in range(ceil_div(len(kinds), self.per_block)):
            first = index * self.per_block
            if index in self.blocks:
                if not add_counts(kinds, self.blocks[index], self.order, first):
                    raise self._broken(first << self.bits)
            else:
                # Without a block they cannot be taken.
                last = min(first + self.per_block, len(kinds))
                kinds[first:last] = bytes([UNCOUNTED]) * (last - first)

    def _set(self, offset: int, kind: int) -> None:
        cluster = offset >> self.bits
        if offset % self.size or cluster >= self.count or self.kinds[cluster] not in (FREE, kind):
            raise self._broken(offset)
        self.kinds[cluster] = kind

    def _broken(self, offset: int) -> CorruptImage:
        return CorruptImage(f"the metadata about the cluster at {offset:#x} contradicts itself", path=self.storage.name)

    # -- for whoever moves them -----------------------------------------------------

    def block_offset(self, index: int) -> int:
        """Where refcount block *index* lies (bytes), or 0."""
        return int.from_bytes(self.refcounts.content[8 * index : 8 * index + 8], "big") & REFCOUNT_TABLE_OFFSET_MASK

    def l2_weights(self) -> Counter[int]:
        """How many entries of all L1 tables name each L2 table (bytes)."""
        found: Counter[int] = Counter()
        for l1 in self.l1s:
            found.update(word & OFFSET_MASK for word in struct.unpack(f">{l1.length // 8}Q", l1.words))
        del found[0]
        return found

    def l2_offsets(self) -> list[int]:
        """Every L2 table's offset, once, in file order."""
        return sorted(self.l2_weights())

    def l2_tables(self) -> Iterator[tuple[int, bytearray]]:
        """Every L2 table with its offset, once, in file order."""
        for offset in self.l2_offsets():
            if offset % self.size or offset >> self.bits >= self.count + self.spare:
                raise self._broken(offset)
            table = bytearray(self.size)
            self.storage.read_into(offset, [table])
            yield offset, table
