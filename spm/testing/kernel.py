# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual time, processes that can be paused and killed, and a trace.

Invariant: everything that happens follows from the seed; the digest of the
trace is equal for equal seeds and nothing else decides an order.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Generator

__all__ = ["Gate", "Kernel", "Process"]

Steps = Generator[float, None, None]


class Kernel:
    """A queue of calls in virtual time; seconds."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.chance = random.Random(seed)
        self.events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._digest = hashlib.sha256()
        #: Last lines of the trace, for messages.
        self.lines: list[str] = []

    def time(self) -> float:
        """Return the virtual time."""
        return self.now_s

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call at a time, not before now."""
        self._number += 1
        heapq.heappush(self._queue, (max(time_s, self.now_s), self._number, call))

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call after a delay."""
        self.at(self.now_s + delay_s, call)

    def run(self, until_s: float) -> None:
        """Run everything up to a time."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            self.now_s, _, call = heapq.heappop(queue)
            self.events += 1
            call()
        self.now_s = until_s

    def trace(self, text: str) -> None:
        """Note what happened."""
        line = f"{self.now_s:.6f} {text}"
        self._digest.update(line.encode())
        self.lines.append(line)
        if len(self.lines) > 200:
            del self.lines[:100]

    def hash(self) -> str:
        """Return the digest of the trace."""
        return self._digest.hexdigest()


class Gate:
    """Until when something is paused."""

    __slots__ = ("open_s",)

    def __init__(self) -> None:
        self.open_s = 0.0


class Process:
    """Steps, each of which tells how long it takes; killed without a word."""

    __slots__ = ("_gates", "_kernel", "_steps", "ended")

    def __init__(self, kernel: Kernel, steps: Steps, *gates: Gate) -> None:
        self._kernel = kernel
        self._steps = steps
        self._gates = gates
        self.ended: Callable[[], None] | None = None
        kernel.after(0.0, self._step)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._steps is not _NOTHING

    def _step(self) -> None:
        for gate in self._gates:
            if gate.open_s > self._kernel.now_s:
                self._kernel.at(gate.open_s, self._step)
                return
        try:
            delay_s = next(self._steps)
        except StopIteration:
            was_alive = self.alive
            self._steps = _NOTHING
            if was_alive and self.ended is not None:
                self.ended()
            return
        self._kernel.after(delay_s, self._step)

    def kill(self) -> None:
        """End it between two steps."""
        self._steps = _NOTHING


def _nothing() -> Steps:
    yield from ()


_NOTHING = _nothing()
