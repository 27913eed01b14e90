# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Persistent dirty bitmaps at rest: reading them, and bits kept by pages.

Invariants: a bitmap in use was not saved by its last writer and is never read;
a table is read only after its size was found to be what the virtual size
needs, and an entry is followed only after it was checked (I9); memory is one
table and one page (a cluster of bits) while ranges are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from qcowlib.errors import CorruptImage, UsageError, printable
from qcowlib.native import bitmap_merge, bitmap_runs, bitmap_set
from qcowlib.ondisk import (
    MAX_BITMAP_BYTES,
    MAX_BITMAP_NAME,
    BitmapEntry,
    bitmap_table_entries,
)
from qcowlib.ondisk.constants import MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS
from qcowlib.units import KiB, ceil_div, round_up

if TYPE_CHECKING:
    from qcowlib.ondisk import Header
    from qcowlib.storage.base import Storage

__all__ = [
    "ALL_ONES",
    "AUTO",
    "IN_USE",
    "Pages",
    "Table",
    "default_granularity",
    "dirty_ranges",
    "find_bitmap",
    "granularity_bits",
    "new_entry",
    "usable",
]

IN_USE: Final = 1
AUTO: Final = 2
#: A table entry that stands for a page of ones without space.
ALL_ONES: Final = 1

_ABSENT: Final = bytearray()
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_RESERVED: Final = 0xFF00_0000_0000_01FE


