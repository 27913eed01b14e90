# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Which host becomes the manager, and when it tries.

Every host runs the same machine on what it sees in the lockspace, and all
come to the same order of candidates; a candidate of a later rank has its turn
later, so the first one normally is alone.  When two try nevertheless, the
lease decides: a mistake here costs time, never safety.

Order: those that know the newest version of the pool, then by priority (10
first; below 1 never), then the last manager, then by a number that the term
and the host id make, so that it is another host each time.

Invariant: S6.  A candidate that sees a free lease tries within one round; a
failed start sets the host aside for a time that grows, and is forgotten when
storage comes back or all others had their turn.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable
from typing import Literal, NamedTuple

from storage_pool.leases import HostState

from .timing import ElectionTiming

__all__ = ["Action", "Candidate", "Election", "PoolView", "Role", "order"]

Role = Literal["Free", "Contend", "SPM"]


class Candidate(NamedTuple):
    """A live host: *priority* 10 is first, below 1 never; *version* of the pool that it knows."""

    host_id: int
    priority: int = 5
    version: int = 0


class PoolView(NamedTuple):
    """What a host sees: the lease's owner and its state, who managed last, which hosts are live."""

    owner: int | None
    owner_state: HostState
    last_spm: int | None
    epoch: int
    candidates: tuple[Candidate, ...]

    @property
    def free(self) -> bool:
        """Whether the lease can be had: nobody holds it, or its holder is dead."""
        return self.owner is None or self.owner_state in ("free", "dead")


class Action(NamedTuple):
    """What to do now, and when to look again, in seconds of the caller's clock."""

    kind: Literal["wait", "contend"]
    again_s: float


def order(view: PoolView) -> list[int]:
    """Return the host ids of the candidates, who has the first turn first."""
    return list(_order(view.candidates, view.epoch, view.last_spm))


@functools.lru_cache(maxsize=4)
def _order(candidates: tuple[Candidate, ...], epoch: int, last_spm: int | None) -> tuple[int, ...]:
    def rank(candidate: Candidate) -> tuple[int, int, bool, int]:
        # A checksum alone is linear: the same few hosts would always come first.
        number = zlib.crc32(b"%d %d" % (epoch, candidate.host_id)) * 2654435761 >> 7 & 0xFFFFFFFF
        return -candidate.version, -candidate.priority, candidate.host_id != last_spm, number

    eligible: Iterable[Candidate] = (candidate for candidate in candidates if candidate.priority >= 1)
    return tuple(candidate.host_id for candidate in sorted(eligible, key=rank))


class Election:
    """One host's part; a machine without I/O."""

    __slots__ = (
        "_aside_until_s",
        "_backoff_s",
        "_blind",
        "_failed_s",
        "_free_since_s",
        "host_id",
        "role",
        "timing",
        "willing",
    )

    def __init__(self, host_id: int, timing: ElectionTiming, *, willing: bool = True) -> None:
        """A host that is not *willing* only tries when :meth:`told`."""
        self.host_id = host_id
        self.timing = timing
        self.willing = willing
        self.role: Role = "Free"
        self._free_since_s: float | None = None
        self._aside_until_s = self._failed_s = float("-inf")
        self._backoff_s = timing.backoff_s
        self._blind = False

    def told(self) -> bool:
        """Somebody asks this host to be the manager; returns whether it may try now."""
        if self.role != "Free":
            return False
        self.role = "Contend"
        return True

    def observe(self, now_s: float, view: PoolView | None) -> Action:
        """Take what is seen, ``None`` when storage does not answer.

        With the answer ``contend`` the role is *Contend*; tell the end by
        :meth:`won` or :meth:`failed`.
        """
        wait = Action("wait", now_s + self.timing.poll_s)
        if view is None:
            self._blind = True
            self._free_since_s = None
            return wait
        if self._blind:
            self._blind = False
            self._forget_failures()
        if self.role != "Free" or not self.willing:
            return wait
        if not view.free:
            self._free_since_s = None
            return wait
        ranks = order(view)
        if self.host_id not in ranks:
            return wait
        if self._free_since_s is None:
            self._free_since_s = now_s
        rank = min(ranks.index(self.host_id), self.timing.ranks)
        aside_s = self._aside_until_s
        if len(ranks) == 1:
            # Nobody else could have the turn meanwhile.
            aside_s = min(aside_s, self._failed_s + self.timing.poll_s)
        turn_s = max(self._free_since_s + rank * self.timing.stagger_s, aside_s)
        if now_s < turn_s:
            return Action("wait", min(turn_s, wait.again_s))
        self.role = "Contend"
        return Action("contend", wait.again_s)

    def won(self) -> None:
        """The start succeeded."""
        self.role = "SPM"
        self._free_since_s = None
        self._forget_failures()

    def failed(self, now_s: float, *, held: bool) -> None:
        """The try ended; *held* when another host was faster, which is nobody's fault."""
        self.role = "Free"
        self._free_since_s = None
        self._failed_s = now_s
        if held:
            self._aside_until_s = now_s + self.timing.stagger_s
        else:
            self._aside_until_s = now_s + self._backoff_s
            self._backoff_s = min(self._backoff_s * 2, self.timing.backoff_limit_s)

    def ended(self, now_s: float, *, lost: bool) -> None:
        """The term is over; who *lost* its lease lets the others go first."""
        self.role = "Free"
        self._free_since_s = None
        self._failed_s = now_s
        if lost:
            self._aside_until_s = now_s + self.timing.round_s

    def _forget_failures(self) -> None:
        self._aside_until_s = float("-inf")
        self._backoff_s = self.timing.backoff_s
