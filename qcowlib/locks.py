# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Waiting inside one engine: ranges of guest bytes, and the gate for structural changes.

Invariants: two holders of a :class:`RangeLock` never overlap, and whoever asked
first of two that overlap gets it first, so nobody starves; a closed
:class:`Gate` has no pins, and lets nobody in until it is opened.  Both change
state only between two awaits, so one text serves every runtime; a waiter that
is cancelled leaves no trace.

Not for other processes: see :mod:`qcowlib.storage.imagelock`.
"""

from __future__ import annotations

from qcowlib.runtime import Runtime

__all__ = ["Gate", "HeldRange", "RangeLock"]


class HeldRange:
    """A claim on ``start`` to ``end`` (exclusive); compared by identity."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end


class RangeLock:
    """Exclusive ranges in order of arrival."""

    __slots__ = ("_claims", "_queue")

    def __init__(self, runtime: Runtime) -> None:
        self._queue = runtime.queue()
        # Holders and waiters by arrival: a claim is held when nothing before it overlaps.
        self._claims: list[HeldRange] = []

    def try_acquire(self, start: int, end: int) -> HeldRange | None:
        """Return the claim if nobody holds or waits for a part of the range, else ``None``."""
        for other in self._claims:
            if other.start < end and start < other.end:
                return None
        claim = HeldRange(start, end)
        self._claims.append(claim)
        return claim

    async def acquire(self, start: int, end: int) -> HeldRange:
        """Wait until all earlier claims that overlap are released; pass the result to :meth:`release`."""
        claim = self.try_acquire(start, end)
        if claim is not None:
            return claim
        claim = HeldRange(start, end)
        self._claims.append(claim)
        try:
            while self._blocked(claim):
                await self._queue.wait()
        except BaseException:
            self.release(claim)
            raise
        return claim

    def _blocked(self, claim: HeldRange) -> bool:
        for other in self._claims:
            if other is claim:
                return False
            if other.start < claim.end and claim.start < other.end:
                return True
        raise ValueError("the claim was released while it waited")

    def release(self, claim: HeldRange) -> None:
        """Give a claim back.  Raises ValueError when it is not held."""
        self._claims.remove(claim)
        if self._claims:
            self._queue.wake_all()

    @property
    def busy(self) -> bool:
        """Whether any range is held or waited for."""
        return bool(self._claims)


class Gate:
    """Lets operations in (a pin each) until somebody closes it for a structural change."""

    __slots__ = ("_closed", "_pins", "_queue")

    def __init__(self, runtime: Runtime) -> None:
        self._queue = runtime.queue()
        self._pins = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it is closed, or being closed."""
        return self._closed

    @property
    def pins(self) -> int:
        """How many operations are inside."""
        return self._pins

    def try_enter(self) -> bool:
        """Pin and return true unless the gate is closed."""
        if self._closed:
            return False
        self._pins += 1
        return True

    async def enter(self) -> None:
        """Pin, as soon as the gate is open.  Each enter needs one :meth:`leave`."""
        while self._closed:
            await self._queue.wait()
        self._pins += 1

    def leave(self) -> None:
        """Drop a pin."""
        if self._pins <= 0:
            raise ValueError("left a gate that nobody is in")
        self._pins -= 1
        if self._pins == 0:
            self._queue.wake_all()

    async def close(self) -> None:
        """Let nobody in any more and return when nobody is inside; one closer at a time."""
        while self._closed:
            await self._queue.wait()
        self._closed = True
        try:
            while self._pins:
                await self._queue.wait()
        except BaseException:
            self.open()
            raise

    def open(self) -> None:
        """Let operations in again."""
        self._closed = False
        self._queue.wake_all()
