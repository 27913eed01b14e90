# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Lease records on storage: sanlock's leader records and the safelease block.

========  ======  =====================================================
offset    bytes   leader record (little endian, at sector 0 of an area)
========  ======  =====================================================
0         4       magic: 0x12212010 lockspace, 0x06152010 resource
4         4       version
8         4       flags: alignment (0x10 1 MiB ... 0x80 8 MiB)
12        4       sector size
16, 24    8, 8    number of hosts, maximum of hosts
32 - 48   8 each  owner id, owner generation, lease version
56        48      lockspace name
104       48      resource name
152       8       timestamp
168       4       CRC-32C of bytes 0 to 167
174       2       I/O timeout in seconds (lockspaces)
========  ======  =====================================================

A host's block, at sector ``1 + host id`` of a resource, ends its bid: at byte
16 owner id, generation, timestamp and lease version (8 each), at 52 flags (4),
of which bit 0 says that this owner gave the lease back.

Invariant: records made here are what the daemon's own initialisation writes,
so a host with sanlock can use them; an area is written in full, so that a
renewal never has to allocate.

Source: records written by sanlock 3.8.5; the safelease tool of 2011.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from qcowlib.units import MiB

from .errors import InvalidName, MetadataError, printable

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

__all__ = [
    "SAFELEASE_SIZE",
    "Leader",
    "SafeleaseTag",
    "crc32c",
    "leader_trouble",
    "left_host_record",
    "lockspace_area",
    "parse_leader",
    "read_leader",
    "released",
    "resource_area",
    "write_area",
]

LOCKSPACE_MAGIC: Final = 0x12212010
RESOURCE_MAGIC: Final = 0x06152010
REQUEST_MAGIC: Final = 0x08292011
_LOCKSPACE_VERSION: Final = 0x00030004
_RESOURCE_VERSION: Final = 0x00060004
_REQUEST_VERSION: Final = 0x00010001
_LEADER: Final = struct.Struct("<IIIIQQQQQ48s48sQ")
_BID: Final = struct.Struct("<16xQQQQ4xI")
_RELEASED: Final = 1

_CHECKED: Final = 168
_ALIGN_FLAGS: Final = {MiB: 0x10, 2 * MiB: 0x20, 4 * MiB: 0x40, 8 * MiB: 0x80}
NAME_LIMIT: Final = 48
#: Seconds per I/O with which hosts of these domains run.
IO_TIMEOUT_S: Final = 10


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE: Final = _crc_table()


def crc32c(data: bytes) -> int:
    """Return the daemon's CRC-32C: start value ~1, no final inversion."""
    crc = 0xFFFFFFFE
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc


class Leader(NamedTuple):
    """A leader record as read; *valid* tells whether its checksum fits."""

    lockspace: bool
    sector_size: int
    alignment: int
    owner_id: int
    owner_generation: int
    version: int
    space_name: str
    resource_name: str
    timestamp: int
    valid: bool


def _name(text: str) -> bytes:
    data = text.encode()
    if len(data) > NAME_LIMIT or b"\0" in data:
        raise InvalidName(f"a lease name has at most {NAME_LIMIT} bytes")
    return data


