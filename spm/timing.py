# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Who may do what until when: every period of leases, election and mailbox.

Invariant: S1.  On one clock, counted from the last renewal that reached
storage, the following order holds for every I/O timeout T::

    deadline < renewal limit < deadline + landing limit < death

A right to change the pool ends at the *deadline*; a write that began before
it has landed, or never will, one *landing limit* later; the lease manager
kills what is left at the *renewal limit*; nobody else gets the lease before
*death*.  The diagram of the documentation is made from these numbers.

Source: sanlock 3.8.5 (renewal every 2 T, limit 8 T, death 8 T + 60 s,
measured), VDSM's polling periods.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["ElectionTiming", "LeaseTiming", "MailboxTiming", "SafeleaseTiming", "budget", "diagram"]

#: Seconds that the daemon grants the watchdog; fixed in it.
WATCHDOG_S: Final = 60.0


class LeaseTiming(NamedTuple):
    """Periods of a lease, in seconds, from the daemon's I/O timeout T.

    ``margin_intervals`` is in units of T: how much earlier than the daemon's
    own limit a token ends at least, and the longest gap in our own progress
    that is not answered by asking for the lease again.
    """

    io_timeout_s: float = 10.0
    margin_intervals: float = 2.0

    @property
    def renewal_s(self) -> float:
        """Between two renewals of a healthy host."""
        return 2 * self.io_timeout_s

    @property
    def margin_s(self) -> float:
        """How much earlier than the daemon's limit a token ends.

        With a large T that is more, for the last write must land before death.
        """
        return max(self.gap_s, self.limit_s - WATCHDOG_S)

    @property
    def gap_s(self) -> float:
        """A process without progress for longer was paused; see ``margin_intervals``."""
        return self.margin_intervals * self.io_timeout_s

    @property
    def limit_s(self) -> float:
        """After the last renewal the daemon has failed and kills its clients."""
        return 8 * self.io_timeout_s

    @property
    def deadline_s(self) -> float:
        """After the last renewal a token is void, whatever anybody says."""
        return self.limit_s - self.margin_s

    @property
    def landing_s(self) -> float:
        """A write reaches storage this long after it began, or never (the path gives up earlier)."""
        return self.limit_s

    @property
    def death_s(self) -> float:
        """After the last renewal others may take the host's leases."""
        return self.limit_s + WATCHDOG_S

    @property
    def recheck_s(self) -> float:
        """How often the holder asks storage for its lease although nothing is wrong."""
        return self.renewal_s

    @property
    def join_s(self) -> float:
        """The longest wait for a host id: its former holder must be dead first."""
        return self.death_s + 4 * self.io_timeout_s


class ElectionTiming(NamedTuple):
    """Periods of the choice of a host, in seconds."""

    #: Between two looks at the lease.
    poll_s: float = 10.0
    #: Between the turns of two candidates of different rank.
    stagger_s: float = 2.0
    #: Ranks after which all candidates of lower rank have their turn together.
    ranks: int = 8
    #: First wait after a failed start; doubles up to ``backoff_limit_s``.
    backoff_s: float = 10.0
    backoff_limit_s: float = 300.0

    @property
    def round_s(self) -> float:
        """One round of contention: each live candidate has had its turn in it."""
        return self.poll_s + self.stagger_s * self.ranks


class MailboxTiming(NamedTuple):
    """Periods of the mailbox, in seconds."""

    #: The manager looks at the event block this often,
    event_s: float = 0.5
    #: and at all mail this often.
    poll_s: float = 2.0
    #: A host looks for replies this often while it waits for one.
    reply_s: float = 0.5
    #: A request without a reply is written again after this.
    resend_s: float = 10.0
    #: Failures in a row after which tries are ``rest_s`` apart.
    failures: int = 10
    rest_s: float = 60.0


class SafeleaseTiming(NamedTuple):
    """Parameters of the lease of V1 and V2 domains, in seconds; defaults as domains are made."""

    lease_s: float = 60.0
    operation_s: float = 10.0
    renewal_s: float = 5.0
    retries: int = 3

    @property
    def foreign_wait_s(self) -> float:
        """A stamp that did not change for this long is of a dead host."""
        return self.lease_s + 6 * self.operation_s

    @property
    def settle_s(self) -> float:
        """After writing one's stamp, until it is read back."""
        return 2 * self.operation_s


class Moment(NamedTuple):
    """A row of the budget: *after_s* seconds from the last renewal, *what* happens."""

    after_s: float
    what: str


def budget(lease: LeaseTiming, election: ElectionTiming) -> list[Moment]:
    """Return what happens to a manager that renewed its lease for the last time, in order."""
    return [
        Moment(0.0, "last renewal that reached storage"),
        Moment(lease.renewal_s, "next renewal is due; the holder asks for its lease"),
        Moment(lease.deadline_s, "the token is void: no change begins, helper processes are killed"),
        Moment(lease.limit_s, "the lease manager kills the holder"),
        Moment(lease.deadline_s + lease.landing_s, "the last write that began before has landed or never will"),
        Moment(lease.death_s, "other hosts may take the lease"),
        Moment(lease.death_s + election.round_s, "another host is the manager"),
    ]


def diagram(lease: LeaseTiming, election: ElectionTiming, width: int = 60) -> str:
    """Return the budget as text: a bar to scale and a line for each moment."""
    moments = budget(lease, election)
    end = moments[-1].after_s
    lines = []
    for moment in moments:
        filled = round(moment.after_s / end * width)
        lines.append(f"{moment.after_s:7.1f} s |{'=' * filled:<{width}}| {moment.what}")
    return "\n".join(lines) + "\n"
