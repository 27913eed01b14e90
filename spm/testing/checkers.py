# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What must hold in every simulated history, watched from outside.

The checkers see all hosts at once and the true time; the hosts know nothing
of them.  Invariant: S1 to S6, each with its own words in the finding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Checkers", "Finding", "PoolState", "SimTask", "SimVolume", "Term"]


class SimVolume(NamedTuple):
    """A volume: its physical extents, and whether it is still being made."""

    extents: tuple[int, ...]
    initializing: bool


class SimTask(NamedTuple):
    """A recorded task: ``create`` or ``delete`` of a volume, begun in *epoch*."""

    kind: str
    volume: str
    epoch: int


class PoolState(NamedTuple):
    """All pool metadata of a simulated storage; replaced as a whole."""

    epoch: int
    lease_version: int
    volumes: dict[str, SimVolume]
    tasks: dict[str, SimTask]


class Term(NamedTuple):
    """One holding of the lease: a number by which terms are told apart, and who."""

    number: int
    host: str


class Finding(NamedTuple):
    """A broken invariant: which, when, and in words."""

    rule: str
    time_s: float
    what: str


class Checkers:
    """Watches one history; *deadline_s* as terms must keep it, *absence_s* the longest time without a manager."""

    def __init__(self, now: Callable[[], float], deadline_s: float, absence_s: float) -> None:
        self.now = now
        self.deadline_s = deadline_s
        self.absence_s = absence_s
        self.findings: list[Finding] = []
        self.term: Term | None = None
        self.serving: Term | None = None
        self.absent_since_s = 0.0
        self.requested: dict[str, int] = {}
        self.answered: dict[str, int] = {}
        self._epochs: dict[int, Term] = {}
        self.checks = self.writes = self.terms = 0
        self.longest_absence_s = 0.0

    def report(self, rule: str, what: str) -> None:
        """Note a finding; only the first ones matter."""
        if len(self.findings) < 20:
            self.findings.append(Finding(rule, self.now(), what))

    def acquired(self, host: str) -> Term:
        """Somebody got the lease; every older term is over from now on."""
        self.terms += 1
        self.term = Term(self.terms, host)
        return self.term

    def allowed(self, term: Term) -> None:
        """A token's check let its holder go on."""
        self.checks += 1
        if term != self.term:
            self.report("S1", f"{term} acts although {self.term} has the lease")

    def write_begins(self, term: Term, renewal_age_s: float) -> None:
        """A change begins, *renewal_age_s* after the true last renewal."""
        self.writes += 1
        if renewal_age_s > self.deadline_s:
            self.report("S2", f"{term} writes {renewal_age_s:.0f} s after its last renewal")

    def lands(self, term: Term, old: PoolState, new: PoolState) -> None:
        """A change reaches storage and replaces *old*."""
        if new.epoch < old.epoch:
            self.report("S2", f"{term} wrote at epoch {new.epoch} over epoch {old.epoch}")
        if self._epochs.setdefault(new.epoch, term) != term:
            self.report("S2", f"{term} wrote at epoch {new.epoch} of {self._epochs[new.epoch]}")
        self._extents(old, new)
        recorded = {task.volume for task in new.tasks.values()}
        for name, volume in new.volumes.items():
            if volume.initializing and name not in recorded:
                self.report("S5", f"{name} is being made and no task knows")

    def _extents(self, old: PoolState, new: PoolState) -> None:
        if new.volumes is old.volumes:
            return
        count = 0
        used: set[int] = set()
        for name, volume in new.volumes.items():
            count += len(volume.extents)
            used.update(volume.extents)
            before = old.volumes.get(name)
            if before is None or before is volume:
                continue
            if before.extents != volume.extents[: len(before.extents)]:
                self.report("S4", f"{name} lost extents")
            if len(volume.extents) > self.requested.get(name, len(before.extents)):
                self.report("S3", f"{name} has {len(volume.extents)} extents, more than anybody asked for")
        if len(used) != count:
            self.report("S4", "an extent belongs to two volumes")
        for name, size in self.answered.items():
            if name in old.volumes and name in new.volumes and len(new.volumes[name].extents) < size:
                self.report("S4", f"{name} is smaller than its extension that was acknowledged")

    def serves(self, term: Term, state: PoolState) -> None:
        """A manager finished its start."""
        left = [name for name, task in state.tasks.items() if task.epoch < state.epoch]
        if left:
            self.report("S5", f"{term} serves and {len(left)} tasks of older terms are open")
        self.serving = term

    def stopped(self, term: Term) -> None:
        """A manager ended, in whatever way."""
        if self.serving == term:
            self.serving = None
            self.absent_since_s = self.now()

    def look(self, able_since_s: float | None) -> None:
        """Called regularly with the time since when some host was able to manage without a break."""
        if self.serving is not None or able_since_s is None:
            return
        absent_s = self.now() - max(self.absent_since_s, able_since_s)
        self.longest_absence_s = max(self.longest_absence_s, absent_s)
        if absent_s > self.absence_s:
            self.report("S6", f"no manager for {absent_s:.0f} s although a host was able to")
            self.absent_since_s = self.now()
