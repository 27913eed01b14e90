# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What storage says of a lease, and lease managers that can tell it.

Invariant: S2.  A proof is read from storage when it is asked for, never from
a daemon's memory: the daemon may be stopped, late or wrong.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from storage_pool.leases import Lease, LeaseOwner, Leases

__all__ = ["LeaseProof", "ProvingLeases"]


class LeaseProof(NamedTuple):
    """A lease as storage has it.

    *renewed_s* is when this host last renewed its host id (on the holder's
    clock), *generation* that of its host id now, *owner* whom the lease names.
    """

    renewed_s: float
    generation: int
    owner: LeaseOwner | None


class ProvingLeases(Leases, Protocol):
    """Leases whose holder can look at them on storage."""

    def prove(self, lease: Lease) -> LeaseProof:
        """Read the lease and the renewals of this host's id.

        Raises: StorageError, LeaseError when storage does not answer.
        """

    def connected(self) -> bool:
        """Whether the daemon that granted this process its leases still knows it."""

    def drop(self, lease: Lease) -> None:
        """Give up a lease that is lost, without waiting for a daemon that may stand still.

        Other leases of this object may be given up too.
        """

    def members(self, lockspace: str) -> list[int]:
        """Return the host ids that are renewed now, as far as is known.  Raises: LeaseError."""

    def settle_s(self, lease: Lease) -> float:
        """Return how long after :meth:`acquire` the first change must wait; ask before and after, the longer counts.

        A lease that its holder gave back, or that is taken after the holder's
        death, needs no wait.  One that is free because its host's daemon was
        started anew may still have a write of the old holder on its way.
        """
