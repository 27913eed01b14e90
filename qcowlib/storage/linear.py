# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Segments of other storages one behind the other, as a logical volume has them.

Invariant: an offset never moves; :meth:`LinearStorage.append` only adds behind
the end, so it may run while others read and write.  Two segments of one
storage are flushed by one barrier.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qcowlib.errors import OutOfRange, ReadOnly, StorageError
from qcowlib.storage.base import Alignment, FdSegment, Storage, StorageExtent
from qcowlib.storage.view import clip_segments, split_views

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["LinearStorage", "Segment"]


class Segment(NamedTuple):
    """``length`` bytes of ``storage`` from ``offset`` on."""

    storage: Storage
    offset: int
    length: int


class _Layout(NamedTuple):
    """Replaced as a whole by :meth:`LinearStorage.append`: readers see the old or the new one."""

    starts: tuple[int, ...]
    segments: tuple[Segment, ...]
    size: int


class LinearStorage:
    """A fixed-size storage of *segments*; the last :meth:`append` made it longest.

    With *owned* their storages are closed with it, also those appended.

    Raises: OutOfRange for a segment outside its storage.
    """

    __slots__ = ("_layout", "_name", "_owned", "_storages")

    def __init__(self, segments: Iterable[Segment], *, name: str = "linear", owned: bool = False) -> None:
        self._name = name
        self._owned = owned
        self._storages: tuple[Storage, ...] = ()
        self._layout = _Layout((), (), 0)
        self.append(segments)

    def append(self, segments: Iterable[Segment]) -> None:
        """Make the storage longer by *segments*; empty ones are left out."""
        starts, known, size = list(self._layout.starts), list(self._layout.segments), self._layout.size
        storages = list(self._storages)
        for segment in segments:
            storage, offset, length = segment
            if offset < 0 or length < 0 or offset + length > storage.size:
                raise OutOfRange(f"segment {offset}+{length} is outside {storage.name}", path=self._name)
            if length:
                starts.append(size)
                known.append(segment)
                size += length
            if not any(storage is other for other in storages):
                storages.append(storage)
        self._storages = tuple(storages)
        self._layout = _Layout(tuple(starts), tuple(known), size)

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return self._layout.size

    @property
    def writable(self) -> bool:
        return bool(self._storages) and all(storage.writable for storage in self._storages)

    @property
    def align(self) -> Alignment:
        units = [storage.align for storage in self._storages] or [Alignment()]
        return Alignment(*map(max, zip(*units, strict=True)))

    def _parts(self, offset: int, length: int) -> Iterator[tuple[Storage, int, int, int]]:
        """Yield (storage, its offset, our offset, count) for the part of the range that exists."""
        starts, segments, size = self._layout
        end = min(offset + length, size)
        index = bisect_right(starts, offset) - 1
        while offset < end:
            storage, base, count = segments[index]
            inside = offset - starts[index]
            count = min(count - inside, end - offset)
            yield storage, base + inside, offset, count
            offset += count
            index += 1

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        if offset < 0:
            raise OutOfRange(f"offset {offset} is negative", path=self._name)
        for storage, position, _, count in self._parts(offset, sum(view.nbytes for view in views)):
            head, views = split_views(views, count)
            storage.read_into(position, head)
        for view in views:
            view[:] = bytes(view.nbytes)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        length = sum(view.nbytes for view in views)
        self._check("write", offset, length)
        for storage, position, _, count in self._parts(offset, length):
            head, views = split_views(views, count)
            storage.write(position, head)

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        self._check("zero", offset, length)
        for storage, position, _, count in self._parts(offset, length):
            storage.zero(position, count, allocate=allocate)

    def discard(self, offset: int, length: int) -> None:
        self._check("discard", offset, 0)
        for storage, position, _, count in self._parts(offset, length):
            storage.discard(position, count)

    def flush(self) -> None:
        """Flush every storage, also after one of them failed; raise the first failure."""
        failed: StorageError | None = None
        for storage in self._storages:
            try:
                storage.flush()
            except StorageError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        if offset < 0 or length < 0:
            raise OutOfRange(f"range {offset}+{length} is not valid", path=self._name)
        end = position = offset
        end += length
        for storage, theirs, ours, count in self._parts(offset, length):
            for kind, start, run in storage.extents(theirs, count):
                yield StorageExtent(kind, start - theirs + ours, run)
            position = ours + count
        if position < end:
            yield StorageExtent("hole", position, end - position)

    def resize(self, size: int) -> None:
        """Only to the size it has: :meth:`append` is the way to grow."""
        self._check("resize", 0, 0)
        if size != self.size:
            code = errno.ENOSPC if size > self.size else errno.EINVAL
            raise StorageError(code, path=self._name, operation="resize")

    def close(self) -> None:
        if self._owned:
            self._owned = False
            for storage in self._storages:
                storage.close()

    def fd_map(self) -> Sequence[FdSegment] | None:
        starts, segments, _ = self._layout
        parts: list[FdSegment] = []
        for start, segment in zip(starts, segments, strict=True):
            below = segment.storage.fd_map()
            if below is None:
                return None
            parts += clip_segments(below, segment.offset, segment.length, start)
        return parts

    def _check(self, operation: str, offset: int, length: int) -> None:
        if not self.writable:
            raise ReadOnly("opened for reading", path=self._name)
        if offset < 0 or length < 0:
            raise OutOfRange(f"range {offset}+{length} is not valid", path=self._name)
        if offset + length > self.size:
            raise StorageError(errno.ENOSPC, path=self._name, operation=operation, offset=offset)
