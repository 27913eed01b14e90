# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A storage that keeps an image from being one until its maker says so.

Invariant: I11 for images that are filled through the engine: whatever is
written to bytes 0 to 4 stays in memory, where reads find it, and the storage
below has zeros there until :meth:`HeldMagic.release`, which flushes before and
after it writes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcowlib.storage.wrapper import StorageWrapper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcowlib.storage.base import Storage

__all__ = ["HeldMagic"]

_LENGTH = 4
_SECTOR = 512


class HeldMagic(StorageWrapper):
    """See :class:`~qcowlib.storage.base.Storage`; the storage below stays the caller's to close."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self._magic = bytes(_LENGTH)

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        self._storage.read_into(offset, buffers)
        if offset >= _LENGTH:
            return
        at = offset
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            count = min(len(view), _LENGTH - at)
            if count > 0:
                view[:count] = self._magic[at : at + count]
            at += len(view)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        if offset >= _LENGTH:
            self._storage.write(offset, buffers)
            return
        data = bytearray().join(memoryview(buffer).cast("B") for buffer in buffers)
        count = min(len(data), _LENGTH - offset)
        self._magic = (self._magic[:offset] + bytes(data[:count]) + self._magic[offset + count :])[:_LENGTH]
        data[:count] = bytes(count)
        self._storage.write(offset, [data])

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        if offset < _LENGTH and length:
            end = min(offset + length, _LENGTH)
            self._magic = self._magic[:offset] + bytes(end - offset) + self._magic[end:]
        self._storage.zero(offset, length, allocate=allocate)

    def close(self) -> None:
        """Leave the storage below open: whoever made it finishes and closes it."""

    def release(self) -> None:
        """Make everything durable, then the image one.  Invariant: I11."""
        self._storage.flush()
        sector = bytearray(_SECTOR)
        self._storage.read_into(0, [sector])
        sector[:_LENGTH] = self._magic
        self._storage.write(0, [sector])
        self._storage.flush()
