# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Direct I/O for any request: aligned ones as they are, others bounced.

Invariant: a read-modify-write of a block never runs while another write of
the same storage is under way, so no write is lost between the two; aligned
writes run side by side.  A file never keeps the padding of a last block.

Raises :class:`OSError`; :mod:`.file` gives it a name.
"""

from __future__ import annotations

import errno
import mmap
import os

from qcowlib.runtime import new_condition
from qcowlib.storage.syscalls import direct_alignment

__all__ = ["DirectIO", "probe"]

_CHUNK = 1 << 20
_POOL = 4
_IOV_MAX = 1024
_SAFE_ALIGNMENT = 4096


def probe(fd: int, sector: int | None) -> tuple[int, int]:
    """Return (offset, memory) alignment: of the device's *sector*, or as the kernel says of a file, else 4096."""
    if sector is not None:
        return sector, sector
    return direct_alignment(fd) or (_SAFE_ALIGNMENT, _SAFE_ALIGNMENT)


class DirectIO:
    """Reads and writes of one descriptor that was opened for direct I/O."""

    __slots__ = ("_aligned", "_condition", "_fd", "_flags", "_pool", "_unit")

    def __init__(self, fd: int, unit: int, flags: int) -> None:
        self._fd = fd
        self._unit = unit
        self._flags = flags
        self._pool: list[mmap.mmap] = []
        self._condition = new_condition()
        self._aligned = 0

    def close(self) -> None:
        """Drop the bounce buffers."""
        self._pool.clear()

    def read(self, offset: int, views: list[memoryview], total: int) -> None:
        """Fill *views*, with zeros past the end of the file."""
        if not (offset | total) % self._unit and len(views) <= _IOV_MAX:
            try:
                if self._read_whole(offset, views, total):
                    return
            except OSError as error:
                # The addresses were not aligned, or a buffer among several.
                if error.errno != errno.EINVAL:
                    raise
        self._read_bounced(offset, views, total)

    def _read_whole(self, offset: int, views: list[memoryview], total: int) -> bool:
        return os.preadv(self._fd, views, offset) == total

    def _read_bounced(self, offset: int, views: list[memoryview], total: int) -> None:
        buffer = self._take()
        try:
            end = offset + total
            while offset < end:
                start = offset - offset % self._unit
                stop = min(-(-end // self._unit) * self._unit, start + _CHUNK)
                self._fill(buffer, 0, start, stop - start)
                upto = min(stop, end)
                with memoryview(buffer) as source:
                    views = _scatter(source[offset - start : upto - start], views)
                offset = upto
        finally:
            self._give(buffer)

    def _fill(self, buffer: mmap.mmap, at: int, start: int, length: int) -> None:
        """Read aligned bytes into *buffer* from *at*; what the file lacks is zero."""
        done = 0
        with memoryview(buffer) as view:
            while done < length:
                with view[at + done : at + length] as part:
                    count = os.preadv(self._fd, [part], start + done)
                if count % self._unit or count == 0:
                    # Only the end of the file is not aligned.
                    done += count
                    view[at + done : at + length] = bytes(length - done)
                    return
                done += count

    def write(self, offset: int, views: list[memoryview], total: int) -> None:
        """Write all of *views*."""
        if (offset | total) % self._unit:
            self._write_modified(offset, views, total)
            return
        with self._condition:
            self._aligned += 1
        try:
            self._write_aligned(offset, views, total)
        finally:
            with self._condition:
                self._aligned -= 1
                self._condition.notify_all()

    def _write_aligned(self, offset: int, views: list[memoryview], total: int) -> None:
        if len(views) <= _IOV_MAX:
            try:
                if os.pwritev(self._fd, views, offset, self._flags) == total:
                    return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        # Again from the start: the same bytes to the same place.
        buffer = self._take()
        try:
            end = offset + total
            while offset < end:
                count = min(end - offset, _CHUNK)
                with memoryview(buffer) as target:
                    views = _gather(target[:count], views)
                self._put(buffer, offset, count)
                offset += count
        finally:
            self._give(buffer)

    def _write_modified(self, offset: int, views: list[memoryview], total: int) -> None:
        """Write a range whose first or last block is covered in part, alone."""
        unit = self._unit
        end = offset + total
        buffer = self._take()
        try:
            with self._condition:
                while self._aligned:
                    self._condition.wait()
                size = os.lseek(self._fd, 0, os.SEEK_END)
                while offset < end:
                    start = offset - offset % unit
                    stop = min(-(-end // unit) * unit, start + _CHUNK)
                    upto = min(stop, end)
                    if offset > start:
                        self._fill(buffer, 0, start, unit)
                    if upto < stop and (stop - start > unit or offset == start):
                        self._fill(buffer, stop - start - unit, stop - unit, unit)
                    with memoryview(buffer) as target:
                        views = _gather(target[offset - start : upto - start], views)
                    self._put(buffer, start, stop - start)
                    offset = upto
                if end % unit and end > size - size % unit:
                    self._cut(max(size, end))
        finally:
            self._give(buffer)

    def _cut(self, size: int) -> None:
        """Cut the padding behind *size* off a file; a device has none."""
        if os.lseek(self._fd, 0, os.SEEK_END) > size:
            os.ftruncate(self._fd, size)

    def grow(self, end: int) -> None:
        """Make the file at least *end* bytes long."""
        with self._condition:
            while self._aligned:
                self._condition.wait()
            if os.lseek(self._fd, 0, os.SEEK_END) < end:
                os.ftruncate(self._fd, end)

    def _put(self, buffer: mmap.mmap, offset: int, length: int) -> None:
        done = 0
        with memoryview(buffer) as view:
            while done < length:
                with view[done:length] as part:
                    count = os.pwritev(self._fd, [part], offset + done, self._flags)
                if count == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                # A short write may end inside a block: go on from its start.
                if count < self._unit:
                    raise OSError(errno.EIO, "a direct write stopped inside a block")
                done += count - count % self._unit

    def _take(self) -> mmap.mmap:
        try:
            return self._pool.pop()
        except IndexError:
            return mmap.mmap(-1, _CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _give(self, buffer: mmap.mmap) -> None:
        if len(self._pool) < _POOL:
            self._pool.append(buffer)


def _scatter(source: memoryview, views: list[memoryview]) -> list[memoryview]:
    """Copy *source* to the start of *views*; return what is still to fill."""
    done = 0
    for index, view in enumerate(views):
        count = min(view.nbytes, source.nbytes - done)
        view[:count] = source[done : done + count]
        done += count
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]]
    return []


def _gather(target: memoryview, views: list[memoryview]) -> list[memoryview]:
    """Fill *target* from the start of *views*; return what was not used."""
    done = 0
    for index, view in enumerate(views):
        count = min(view.nbytes, target.nbytes - done)
        target[done : done + count] = view[:count]
        done += count
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]]
    return []
