# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One host of a pool as a supervisor runs it: in its lockspace, a candidate when told, the manager when it wins.

A machine that :meth:`PoolHost.step` drives; it waits nowhere but inside the
lease manager's own calls, which take their time (a join waits until the
former holder of the host id is dead).

======== =================================================================
lockspace what it means
======== =================================================================
out      not joined
joining  waiting for the host id
joined   renewed; this host may hold leases
lost     the lease manager renews no more, or is gone; it is joined again
======== =================================================================

Invariant: S1, S6.  The role is never held outside a joined lockspace for
longer than the token allows; whoever watches is told of every change once,
in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from qcowlib.errors import Error, StorageError
from storage_pool.errors import NotAuthorized
from storage_pool.leases import HostState, Lease, LeaseArea

from .election import Candidate, Election, PoolView, Role
from .errors import LeaseHeld
from .service import PoolRecord, SpmHost, SpmService, Terms
from .timing import ElectionTiming, LeaseTiming

__all__ = ["Duties", "HostReport", "LockspaceState", "PoolHost", "election_timing"]

LockspaceState = Literal["out", "joining", "joined", "lost"]

#: How often a manager judges its lease and does its duties, in seconds.
DUTY_S = 0.5


class HostReport(NamedTuple):
    """State of a host: *lver* is the number of its own term, -1 while it manages nothing.

    *spm_id* is the manager that this host sees, -1 for nobody, *spm_lver* the
    last term that it saw stored; *reason* says why the state changed.
    """

    host_id: int
    role: Role
    lver: int
    lockspace: LockspaceState
    spm_id: int = -1
    spm_lver: int = -1
    reason: str = ""


class Duties:
    """What a manager does between two looks at its lease; this one does nothing."""

    def step(self, now_s: float) -> None:
        """Do what is due.  Raises: NotSpm when the right to change is over; StorageError."""


def election_timing(lease: LeaseTiming) -> ElectionTiming:
    """Return periods of the choice of a host that fit the lease's: with 10 s the usual ones, faster with less."""
    poll_s = max(1.0, min(10.0, lease.io_timeout_s))
    return ElectionTiming(
        poll_s=poll_s, stagger_s=poll_s / 5, backoff_s=poll_s, backoff_limit_s=max(30.0, 30 * lease.io_timeout_s)
    )


