# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A lease manager with sanlock's rules on a clock that the test moves.

Renewals are not events: that of a healthy host is computed from the time it
joined, so a simulated day costs nothing but its faults.  A host is healthy
until :meth:`SimHost.sicken` and again after :meth:`SimHost.recover`.

Modelled as measured: renewal every 2 T, client killed at 8 T, taken over at
8 T + 60 s; a rejoining host gets a new generation, so its old leases are
free; the version of a free lease may go back (:meth:`SimSpace.regress`).

Invariant: what is modelled wrong makes tests wrong; the contract tests run
against this and against the real daemon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qcowlib.errors import StorageError
from spm.errors import LeaseError, LeaseHeld
from spm.proof import LeaseProof
from spm.timing import LeaseTiming
from storage_pool.leases import HostState, Lease, LeaseArea, LeaseOwner

__all__ = ["SimHost", "SimLeases", "SimSpace"]


class _Seat(NamedTuple):
    """A host id of a lockspace: whose, and since when the present life of it."""

    name: str
    generation: int
    host: SimHost | None
    joined_s: float
    left: bool


class _Leader:
    __slots__ = ("owner", "shared", "version")

    def __init__(self) -> None:
        self.owner: LeaseOwner | None = None
        self.shared: dict[int, int] = {}
        self.version = 0


class SimSpace:
    """All lockspaces and resources of one simulated storage; *now* gives its time in seconds."""

    def __init__(self, now: Callable[[], float], timing: LeaseTiming) -> None:
        self.now = now
        self.timing = timing
        self.seats: dict[tuple[str, int], _Seat] = {}
        self.leaders: dict[Lease, _Leader] = {}
        #: Age of the last renewal at which a host's leases can be taken.
        self.death_s = timing.death_s

    def leader(self, lease: Lease) -> _Leader:
        """Return the record of a resource, made when first asked for."""
        return self.leaders.setdefault(lease, _Leader())

    def renewed_s(self, seat: _Seat) -> float:
        """Return when the host of *seat* last renewed, on the storage's clock."""
        if seat.host is None:
            return seat.joined_s
        return seat.host.renewed_s(seat.joined_s)

    def state(self, lockspace: str, host_id: int, generation: int | None = None) -> HostState:
        """Return the state of a host id; one of another *generation* is gone."""
        seat = self.seats.get((lockspace, host_id))
        if seat is None or seat.left or (generation is not None and seat.generation != generation):
            return "free"
        age_s = self.now() - self.renewed_s(seat)
        if age_s <= self.timing.limit_s:
            return "live"
        return "fail" if age_s <= self.death_s else "dead"

    def regress(self, lease: Lease, versions: int) -> None:
        """Set the version of a free lease back, as a host paused inside a ballot does."""
        leader = self.leader(lease)
        if leader.owner is None:
            leader.version = max(0, leader.version - versions)


