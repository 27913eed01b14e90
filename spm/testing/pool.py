# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The storage that simulated hosts share: pool metadata and the two mailbox volumes.

A change replaces all metadata at once, as LVM does, and lands some time after
it began; nobody can take it back.  A change may also be reported as failed
and land nevertheless.  Mailbox pages may be lost or torn.
"""

from __future__ import annotations

from typing import Final

from spm.mailbox import BOX_SIZE

from .checkers import Checkers, PoolState, SimTask, SimVolume, Term
from .kernel import Kernel

__all__ = ["SimPool", "extended", "removed", "with_task", "with_volume", "without_task"]

EXTENTS: Final = 4000
_SECTOR: Final = 512


class SimPool:
    """What is on storage."""

    def __init__(self, kernel: Kernel, checkers: Checkers, hosts: int) -> None:
        self.kernel = kernel
        self.checkers = checkers
        self.state = PoolState(0, 0, {}, {})
        self._pages = {"inbox": [bytes(BOX_SIZE)] * (hosts + 1), "outbox": [bytes(BOX_SIZE)] * (hosts + 1)}
        self._inbox: bytes | None = None
        #: Share of mailbox writes that are lost or torn.
        self.trouble = 0.0

    def submit(self, term: Term, new: PoolState, latency_s: float) -> None:
        """Begin a change that lands after *latency_s*, whatever becomes of its writer."""

        def land() -> None:
            self.checkers.lands(term, self.state, new)
            self.state = new

        self.kernel.after(latency_s, land)

    def read_box(self, area: str, host_id: int) -> bytes:
        """Return one box."""
        return self._pages[area][host_id]

    def inbox(self) -> bytes:
        """Return the whole inbox; the same object while nothing was written."""
        if self._inbox is None:
            self._inbox = b"".join(self._pages["inbox"])
        return self._inbox

    def write_boxes(self, area: str, offset: int, data: bytes) -> bool:
        """Write boxes from *offset* on; returns whether they are whole on storage."""
        if area == "inbox":
            self._inbox = None
        torn = self.kernel.chance.random() < self.trouble
        for start in range(0, len(data), BOX_SIZE):
            box = data[start : start + BOX_SIZE]
            number = (offset + start) // BOX_SIZE
            self._pages[area][number] = self._tear(self._pages[area][number], box) if torn else box
        return not torn

    def _tear(self, old: bytes, new: bytes) -> bytes:
        sectors = range(0, BOX_SIZE, _SECTOR)
        chance = self.kernel.chance
        return b"".join((new if chance.random() < 0.5 else old)[start : start + _SECTOR] for start in sectors)


def _free(state: PoolState, count: int) -> tuple[int, ...]:
    """Return the lowest free extents, fewer when the group is full."""
    used = {extent for volume in state.volumes.values() for extent in volume.extents}
    found: list[int] = []
    for extent in range(EXTENTS):
        if len(found) == count:
            break
        if extent not in used:
            found.append(extent)
    return tuple(found)


def with_task(state: PoolState, name: str, task: SimTask) -> PoolState:
    """Record a task."""
    return state._replace(tasks={**state.tasks, name: task})


def without_task(state: PoolState, name: str) -> PoolState:
    """Forget a task."""
    return state._replace(tasks={key: task for key, task in state.tasks.items() if key != name})


def with_volume(state: PoolState, name: str, *, initializing: bool) -> PoolState:
    """Make a volume of one extent, or publish one that was made."""
    volume = state.volumes.get(name) or SimVolume(_free(state, 1), True)
    return state._replace(volumes={**state.volumes, name: volume._replace(initializing=initializing)})


def removed(state: PoolState, name: str) -> PoolState:
    """Remove a volume."""
    return state._replace(volumes={key: volume for key, volume in state.volumes.items() if key != name})


def extended(state: PoolState, name: str, size: int) -> PoolState:
    """Give a volume at least *size* extents; the state itself where it has them or is not there."""
    volume = state.volumes.get(name)
    if volume is None or len(volume.extents) >= size:
        return state
    more = _free(state, size - len(volume.extents))
    return state._replace(volumes={**state.volumes, name: volume._replace(extents=volume.extents + more)})
