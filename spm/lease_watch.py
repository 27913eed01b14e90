# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The holder's own judgement of its lease, and the token that follows from it.

The daemon may be dead, stopped or late, and without a watchdog nobody ends
its client; so the holder fences itself.  Every change is preceded by
:meth:`LeaseToken.check`:

* *fresh*: storage proved the lease a moment ago; go on.
* *stale*: the last proof is older than a renewal period, the deadline passed,
  or this process made no progress for longer than the margin (it was paused,
  or the whole host was).  Storage is asked before anything is written.
* *lost*: storage says that the lease is another's, or the deadline passed
  without a renewal.  Final: a new term needs a new lease.

Invariant: S1, S2.  No change begins later than ``deadline_s`` after a renewal
that reached storage.  The clock must go on while the host sleeps
(``CLOCK_BOOTTIME``).  The lease's version is only ever compared for
equality, because a host paused inside a ballot can set it back; what orders
terms is the epoch in the pool's metadata, :func:`next_epoch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from qcowlib.errors import StorageError
from qcowlib.runtime import new_condition
from storage_pool.leases import LeaseOwner

from .errors import LeaseError, LeaseLost
from .proof import LeaseProof
from .timing import LeaseTiming

__all__ = ["LeaseToken", "LeaseWatch", "Verdict", "next_epoch", "settling_s"]

Verdict = Literal["fresh", "stale", "lost"]

#: Proofs that may fail for a passing reason in a row before the lease counts as lost.
PASSING_ERRORS = 3


def next_epoch(stored: int, own: int) -> int:
    """Return the epoch of a new term: above every one that was stored or held."""
    return max(stored, own) + 1


def settling_s(timing: LeaseTiming, unreleased_s: float, stored_version: int, own: LeaseOwner) -> float:
    """Return how long a new term must wait before its first change.

    *unreleased_s* is what :meth:`~spm.proof.ProvingLeases.settle_s` said
    before the lease was taken; *stored_version* is the version of the lease
    with which the last term stored its epoch.  If that is not the version just
    before ours, a term began and ended between that never got so far: it may
    have been waiting itself, and its duty to wait is ours now.
    """
    return max(unreleased_s, 0.0 if stored_version == own.version - 1 else timing.landing_s)


class LeaseWatch:
    """The judgement, a machine without I/O; all times in seconds on one clock."""

    __slots__ = ("_progress_s", "_proved_s", "_suspect", "epoch", "errors", "own", "reason", "renewed_s", "timing")

    def __init__(self, timing: LeaseTiming, own: LeaseOwner, epoch: int, proof: LeaseProof, now_s: float) -> None:
        """Begin a term; *proof* was asked for after the lease was taken."""
        self.timing = timing
        self.own = own
        self.epoch = epoch
        self.errors = 0
        #: Why the lease is lost, ``None`` while it is not.
        self.reason: str | None = None
        self.renewed_s = proof.renewed_s
        self._proved_s = self._progress_s = now_s
        self._suspect = False
        self.prove(proof, epoch, now_s)

    @property
    def deadline_s(self) -> float:
        """When the right to change ends unless a later renewal is proved."""
        return self.renewed_s + self.timing.deadline_s

    def judge(self, now_s: float) -> Verdict:
        """Return what the lease is worth now; call it before each change and regularly."""
        if self.reason is not None:
            return "lost"
        if now_s - self._progress_s > self.timing.gap_s or now_s < self._progress_s:
            # Paused, or the clock is broken: whatever was known is old.
            self._suspect = True
        self._progress_s = now_s
        if self._suspect or now_s >= self.deadline_s or now_s - self._proved_s >= self.timing.recheck_s:
            return "stale"
        return "fresh"

    def prove(self, proof: LeaseProof, stored_epoch: int, now_s: float) -> Verdict:
        """Take what storage answered, and the epoch stored in the pool; returns ``fresh`` or ``lost``."""
        if self.reason is not None:
            return "lost"
        owner = proof.owner
        if owner is None or owner.host_id != self.own.host_id:
            return self.lose("another host holds the lease" if owner else "the lease is free")
        if owner != self.own or proof.generation != self.own.generation:
            return self.lose("the lease belongs to another term of this host")
        if stored_epoch > self.epoch:
            return self.lose(f"the pool is at epoch {stored_epoch}, this term is {self.epoch}")
        if now_s >= proof.renewed_s + self.timing.deadline_s:
            return self.lose(f"no renewal for {now_s - proof.renewed_s:.0f} seconds")
        self.renewed_s = max(self.renewed_s, proof.renewed_s)
        self._proved_s = self._progress_s = now_s
        self._suspect = False
        self.errors = 0
        return "fresh"

    def failed(self, now_s: float) -> Verdict:
        """Storage did not answer; ``stale`` while that may pass."""
        self.errors += 1
        if self.reason is None and (self.errors > PASSING_ERRORS or now_s >= self.deadline_s):
            return self.lose(f"the lease could not be proved {self.errors} times in a row")
        return "lost" if self.reason is not None else "stale"

    def lose(self, reason: str) -> Verdict:
        """End the term."""
        if self.reason is None:
            self.reason = reason
        return "lost"


class LeaseToken:
    """An :class:`~storage_pool.token.SpmToken` that asks storage when it must.

    *clock* gives seconds including pauses, *prove* reads from storage the
    lease and the epoch stored in the pool (it raises StorageError or
    LeaseError when it cannot); *connected* tells whether the daemon that
    granted the lease still knows this process: one that was started anew
    takes the host id under another generation, which frees the lease at once.
    *lost* is called once, by whoever notices the loss, before anybody is
    told.  Safe for threads.
    """

    __slots__ = ("_clock", "_connected", "_guard", "_lost", "_prove", "_told", "watch")

    def __init__(
        self,
        watch: LeaseWatch,
        clock: Callable[[], float],
        prove: Callable[[], tuple[LeaseProof, int]],
        lost: Callable[[str], None],
        connected: Callable[[], bool],
    ) -> None:
        self.watch = watch
        self._connected = connected
        self._clock = clock
        self._prove = prove
        self._lost = lost
        self._told = False
        self._guard = new_condition()

    @property
    def epoch(self) -> int:
        """Number of the term."""
        return self.watch.epoch

    @property
    def valid(self) -> bool:
        """Whether the lease is not known to be lost."""
        return self.watch.reason is None

    def check(self) -> None:
        """Return if a change may begin now.  Raises: LeaseLost."""
        with self._guard:
            verdict = self.watch.judge(self._clock())
            if verdict != "lost" and not self._connected():
                verdict = self.watch.lose("the lease manager's daemon is gone")
            if verdict == "stale":
                verdict = self._ask()
        if verdict == "lost":
            self._tell()
            raise LeaseLost(f"this host no longer manages the pool: {self.watch.reason}")
        if verdict == "stale":
            raise LeaseLost("the lease cannot be proved now, nothing was changed", hint="Try again.")

    def _ask(self) -> Verdict:
        try:
            proof, stored_epoch = self._prove()
        except (StorageError, LeaseError):
            return self.watch.failed(self._clock())
        # The clock after the answer: a pause while asking counts.
        return self.watch.prove(proof, stored_epoch, self._clock())

    def _tell(self) -> None:
        with self._guard:
            told, self._told = self._told, True
        if not told:
            self._lost(self.watch.reason or "")

    def give_up(self, reason: str = "given back") -> None:
        """End the right; every later :meth:`check` fails."""
        with self._guard:
            self.watch.lose(reason)
            self._told = True