class SimHost:
    """One host's daemon: healthy, or not renewing since some time."""

    def __init__(self, space: SimSpace, name: str) -> None:
        self.space = space
        self.name = name
        self.reachable = True
        #: Grows when the daemon is started anew.
        self.life = 0
        self._sick_since_s: float | None = None
        self._healthy_since_s = float("-inf")

    @property
    def healthy(self) -> bool:
        """Whether it renews."""
        return self._sick_since_s is None

    def sicken(self) -> None:
        """Renewals stop."""
        if self._sick_since_s is None:
            self._sick_since_s = self.space.now()

    def recover(self) -> None:
        """Renewals go on, if the daemon did not give up meanwhile: see :meth:`SimLeases.alive`."""
        self._sick_since_s = None
        self._healthy_since_s = self.space.now()

    def renewed_s(self, joined_s: float) -> float:
        """Return the time of the last renewal of a host id taken at *joined_s*."""
        end_s = self.space.now() if self._sick_since_s is None else self._sick_since_s
        period_s = self.space.timing.renewal_s
        regular_s = joined_s + max(0.0, (end_s - joined_s) // period_s) * period_s
        if self._healthy_since_s > joined_s and regular_s < self._healthy_since_s <= end_s:
            return self._healthy_since_s
        return regular_s


class SimLeases:
    """The leases of one host; a :class:`~spm.proof.ProvingLeases` that never waits."""

    def __init__(self, host: SimHost, to_host_clock: Callable[[float], float] = float) -> None:
        """*to_host_clock* turns a time of the storage's clock into one of the holder's."""
        self.host = host
        self.space = host.space
        self._to_host_clock = to_host_clock
        self._life = host.life
        self._joined: dict[str, int] = {}

    def _reach(self) -> None:
        if not self.host.reachable:
            raise StorageError(5, path=self.host.name, operation="read")

    def _seat(self, lockspace: str) -> tuple[int, _Seat]:
        host_id = self._joined.get(lockspace)
        if host_id is None:
            raise LeaseError(f"the lockspace {lockspace} was not joined")
        return host_id, self.space.seats[lockspace, host_id]

    def alive(self, lockspace: str) -> bool:
        """Whether this host's own id is still its own and renewed in time."""
        host_id, seat = self._seat(lockspace)
        return seat.host is self.host and self.space.state(lockspace, host_id) == "live"

    def join(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`~storage_pool.leases.Leases`."""
        self._reach()
        seat = self.space.seats.get((lockspace, host_id))
        generation = 1
        if seat is not None:
            if seat.name != self.host.name and self.space.state(lockspace, host_id) in ("live", "fail"):
                raise LeaseHeld(f"host id {host_id} is used by a live host")
            generation = seat.generation + 1
        self.space.seats[lockspace, host_id] = _Seat(
            self.host.name, generation, self.host, self.space.now(), left=False
        )
        self._joined[lockspace] = host_id

    def leave(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`~storage_pool.leases.Leases`."""
        self._reach()
        _, seat = self._seat(lockspace)
        self.space.seats[lockspace, host_id] = seat._replace(left=True)
        del self._joined[lockspace]

    def host_state(self, lockspace: str, host_id: int) -> HostState:
        """See :class:`~storage_pool.leases.Leases`."""
        self._reach()
        return self.space.state(lockspace, host_id)

    def members(self, lockspace: str) -> list[int]:
        """See :class:`~spm.proof.ProvingLeases`."""
        self._reach()
        numbers = [number for space, number in self.space.seats if space == lockspace]
        return sorted(number for number in numbers if self.space.state(lockspace, number) == "live")

    def _holders(self, lease: Lease) -> list[LeaseOwner]:
        leader = self.space.leader(lease)
        owners = [LeaseOwner(host, generation, leader.version) for host, generation in leader.shared.items()]
        if leader.owner is not None:
            owners.append(leader.owner)
        return [
            owner
            for owner in owners
            if self.space.state(lease.lockspace, owner.host_id, owner.generation) not in ("free", "dead")
        ]

    def acquire(self, lease: Lease, *, shared: bool = False) -> LeaseOwner:
        """See :class:`~storage_pool.leases.Leases`."""
        self._reach()
        host_id, seat = self._seat(lease.lockspace)
        if not self.host.healthy or not self.alive(lease.lockspace):
            raise LeaseError("this host's own id is not renewed")
        leader = self.space.leader(lease)
        holders = self._holders(lease)
        if any(holder.host_id == host_id for holder in holders):
            raise LeaseHeld(f"the lease {lease.name} is held here already")
        exclusive = leader.owner is not None and leader.owner in holders
        if holders and (not shared or exclusive):
            raise LeaseHeld(f"the lease {lease.name} is held by host {holders[0].host_id}")
        self._life = self.host.life
        leader.version += 1
        own = LeaseOwner(host_id, seat.generation, leader.version)
        if shared:
            leader.owner = None
            leader.shared[host_id] = seat.generation
        else:
            leader.owner = own
            leader.shared.clear()
        return own

    def release(self, lease: Lease) -> None:
        """See :class:`~storage_pool.leases.Leases`."""
        self._reach()
        if not self.host.healthy:
            raise LeaseError("the daemon does not answer")
        host_id, seat = self._seat(lease.lockspace)
        leader = self.space.leader(lease)
        if leader.owner is not None and leader.owner[:2] == (host_id, seat.generation):
            leader.owner = None
        if leader.shared.get(host_id) == seat.generation:
            del leader.shared[host_id]

    def owner(self, lease: Lease) -> LeaseOwner | None:
        """See :class:`~storage_pool.leases.Leases`."""
        self._reach()
        holders = self._holders(lease)
        return holders[0] if holders else None

    def prove(self, lease: Lease) -> LeaseProof:
        """See :class:`~spm.proof.ProvingLeases`."""
        self._reach()
        _, seat = self._seat(lease.lockspace)
        renewed_s = self._to_host_clock(self.space.renewed_s(seat)) if seat.host is self.host else float("-inf")
        return LeaseProof(renewed_s, seat.generation, self.space.leader(lease).owner)

    def connected(self) -> bool:
        """See :class:`~spm.proof.ProvingLeases`."""
        return self._life == self.host.life

    def drop(self, lease: Lease) -> None:
        """See :class:`~spm.proof.ProvingLeases`."""
        if self.host.healthy and self.host.reachable:
            self.release(lease)

    def settle_s(self, lease: Lease) -> float:
        """See :class:`~spm.proof.ProvingLeases`."""
        owner = self.space.leader(lease).owner
        if owner is None or self.space.state(lease.lockspace, owner.host_id, owner.generation) != "free":
            return 0.0
        return self.space.timing.landing_s
