# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The work on one unit of a copy: read, look for zeros, compress, write.

Invariants: nothing is written before it was read whole; zero detection gives
the allocation that ``qemu-img convert`` gives; a read error is raised with the
target offset it concerns, unless the caller salvages.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from qcowlib.driver import COMPRESSED, DATA
from qcowlib.errors import CorruptImage, Error, StorageError
from qcowlib.image import Image
from qcowlib.jobs.plan import COPY, PACKED, Part, Stretch
from qcowlib.jobs.targets import Action
from qcowlib.native import RunList, is_zero, zero_runs
from qcowlib.units import SECTOR, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.codec import Codec, Level
    from qcowlib.jobs.pipeline import Turn
    from qcowlib.jobs.targets import Placed, Target
    from qcowlib.storage.base import Storage

__all__ = ["Copier", "read_error", "used_runs"]

Salvage = Callable[[int, Error], object]


def used_runs(view: memoryview, start: int, unit: int) -> Iterator[tuple[int, int, bool]]:
    """Split *view*, at target offset *start*, into ``(offset, length, is_zero)``.

    Zeros count from *unit* bytes on; borders lie on multiples of the largest
    power of two in *unit* of the target.  Source: the results of
    ``qemu-img convert -S``.
    """
    align = 1 << (unit.bit_length() - 1)
    if align == unit and start % unit == 0:
        return iter(zero_runs(view, unit))
    return _used_runs_any(view, start, unit, align)


def _used_runs_any(view: memoryview, start: int, unit: int, align: int) -> Iterator[tuple[int, int, bool]]:
    length = len(view)
    sectors = zero_runs(view, SECTOR)
    ends = [first + size for first, size, _ in sectors]

    def span(position: int) -> tuple[bool, int]:
        """The run at *position* with its end moved to a border of *align*."""
        index = bisect_right(ends, position)
        end, zero = ends[index], sectors[index][2]
        over = (start + end) % align
        if end < length and over:
            if zero and end - position <= over:
                zero = False
            end += -over if zero else align - over
        return zero, min(end, length)

    position = 0
    while position < length:
        zero, end = span(position)
        at, least = end, min(unit, length - position)
        # Zeros that are too few belong to the data around them.
        while not zero and at < length:
            hollow, after = span(at)
            if hollow and after - at >= least:
                break
            if not hollow:
                end = after
            at = after
        yield position, end - position, zero
        position = end


