# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A log of everything that changes one or more storages.

Invariant: the log has the changes of all recorded storages in one global
order, each with its bytes, and each barrier at the place where it returned;
so any state that a power cut could leave can be built from it
(:mod:`.crash`).  Only what succeeded below is logged; put
:class:`~qcowlib.testing.faults.FaultStorage` above the recorder.

Storage calls are expected one at a time, as they come from one thread or from
:class:`~qcowlib.testing.sim.SimRuntime`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from qcowlib.storage.wrapper import StorageWrapper

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from qcowlib.storage.base import Storage

__all__ = ["Op", "OpKind", "OpLog", "RecordingStorage"]

OpKind = Literal["write", "zero", "discard", "resize", "flush", "mark"]


class Op(NamedTuple):
    """One change: ``length`` bytes at ``offset`` of the storage with number ``storage``.

    ``data`` is set for writes, ``note`` for marks; ``length`` of a resize is
    the new size.
    """

    kind: OpKind
    storage: int
    offset: int
    length: int
    data: bytes = b""
    note: str = ""


class OpLog:
    """The changes of all storages that were made by :meth:`record`, in order."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        #: Content of each storage when its recording began.
        self.bases: list[bytes] = []

    def __len__(self) -> int:
        return len(self.ops)

    @property
    def position(self) -> int:
        """How many operations the log has: the point in time of what happens next."""
        return len(self.ops)

    def record(self, storage: Storage) -> RecordingStorage:
        """Return *storage* wrapped; what it holds now counts as durable."""
        content = bytearray(storage.size)
        storage.read_into(0, [content])
        self.bases.append(bytes(content))
        return RecordingStorage(storage, self, len(self.bases) - 1)

    def mark(self, note: str) -> int:
        """Add a remark for whoever reads the log and return its position."""
        self.ops.append(Op("mark", 0, 0, 0, note=note))
        return len(self.ops) - 1


class RecordingStorage(StorageWrapper):
    """Passes everything to another storage and logs what changed it."""

    def __init__(self, storage: Storage, log: OpLog, number: int) -> None:
        super().__init__(storage)
        self._log = log
        self._number = number

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        self._storage.write(offset, buffers)
        data = b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers)
        if data:
            self._add(Op("write", self._number, offset, len(data), data))

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        self._storage.zero(offset, length, allocate=allocate)
        if length:
            self._add(Op("zero", self._number, offset, length))

    def discard(self, offset: int, length: int) -> None:
        self._storage.discard(offset, length)
        if length:
            self._add(Op("discard", self._number, offset, length))

    def flush(self) -> None:
        self._storage.flush()
        self._add(Op("flush", self._number, 0, 0))

    def resize(self, size: int) -> None:
        self._storage.resize(size)
        self._add(Op("resize", self._number, 0, size))

    def _add(self, op: Op) -> None:
        self._log.ops.append(op)
