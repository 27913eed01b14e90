# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A window of another storage.

Invariant: no byte outside the window is read or changed; the window has a
fixed size, like a device.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qcowlib.errors import OutOfRange, StorageError
from qcowlib.storage.base import FdSegment, Storage, StorageExtent
from qcowlib.storage.wrapper import StorageWrapper

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["StorageView", "clip_segments", "split_views"]


def split_views(views: Sequence[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """Return (the first *count* bytes, the rest) of byte *views*."""
    head: list[memoryview] = []
    for index, view in enumerate(views):
        if count < view.nbytes:
            if count:
                head.append(view[:count])
            return head, [view[count:], *views[index + 1 :]]
        head.append(view)
        count -= view.nbytes
    return head, []


def clip_segments(segments: Sequence[FdSegment], offset: int, length: int, start: int) -> list[FdSegment]:
    """Return the parts of *segments* in ``offset .. offset + length``, moved so that it begins at *start*."""
    parts = []
    for segment in segments:
        first = max(segment.start, offset)
        last = min(segment.start + segment.length, offset + length)
        if first < last:
            position = segment.position + first - segment.start
            parts.append(FdSegment(start + first - offset, last - first, segment.fd, position))
    return parts


class StorageView(StorageWrapper):
    """The *length* bytes of *storage* from *offset* on.

    With *owned*, closing the view closes *storage*.  *writable* may only take
    the right to write away.

    Raises: OutOfRange unless the window lies inside *storage*.
    """

    __slots__ = ("_length", "_offset", "_owned", "_writable")

    def __init__(
        self, storage: Storage, offset: int, length: int, *, writable: bool = True, owned: bool = False
    ) -> None:
        if offset < 0 or length < 0 or offset + length > storage.size:
            raise OutOfRange(f"window {offset}+{length} is outside the storage", path=storage.name)
        super().__init__(storage)
        self._offset = offset
        self._length = length
        self._writable = writable and storage.writable
        self._owned = owned

    @property
    def size(self) -> int:
        return self._length

    @property
    def writable(self) -> bool:
        return self._writable

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        if offset < 0:
            raise OutOfRange(f"offset {offset} is negative", path=self.name)
        inside, behind = split_views(views, max(0, self._length - offset))
        if inside:
            self._storage.read_into(self._offset + offset, inside)
        for view in behind:
            view[:] = bytes(view.nbytes)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        self._check("write", offset, sum(view.nbytes for view in views))
        self._storage.write(self._offset + offset, views)

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        self._check("zero", offset, length)
        self._storage.zero(self._offset + offset, length, allocate=allocate)

    def discard(self, offset: int, length: int) -> None:
        self._check("discard", offset, 0)
        length = min(length, self._length - offset)
        if length > 0:
            self._storage.discard(self._offset + offset, length)

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        if offset < 0 or length < 0:
            raise OutOfRange(f"range {offset}+{length} is not valid", path=self.name)
        end = offset + length
        middle = min(end, max(offset, self._length))
        if offset < middle:
            for kind, start, count in self._storage.extents(self._offset + offset, middle - offset):
                yield StorageExtent(kind, start - self._offset, count)
        if middle < end:
            yield StorageExtent("hole", middle, end - middle)

    def resize(self, size: int) -> None:
        self._check("resize", 0, 0)
        if size != self._length:
            raise StorageError(errno.EINVAL, path=self.name, operation="resize", message="a window cannot be resized")

    def close(self) -> None:
        if self._owned:
            self._owned = False
            self._storage.close()

    def fd_map(self) -> Sequence[FdSegment] | None:
        segments = self._storage.fd_map()
        return None if segments is None else clip_segments(segments, self._offset, self._length, 0)