def max_hosts(block_size: int, alignment: int) -> int:
    """Return how many hosts an area has room for.  Raises: InvalidName."""
    if alignment not in _ALIGN_FLAGS or block_size not in (512, 4096):
        raise InvalidName(f"no leases with blocks of {block_size} and alignment {alignment}")
    return 2000 if block_size == 512 else min(2000, alignment // MiB * 250)


def _leader(
    magic: int,
    version: int,
    block_size: int,
    alignment: int,
    hosts: tuple[int, int],
    names: tuple[str, str],
    timeout_s: int,
    owner: tuple[int, int] = (0, 0),
) -> bytes:
    head = _LEADER.pack(
        magic, version, _ALIGN_FLAGS[alignment], block_size, *hosts, *owner, 0, _name(names[0]), _name(names[1]), 0
    )
    head = head.ljust(_CHECKED, b"\0")
    return head + struct.pack("<IHH", crc32c(head), 0, timeout_s)


def lockspace_area(
    name: str, *, block_size: int = 512, alignment: int = MiB, io_timeout_s: int = IO_TIMEOUT_S
) -> bytes:
    """Return the area, one alignment long, of an empty lockspace whose hosts run with *io_timeout_s*."""
    hosts = max_hosts(block_size, alignment)
    record = _leader(LOCKSPACE_MAGIC, _LOCKSPACE_VERSION, block_size, alignment, (0, 1), (name, ""), io_timeout_s)
    return (record.ljust(block_size, b"\0") * hosts).ljust(alignment, b"\0")


def left_host_record(
    lockspace: str, host_id: int, generation: int, *, block_size: int, alignment: int, io_timeout_s: int
) -> bytes:
    """Return the sector of a host id whose host left the lockspace after *generation*."""
    names, owner = (lockspace, ""), (host_id, generation)
    record = _leader(LOCKSPACE_MAGIC, _LOCKSPACE_VERSION, block_size, alignment, (0, 1), names, io_timeout_s, owner)
    return record.ljust(block_size, b"\0")


def resource_area(lockspace: str, name: str, *, block_size: int = 512, alignment: int = MiB) -> bytes:
    """Return the area, one alignment long, of a free resource.

    With empty names the area belongs to nobody and cannot be acquired.
    """
    hosts = max_hosts(block_size, alignment)
    leader = _leader(
        RESOURCE_MAGIC, _RESOURCE_VERSION, block_size, alignment, (hosts, hosts), (lockspace, name), 0
    ).ljust(block_size, b"\0")
    request = struct.pack("<II", REQUEST_MAGIC, _REQUEST_VERSION).ljust(block_size, b"\0")
    return (leader + request).ljust(alignment, b"\0")


def parse_leader(data: bytes) -> Leader | None:
    """Return the leader record at the start of *data*, ``None`` when there is none."""
    if len(data) < _CHECKED + 8:
        return None
    fields = _LEADER.unpack_from(data)
    magic, _version, flags, sector_size, _hosts, _max, owner, generation, lver, space, resource, timestamp = fields
    if magic not in (LOCKSPACE_MAGIC, RESOURCE_MAGIC):
        return None
    alignment = next((size for size, flag in _ALIGN_FLAGS.items() if flags & flag), MiB)
    (stored,) = struct.unpack_from("<I", data, _CHECKED)
    return Leader(
        magic == LOCKSPACE_MAGIC,
        sector_size,
        alignment,
        owner,
        generation,
        lver,
        space.rstrip(b"\0").decode("utf-8", "replace"),
        resource.rstrip(b"\0").decode("utf-8", "replace"),
        timestamp,
        stored == crc32c(data[:_CHECKED]),
    )


def read_leader(storage: Storage, offset: int) -> Leader | None:
    """Return the leader record at *offset*, ``None`` when there is none."""
    data = bytearray(512)
    storage.read_into(offset, [data])
    return parse_leader(bytes(data))


def leader_trouble(
    leader: Leader | None, space: str, resource: str = "", *, lockspace: bool = False, block_size: int, alignment: int
) -> str | None:
    """Say why nobody can use a record as that of lockspace *space* or its *resource*, ``None`` when it is good."""
    if leader is None:
        return "is not there"
    if leader.lockspace != lockspace:
        return "is a record of another kind"
    if not leader.valid:
        return "has a wrong checksum"
    if leader.space_name != space:
        return f"is of lockspace '{printable(leader.space_name)}'"
    if not lockspace and leader.resource_name != resource:
        return f"is named '{printable(leader.resource_name)}'"
    if (leader.sector_size, leader.alignment) != (block_size, alignment):
        return f"is for blocks of {leader.sector_size} bytes and areas of {leader.alignment}"
    return None


def released(leader: Leader, block: bytes) -> bool:
    """Whether *block*, that of the owner of *leader*, says that this very lease was given back.

    The daemon clears only leaders that it wrote itself.  Where two hosts bid
    at once the loser may have written the winner's, which then stays.
    """
    owner, generation, timestamp, version, flags = _BID.unpack_from(block)
    bid = (owner, generation, timestamp, version)
    given = (leader.owner_id, leader.owner_generation, leader.timestamp, leader.version)
    return bool(flags & _RELEASED) and bid == given


def write_area(storage: Storage, offset: int, data: bytes) -> None:
    """Write an area durably.  Nobody may hold the lease."""
    storage.write(offset, [data])
    storage.flush()


#: Bytes of the block at offset 0 of ``leases``; only the first 32 are used.
SAFELEASE_SIZE: Final = 512
_FREE_ID: Final = b"------FREE------"
_FREE_STAMP: Final = b"0" * 16


class SafeleaseTag(NamedTuple):
    """The lock of V1 and V2 domains: a host id and a time in microseconds, or free (``None``)."""

    host_id: int | None
    timestamp_us: int = 0

    def pack(self) -> bytes:
        """Return the 512 byte block.  Raises: InvalidName."""
        if self.host_id is None:
            return (_FREE_ID + _FREE_STAMP).ljust(SAFELEASE_SIZE, b"\0")
        if not 0 < self.host_id < 2**31 or not 0 <= self.timestamp_us < 2**64:
            raise InvalidName(f"no safelease for host id {self.host_id} and time {self.timestamp_us}")
        return f"{self.host_id:<16d}{self.timestamp_us:016x}".encode().ljust(SAFELEASE_SIZE, b"\0")

    @classmethod
    def parse(cls, data: bytes, path: str | None = None) -> SafeleaseTag:
        """Read a block; one of zeros is free.  Raises: MetadataError."""
        head, stamp = data[:16], data[16:32]
        if head == _FREE_ID or not any(data[:32]):
            return cls(None)
        digits = head.rstrip(b" ")
        hexadecimal = stamp.isalnum() and len(stamp) == 16 and not set(stamp.lower()) - set(b"0123456789abcdef")
        if not digits.isdigit() or not hexadecimal:
            raise MetadataError("the block of the domain's lock is neither free nor held", path=path)
        return cls(int(digits), int(stamp, 16))
