# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Locks between the threads of one process, so that changes of one domain happen one after the other.

They keep no other process out: that is what the right to change is for
(:mod:`.token`).

Invariants: first come, first served; several locks are always taken in the
order of their names and given back in reverse, so no two threads wait for each
other; a shared lock never becomes exclusive, which could only end in that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import NamedTuple

from qcowlib.errors import Busy
from qcowlib.runtime import new_condition, thread_id

from .errors import Illegal

__all__ = ["FairLock", "Locks", "Wanted"]


class Wanted(NamedTuple):
    """A lock by name, *shared* or exclusive."""

    name: str
    shared: bool = False


class _Ticket(NamedTuple):
    owner: int
    shared: bool


class FairLock:
    """A lock for many readers or one writer, in the order in which they came; a thread may take it again."""

    __slots__ = ("_changed", "_exclusive", "_held", "_queue")

    def __init__(self) -> None:
        self._changed = new_condition()
        #: How often each thread holds it.
        self._held: dict[int, int] = {}
        self._exclusive = False
        self._queue: deque[_Ticket] = deque()

    def acquire(self, *, shared: bool = False, timeout_s: float | None = None) -> None:
        """Take it, waiting at most *timeout_s*.

        Raises: Busy when that is over; Illegal for a thread that has it shared and wants it exclusively.
        """
        me = thread_id()
        with self._changed:
            if me in self._held:
                if not shared and not self._exclusive:
                    raise Illegal("a shared lock does not become an exclusive one")
                self._held[me] += 1
                return
            ticket = _Ticket(me, shared)
            self._queue.append(ticket)
            try:
                if not self._changed.wait_for(lambda: self._may_enter(ticket), timeout_s):
                    raise Busy(f"the lock was not free within {timeout_s:g} s")
                self._held[me] = 1
                self._exclusive = not shared
            finally:
                # Whoever leaves the queue lets those behind look again.
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _may_enter(self, ticket: _Ticket) -> bool:
        if self._queue[0] is not ticket:
            return False
        return not self._held or (ticket.shared and not self._exclusive)

    def release(self) -> None:
        """Give it back once.  Raises: Illegal for a thread that does not have it."""
        me = thread_id()
        with self._changed:
            if me not in self._held:
                raise Illegal("this thread does not have the lock")
            self._held[me] -= 1
            if not self._held[me]:
                del self._held[me]
                self._exclusive = False
                self._changed.notify_all()


class Locks:
    """Locks by name, made when they are first wanted."""

    __slots__ = ("_locks", "_making")

    def __init__(self) -> None:
        self._locks: dict[str, FairLock] = {}
        self._making = new_condition()

    def _lock(self, name: str) -> FairLock:
        with self._making:
            return self._locks.setdefault(name, FairLock())

    @contextmanager
    def guard(self, wanted: Iterable[Wanted], *, timeout_s: float | None = None) -> Iterator[None]:
        """Hold all of *wanted* for the body; the same lock twice counts once.

        Raises: Illegal for a lock that is wanted shared and exclusively; Busy
        after *timeout_s* for one of them, when none is held any more.
        """
        once = sorted(set(wanted))
        for one, two in pairwise(once):
            if one.name == two.name:
                raise Illegal(f"the lock '{one.name}' is wanted shared and exclusively: a deadlock")
        with ExitStack() as held:
            for one in once:
                lock = self._lock(one.name)
                lock.acquire(shared=one.shared, timeout_s=timeout_s)
                held.callback(lock.release)
            yield
