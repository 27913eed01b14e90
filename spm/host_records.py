# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Records of host ids on storage: read around the page cache, and mended when one is damaged and its host dead.

A record with a wrong checksum keeps everybody out: its host is ended at its
next renewal and cannot come back, and nobody takes a lease that it held,
because nobody can tell whether it lives.  So who meets such a record again
and again mends it, in two steps:

1. it stood still for as long as a host may live without a renewal: it is
   claimed, by a mark outside what the checksum covers, so it stays damaged;
2. the claim stood still for a renewal period: the record is written as that
   of a host that left, under a generation that no lease has.

Invariant: S1.  A damaged record is only written by who saw it stand still for
the death of a host, the same rule by which a lease is taken.  A late claim
writes nothing but damage, which keeps everybody out; a late second step needs
a pause after which its writer counts as dead.

Source: sanlock 3.8.5, which ends a host whose record is damaged and refuses
its leases to others (measured).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from contextlib import closing
from typing import Final, NamedTuple

from qcowlib.errors import StorageError
from qcowlib.storage.file import FileStorage
from storage_pool.errors import MetadataError
from storage_pool.lease_records import SAFELEASE_SIZE, SafeleaseTag, left_host_record, parse_leader
from storage_pool.leases import Lease, LeaseArea

from .errors import LeaseHeld
from .timing import LeaseTiming

__all__ = ["Damaged", "RecordMender", "io_timeout_of", "open_area", "read_sector", "refuse_older_form"]

POOL_LEASE: Final = "SDM"
#: Bytes of a record that are read; the rest of a large sector is zero.
RECORD_SIZE: Final = 512
_CLAIM_AT: Final = 256
_CLAIM: Final = struct.Struct("<16sQQ")
_CLAIM_MARK: Final = b"qpool mends this"
_MAX_TIMEOUT_S: Final = 600
#: A generation above is part of the damage.
_MAX_GENERATION: Final = 1 << 32


def read_sector(area: LeaseArea, offset: int) -> bytes:
    """Read a record that other hosts write, around the page cache where the file allows.  Raises: StorageError."""
    storage = open_area(area)
    try:
        data = bytearray(RECORD_SIZE)
        storage.read_into(area.offset + offset, [data])
    finally:
        storage.close()
    return bytes(data)


def open_area(area: LeaseArea, *, writable: bool = False) -> FileStorage:
    """Open what other hosts write, around the page cache where the file allows.  Raises: StorageError."""
    try:
        return FileStorage.open(area.path, writable=writable, cache="none")
    except StorageError as error:
        if error.errno != errno.EINVAL:
            raise
        return FileStorage.open(area.path, writable=writable)


def refuse_older_form(lease: Lease, alignment: int) -> None:
    """Raise LeaseHeld where a host holds the pool's *lease* in the form of versions before 3.

    That is a block one *alignment* before the lease.  Raises: StorageError.
    """
    offset = lease.area.offset - alignment
    if lease.name != POOL_LEASE or offset < 0:
        return
    data = bytearray(SAFELEASE_SIZE)
    with closing(open_area(lease.area)) as storage:
        if storage.size >= offset + SAFELEASE_SIZE:
            storage.read_into(offset, [data])
    try:
        tag = SafeleaseTag.parse(bytes(data))
    except MetadataError:
        return
    if tag.host_id is not None:
        raise LeaseHeld(
            f"host {tag.host_id} holds the lease in the form of older versions",
            path=lease.area.path,
            hint="Stop that host; if it is down, free the block.",
        )


def io_timeout_of(record: bytes) -> int:
    """Return the I/O timeout, in seconds, that a record of a lockspace tells; 10 where it tells none."""
    (timeout,) = struct.unpack_from("<H", record, 174)
    return timeout or 10


class Damaged(NamedTuple):
    """A damaged record: of which host id of which lockspace, its bytes, and when they were asked for (*read_s*).

    *generation* is the last one of the host that a lease names, the sizes are those of the lockspace.
    """

    lockspace: str
    host_id: int
    area: LeaseArea
    block_size: int
    alignment: int
    data: bytes
    read_s: float
    generation: int = 0


class _Seen(NamedTuple):
    data: bytes
    since_s: float
    claimed: bool


class RecordMender:
    """What a host remembers of damaged records; *clock* gives seconds and goes on while the host sleeps."""

    def __init__(self, timing: LeaseTiming, clock: Callable[[], float]) -> None:
        self._timing = timing
        self._clock = clock
        self._seen: dict[tuple[LeaseArea, int], _Seen] = {}

    def look(self, found: Damaged, own: int) -> bool:
        """Take note of a damaged record as host *own*, and do what is due; returns whether it is mended now.

        Raises: StorageError.
        """
        key = found.area, found.host_id
        now_s = self._clock()
        seen = self._seen.get(key)
        if seen is None or seen.data != found.data:
            self._seen[key] = _Seen(found.data, now_s, claimed=False)
            return False
        wait_s = self._timing.renewal_s if seen.claimed else self._death_s(found.data)
        # Paused since the look: what was read may be old.
        if now_s - seen.since_s < wait_s or now_s - found.read_s > self._timing.gap_s:
            return False
        if seen.claimed:
            del self._seen[key]
            self._write(found, self._left(found))
            return True
        claim = bytearray(found.data)
        _CLAIM.pack_into(claim, _CLAIM_AT, _CLAIM_MARK, own, int(now_s * 1000))
        self._write(found, bytes(claim))
        self._seen[key] = _Seen(bytes(claim), self._clock(), claimed=True)
        return False

    def _death_s(self, data: bytes) -> float:
        timeout_s = max(self._timing.io_timeout_s, min(io_timeout_of(data), _MAX_TIMEOUT_S))
        return LeaseTiming(timeout_s).death_s

    @staticmethod
    def _left(found: Damaged) -> bytes:
        leader = parse_leader(found.data)
        told = leader.owner_generation if leader is not None and leader.owner_generation < _MAX_GENERATION else 0
        timeout_s = min(io_timeout_of(found.data), _MAX_TIMEOUT_S)
        return left_host_record(
            found.lockspace,
            found.host_id,
            max(told, found.generation),
            block_size=found.block_size,
            alignment=found.alignment,
            io_timeout_s=timeout_s,
        )

    @staticmethod
    def _write(found: Damaged, data: bytes) -> None:
        storage = open_area(found.area, writable=True)
        try:
            offset = found.area.offset + (found.host_id - 1) * found.block_size
            storage.write(offset, [data.ljust(found.block_size, b"\0")])
            storage.flush()
        finally:
            storage.close()