class Pages:
    """Bits of one granularity, in pages of ``page_bits``; only pages with a bit set are there.

    A page is a bytearray, or ``None`` when all its bits are set.
    """

    __slots__ = ("granularity_bits", "page_bits", "pages")

    def __init__(self, granularity_bits: int, cluster_bits: int) -> None:
        self.granularity_bits = granularity_bits
        self.page_bits = 8 << cluster_bits
        self.pages: dict[int, bytearray | None] = {}

    def add(self, offset: int, length: int) -> None:
        """Set the bits of *length* guest bytes at *offset*."""
        if length <= 0:
            return
        first = offset >> self.granularity_bits
        last = (offset + length - 1) >> self.granularity_bits
        size = self.page_bits
        while first <= last:
            index, start = divmod(first, size)
            count = min(last + 1 - first, size - start)
            first += count
            if count == size:
                self.pages[index] = None
                continue
            page = self.pages.get(index, _ABSENT)
            if page is _ABSENT:
                page = self.pages[index] = bytearray(size // 8)
            if page is not None:
                bitmap_set(page, start, count)


class Table:
    """The table of a bitmap in memory, all zeros for one that has no place yet.

    Entries are as on storage; raises CorruptImage for one that cannot be.
    """

    __slots__ = ("_header", "_storage", "data", "entry")

    def __init__(self, storage: Storage, header: Header, entry: BitmapEntry) -> None:
        self._storage = storage
        self._header = header
        self.entry = entry
        self.data = bytearray(8 * entry.table_size)
        if entry.table_offset == 0:
            return
        if entry.table_offset + len(self.data) > round_up(storage.size, header.cluster_size):
            raise self._broken()
        storage.read_into(entry.table_offset, [self.data])

    def __len__(self) -> int:
        return len(self.data) // 8

    def __getitem__(self, index: int) -> int:
        """The entry of one page: 0, ``ALL_ONES`` or the offset of its cluster."""
        value = int.from_bytes(self.data[8 * index : 8 * index + 8], "big")
        place = value & _OFFSET
        if value & _RESERVED or (place and (value & 1 or not self._inside(place))):
            raise self._broken()
        return value

    def _inside(self, place: int) -> bool:
        return place % self._header.cluster_size == 0 and place < self._storage.size

    def __setitem__(self, index: int, value: int) -> None:
        self.data[8 * index : 8 * index + 8] = value.to_bytes(8, "big")

    def _broken(self) -> CorruptImage:
        name = printable(self.entry.name)
        return CorruptImage(
            f"Could not read bitmap_table table from image for bitmap '{name}'", path=self._storage.name
        )

    def page(self, index: int) -> bytearray | None:
        """The bits of a page (a copy), ``None`` for all ones."""
        value = self[index]
        if value == ALL_ONES:
            return None
        page = bytearray(self._header.cluster_size)
        if value:
            self._storage.read_into(value, [page])
        return page

    def resize(self, count: int) -> None:
        """Cut, or lengthen with empty pages."""
        self.data = self.data[: 8 * count].ljust(8 * count, b"\0")


def find_bitmap(entries: list[BitmapEntry], name: str, path: str) -> BitmapEntry:
    """Return the entry called *name*; raises UsageError with qemu's words."""
    key = name.encode(errors="surrogateescape")
    for entry in entries:
        if entry.name == key:
            return entry
    raise UsageError(f"Dirty bitmap '{printable(name)}' not found", path=path)


def usable(entry: BitmapEntry, path: str) -> BitmapEntry:
    """Return *entry*; raises UsageError with qemu's words unless its contents may be used."""
    if entry.in_use:
        raise UsageError(
            f"Bitmap '{printable(entry.name)}' is inconsistent and cannot be used",
            path=path,
            hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
        )
    return entry


def default_granularity(cluster_size: int) -> int:
    """Bytes a bit when the caller does not say.  Source: qemu, the cluster size between 4 and 64 KiB."""
    return max(4 * KiB, min(cluster_size, 64 * KiB))


def granularity_bits(granularity: int) -> int:
    """Return log2 of *granularity*; raises UsageError with qemu's words."""
    bits = granularity.bit_length() - 1
    if granularity <= 0 or granularity & (granularity - 1) or not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        raise UsageError("Granularity must be power of 2 and at least 512")
    return bits


def new_entry(header: Header, name: str, granularity: int | None, flags: int, path: str) -> BitmapEntry:
    """Return the entry of a new bitmap, its table still without a place.  Raises UsageError with qemu's words."""
    key = name.encode(errors="surrogateescape")
    if not key:
        raise UsageError("Bitmap name cannot be empty", path=path)
    bits = granularity_bits(default_granularity(header.cluster_size) if granularity is None else granularity)
    refused = f"Can't make bitmap '{printable(name)}' persistent in '{path}': "
    if header.version < 3:
        raise UsageError(refused + "Cannot store dirty bitmaps in qcow2 v2 files", path=path)
    if len(key) > MAX_BITMAP_NAME:
        raise UsageError(refused + f"Name length exceeds maximum ({MAX_BITMAP_NAME} characters)", path=path)
    count = bitmap_table_entries(header.virtual_size, bits, header.cluster_bits)
    if count << header.cluster_bits > MAX_BITMAP_BYTES:
        raise UsageError(refused + "Too much space will be occupied by the bitmap. Use larger granularity", path=path)
    if count == 0:
        raise UsageError(refused + "the image has no bytes", path=path)
    return BitmapEntry(key, bits, 0, count, flags)


def dirty_ranges(
    storage: Storage, header: Header, entry: BitmapEntry, extra: Pages | None = None, since: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield ``(guest offset, length)`` of what the bitmap (or *extra*) has set, joined, in order (blocking).

    Pages that lie wholly before guest offset *since* are not looked at.
    """
    size = header.virtual_size
    if entry.table_size != bitmap_table_entries(size, entry.granularity_bits, header.cluster_bits):
        raise CorruptImage(f"Could not read bitmap '{printable(entry.name)}' from image", path=storage.name)
    table = Table(storage, header, entry)
    start = end = 0
    total, page_bits = ceil_div(size, entry.granularity), 8 << header.cluster_bits
    for first, count in _runs(table, extra, total, page_bits, (since >> entry.granularity_bits) // page_bits):
        low = first << entry.granularity_bits
        high = min((first + count) << entry.granularity_bits, size)
        if low == end and start != end:
            end = high
            continue
        if start != end:
            yield start, end - start
        start, end = low, high
    if start != end:
        yield start, end - start


def _runs(table: Table, extra: Pages | None, total: int, page_bits: int, page_from: int) -> Iterator[tuple[int, int]]:
    """Yield runs of set bits below *total*, page by page."""
    recorded = extra.pages if extra is not None else {}
    for index in range(page_from, len(table)):
        base = index * page_bits
        count = min(page_bits, total - base)
        more = recorded.get(index, b"")
        if table[index] == 0 and more == b"":
            continue
        page = None if more is None else table.page(index)
        if page is None:
            yield base, count
            continue
        if more:
            bitmap_merge(page, more)
        for first, length in bitmap_runs(page, 0, count):
            yield base + first, length
