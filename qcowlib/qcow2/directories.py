# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Reading the header and the small tables it points at (blocking).

Invariant: nothing else of the image is read, and no compiled module is needed:
this is what ``info`` costs.  Sizes are bounded before anything is allocated.
"""

from __future__ import annotations

from qcowlib.errors import CorruptImage
from qcowlib.ondisk.bitmaps import BitmapEntry, parse_bitmap_directory
from qcowlib.ondisk.constants import MAX_L1_BYTES
from qcowlib.ondisk.header import HEADER_READ, Header, header_read_size
from qcowlib.ondisk.snapshots import ShortTable, SnapshotEntry, parse_snapshots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

__all__ = ["check_snapshot_l1", "read_bitmaps", "read_header", "read_snapshots"]


def read_header(storage: Storage, *, writable: bool = False, repair: bool = False, no_io: bool = False) -> Header:
    """Read and check the header of *storage*; arguments as :meth:`Header.parse`."""
    size = storage.size
    data = bytearray(min(HEADER_READ, size))
    storage.read_into(0, [data])
    wanted = min(header_read_size(bytes(data)), size)
    if wanted > len(data):
        data = bytearray(wanted)
        storage.read_into(0, [data])
    return Header.parse(bytes(data), size, path=storage.name, writable=writable, repair=repair, no_io=no_io)


def read_snapshots(storage: Storage, header: Header) -> list[SnapshotEntry]:
    """Read the snapshot table, in growing pieces.  Raises FormatError, StorageError."""
    if header.nb_snapshots == 0:
        return []
    length = 4096
    while True:
        data = bytearray(length)
        storage.read_into(header.snapshots_offset, [data])
        try:
            return parse_snapshots(bytes(data), header.nb_snapshots, path=storage.name)
        except ShortTable as short:
            length = max(2 * length, short.needed)


def check_snapshot_l1(entry: SnapshotEntry, cluster_size: int, storage: Storage) -> None:
    """Raise CorruptImage, in qemu's words, unless the L1 table of a snapshot can be read."""
    length = 8 * entry.l1_size
    if length > MAX_L1_BYTES:
        raise CorruptImage("Snapshot L1 table too large", path=storage.name)
    if entry.l1_table_offset % cluster_size or (length and entry.l1_table_offset + length > storage.size):
        raise CorruptImage("Snapshot L1 table offset invalid", path=storage.name)


def read_bitmaps(storage: Storage, header: Header) -> list[BitmapEntry]:
    """Read the bitmap directory; empty where it cannot be trusted.  Raises FormatError, StorageError."""
    if header.bitmaps is None or not header.bitmaps_valid:
        return []
    extension = header.bitmaps
    data = bytearray(extension.directory_size)
    storage.read_into(extension.directory_offset, [data])
    return list(
        parse_bitmap_directory(bytes(data), extension.nb_bitmaps, header.size, header.cluster_bits, path=storage.name)
    )
