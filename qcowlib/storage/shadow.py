# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A storage whose changes stay in memory: to find out what a job would leave, to the byte.

Invariant: the storage below is never changed.  Guest data that a trial writes
is a view of :data:`BLANK` and is not kept, so that memory is what the trial
writes of metadata; what such a range holds afterwards is undefined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcowlib.errors import OutOfRange
from qcowlib.storage.base import Alignment, StorageExtent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcowlib.storage.base import FdSegment, Storage

__all__ = ["BLANK", "ShadowStorage"]

BLANK: Final = bytes(2 << 20)
"""What a trial writes in place of guest data."""

_PAGE = 4096


class ShadowStorage:
    """See :class:`~qcowlib.storage.base.Storage`; *below* (``None``: nothing) stays the caller's to close."""

    def __init__(self, below: Storage | None, *, name: str) -> None:
        self._below = below
        self.name = name
        self.is_block = bool(getattr(below, "is_block", False))
        self._size = 0 if below is None else below.size
        #: What lies behind this was cut off once: the storage below does not show there.
        self._shown = self._size
        self._pages: dict[int, bytearray] = {}
        self._zeroed: list[tuple[int, int]] = []
        #: Where the highest write ended.
        self.reached = 0

    @property
    def size(self) -> int:
        return self._size

    @property
    def writable(self) -> bool:
        return True

    @property
    def align(self) -> Alignment:
        return Alignment()

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        self._check(offset, 0)
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            self._read(offset, view)
            offset += len(view)

    def _read(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        shown = max(0, min(end, self._shown) - offset)
        if shown and self._below is not None:
            self._below.read_into(offset, [view[:shown]])
        view[shown:] = bytes(len(view) - shown)
        for start, stop in self._zeroed:
            low, high = max(start, offset), min(stop, end)
            if low < high:
                view[low - offset : high - offset] = bytes(high - low)
        for number in range(offset // _PAGE, -(-end // _PAGE)):
            page = self._pages.get(number)
            if page is not None:
                low, high = max(number * _PAGE, offset), min((number + 1) * _PAGE, end)
                view[low - offset : high - offset] = page[low - number * _PAGE : high - number * _PAGE]

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        self._check(offset, 0)
        for buffer in buffers:
            view = memoryview(buffer)
            blank = view.obj is BLANK
            view = view.cast("B")
            if not blank:
                self._write(offset, view)
            offset += len(view)
        self._size = max(self._size, offset)
        self.reached = max(self.reached, offset)

    def _write(self, offset: int, view: memoryview) -> None:
        at = 0
        while at < len(view):
            number, inside = divmod(offset + at, _PAGE)
            count = min(_PAGE - inside, len(view) - at)
            page = self._pages.get(number)
            if page is None:
                page = bytearray(_PAGE)
                if count < _PAGE:
                    self._read(number * _PAGE, memoryview(page))
                self._pages[number] = page
            page[inside : inside + count] = view[at : at + count]
            at += count

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        self._check(offset, length)
        end = offset + length
        first, last = -(-offset // _PAGE), end // _PAGE
        for number in range(first, last) if last - first < len(self._pages) else list(self._pages):
            if first <= number < last:
                self._pages.pop(number, None)
        for low, high in ((offset, min(end, first * _PAGE)), (max(offset, last * _PAGE), end)):
            if low < high and low // _PAGE in self._pages:
                self._write(low, memoryview(bytes(high - low)))
        if self._zeroed and self._zeroed[-1][1] == offset:
            self._zeroed[-1] = (self._zeroed[-1][0], end)
        elif offset < self._shown:
            self._zeroed.append((offset, end))
        self._size = max(self._size, end)
        self.reached = max(self.reached, end)

    def discard(self, offset: int, length: int) -> None:
        """Keep the content: any is allowed."""
        self._check(offset, length)

    def flush(self) -> None:
        pass

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        self._check(offset, length)
        if length:
            yield StorageExtent("data", offset, length)

    def resize(self, size: int) -> None:
        self._check(size, 0)
        if size < self._size:
            self._shown = min(self._shown, size)
            for number in [number for number in self._pages if number * _PAGE >= size]:
                del self._pages[number]
            last = self._pages.get(size // _PAGE)
            if last is not None:
                last[size % _PAGE :] = bytes(_PAGE - size % _PAGE)
        self._size = size

    def close(self) -> None:
        """Leave everything as it is: who made the trial looks at the result, and closes what is below."""

    def fd_map(self) -> Sequence[FdSegment] | None:
        return None

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0:
            raise OutOfRange(f"range {offset}+{length} is not valid", path=self.name)
