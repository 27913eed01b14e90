# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Storages that fail on purpose.

Invariant: which call fails, and how, is said by a :class:`FaultPlan` before
the run and by nothing else, so a failure repeats.

Ways to fail: ``error`` (nothing done), ``late`` (all done, yet an error),
``short`` (the first half of the sectors done, then the error), ``torn`` (each
second sector done, then the error), ``lie`` (nothing done, success; the lying
flush of a disk with a volatile cache).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from qcowlib.errors import StorageError
from qcowlib.storage.wrapper import StorageWrapper

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcowlib.storage.base import Storage

__all__ = ["Fault", "FaultPlan", "FaultStorage", "every_fault"]

SECTOR = 512

Operation = Literal["any", "change", "read", "write", "zero", "discard", "flush", "resize"]
Way = Literal["error", "late", "short", "torn", "lie"]


class Fault(NamedTuple):
    """Fail call number ``nth`` (from 1) of ``operation``; with ``forever`` each later one too.

    ``operation`` may be ``change`` for all but reads.  With ``length`` only
    calls that touch ``offset`` .. ``offset + length`` are counted.
    """

    operation: Operation = "any"
    nth: int = 1
    code: int = errno.EIO
    way: Way = "error"
    forever: bool = False
    offset: int = 0
    length: int = 0


class FaultPlan:
    """Faults shared by any number of storages, with the count of calls so far."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.faults = tuple(faults)
        self.calls = 0
        #: Descriptions of the faults that were played.
        self.played: list[str] = []
        self._seen = [0] * len(self.faults)

    def next(self, operation: Operation, offset: int, length: int) -> Fault | None:
        """Count a call and return the fault it has to suffer."""
        self.calls += 1
        chosen = None
        for index, fault in enumerate(self.faults):
            if fault.operation not in ("any", operation) and (fault.operation, operation == "read") != (
                "change",
                False,
            ):
                continue
            if fault.length and not (offset < fault.offset + fault.length and fault.offset < offset + length):
                continue
            self._seen[index] += 1
            if self._seen[index] == fault.nth or (fault.forever and self._seen[index] > fault.nth):
                chosen = fault
        if chosen is not None:
            self.played.append(f"call {self.calls}: {operation} {offset}+{length}: {chosen.way} {chosen.code}")
        return chosen


def every_fault(
    calls: int, *, codes: Sequence[int] = (errno.EIO, errno.ENOSPC), ways: Sequence[Way] = ("error", "short", "torn")
) -> Iterator[FaultPlan]:
    """Yield one plan for each of *calls* calls, each error and each way; *calls* is counted in a run without faults."""
    for nth in range(1, calls + 1):
        for code in codes:
            for way in ways:
                yield FaultPlan([Fault(nth=nth, code=code, way=way)])


class FaultStorage(StorageWrapper):
    """Passes everything to another storage, except where the plan says otherwise."""

    def __init__(self, storage: Storage, plan: FaultPlan) -> None:
        super().__init__(storage)
        self.plan = plan

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        fault = self.plan.next("read", offset, sum(memoryview(buffer).nbytes for buffer in buffers))
        if fault is not None and fault.way != "lie":
            raise self._error(fault, "read", offset)
        self._storage.read_into(offset, buffers)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        data = b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers)
        fault = self.plan.next("write", offset, len(data))
        if fault is None:
            self._storage.write(offset, [data])
            return
        for start, end in _parts(fault, offset, len(data)):
            self._storage.write(start, [data[start - offset : end - offset]])
        self._finish(fault, "write", offset)

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        fault = self.plan.next("zero", offset, length)
        if fault is None:
            self._storage.zero(offset, length, allocate=allocate)
            return
        for start, end in _parts(fault, offset, length):
            self._storage.zero(start, end - start, allocate=allocate)
        self._finish(fault, "zero", offset)

    def discard(self, offset: int, length: int) -> None:
        fault = self.plan.next("discard", offset, length)
        if fault is None:
            self._storage.discard(offset, length)
            return
        for start, end in _parts(fault, offset, length):
            self._storage.discard(start, end - start)
        self._finish(fault, "discard", offset)

    def flush(self) -> None:
        fault = self.plan.next("flush", 0, 0)
        if fault is None or fault.way == "late":
            self._storage.flush()
        if fault is not None:
            self._finish(fault, "flush", 0)

    def resize(self, size: int) -> None:
        fault = self.plan.next("resize", size, 0)
        if fault is None or fault.way == "late":
            self._storage.resize(size)
        if fault is not None:
            self._finish(fault, "resize", size)

    def _error(self, fault: Fault, operation: str, offset: int) -> StorageError:
        return StorageError(fault.code, path=self.name, operation=operation, offset=offset)

    def _finish(self, fault: Fault, operation: str, offset: int) -> None:
        if fault.way != "lie":
            raise self._error(fault, operation, offset)


def _parts(fault: Fault, offset: int, length: int) -> list[tuple[int, int]]:
    """Return the ranges that a failing change still changes, at sector borders."""
    end = offset + length
    if fault.way == "late":
        return [(offset, end)] if length else []
    if fault.way not in ("short", "torn"):
        return []
    borders = [offset, *range(offset - offset % SECTOR + SECTOR, end, SECTOR), end]
    sectors = list(pairwise(borders))
    return sectors[: len(sectors) // 2] if fault.way == "short" else sectors[::2]
