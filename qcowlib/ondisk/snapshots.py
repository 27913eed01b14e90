# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The table of internal snapshots.

Invariant: count, table size and extra data are bounded before anything is
kept; extra data past what we know survives a rewrite.

Entries of variable length, each at a multiple of 8 from the table's start:

====== ==== =================================================================
offset size field
====== ==== =================================================================
0      8    L1 table offset
8      4    L1 entries
12     2    length of the id
14     2    length of the name
16     8    date: u32 seconds, u32 nanoseconds
24     8    guest run time, nanoseconds
32     4    VM state size, 0 if it needs 64 bits
36     4    length of the extra data
40     ..   extra data: u64 VM state size, u64 disk size, u64 instruction count
..     ..   id, name, padding to 8
====== ==== =================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct

from qcowlib.errors import FormatError
from qcowlib.ondisk.constants import MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE, MAX_SNAPSHOTS
from qcowlib.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from qcowlib.records import NamedTuple


__all__ = [
    "ShortTable",
    "SnapshotEntry",
    "next_snapshot_id",
    "pack_snapshots",
    "parse_snapshots",
    "snapshot_table_size",
]

_HEAD = Struct(">QIHHIIQII")
_EXTRA = Struct(">QQQ")
_NO_ICOUNT = (1 << 64) - 1


class ShortTable(Exception):
    """:func:`parse_snapshots` needs at least ``needed`` bytes from the table's start."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"need {needed} bytes")
        self.needed = needed


class SnapshotEntry(NamedTuple):
    """One internal snapshot; sizes and offsets in bytes, ``l1_size`` in entries.

    ``disk_size`` and ``icount`` are ``None`` where the image does not tell.
    ``extra_size`` is the length of the extra data found (a new entry has 24).
    """

    l1_table_offset: int
    l1_size: int
    id: bytes
    name: bytes
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int = 0
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    unknown_extra: bytes = b""
    extra_size: int = 24

    def pack(self, disk_size: int) -> bytes:
        """Return the entry padded to 8; *disk_size* stands in for an unknown one."""
        extra = _EXTRA.pack(
            self.vm_state_size,
            disk_size if self.disk_size is None else self.disk_size,
            _NO_ICOUNT if self.icount is None else self.icount,
        )
        head = _HEAD.pack(
            self.l1_table_offset,
            self.l1_size,
            len(self.id),
            len(self.name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            self.vm_state_size if self.vm_state_size < 1 << 32 else 0,
            len(extra) + len(self.unknown_extra),
        )
        data = b"".join((head, extra, self.unknown_extra, self.id, self.name))
        return data.ljust(round_up(len(data), 8), b"\0")


def parse_snapshots(
    data: bytes | memoryview, count: int, *, complete: bool = False, repair: bool = False, path: str | None = None
) -> list[SnapshotEntry]:
    """Return the *count* entries of the table that *data* begins.

    The table does not tell its own size.  Call with what one read gave; on
    :class:`ShortTable` read at least ``needed`` bytes (zeros past the end of
    the file) and call again, or pass ``complete=True`` to have the missing
    bytes taken as zeros.  With *repair* too long extra data is cut and entries
    past the size limit are dropped, as ``check -r all`` wants.
    Raises: FormatError outside the limits.
    """
    if count > MAX_SNAPSHOTS:
        raise FormatError("Snapshot table too large", path=path)
    entries: list[SnapshotEntry] = []
    position = 0

    def take(length: int) -> bytes:
        nonlocal position
        end = position + length
        if end > len(data) and not complete:
            raise ShortTable(end)
        piece = bytes(data[position:end]).ljust(length, b"\0")
        position = end
        return piece

    for index in range(count):
        position = round_up(position, 8)
        (l1_offset, l1_size, id_len, name_len, sec, nsec, clock, vm_size, extra_len) = _HEAD.unpack(take(_HEAD.size))
        if extra_len > MAX_SNAPSHOT_EXTRA and not repair:
            raise FormatError(
                f"Too much extra metadata in snapshot table entry {index}",
                path=path,
                hint="You can force-remove this extra metadata with qemu-img check -r all",
            )
        extra = take(min(extra_len, MAX_SNAPSHOT_EXTRA))
        position += extra_len - len(extra)
        if position > MAX_SNAPSHOT_TABLE and repair:
            break
        big_vm_size, disk_size, icount = _EXTRA.unpack(extra[:24].ljust(24, b"\xff"))
        id_bytes = take(id_len)
        name = take(name_len)
        if position > MAX_SNAPSHOT_TABLE:
            if repair:
                break
            raise FormatError(
                "Snapshot table is too big",
                path=path,
                hint=f"You can force-remove all {count - index} overhanging snapshots with qemu-img check -r all",
            )
        entries.append(
            SnapshotEntry(
                l1_offset,
                l1_size,
                id_bytes,
                name,
                sec,
                nsec,
                clock,
                big_vm_size if len(extra) >= 8 else vm_size,
                disk_size if len(extra) >= 16 else None,
                icount if len(extra) >= 24 and icount != _NO_ICOUNT else None,
                extra[24:],
                extra_len,
            )
        )
    return entries


def snapshot_table_size(entries: Sequence[SnapshotEntry]) -> int:
    """Return the table's length as it stands on disk: the last entry is not padded."""
    size = 0
    for entry in entries:
        size = round_up(size, 8) + _HEAD.size + entry.extra_size + len(entry.id) + len(entry.name)
    return size


def pack_snapshots(entries: Iterable[SnapshotEntry], disk_size: int) -> bytes:
    """Return the whole table; *disk_size* (bytes) is given to entries without one.

    Raises: FormatError over 64 MiB or 65,536 entries.
    """
    packed = [entry.pack(disk_size) for entry in entries]
    table = b"".join(packed)
    if len(packed) > MAX_SNAPSHOTS or len(table) > MAX_SNAPSHOT_TABLE:
        raise FormatError("Snapshot table is too big")
    return table


def next_snapshot_id(entries: Iterable[SnapshotEntry]) -> bytes:
    """Return the decimal id for a new snapshot: one above the highest number in use."""
    highest = 0
    for entry in entries:
        digits = entry.id[: len(entry.id) - len(entry.id.lstrip(b"0123456789"))]
        highest = max(highest, int(digits[:20]) if digits else 0)
    return b"%d" % (highest + 1)
