# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Leases of a pool that only this host uses: locks of local files.

The default where no sanlock runs.  The kernel is the daemon here: it frees a
lock when the last process that has it ends, so there is nothing to renew and
nothing to settle.

Invariant: S1 also against hosts with sanlock.  A lockspace in which any host
id is renewed while we watch, for as long as that host could be late, is
refused; one in which a host appears later ends the leases held here at their
next proof; a lease held in the form of older versions is refused.  Locks and
other forms are never mixed on one domain.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from typing import Final

from qcowlib.errors import StorageError
from qcowlib.units import MiB
from storage_pool.lease_records import parse_leader
from storage_pool.leases import HostState, Lease, LeaseArea, LeaseOwner

from .errors import LeaseError, LeaseHeld
from .host_records import io_timeout_of, open_area, refuse_older_form
from .proof import LeaseProof
from .timing import LeaseTiming

__all__ = ["EmbeddedLeases", "live_hosts"]

_HOSTS: Final = 2000
_LOOK_S: Final = 1.0
#: Where a record has its time; most records have none.
_TIMESTAMP: Final = slice(152, 160)


def _stamps(area: LeaseArea) -> tuple[dict[int, tuple[int, int]], float]:
    """Return (generation, timestamp) of each host id in use, and the longest I/O timeout among them."""
    storage = open_area(area)
    try:
        data = bytearray(4096)
        storage.read_into(area.offset, [data])
        first = parse_leader(bytes(data))
        if first is None or not first.lockspace:
            return {}, 0.0
        table = bytearray(first.alignment)
        storage.read_into(area.offset, [table])
    finally:
        storage.close()
    found = {}
    timeout_s = 0.0
    for number in range(min(_HOSTS, len(table) // first.sector_size)):
        start = number * first.sector_size
        record = bytes(table[start : start + 512])
        if not any(record[_TIMESTAMP]):
            continue
        leader = parse_leader(record)
        if leader is not None and leader.timestamp:
            found[number + 1] = leader.owner_generation, leader.timestamp
            timeout_s = max(timeout_s, float(io_timeout_of(record)))
    return found, timeout_s


def live_hosts(area: LeaseArea, sleep: Callable[[float], None]) -> list[int]:
    """Return the host ids that are renewed in a lockspace; waits until none of the others can be late.

    Returns at once when no host id is in use, and as soon as one was renewed.
    """
    before, timeout_s = _stamps(area)
    if not before:
        return []
    waited_s = 0.0
    while waited_s < LeaseTiming(timeout_s).limit_s:
        sleep(_LOOK_S)
        waited_s += _LOOK_S
        now, _ = _stamps(area)
        changed = [host for host, stamp in now.items() if before.get(host) != stamp]
        if changed:
            return changed
    return []


def _used_by(host_id: int, area: LeaseArea) -> LeaseHeld:
    hint = "Install and start sanlock on this host too."
    return LeaseHeld(f"host {host_id} uses this domain through sanlock", path=area.path, hint=hint)


class EmbeddedLeases:
    """A :class:`~spm.proof.ProvingLeases` on files in *folder*, which must be local to this host."""

    def __init__(self, folder: str, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._folder = folder
        self._clock = clock
        self._sleep = sleep
        self._joined: dict[str, int] = {}
        #: Where each lockspace is, and what its records were when it was joined.
        self._found: dict[str, tuple[LeaseArea, dict[int, tuple[int, int]]]] = {}
        self._held: dict[Lease, tuple[int, LeaseOwner]] = {}

    def join(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`~storage_pool.leases.Leases`.  Raises: LeaseHeld when sanlock is at work on the domain."""
        hosts = live_hosts(area, self._sleep)
        if hosts:
            raise _used_by(hosts[0], area)
        self._found[lockspace] = area, _stamps(area)[0]
        self._joined[lockspace] = host_id

    def _others(self, lockspace: str) -> list[int]:
        """Return the host ids that came or were renewed since the lockspace was joined."""
        area, before = self._found[lockspace]
        now, _ = _stamps(area)
        return [host for host, stamp in now.items() if before.get(host) != stamp]

    def leave(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`~storage_pool.leases.Leases`."""
        self._joined.pop(lockspace, None)

    def host_state(self, lockspace: str, host_id: int) -> HostState:
        """See :class:`~storage_pool.leases.Leases`; there is only this host."""
        return "live" if self._joined.get(lockspace) == host_id else "free"

    def members(self, lockspace: str) -> list[int]:
        """See :class:`~spm.proof.ProvingLeases`; there is only this host."""
        return [self._joined[lockspace]] if lockspace in self._joined else []

    def _open(self, lease: Lease) -> int:
        key = f"{lease.lockspace}/{lease.name}".encode()
        path = f"{self._folder}/{hashlib.sha256(key).hexdigest()[:32]}.lock"
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StorageError.from_os(error, path=path, operation="open") from error

    def acquire(self, lease: Lease, *, shared: bool = False) -> LeaseOwner:
        """See :class:`~storage_pool.leases.Leases`."""
        if lease.lockspace not in self._joined:
            raise LeaseError(f"the lockspace {lease.lockspace} was not joined")
        if lease in self._held:
            raise LeaseHeld(f"the lease {lease.name} is held here already")
        others = self._others(lease.lockspace)
        if others:
            raise _used_by(others[0], lease.area)
        refuse_older_form(lease, MiB)
        fd = self._open(lease)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            text = os.pread(fd, 20, 0)
            version = (int(text) if text.isdigit() else 0) + 1
            if not shared:
                os.pwrite(fd, b"%020d" % version, 0)
                os.fsync(fd)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LeaseHeld(f"the lease {lease.name} is held by another process") from error
            raise StorageError.from_os(error, path=lease.name, operation="lock") from error
        owner = LeaseOwner(self._joined[lease.lockspace], 1, version)
        self._held[lease] = fd, owner
        return owner

    def release(self, lease: Lease) -> None:
        """See :class:`~storage_pool.leases.Leases`; one that is not held is fine."""
        fd, _ = self._held.pop(lease, (-1, None))
        if fd >= 0:
            os.close(fd)

    def owner(self, lease: Lease) -> LeaseOwner | None:
        """See :class:`~storage_pool.leases.Leases`."""
        if lease in self._held:
            return self._held[lease][1]
        fd = self._open(lease)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            text = os.pread(fd, 20, 0)
            return LeaseOwner(self._joined.get(lease.lockspace, 1), 1, int(text) if text.isdigit() else 0)
        finally:
            os.close(fd)
        return None

    def prove(self, lease: Lease) -> LeaseProof:
        """See :class:`~spm.proof.ProvingLeases`."""
        held = self._held.get(lease)
        others = self._others(lease.lockspace) if held else []
        if others:
            return LeaseProof(self._clock(), 1, LeaseOwner(others[0], 0, 0))
        return LeaseProof(self._clock(), 1, held[1] if held else None)

    def connected(self) -> bool:
        """See :class:`~spm.proof.ProvingLeases`."""
        return True

    def drop(self, lease: Lease) -> None:
        """See :class:`~spm.proof.ProvingLeases`."""
        self.release(lease)

    def settle_s(self, lease: Lease) -> float:
        """See :class:`~spm.proof.ProvingLeases`."""
        return 0.0

    def filenos(self) -> list[int]:
        """Return the locks, for helper programs to inherit: a lock is free when its last process ends."""
        return [fd for fd, _ in self._held.values()]
