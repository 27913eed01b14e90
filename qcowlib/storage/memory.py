# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes in memory as a storage, for tests and small images.

Invariant: no view of the bytes leaves this module, so their length may change
at any time; a lock guards the length, the GIL each copy.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qcowlib.errors import OutOfRange, ReadOnly, StorageError
from qcowlib.runtime import new_condition
from qcowlib.storage.base import Alignment, FdSegment, StorageExtent

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["MemoryStorage"]


class MemoryStorage:
    """A growable (or, like a device, fixed) run of bytes.

    *data* is the first content (copied, except a ``bytearray``, which is
    taken over) or a length of zeros.  *limit* is the size it may reach; what
    would exceed it fails with ENOSPC.
    """

    __slots__ = ("_data", "_limit", "_lock", "_name", "_writable")

    def __init__(
        self,
        data: ReadableBuffer | int = b"",
        *,
        name: str = "memory",
        writable: bool = True,
        growable: bool = True,
        limit: int = 1 << 40,
    ) -> None:
        self._data = data if isinstance(data, bytearray) else bytearray(data)
        self._lock = new_condition()
        self._name = name
        self._writable = writable
        self._limit = limit if growable else len(self._data)

    def getvalue(self) -> bytes:
        """Return a copy of the content."""
        return bytes(self._data)

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def writable(self) -> bool:
        return self._writable

    @property
    def align(self) -> Alignment:
        return Alignment()

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        if offset < 0:
            raise OutOfRange(f"offset {offset} is negative", path=self._name)
        data = self._data
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            length = view.nbytes
            part = data[offset : offset + length]
            view[: len(part)] = part
            if len(part) < length:
                view[len(part) :] = bytes(length - len(part))
            offset += length

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        parts = [memoryview(buffer).cast("B") for buffer in buffers]
        end = self._reach("write", offset, sum(part.nbytes for part in parts))
        self._extend(end)
        for part in parts:
            self._data[offset : offset + part.nbytes] = part
            offset += part.nbytes

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        self._extend(self._reach("zero", offset, length))
        self._data[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        """Give the range back: it reads as zeros, to surprise whoever relies on it."""
        self._check("discard", offset, length)
        end = min(offset + length, len(self._data))
        if offset < end:
            self._data[offset:end] = bytes(end - offset)

    def flush(self) -> None:
        pass

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        if offset < 0 or length < 0:
            raise OutOfRange(f"range {offset}+{length} is not valid", path=self._name)
        middle = max(offset, min(offset + length, len(self._data)))
        if middle > offset:
            yield StorageExtent("data", offset, middle - offset)
        if middle < offset + length:
            yield StorageExtent("hole", middle, offset + length - middle)

    def resize(self, size: int) -> None:
        self._reach("resize", size, 0)
        with self._lock:
            del self._data[size:]
        self._extend(size)

    def close(self) -> None:
        pass

    def fd_map(self) -> Sequence[FdSegment] | None:
        return None

    def _check(self, operation: str, offset: int, length: int) -> None:
        if not self._writable:
            raise ReadOnly("opened for reading", path=self._name)
        if offset < 0 or length < 0:
            raise OutOfRange(f"range {offset}+{length} is not valid", path=self._name)

    def _reach(self, operation: str, offset: int, length: int) -> int:
        self._check(operation, offset, length)
        if offset + length > self._limit:
            raise StorageError(errno.ENOSPC, path=self._name, operation=operation, offset=offset)
        return offset + length

    def _extend(self, end: int) -> None:
        with self._lock:
            if end > len(self._data):
                self._data.extend(bytes(end - len(self._data)))
