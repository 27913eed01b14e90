# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The directory of persistent bitmaps.

Invariant: an entry that :func:`parse_bitmap_directory` returns is within the
limits, so that its table may be read.

====== ==== =================================================================
offset size field of an entry
====== ==== =================================================================
0      8    bitmap table offset
8      4    bitmap table entries
12     4    flags: 0 in use, 1 auto, 2 extra data compatible
16     1    type, 1 = dirty tracking
17     1    granularity bits
18     2    length of the name
20     4    length of the extra data
24     ..   extra data, name, padding to 8
====== ==== =================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from qcowlib.errors import FormatError, printable
from qcowlib.ondisk.constants import (
    INT64_MAX,
    MAX_BITMAP_BYTES,
    MAX_BITMAP_DIRECTORY,
    MAX_BITMAP_NAME,
    MAX_BITMAP_TABLE,
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
)
from qcowlib.units import ceil_div, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from qcowlib.records import NamedTuple


__all__ = ["BitmapEntry", "bitmap_table_entries", "pack_bitmap_directory", "parse_bitmap_directory"]

_HEAD = Struct(">QIIBBHI")
_IN_USE = 1
_AUTO = 2
_DIRTY_TRACKING = 1


class BitmapEntry(NamedTuple):
    """One persistent bitmap; ``table_size`` in entries, ``table_offset`` in bytes."""

    name: bytes
    granularity_bits: int
    table_offset: int
    table_size: int
    flags: int = 0
    type: int = _DIRTY_TRACKING

    @property
    def in_use(self) -> bool:
        """Not saved by its last writer: the contents are not to be used."""
        return bool(self.flags & _IN_USE)

    @property
    def auto(self) -> bool:
        """Enabled: every write must be recorded."""
        return bool(self.flags & _AUTO)

    @property
    def granularity(self) -> int:
        """Guest bytes per bit."""
        return 1 << self.granularity_bits

    def pack(self) -> bytes:
        """Return the directory entry padded to 8."""
        head = _HEAD.pack(
            self.table_offset, self.table_size, self.flags, self.type, self.granularity_bits, len(self.name), 0
        )
        data = head + self.name
        return data.ljust(round_up(len(data), 8), b"\0")


def bitmap_table_entries(size: int, granularity_bits: int, cluster_bits: int) -> int:
    """Return how many clusters of bits a virtual size of *size* bytes needs."""
    bits = ceil_div(size, 1 << granularity_bits)
    return ceil_div(ceil_div(bits, 8), 1 << cluster_bits)


def _acceptable(entry: BitmapEntry, size: int, cluster_bits: int) -> bool:
    table_bytes = entry.table_size << cluster_bits
    covered = (table_bytes * 8) << entry.granularity_bits
    return (
        0 < len(entry.name) <= MAX_BITMAP_NAME
        and entry.type == _DIRTY_TRACKING
        and not entry.flags & ~(_IN_USE | _AUTO)
        and MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS
        and 0 < entry.table_size <= MAX_BITMAP_TABLE
        and table_bytes <= MAX_BITMAP_BYTES
        and 0 < entry.table_offset <= INT64_MAX - table_bytes
        and entry.table_offset % (1 << cluster_bits) == 0
        # A bitmap in use may be of another size: a resize was not saved.
        and (entry.in_use or covered >= size)
    )


def parse_bitmap_directory(
    data: bytes | memoryview, count: int, size: int, cluster_bits: int, *, path: str | None = None
) -> list[BitmapEntry]:
    """Return the *count* entries of a directory of exactly ``len(data)`` bytes.

    *size* is the virtual size in bytes.  Raises: FormatError for a broken or
    too large directory, or an entry outside the limits.
    """
    if not data:
        raise FormatError("Requested bitmap_directory_size is zero", path=path)
    if len(data) > MAX_BITMAP_DIRECTORY:
        raise FormatError("Requested bitmap_directory_size is too big", path=path)
    entries: list[BitmapEntry] = []
    position = 0
    while position < len(data):
        if len(entries) == count:
            raise FormatError("More bitmaps found than specified in header extension", path=path)
        if len(data) - position < _HEAD.size:
            raise FormatError("Broken bitmap directory", path=path)
        offset, table_size, flags, kind, bits, name_len, extra_len = _HEAD.unpack_from(data, position)
        start = position + _HEAD.size + extra_len
        position = round_up(start + name_len, 8)
        if position > len(data):
            raise FormatError("Broken bitmap directory", path=path)
        if extra_len:
            raise FormatError("Bitmap extra data is not supported", path=path)
        entry = BitmapEntry(bytes(data[start : start + name_len]), bits, offset, table_size, flags, kind)
        if not _acceptable(entry, size, cluster_bits):
            raise FormatError(f"Bitmap '{printable(entry.name)}' doesn't satisfy the constraints", path=path)
        entries.append(entry)
    if len(entries) < count:
        raise FormatError("Less bitmaps found than specified in header extension", path=path)
    return entries


def pack_bitmap_directory(entries: Iterable[BitmapEntry]) -> bytes:
    """Return the directory; Raises: FormatError where it would pass the limit."""
    directory = b"".join(entry.pack() for entry in entries)
    if len(directory) > MAX_BITMAP_DIRECTORY:
        raise FormatError("Requested bitmap_directory_size is too big")
    return directory
