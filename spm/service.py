# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The manager's role: taken in steps, each with its undo, and given back in reverse.

==========  ========================================  =========================
step        does                                      undone by
==========  ========================================  =========================
lease       acquires the pool's lease                 releases it, last of all
settle      waits for writes of a term that was cut   -
epoch       stores max(stored, own) + 1, host, lease  stores "nobody", if allowed
(others)    of the caller: mount, tasks, mailbox      the caller's
==========  ========================================  =========================

Invariant: S1, S2.  The lease is given back only after everything else is
undone; an undo that fails ends the process (*panic*), because the kernel then
undoes the rest.  When the lease is lost helper programs are killed first, by
whoever notices; the undos then change nothing on storage.

Source: the states Free, Contend, SPM of the RHV Technical Reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, Protocol

from qcowlib.errors import Error, UsageError
from storage_pool.errors import Illegal, NotAuthorized
from storage_pool.leases import Lease, LeaseOwner
from storage_pool.token import SpmToken

from .election import Role
from .errors import LeaseError
from .lease_watch import LeaseToken, LeaseWatch, next_epoch, settling_s
from .proof import LeaseProof, ProvingLeases
from .timing import LeaseTiming

__all__ = ["FENCE_CONFIRMATION", "PoolRecord", "SpmHost", "SpmService", "SpmStatus", "Step", "Terms"]

#: What a person must say before a host's role is declared over.
FENCE_CONFIRMATION = "the host is off"
#: Between two looks whether helper programs ended, in seconds.
_END_S = 0.05


class PoolRecord(NamedTuple):
    """What the pool stores of its manager: number of the term, host (-1: nobody), version of the lease."""

    epoch: int
    host_id: int
    lease_version: int


class Terms(Protocol):
    """Reads and writes the pool's record of its manager, on storage each time."""

    def read(self) -> PoolRecord:
        """Return what is stored.  Raises: StorageError."""

    def write(self, token: SpmToken, record: PoolRecord) -> None:
        """Store it, checking the token before."""

    def master_version(self) -> int:
        """Return the version of the master domain's format."""


class SpmHost(NamedTuple):
    """What a manager needs of its host; *clock* goes on while the host sleeps, *panic* ends the process."""

    host_id: int
    leases: ProvingLeases
    timing: LeaseTiming
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    panic: Callable[[str], NoReturn]


class Step(NamedTuple):
    """A part of the start: *do* gets the token; *undo* needs none, and also follows a *do* that failed halfway."""

    name: str
    do: Callable[[LeaseToken], None]
    undo: Callable[[], None]


class SpmStatus(NamedTuple):
    """State, number of the term and host, the last two -1 when nobody manages the pool."""

    status: Role
    lver: int
    host_id: int


