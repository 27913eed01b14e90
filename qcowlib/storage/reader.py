# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Any readable object as a read-only storage: HTTP files, archives, decompressors.

Invariant: an object with a cursor is used by one thread at a time; the cursor
is set before each read, so other users of the object may move it between
calls, not during them.  What the object raises as :class:`OSError` comes out
as :class:`~qcowlib.errors.StorageError`; answers that are too long are an
error, not an overrun.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from qcowlib.errors import OutOfRange, ReadOnly, StorageError, UsageError
from qcowlib.runtime import new_condition
from qcowlib.storage.base import Alignment, FdSegment, StorageExtent

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["PositionedReader", "ReaderStorage", "SeekableReader"]


class PositionedReader(Protocol):
    """Reads at an offset, from several threads at once; shorter only at the end."""

    def pread(self, length: int, offset: int, /) -> ReadableBuffer: ...


class SeekableReader(Protocol):
    """Reads at a cursor, as binary files do."""

    def seek(self, offset: int, whence: int = ..., /) -> int: ...

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class ReaderStorage:
    """The bytes of *source*, which needs ``pread(length, offset)`` or ``seek`` and ``readinto``.

    *size* is asked of ``seek`` where not given; an object without ``seek``
    may have an attribute ``size``.  With *owned* its ``close`` is called.

    Raises: UsageError for an object without these methods.
    """

    __slots__ = ("_lock", "_name", "_owned", "_positioned", "_seekable", "_size", "_source")

    def __init__(
        self,
        source: PositionedReader | SeekableReader,
        *,
        size: int | None = None,
        name: str | None = None,
        owned: bool = False,
    ) -> None:
        self._source = source
        self._owned = owned
        given = getattr(source, "name", None) if name is None else name
        self._name = given if isinstance(given, str) else type(source).__name__
        self._positioned = cast("PositionedReader", source) if hasattr(source, "pread") else None
        seeks = hasattr(source, "seek") and hasattr(source, "readinto")
        self._seekable = cast("SeekableReader", source) if seeks else None
        if self._positioned is None and self._seekable is None:
            raise UsageError("the object has neither pread nor seek and readinto", path=self._name)
        self._lock = new_condition()
        self._size = self._measure() if size is None else size

    def _measure(self) -> int:
        try:
            if hasattr(self._source, "seek"):
                return int(self._source.seek(0, os.SEEK_END))
        except OSError as error:
            raise StorageError.from_os(error, path=self._name, operation="seek") from error
        size = getattr(self._source, "size", None)
        if not isinstance(size, int):
            raise UsageError("the size of the object is not known", path=self._name)
        return size

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return self._size

    @property
    def writable(self) -> bool:
        return False

    @property
    def align(self) -> Alignment:
        return Alignment()

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        if offset < 0:
            raise OutOfRange(f"offset {offset} is negative", path=self._name)
        try:
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                count = max(0, min(view.nbytes, self._size - offset))
                if self._positioned is not None:
                    done = self._read_positioned(self._positioned, offset, view[:count])
                else:
                    done = self._read_seeking(cast("SeekableReader", self._seekable), offset, view[:count])
                view[done:] = bytes(view.nbytes - done)
                offset += view.nbytes
        except StorageError:
            raise
        except OSError as error:
            raise StorageError.from_os(error, path=self._name, operation="read", offset=offset) from error

    def _read_positioned(self, source: PositionedReader, offset: int, view: memoryview) -> int:
        done = 0
        while done < view.nbytes:
            part = memoryview(source.pread(view.nbytes - done, offset + done)).cast("B")
            if part.nbytes == 0:
                break
            self._check_count(part.nbytes, view.nbytes - done, offset + done)
            view[done : done + part.nbytes] = part
            done += part.nbytes
        return done

    def _read_seeking(self, source: SeekableReader, offset: int, view: memoryview) -> int:
        if not view.nbytes:
            return 0
        done = 0
        with self._lock:
            source.seek(offset, os.SEEK_SET)
            while done < view.nbytes:
                with view[done:] as part:
                    count = source.readinto(part)
                if count is None:
                    raise StorageError(errno.EAGAIN, path=self._name, operation="read", offset=offset + done)
                if count == 0:
                    break
                self._check_count(count, view.nbytes - done, offset + done)
                done += count
        return done

    def _check_count(self, count: int, room: int, offset: int) -> None:
        if not 0 < count <= room:
            text = f"the object answered {count} bytes where {room} were asked"
            raise StorageError(errno.EIO, path=self._name, operation="read", offset=offset, message=text)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        raise self._readonly()

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        raise self._readonly()

    def discard(self, offset: int, length: int) -> None:
        raise self._readonly()

    def resize(self, size: int) -> None:
        raise self._readonly()

    def _readonly(self) -> ReadOnly:
        return ReadOnly("opened for reading", path=self._name)

    def flush(self) -> None:
        pass

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        if offset < 0 or length < 0:
            raise OutOfRange(f"range {offset}+{length} is not valid", path=self._name)
        middle = min(offset + length, max(offset, self._size))
        if middle > offset:
            yield StorageExtent("data", offset, middle - offset)
        if middle < offset + length:
            yield StorageExtent("hole", middle, offset + length - middle)

    def close(self) -> None:
        if self._owned:
            self._owned = False
            getattr(self._source, "close", lambda: None)()

    def fd_map(self) -> Sequence[FdSegment] | None:
        return None
