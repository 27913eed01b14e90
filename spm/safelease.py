# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Leases of domains before version 3: one block, which its holder stamps with the time again and again.

There is no daemon and nobody kills a late holder.  Who finds the block taken
watches it for ``lease + 6 operations``; if the stamp stood still, its writer
is dead.  Who has written its own stamp waits two operations more and reads
it back: the last of several writers has the lease.

Invariant: S1.  With ``lease >= 6 operations`` a right ends at most one lease
after a renewal and its last write lands within eight operations more, which
is when another host can have the lease at the earliest: the budget is that of
:class:`~spm.timing.LeaseTiming` with an I/O timeout of one operation.  Never on
a domain with records of sanlock, whose hosts would not see this block.

Source: the protocol of the tool of 2011, as domains of versions 0 to 2 use it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Final

from storage_pool.lease_records import SAFELEASE_SIZE, SafeleaseTag, parse_leader
from storage_pool.leases import HostState, Lease, LeaseArea, LeaseOwner

from .errors import LeaseError, LeaseHeld
from .host_records import open_area
from .proof import LeaseProof
from .timing import LeaseTiming, SafeleaseTiming

__all__ = ["SafeleaseLeases", "budget_of"]

POOL_LEASE: Final = "SDM"
#: Stamps from here on are nobody's clock; counting on would leave the field.
_FAR_US: Final = 1 << 63
#: Alignments at which sanlock's records may lie.
_RECORDS: Final = (0, 1 << 20, 2 << 20, 4 << 20, 8 << 20)


def budget_of(timing: SafeleaseTiming) -> LeaseTiming:
    """Return the periods of a holder's own judgement.  Raises: LeaseError when the lease is too short for them."""
    budget = LeaseTiming(io_timeout_s=timing.operation_s)
    earliest_s = timing.foreign_wait_s + timing.settle_s
    if budget.deadline_s > timing.lease_s or budget.deadline_s + budget.landing_s > earliest_s:
        raise LeaseError(f"a lease of {timing.lease_s:g} s is too short for operations of {timing.operation_s:g} s")
    return budget


def _refuse_sanlock(area: LeaseArea) -> None:
    """Raise LeaseError where sanlock's records are, of a lockspace or of a lock."""
    with closing(open_area(area)) as storage:
        for distance in _RECORDS:
            if storage.size >= area.offset + distance + 512:
                data = bytearray(512)
                storage.read_into(area.offset + distance, [data])
                if parse_leader(bytes(data)) is not None:
                    raise LeaseError("this domain's leases are of sanlock, the older form is refused", path=area.path)


class _Seen:
    """A foreign stamp, and since when it stands still."""

    __slots__ = ("since_s", "tag")

    def __init__(self, tag: SafeleaseTag, since_s: float) -> None:
        self.tag = tag
        self.since_s = since_s