class SpmService:
    """One pool's manager on one host.

    *lease* is the pool's, *steps* what follows the epoch, *killers* end
    helper programs when the lease is lost or given back, and tell whether
    none is left.
    """

    def __init__(self, host: SpmHost, lease: Lease, terms: Terms, steps: Sequence[Step] = ()) -> None:
        self._host = host
        self._lease = lease
        self._terms = terms
        self._steps = tuple(steps)
        self._undos: list[tuple[str, Callable[[], None]]] = []
        self._own_epoch = 0
        self._dropped = False
        self.killers: list[Callable[[], bool]] = []
        self.role: Role = "Free"
        self.token: LeaseToken | None = None

    # -- start ---------------------------------------------------------------

    def start(self, *, wanted_version: int | None = None) -> LeaseToken:
        """Become the manager; a second call returns the same token.

        Raises: Illegal while another start is under way or when the master is
        newer than *wanted_version*; LeaseHeld when another host is the
        manager; what a step raises, after everything before it was undone.
        """
        if self.role == "SPM" and self.token is not None:
            return self.token
        if self.role == "Contend":
            raise Illegal("this host is about to become the manager already")
        version = self._terms.master_version()
        if wanted_version is not None and version > wanted_version:
            raise Illegal(f"the master domain has version {version}, wanted is at most {wanted_version}")
        self.role = "Contend"
        try:
            token = self._take()
            for step in self._steps:
                token.check()
                self._undos.append((step.name, step.undo))
                step.do(token)
            token.check()
        except BaseException:
            self._end()
            raise
        self.role = "SPM"
        return token

    def _take(self) -> LeaseToken:
        host, leases = self._host, self._host.leases
        unreleased_s = leases.settle_s(self._lease)
        own = leases.acquire(self._lease)
        self._dropped = False
        self._undos.append(("lease", self._release))
        # Taking it may have waited, and its holder's daemon may have been started anew meanwhile.
        unreleased_s = max(unreleased_s, leases.settle_s(self._lease))
        stored = self._terms.read()
        wait_s = settling_s(host.timing, unreleased_s, max(stored.lease_version, 0), own)
        if wait_s:
            host.sleep(wait_s)
            stored = self._terms.read()
        token = self._make_token(own, stored)
        self._undos.append(("epoch", lambda: self._forget(token, own)))
        self._terms.write(token, PoolRecord(token.epoch, host.host_id, own.version))
        self.token = token
        return token

    def _make_token(self, own: LeaseOwner, stored: PoolRecord) -> LeaseToken:
        host = self._host
        self._own_epoch = next_epoch(stored.epoch, self._own_epoch)
        watch = LeaseWatch(host.timing, own, self._own_epoch, host.leases.prove(self._lease), host.clock())

        def prove() -> tuple[LeaseProof, int]:
            return host.leases.prove(self._lease), self._terms.read().epoch

        return LeaseToken(watch, host.clock, prove, self._lost, host.leases.connected)

    def _lost(self, reason: str) -> None:
        for kill in self.killers:
            kill()

    # -- stop ----------------------------------------------------------------

    def stop(self) -> None:
        """Give the role back; nothing to do for a host that does not have it."""
        if self.role == "Contend":
            raise Illegal("this host is about to become the manager")
        self._end()

    def watch(self) -> bool:
        """Judge the lease; called at least once a second while the role is held.

        Returns whether this host is the manager.  A lost lease ends the role.
        """
        if self.role != "SPM" or self.token is None:
            return False
        with contextlib.suppress(NotAuthorized):
            self.token.check()
        if not self.token.valid:
            self._end()
            return False
        return True

    def _end(self) -> None:
        while self._undos:
            name, undo = self._undos.pop()
            try:
                undo()
            except (Error, OSError) as error:
                self._host.panic(f"'{name}' cannot be undone: {error}")
        self.role = "Free"
        self.token = None

    def _forget(self, token: LeaseToken, own: LeaseOwner) -> None:
        # Not allowed any more, or storage is gone: the next manager knows by its own epoch.
        self._dropped = not token.valid
        with contextlib.suppress(Error, OSError):
            if token.valid:
                self._terms.write(token, PoolRecord(token.epoch, -1, own.version))
        token.give_up()

    def _release(self) -> None:
        self._end_helpers()
        # A daemon that is gone, or that lost the lease, has nothing to release.
        with contextlib.suppress(LeaseError):
            if self._dropped:
                self._host.leases.drop(self._lease)
            else:
                self._host.leases.release(self._lease)

    def _end_helpers(self) -> None:
        """End helper programs; one that is stuck in the kernel is waited for until its write landed or never will."""
        end_s = self._host.clock() + self._host.timing.landing_s
        while False in [kill() for kill in self.killers] and self._host.clock() < end_s:
            self._host.sleep(_END_S)

    # -- what others ask -----------------------------------------------------

    def status(self) -> SpmStatus:
        """Return who manages the pool, as storage tells.  Raises: StorageError, LeaseError."""
        if self.role == "Contend":
            return SpmStatus("Contend", -1, -1)
        owner = self._host.leases.owner(self._lease)
        if owner is None:
            return SpmStatus("Free", -1, -1)
        role: Role = "SPM" if owner.host_id != self._host.host_id or self.role == "SPM" else "Free"
        return SpmStatus(role, self._terms.read().epoch, owner.host_id)

    def fence(self, host_id: int, confirmation: str) -> None:
        """Declare that a host, which a person made sure is off, manages the pool no more.

        The lease still decides when another host can take over; what is
        cleared is the record that others show.  Raises: UsageError without
        the confirmation, Illegal for a host that is live.
        """
        if confirmation != FENCE_CONFIRMATION:
            raise UsageError(f"fencing needs the confirmation '{FENCE_CONFIRMATION}'")
        owner = self._host.leases.owner(self._lease)
        if owner is not None and owner.host_id == host_id:
            state = self._host.leases.host_state(self._lease.lockspace, host_id)
            if state == "live":
                raise Illegal(f"host {host_id} renews its lease, it is not off")
        if self.role == "Free":
            # A term of our own, however short, stores that nobody manages the pool.
            self.start()
            self.stop()
