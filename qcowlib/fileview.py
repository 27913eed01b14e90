# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""An open image as a file object, for code that wants one.

Invariant: the position is the view's own; several views of one image do not
disturb each other.  Closing the view does not close the image.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Protocol

from qcowlib.errors import ReadOnly, UsageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["FileView"]


class _Positioned(Protocol):
    @property
    def size(self) -> int: ...

    @property
    def mode(self) -> str: ...

    def preadinto(self, buffer: WriteableBuffer, offset: int) -> int: ...

    def pwrite(self, data: ReadableBuffer, offset: int) -> int: ...

    def flush(self) -> None: ...


class FileView(io.RawIOBase):
    """A seekable raw stream over the guest bytes."""

    def __init__(self, image: _Positioned) -> None:
        super().__init__()
        self._image = image
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._image.mode == "r+"

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._image.size}.get(whence)
        if base is None or base + offset < 0:
            raise UsageError("a position before the start, or an unknown whence")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        count = self._image.preadinto(buffer, self._position)
        self._position += count
        return count

    def write(self, data: ReadableBuffer, /) -> int:
        if not self.writable():
            raise ReadOnly("the image is open for reading")
        view = memoryview(data).cast("B")
        room = max(self._image.size - self._position, 0)
        count = self._image.pwrite(view[:room], self._position)
        self._position += count
        return count

    def flush(self) -> None:
        super().flush()
        if not self.closed and self.writable():
            self._image.flush()