class PoolHost:
    """One host of one pool; *tell* hears of each change of its report."""

    def __init__(
        self,
        host: SpmHost,
        area: LeaseArea,
        lease: Lease,
        terms: Terms,
        service: SpmService,
        election: Election,
        tell: Callable[[HostReport], None],
        *,
        duties: Duties | None = None,
        priority: int = 5,
        version: int = 0,
    ) -> None:
        self._host = host
        self._area = area
        self._lease = lease
        self._terms = terms
        self._service = service
        self._election = election
        self._tell = tell
        self._duties = duties or Duties()
        self._self = Candidate(host.host_id, priority, version)
        self._last_spm: int | None = None
        self._look_s = float("-inf")
        self._refused = False
        self.report = HostReport(host.host_id, "Free", -1, "out")

    @property
    def service(self) -> SpmService:
        """The role itself."""
        return self._service

    # -- what happens ----------------------------------------------------------

    def step(self) -> float:
        """Do what is due; returns how many seconds the next step may wait."""
        host = self._host
        if self.report.lockspace != "joined":
            return self._join()
        now_s = host.clock()
        if self._service.role == "SPM":
            self._manage(now_s)
            return DUTY_S
        if now_s < self._look_s:
            return min(self._look_s - now_s, DUTY_S)
        if not self._in_lockspace():
            return 0.0
        action = self._election.observe(now_s, self._view())
        self._look_s = action.again_s
        if action.kind == "contend":
            self.start()
        return 0.0

    def start(self) -> bool:
        """Try to become the manager now; returns whether that worked."""
        if self._service.role == "SPM":
            return True
        self._election.told()
        self._change(role="Contend", lver=-1, reason="contending")
        try:
            token = self._service.start()
        except LeaseHeld as error:
            return self._not_started(error, held=True)
        except (Error, OSError) as error:
            return self._not_started(error, held=False)
        self._election.won()
        own = self._host.host_id
        self._last_spm = own
        self._change(role="SPM", lver=token.epoch, spm_id=own, spm_lver=token.epoch, reason="started")
        return True

    def _not_started(self, error: Exception, *, held: bool) -> bool:
        self._election.failed(self._host.clock(), held=held)
        self._change(role="Free", lver=-1, reason=str(error))
        return False

    def stop_spm(self, reason: str = "stopped") -> None:
        """Give the role back; others go first from now on."""
        if self._service.role != "SPM":
            return
        self._service.stop()
        self._election.ended(self._host.clock(), lost=True)
        self._change(role="Free", lver=-1, spm_id=-1, reason=reason)

    def leave(self) -> None:
        """End: the role first, then the lockspace; what a daemon that is gone cannot do is left to it."""
        self.stop_spm("leaving")
        if self.report.lockspace == "joined":
            try:
                self._host.leases.leave(self._lease.lockspace, self._host.host_id, self._area)
            except (Error, OSError) as error:
                self._change(lockspace="lost", reason=str(error))
                return
        self._change(lockspace="out", reason="left")

    # -- the parts ---------------------------------------------------------------

    def _join(self) -> float:
        host = self._host
        if not self._refused:
            # What fails again and again is told once.
            self._change(lockspace="joining", reason="waiting for the host id")
        try:
            host.leases.join(self._lease.lockspace, host.host_id, self._area)
        except (Error, OSError) as error:
            self._refused = True
            self._change(lockspace="out", reason=str(error))
            return self._election.timing.poll_s
        self._refused = False
        self._look_s = float("-inf")
        self._change(lockspace="joined", reason="joined")
        return 0.0

    def _manage(self, now_s: float) -> None:
        reason = ""
        try:
            if self._service.watch():
                self._duties.step(now_s)
                return
        except (NotAuthorized, StorageError) as error:
            # The next look at the lease ends the role if it must.
            reason = str(error)
            if self._service.watch():
                return
        self._election.ended(now_s, lost=True)
        self._change(role="Free", lver=-1, spm_id=-1, reason=reason or "the lease was lost")
        self._look_s = float("-inf")

    def _in_lockspace(self) -> bool:
        try:
            state: HostState = self._host.leases.host_state(self._lease.lockspace, self._host.host_id)
        except (Error, OSError) as error:
            self._lost(str(error))
            return False
        if state in ("live", "unknown"):
            return True
        self._lost(f"the lease manager says that this host is {state}")
        return False

    def _lost(self, reason: str) -> None:
        self._host.leases.drop(self._lease)
        self._election.observe(self._host.clock(), None)
        self._change(lockspace="lost", reason=reason)

    def _view(self) -> PoolView | None:
        """Return what is seen of the pool; ``None`` when storage does not answer."""
        leases, own = self._host.leases, self._host.host_id
        try:
            owner = leases.owner(self._lease)
            record: PoolRecord = self._terms.read()
            state: HostState = "free" if owner is None else leases.host_state(self._lease.lockspace, owner.host_id)
            live = leases.members(self._lease.lockspace)
        except (Error, OSError) as error:
            self._change(reason=str(error))
            return None
        seen = -1 if owner is None else owner.host_id
        if seen != -1:
            self._last_spm = seen
        if seen != self.report.spm_id:
            self._change(reason="no manager is seen" if owner is None else f"host {seen} is the manager")
        self._change(spm_id=seen, spm_lver=record.epoch)
        others = (Candidate(number) for number in live if number != own)
        return PoolView(
            None if owner is None else owner.host_id, state, self._last_spm, record.epoch, (self._self, *others)
        )

    def _change(
        self,
        *,
        role: Role | None = None,
        lver: int | None = None,
        lockspace: LockspaceState | None = None,
        spm_id: int | None = None,
        spm_lver: int | None = None,
        reason: str | None = None,
    ) -> None:
        old = self.report
        new = HostReport(
            old.host_id,
            old.role if role is None else role,
            old.lver if lver is None else lver,
            old.lockspace if lockspace is None else lockspace,
            old.spm_id if spm_id is None else spm_id,
            old.spm_lver if spm_lver is None else spm_lver,
            old.reason if reason is None else reason,
        )
        self.report = new
        # A reason alone is no change of state.
        if new._replace(reason="", spm_lver=0) != old._replace(reason="", spm_lver=0):
            self._tell(new)
