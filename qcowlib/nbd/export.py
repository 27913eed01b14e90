# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What one export answers: an open image, under a name.

Invariant: a reply to a change is sent when the change is visible to every
connection; a flush covers every change that was replied to before, on any
connection, because all connections share one image (and so may be many).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from qcowlib.driver import END, HOLE, SPARSE, ZERO
from qcowlib.errors import OutOfRange, UsageError, printable
from qcowlib.image import Image
from qcowlib.nbd import protocol as p
from qcowlib.nbd.protocol import ExportInfo
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import KiB, round_down, round_up

__all__ = ["Export", "Status"]

_ALLOCATION: Final = "base:allocation"
_DEPTH: Final = "qemu:allocation-depth"
_BITMAP: Final = "qemu:dirty-bitmap:"
_MAX_EXTENTS: Final = 32768

Status = list[tuple[int, int]]
"""``(length, flags)`` from the asked offset on."""


class Export:
    """*image* as clients see it under *name*; it stays the caller's to close.

    Read-only unless the image is open for writing and *read_only* is false.
    *bitmaps* are the names of persistent bitmaps that clients may ask for.

    Raises: UsageError for a name or description that the protocol has no room for, for an unknown
    or inconsistent bitmap, or for an image opened for reading where *read_only* is false.
    """

    def __init__(
        self,
        image: Image,
        name: str = "",
        *,
        read_only: bool | None = None,
        bitmaps: Iterable[str] = (),
        description: str = "",
    ) -> None:
        self.image = image
        if read_only is None:
            read_only = image.mode != "r+"
        if not read_only and image.mode != "r+":
            raise UsageError("an image that is open for reading cannot be exported for writing", path=image.path)
        self.read_only = read_only
        self._bitmaps = tuple(bitmaps)
        texts = [name, description, *(_BITMAP + bitmap for bitmap in self._bitmaps)]
        for text in texts:
            if len(text.encode("utf-8", "surrogateescape")) > p.MAX_NAME or not text.isprintable():
                raise UsageError(f"'{printable(text[:64])}' cannot be a name in the protocol", path=image.path)
        if len(self._bitmaps) >= p.MAX_CONTEXTS:
            raise UsageError(f"more than {p.MAX_CONTEXTS - 1} bitmaps cannot be exported", path=image.path)
        for bitmap in self._bitmaps:
            next(image.bitmap_extents(bitmap), None)
        top = image.layers[0]
        self.fast_zero, self._unit = False, 1
        if isinstance(top, Qcow2Image):
            self.fast_zero = top.header.version >= 3
            self._unit = top.cluster_size // 32 if top.cmap.extended else top.cluster_size
        cluster = max(4 * KiB, image.cluster_size or 0)
        flags = p.HAS_FLAGS | p.SEND_FLUSH | p.SEND_FUA | p.CAN_MULTI_CONN | p.SEND_CACHE
        flags |= p.READ_ONLY if read_only else p.SEND_TRIM | p.SEND_WRITE_ZEROES | p.SEND_FAST_ZERO
        contexts = (_ALLOCATION, _DEPTH, *(_BITMAP + bitmap for bitmap in self._bitmaps))
        self.info = ExportInfo(name, description, image.size, flags, cluster, contexts)

    @property
    def name(self) -> str:
        """What clients ask for."""
        return self.info.name

    def zero(self, length: int, offset: int, *, no_hole: bool, fast: bool) -> int:
        """Write zeros; returns 0, or ENOTSUP where *fast* was asked and it would not be fast."""
        if fast and not (self.fast_zero and self._edges_are_zero(offset, offset + length)):
            return p.ENOTSUP
        self.image.zero(length, offset, unmap=not no_hole)
        return 0

    def _edges_are_zero(self, start: int, end: int) -> bool:
        """Whether the parts of clusters in the range read as zeros already: if not, they would be written."""
        first, last = round_up(start, self._unit), round_down(end, self._unit)
        last = end if end == self.info.size else last
        return self._reads_zero(start, min(first, end)) and self._reads_zero(max(last, start), end)

    def _reads_zero(self, start: int, end: int) -> bool:
        while start < end:
            runs = self.image.map(start, end - start)
            if runs.end <= start or any(run[0] not in (HOLE, ZERO) for run in runs):
                return False
            start = runs.end
        return True

    # -- block status ----------------------------------------------------------------

    def status(self, context: str, offset: int, length: int, *, one: bool) -> Status:
        """Return what *context* says of the range: at least one extent, perhaps fewer bytes than asked.

        Raises: OutOfRange, StorageError, CorruptImage.
        """
        limit = 1 if one else _MAX_EXTENTS
        end = offset + length
        if end > self.info.size or length <= 0:
            raise OutOfRange(f"range {offset}+{length} is outside the export", path=self.image.path)
        if context.startswith(_BITMAP):
            return _collect(self._dirty(context[len(_BITMAP) :], offset, end), limit)
        return _collect(self._mapped(offset, end, depth=context == _DEPTH), limit)

    def _mapped(self, offset: int, end: int, *, depth: bool) -> Iterator[tuple[int, int]]:
        sizes = [layer.size for layer in self.image.layers]
        while offset < end:
            runs = self.image.map(offset, end - offset)
            for kind, guest, length, _host, layer in runs:
                if not depth:
                    yield length, _FLAGS.get(kind, 0)
                elif kind != HOLE:
                    yield length, layer + 1
                else:
                    yield from _hole_depths(sizes, guest, guest + length)
            if runs.end <= offset:
                return
            offset = runs.end

    def _dirty(self, bitmap: str, offset: int, end: int) -> Iterator[tuple[int, int]]:
        for start, length in self.image.bitmap_extents(bitmap, offset):
            stop = min(start + length, end)
            start = max(start, offset)
            if start >= end:
                break
            if stop <= offset:
                continue
            if start > offset:
                yield start - offset, 0
            yield stop - start, p.STATE_DIRTY
            offset = stop
        if offset < end:
            yield end - offset, 0


def _hole_depths(sizes: list[int], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield ``(length, depth)`` of what no layer has.

    Source: qemu; what lies behind the end of a layer counts as allocated in it.
    """
    while start < end:
        stop = min(size for size in (*sizes, end) if size > start)
        depth = next((number for number, size in enumerate(sizes, 1) if size <= start), 0)
        yield stop - start, depth
        start = stop


_NOTHING: Final = p.STATE_HOLE | p.STATE_ZERO
#: Source: qemu; what is zero by its mapping is a hole, what the file system knows as a hole is space that is zero.
_FLAGS: Final = {HOLE: _NOTHING, ZERO: _NOTHING, END: _NOTHING, SPARSE: p.STATE_ZERO}


def _collect(extents: Iterator[tuple[int, int]], limit: int) -> Status:
    """Join neighbours with the same flags; at most *limit* extents."""
    found: Status = []
    for length, flags in extents:
        if not length:
            continue
        if found and found[-1][1] == flags:
            found[-1] = found[-1][0] + length, flags
        elif len(found) == limit:
            break
        else:
            found.append((length, flags))
    return found
