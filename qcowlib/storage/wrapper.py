# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A storage that stands before another one: what it does not change, it passes on.

Invariant: file descriptors are never handed out past a wrapper, unless it says
how its bytes lie in them; what it does to a request then happens to each.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from qcowlib.errors import OutOfRange, ReadOnly, StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcowlib.storage.base import Alignment, FdSegment, Storage, StorageExtent

__all__ = ["StorageWrapper", "guest_side"]


def guest_side(storage: Storage) -> Storage:
    """Return what guest data goes through: *storage*, unless it tells its own metadata and guest data apart."""
    return getattr(storage, "guest", storage)


class StorageWrapper:
    """See :class:`~qcowlib.storage.base.Storage`; closing it closes *storage*."""

    __slots__ = ("_storage",)

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @property
    def name(self) -> str:
        return self._storage.name

    @property
    def size(self) -> int:
        return self._storage.size

    @property
    def writable(self) -> bool:
        return self._storage.writable

    @property
    def align(self) -> Alignment:
        return self._storage.align

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        self._storage.read_into(offset, buffers)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        self._storage.write(offset, buffers)

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        self._storage.zero(offset, length, allocate=allocate)

    def discard(self, offset: int, length: int) -> None:
        self._storage.discard(offset, length)

    def flush(self) -> None:
        self._storage.flush()

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        return self._storage.extents(offset, length)

    def resize(self, size: int) -> None:
        self._storage.resize(size)

    def close(self) -> None:
        self._storage.close()

    def fd_map(self) -> Sequence[FdSegment] | None:
        return None

    def _check(self, operation: str, offset: int, length: int) -> None:
        """Refuse a change that this storage, of a fixed size, cannot make.

        Raises: ReadOnly; OutOfRange for a negative range; StorageError (ENOSPC) for one that ends behind the end.
        """
        if not self.writable:
            raise ReadOnly("opened for reading", path=self.name)
        if offset < 0 or length < 0:
            raise OutOfRange(f"range {offset}+{length} is not valid", path=self.name)
        if offset + length > self.size:
            raise StorageError(errno.ENOSPC, path=self.name, operation=operation, offset=offset)
