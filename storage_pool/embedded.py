# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Tokens and leases of one host, on locks of files.

Invariant: S1 on this host only.  Holding a lease here means holding a lock on
a local file; the lease areas on storage stay free, as domains are made with
them, so that a domain can be given to a cluster.  Do not use it while other
hosts change the same domain.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os

from qcowlib.errors import Busy, StorageError
from qcowlib.storage.file import FileStorage

from .errors import NotAuthorized
from .lease_records import parse_leader
from .leases import HostState, Lease, LeaseArea, LeaseOwner

__all__ = ["FileLeases", "FileToken"]


def _lock(path: str, *, shared: bool = False) -> int:
    """Return a descriptor that holds the lock of file *path*.  Raises: Busy, StorageError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError.from_os(error, path=path, operation="open") from error
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise Busy("another process changes this pool or holds this lease", path=path) from error
        raise StorageError.from_os(error, path=path, operation="lock") from error
    return fd


class FileToken:
    """The right to change a pool, held by the lock of a file, until closed.

    Raises: Busy when another process has it.
    """

    __slots__ = ("_fd", "epoch", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = _lock(path)
        text = os.pread(self._fd, 20, 0)
        self.epoch = (int(text) if text.isdigit() else 0) + 1
        os.pwrite(self._fd, b"%020d" % self.epoch, 0)
        os.fsync(self._fd)

    def check(self) -> None:
        """See :class:`~storage_pool.token.SpmToken`."""
        if self._fd < 0:
            raise NotAuthorized("the right to change the pool was given back", path=self.path)

    def close(self) -> None:
        """Give the right back."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> FileToken:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FileLeases:
    """Leases of this host, by locks in *folder*; see :class:`~storage_pool.leases.Leases` for the methods."""

    __slots__ = ("_folder", "_held")

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._held: dict[Lease, int] = {}

    def join(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """Nothing to do for one host."""

    def leave(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """Nothing to do for one host."""

    def host_state(self, lockspace: str, host_id: int) -> HostState:
        """Other hosts are not known."""
        return "unknown"

    def _path(self, lease: Lease) -> str:
        key = f"{lease.lockspace}/{lease.name}".encode()
        return f"{self._folder}/{hashlib.sha256(key).hexdigest()[:32]}.lock"

    def acquire(self, lease: Lease, *, shared: bool = False) -> LeaseOwner:
        """Take a lease.  Raises: Busy."""
        if lease in self._held:
            raise Busy(f"the lease {lease.name} is held here already")
        self._held[lease] = _lock(self._path(lease), shared=shared)
        return LeaseOwner(1, 1, 1)

    def release(self, lease: Lease) -> None:
        """Give a lease back; one that is not held is fine."""
        fd = self._held.pop(lease, -1)
        if fd >= 0:
            os.close(fd)

    def owner(self, lease: Lease) -> LeaseOwner | None:
        """Return the holder, as far as this process and the area know."""
        if lease in self._held:
            return LeaseOwner(1, 1, 1)
        storage = FileStorage.open(lease.area.path)
        try:
            data = bytearray(512)
            storage.read_into(lease.area.offset, [data])
        finally:
            storage.close()
        leader = parse_leader(bytes(data))
        if leader is None or not leader.owner_id:
            return None
        return LeaseOwner(leader.owner_id, leader.owner_generation, leader.version)