class Copier:
    """Copies units to *target*; safe for any number of workers.

    *unit* is the granularity of zero detection (0: none).  Where the target
    takes whole clusters only, *cluster* is their size.  With *compress* each
    stretch of COPY is one of them, compressed by *codec* or, without one, by the target.  With *keep_zeros* zeros
    found are written as such.  *salvage* gets ``(target offset, error)`` of
    each sector that cannot be read and becomes zeros.  With *offload*, the
    target's data storage, the kernel copies where it can; nobody looks for zeros then.
    """

    def __init__(
        self,
        target: Target,
        *,
        unit: int,
        keep_zeros: bool,
        cluster: int = 0,
        compress: bool = False,
        codec: Codec | None = None,
        level: Level = "fast",
        salvage: Salvage | None = None,
        offload: Storage | None = None,
    ) -> None:
        self.target = target
        self.unit = unit
        self.keep_zeros = keep_zeros
        self.cluster = cluster
        self.compress = compress
        self.codec = codec
        self.level = level
        self.salvage = salvage
        self.offload = offload

    def work(self, unit: list[Stretch], buffer: memoryview, turn: Turn) -> int:
        """Do one unit; returns the bytes of progress."""
        if self.offload is not None:
            return self._work_offload(unit, buffer, turn, self.offload)
        actions: list[Action] = []
        steps: list[int] = []
        used = 0
        together = _read_together(unit, buffer)
        for stretch in unit:
            if stretch.status == COPY:
                view = buffer[used : used + stretch.length]
                used += stretch.length
                if not together:
                    self._read(stretch, view)
                actions.extend(self._compressed(stretch, view) if self.compress else self._plain(stretch, view))
            elif stretch.status == PACKED:
                actions.append(Action(stretch.start, stretch.length, self._packed(stretch), True))
            else:
                actions.append(Action(stretch.start, stretch.length, None))
                continue
            steps.append(stretch.length)
        if self.target.ordered:
            with turn:
                placed = self.target.place(actions)
            self.target.store(placed)
        else:
            self.target.store(self.target.place(actions))
        turn.steps = steps
        return sum(steps)

    # -- copying in the kernel ----------------------------------------------------

    def _work_offload(self, unit: list[Stretch], buffer: memoryview, turn: Turn, storage: Storage) -> int:
        actions: list[Action] = []
        used = 0
        for stretch in unit:
            if stretch.status == COPY:
                actions.append(Action(stretch.start, stretch.length, buffer[used : used + stretch.length]))
                used += stretch.length
            else:
                actions.append(Action(stretch.start, stretch.length, None))
        with turn:
            placed = self.target.place(actions)
        if not _copy_ranges(unit, placed, storage):
            self.offload = None
            used = 0
            for stretch in unit:
                if stretch.status == COPY:
                    self._read(stretch, buffer[used : used + stretch.length])
                    used += stretch.length
            self.target.store(placed)
        return used

    # -- reading ---------------------------------------------------------------

    def _read(self, stretch: Stretch, view: memoryview) -> None:
        position = 0
        for part in stretch.parts:
            piece = view[position : position + part.length]
            try:
                part.source.image.read_runs(part.runs, piece, part.base)
            except (StorageError, CorruptImage) as error:
                if self.salvage is None:
                    raise read_error(part, error, stretch.start + position) from error
                self._salvage(part, piece, self.salvage)
            position += part.length

    @staticmethod
    def _salvage(part: Part, view: memoryview, tell: Salvage) -> None:
        """Read sector by sector; what cannot be read becomes zeros."""
        image = part.source.image
        for kind, guest, length, host, layer in part.runs:
            # A compressed cluster is readable as a whole or not at all.
            step = length if kind == COMPRESSED else SECTOR
            for inside in range(0, length, step):
                size = min(step, length - inside)
                one = RunList()
                one.add(kind, guest + inside, size, host + inside if kind == DATA else host, layer)
                start = guest + inside - part.base
                piece = view[start : start + size]
                try:
                    image.read_runs(one, piece, guest + inside)
                except (StorageError, CorruptImage) as error:
                    piece[:] = bytes(size)
                    for sector in range(0, size, SECTOR):
                        tell(part.source.shift + guest + inside + sector, error)

    @staticmethod
    def _packed(stretch: Stretch) -> bytes:
        offset, length = stretch.packed
        part = stretch.parts[0]
        layer = part.source.image.layers[part.runs[0][4]]
        data = bytearray(length)
        layer.data.read_into(offset, [data])
        return bytes(data)

    # -- looking ---------------------------------------------------------------

    def _plain(self, stretch: Stretch, view: memoryview) -> Iterator[Action]:
        if not self.unit:
            yield Action(stretch.start, stretch.length, view)
            return
        runs = used_runs(view, stretch.start, self.unit)
        for start, length, zero in _whole(runs, self.cluster, len(view)) if self.cluster else runs:
            if not zero:
                yield Action(stretch.start + start, length, view[start : start + length])
            elif self.keep_zeros:
                yield Action(stretch.start + start, length, None)

    def _compressed(self, stretch: Stretch, view: memoryview) -> Iterator[Action]:
        if self.unit and is_zero(view):
            if self.keep_zeros:
                yield Action(stretch.start, stretch.length, None)
            return
        cluster: memoryview | bytes = view
        if len(view) < self.cluster:
            cluster = bytes(view).ljust(self.cluster, b"\0")
        packed = cluster if self.codec is None else self.codec.compress(cluster, self.level)
        if packed is None:
            yield Action(stretch.start, stretch.length, view)
        else:
            yield Action(stretch.start, stretch.length, packed, True)


