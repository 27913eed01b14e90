# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a lease manager must give; nothing here talks to one.

Invariant: a resource has at most one exclusive holder among all hosts of a
lockspace.  The records on storage, and making them, are in
:mod:`.lease_records`; package ``spm`` has the adapters (sanlock, safelease).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

__all__ = ["HostState", "Lease", "LeaseArea", "LeaseOwner", "Leases"]

HostState = Literal["unknown", "free", "live", "fail", "dead"]


class LeaseArea(NamedTuple):
    """A place on storage: *path* (file or device) and a byte *offset* in it."""

    path: str
    offset: int


class Lease(NamedTuple):
    """A resource called *name* in *lockspace* (a domain's UUID) at *area*."""

    lockspace: str
    name: str
    area: LeaseArea


class LeaseOwner(NamedTuple):
    """Who holds a lease: host id, the host's generation, and the lease's version."""

    host_id: int
    generation: int
    version: int


class Leases(Protocol):
    """A lease manager of one host."""

    def join(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """Take *host_id* in the lockspace; may wait for its former holder to be dead."""

    def leave(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """Give the host id back."""

    def host_state(self, lockspace: str, host_id: int) -> HostState:
        """What is known of another host."""

    def acquire(self, lease: Lease, *, shared: bool = False) -> LeaseOwner:
        """Take the lease; raises when another live host holds it."""

    def release(self, lease: Lease) -> None:
        """Give the lease back."""

    def owner(self, lease: Lease) -> LeaseOwner | None:
        """Return who holds it, ``None`` when it is free."""