class SafeleaseLeases:
    """A :class:`~spm.proof.ProvingLeases` on the block at the start of ``leases``.

    *clock* gives seconds and goes on while the host sleeps; *stamp_us* the
    time in microseconds since 1970, which is only ever compared for equality
    by others.  :meth:`prove` renews, so it must be called at least once a
    lease; a token does that.
    """

    def __init__(
        self,
        timing: SafeleaseTiming,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        stamp_us: Callable[[], int],
    ) -> None:
        """Raises: LeaseError for periods that are not safe."""
        budget_of(timing)
        self.timing = timing
        self._clock = clock
        self._sleep = sleep
        self._stamp_us = stamp_us
        self._joined: dict[str, int] = {}
        self._held: dict[Lease, tuple[LeaseOwner, tuple[SafeleaseTag, ...], float]] = {}
        self._seen: dict[Lease, _Seen] = {}
        self._live: dict[tuple[str, int], bool] = {}

    # -- host ids, which this form does not register ---------------------------

    def join(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`~storage_pool.leases.Leases`.  Raises: LeaseError on a domain of sanlock."""
        SafeleaseTag(host_id).pack()
        _refuse_sanlock(area)
        self._joined[lockspace] = host_id

    def leave(self, lockspace: str, host_id: int, area: LeaseArea) -> None:
        """See :class:`~storage_pool.leases.Leases`."""
        self._joined.pop(lockspace, None)

    def host_state(self, lockspace: str, host_id: int) -> HostState:
        """See :class:`~storage_pool.leases.Leases`; of others only the holder of a lease is known, by watching it."""
        if self._joined.get(lockspace) == host_id:
            return "live"
        for lease, seen in self._seen.items():
            if lease.lockspace == lockspace and seen.tag.host_id == host_id:
                if self._stands_still(seen):
                    return "dead"
                return "live" if self._live.get((lockspace, host_id)) else "unknown"
        return "unknown"

    def members(self, lockspace: str) -> list[int]:
        """See :class:`~spm.proof.ProvingLeases`; no more than this host is known."""
        return [self._joined[lockspace]] if lockspace in self._joined else []

    # -- the block ---------------------------------------------------------------

    def _read(self, lease: Lease) -> SafeleaseTag:
        if lease.name != POOL_LEASE:
            raise LeaseError(f"domains of this version have no lease {lease.name}", path=lease.area.path)
        data = bytearray(SAFELEASE_SIZE)
        with closing(open_area(lease.area)) as storage:
            storage.read_into(lease.area.offset, [data])
        tag = SafeleaseTag.parse(bytes(data), lease.area.path)
        self._watch(lease, tag)
        return tag

    def _watch(self, lease: Lease, tag: SafeleaseTag) -> None:
        seen = self._seen.get(lease)
        if tag.host_id is None:
            self._seen.pop(lease, None)
        elif seen is None or seen.tag != tag:
            if seen is not None:
                self._live[lease.lockspace, tag.host_id] = True
            self._seen[lease] = _Seen(tag, self._clock())

    def _stands_still(self, seen: _Seen) -> bool:
        return self._clock() - seen.since_s >= self.timing.foreign_wait_s

    def _write(self, lease: Lease, tag: SafeleaseTag) -> None:
        with closing(open_area(lease.area, writable=True)) as storage:
            storage.write(lease.area.offset, [tag.pack()])
            storage.flush()
        self._watch(lease, tag)

    def _own_stamp(self, host_id: int, before: SafeleaseTag) -> SafeleaseTag:
        """Return a stamp that was never there before, whatever the wall clock does."""
        after_us = before.timestamp_us + 1 if before.timestamp_us < _FAR_US else 0
        return SafeleaseTag(host_id, max(self._stamp_us(), after_us))

    # -- the lease -----------------------------------------------------------------

    def acquire(self, lease: Lease, *, shared: bool = False) -> LeaseOwner:
        """See :class:`~storage_pool.leases.Leases`; waits for the death of a holder that stands still.

        Raises: LeaseHeld as soon as the holder is seen to renew.
        """
        if shared:
            raise LeaseError("leases of this form cannot be shared", path=lease.area.path)
        host_id = self._joined.get(lease.lockspace)
        if host_id is None:
            raise LeaseError(f"the lockspace {lease.lockspace} was not joined")
        if lease in self._held:
            raise LeaseHeld(f"the lease {lease.name} is held here already", path=lease.area.path)
        _refuse_sanlock(lease.area)
        before, began_s = self._wait_for_death(lease)
        own = self._own_stamp(host_id, before)
        self._write(lease, own)
        late = self._clock() - began_s > self.timing.operation_s
        # Who was paused between reading and writing may have put a live holder out: that one stops first.
        self._sleep(self.timing.settle_s + (self.timing.foreign_wait_s if late else 0.0))
        found = self._read(lease)
        if found != own:
            raise LeaseHeld(f"the lease {lease.name} went to host {found.host_id}", path=lease.area.path)
        # Many stamps may be written in one term: the first one tells it from all others.
        owner = LeaseOwner(host_id, 1, own.timestamp_us)
        self._held[lease] = owner, (own,), self._clock()
        if self.prove(lease).owner != owner:
            raise LeaseHeld(f"the lease {lease.name} was lost while it was taken", path=lease.area.path)
        return owner

    def _wait_for_death(self, lease: Lease) -> tuple[SafeleaseTag, float]:
        """Return what the block holds when it may be overwritten, and when the look at it began."""
        began_s = self._clock()
        first = self._read(lease)
        while first.host_id is not None and not self._stands_still(self._seen[lease]):
            self._sleep(self.timing.renewal_s)
            began_s = self._clock()
            now = self._read(lease)
            if now.host_id is None:
                return now, began_s
            if now != first:
                raise LeaseHeld(f"the lease {lease.name} is renewed by host {now.host_id}", path=lease.area.path)
        return first, began_s

    def prove(self, lease: Lease) -> LeaseProof:
        """See :class:`~spm.proof.ProvingLeases`; renews a lease that is still ours and not too old."""
        held = self._held.get(lease)
        began_s = self._clock()
        found = self._read(lease)
        if held is None:
            return LeaseProof(float("-inf"), 1, self._owner_of(found))
        owner, own, renewed_s = held
        if found not in own or began_s - renewed_s > self.timing.lease_s:
            del self._held[lease]
            return LeaseProof(renewed_s, 1, None if found in own else self._owner_of(found))
        new = self._own_stamp(owner.host_id, found)
        # A write that fails may reach storage all the same: either stamp is ours then.
        self._held[lease] = owner, (found, new), renewed_s
        self._write(lease, new)
        if self._clock() - began_s > self.timing.operation_s:
            # Paused meanwhile: what was overwritten may have been another's.
            del self._held[lease]
            return LeaseProof(renewed_s, 1, None)
        self._held[lease] = owner, (new,), began_s
        return LeaseProof(began_s, 1, owner)

    def release(self, lease: Lease) -> None:
        """See :class:`~storage_pool.leases.Leases`; one that is not held, or no longer, is fine.

        The form knows no exchange: who stands still for a whole lease between
        the look and the write of a release frees what another took meanwhile.
        """
        held = self._held.get(lease)
        if held is not None:
            if self._read(lease) in held[1]:
                self._write(lease, SafeleaseTag(None))
            del self._held[lease]

    def fence(self, lease: Lease, host_id: int) -> None:
        """Free the lease of a host of which the operator confirms that it is down.

        Raises: LeaseError when another host's stamp is there.
        """
        found = self._read(lease)
        if found.host_id is None:
            return
        if found.host_id != host_id:
            raise LeaseError(f"the lease is of host {found.host_id}, not of host {host_id}", path=lease.area.path)
        self._write(lease, SafeleaseTag(None))

    @staticmethod
    def _owner_of(tag: SafeleaseTag) -> LeaseOwner | None:
        return None if tag.host_id is None else LeaseOwner(tag.host_id, 1, tag.timestamp_us)

    def owner(self, lease: Lease) -> LeaseOwner | None:
        """See :class:`~storage_pool.leases.Leases`; a holder that stood still for long enough is none."""
        found = self._read(lease)
        held = self._held.get(lease)
        if held is not None and found in held[1]:
            return held[0]
        seen = self._seen.get(lease)
        return None if seen is None or self._stands_still(seen) else self._owner_of(found)

    def connected(self) -> bool:
        """See :class:`~spm.proof.ProvingLeases`; there is no daemon."""
        return True

    def drop(self, lease: Lease) -> None:
        """See :class:`~spm.proof.ProvingLeases`; others take the lease when the stamp has stood still."""
        self._held.pop(lease, None)

    def settle_s(self, lease: Lease) -> float:
        """See :class:`~spm.proof.ProvingLeases`; :meth:`acquire` itself waits for what was on its way."""
        return 0.0