def _whole(runs: Iterator[tuple[int, int, bool]], cluster: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """Widen what is not zero to whole clusters."""
    done = start = end = 0
    for first, size, zero in runs:
        if zero:
            continue
        low, high = round_down(first, cluster), min(round_up(first + size, cluster), length)
        if low > end or end == 0:
            if end > start:
                yield start, end - start, False
                done = end
            if low > done:
                yield done, low - done, True
            start = low
        end = high
    if end > start:
        yield start, end - start, False
        done = end
    if length > done:
        yield done, length - done, True


def read_error(part: Part, error: Error, start: int, text: str = "error while reading at byte {}") -> Error:
    """Return *error* with *text* about the offset in place of ``{}``, as precisely as the mapping tells.

    *start* is where *part* lies in the target.
    """
    at = start
    if isinstance(error, StorageError) and error.offset is not None:
        for kind, guest, length, host, _ in part.runs:
            if kind == DATA and host <= error.offset < host + length:
                at = start + guest - part.base + error.offset - host
    where = text.format(at)
    if isinstance(error, StorageError):
        code = error.errno or errno.EIO
        return StorageError(code, path=error.path, operation="read", offset=at, message=f"{where}: {os.strerror(code)}")
    return CorruptImage(f"{where}: {error.message}", path=error.path)


def _read_together(unit: list[Stretch], buffer: memoryview) -> bool:
    """Read the many small stretches of a unit by one call, one behind the other; ``False``: not done.

    Only what is plain data of one image: the runs are given other guest
    offsets, those in the buffer.  Whoever reads again learns what is wrong.
    """
    runs, image, used = RunList(), None, 0
    if len(unit) < 2:
        return False
    for stretch in unit:
        for part in stretch.parts if stretch.status == COPY else ():
            if image is None:
                image = part.source.image
                # Who stands before an image or a file sees each request once.
                if type(image) is not Image or any(layer.data.fd_map() is None for layer in image.layers):
                    return False
            if part.source.image is not image:
                return False
            for kind, _, length, host, layer in part.runs:
                if kind != DATA or not image.layers[layer].plain:
                    return False
                runs.add(kind, used, length, host, layer)
                used += length
    if image is None:
        return False
    try:
        image.read_runs(runs, buffer, 0)
    except (StorageError, CorruptImage):
        return False
    return True


def _fd_at(storage: Storage, offset: int, length: int) -> tuple[int, int]:
    """Return (descriptor, position) of a range that lies in one descriptor; -1 where it does not."""
    for start, size, fd, position in storage.fd_map() or ():
        if start <= offset and offset + length <= start + size:
            return fd, position + offset - start
    return -1, 0


def _copy_ranges(unit: list[Stretch], placed: Sequence[Placed], storage: Storage) -> bool:
    """Copy all data of *unit* to where it was placed; ``False`` where the kernel cannot."""
    pieces = [(target, sum(len(buffer) for buffer in buffers)) for target, buffers in placed]
    pieces.reverse()
    for stretch in unit:
        for part in stretch.parts:
            for kind, _, length, host, layer in part.runs:
                image = part.source.image.layers[layer]
                if kind != DATA or not image.plain:
                    return False
                while length:
                    target, room = pieces.pop()
                    count = min(length, room)
                    if not _copy_range(image.data, host, storage, target, count):
                        return False
                    if count < room:
                        pieces.append((target + count, room - count))
                    length -= count
                    host += count
    return True


def _copy_range(source: Storage, start: int, target: Storage, end: int, count: int) -> bool:
    source_fd, start = _fd_at(source, start, count)
    target_fd, end = _fd_at(target, end, count)
    if source_fd < 0 or target_fd < 0:
        return False
    while count:
        try:
            done = os.copy_file_range(source_fd, target_fd, count, start, end)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError.from_os(error, path=target.name, operation="write", offset=end) from error
            return False
        if done == 0:
            # The last cluster of a file may be short: an ordinary read knows what that means.
            return False
        start, end, count = start + done, end + done, count - done
    return True
