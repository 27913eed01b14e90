# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A thin volume that grows under its writer: asked for at a watermark, waited for only at the end.

The writer's host asks the manager for an absolute size (through its mailbox,
or however *ask* does it) as soon as what was written passes the threshold of
the policy, and goes on; a write that reaches the end of the volume waits until
the volume is longer.  New extents are seen by looking at the volume group again.

Invariant: S3.  No write is lost or answered with "no space" while the manager
grows the volume in time; a write that waited too long fails as on a full
device, and nothing of it was written.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import qcowlib
from qcowlib.errors import Error, StorageError
from qcowlib.runtime import new_condition
from qcowlib.storage.file import FileStorage
from qcowlib.storage.linear import LinearStorage, Segment
from qcowlib.storage.wrapper import StorageWrapper
from qcowlib.units import round_up
from storage_pool.block_domain import BlockDomain
from storage_pool.errors import Illegal
from storage_pool.thin import ThinPolicy, thin_max_size

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["GrowingStorage", "Growth", "open_growing"]

#: How often a writer at the end of its volume looks whether it is longer, in seconds.
_LOOK_S: Final = 0.05


class Growth(NamedTuple):
    """What growing took: requests, times that a write had to wait, and the longest of these in seconds."""

    requests: int
    pauses: int
    longest_pause_s: float


class GrowingStorage(StorageWrapper):
    """A :class:`~qcowlib.storage.base.Storage` over *inner*, the extents of a thin volume of *capacity* guest bytes.

    *ask* begins to have the volume made at least so large, and does not wait;
    *more* returns the segments that the volume has beyond what *inner* knows.
    *clock* and *sleep* are in seconds; a write waits at most *limit_s*.
    """

    def __init__(
        self,
        inner: LinearStorage,
        capacity: int,
        policy: ThinPolicy,
        ask: Callable[[int], None],
        more: Callable[[int], Sequence[Segment]],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        *,
        limit_s: float = 120.0,
    ) -> None:
        super().__init__(inner)
        self._inner = inner
        self._capacity = capacity
        self._policy = policy
        self._ask = ask
        self._more = more
        self._clock = clock
        self._sleep = sleep
        self._limit_s = limit_s
        self._highest = 0
        self._asked = 0
        self._looked_s = float("-inf")
        self._lock = new_condition()
        self._pauses = self._requests = 0
        self._longest_s = 0.0

    @property
    def growth(self) -> Growth:
        """What growing took until now."""
        return Growth(self._requests, self._pauses, self._longest_s)

    # -- growing ---------------------------------------------------------------

    def _reach(self, offset: int, length: int) -> None:
        """Before a write: have room for it, and ask for the next chunk in time."""
        end = offset + length
        with self._lock:
            self._highest = max(self._highest, min(end, self._inner.size))
            if end > self._inner.size:
                self._wait_for(end)
                self._highest = max(self._highest, end)
            size = self._inner.size
            if self._policy.needs_growth(size, self._highest, self._capacity):
                self._want(self._policy.next_size(size, self._capacity))
                if self._clock() - self._looked_s >= 10 * _LOOK_S:
                    self._look()

    def _want(self, size: int) -> None:
        if size > self._asked:
            self._asked = size
            self._requests += 1
            self._ask(size)

    def _look(self) -> None:
        self._looked_s = self._clock()
        self._inner.append(self._more(self._inner.size))

    def _wait_for(self, end: int) -> None:
        """Wait until the volume reaches *end*.  Raises: StorageError (ENOSPC)."""
        most = thin_max_size(self._capacity)
        if end > most:
            raise StorageError(errno.ENOSPC, path=self.name, operation="write", offset=end)
        began = self._clock()
        self._pauses += 1
        while self._inner.size < end:
            self._want(min(round_up(end, self._policy.chunk), most))
            self._look()
            if self._inner.size >= end:
                break
            if self._clock() - began > self._limit_s:
                raise StorageError(errno.ENOSPC, path=self.name, operation="write", offset=end)
            self._sleep(_LOOK_S)
        self._longest_s = max(self._longest_s, self._clock() - began)

    # -- a storage ---------------------------------------------------------------

    @property
    def is_block(self) -> bool:
        """Its old bytes are not zeros, and it is never cut."""
        return True

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        """See :class:`~qcowlib.storage.base.Storage`; may wait."""
        self._reach(offset, sum(memoryview(buffer).nbytes for buffer in buffers))
        self._inner.write(offset, buffers)

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """See :class:`~qcowlib.storage.base.Storage`; may wait."""
        self._reach(offset, length)
        self._inner.zero(offset, length, allocate=allocate)

    def resize(self, size: int) -> None:
        """To more, it grows; never to less.  Raises: StorageError."""
        if size > self._inner.size:
            self._reach(size, 0)
        else:
            self._inner.resize(size)


def open_growing(
    domain: BlockDomain,
    volume: str,
    ask: Callable[[int], None],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    *,
    policy: ThinPolicy | None = None,
    limit_s: float = 120.0,
) -> tuple[qcowlib.Image, GrowingStorage]:
    """Open the image of a thin leaf of *domain* for writing, and give the storage that grows under it.

    The layers below it are not opened: a leaf without a parent, or one whose
    unwritten ranges nobody reads.  *domain* is used to look for new extents
    until the image is closed.
    Raises: Illegal for a volume that is not thin; any error of opening.
    """
    record = domain.record(volume)
    if record.type != "SPARSE" or record.format != "COW":
        raise Illegal(f"the volume {volume} is not thin, it does not grow", path=domain.name)
    inner = domain.open_volume(volume, writable=True)
    if not isinstance(inner, LinearStorage):
        inner.close()
        raise Illegal("the volume is reached through its device, which its host grows", path=domain.name)

    def more(size: int) -> list[Segment]:
        try:
            domain.refresh()
            return _segments(domain, volume, size)
        except Error:
            # A report taken while the group changes: looked for again.
            return []

    storage = GrowingStorage(inner, record.capacity, policy or ThinPolicy(), ask, more, clock, sleep, limit_s=limit_s)
    try:
        return qcowlib.open(storage, "r+", format="qcow2", backing=False), storage
    except BaseException:
        storage.close()
        raise


def _segments(domain: BlockDomain, volume: str, size: int) -> list[Segment]:
    """Return what the volume has behind *size*; the storages are the caller's."""
    found: list[Segment] = []
    for place in domain.state.placements(volume):
        skip = max(size - place.start, 0)
        if skip < place.size:
            device = FileStorage.open(place.device, writable=True, cache="none")
            found.append(Segment(device, place.offset + skip, place.size - skip))
    return found
