# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What differs between two images, two points of a chain, two snapshots, or since a bitmap began.

The maps are compared first: where both mean the same place of the same file,
or both read as zeros, nothing is read; so two points of one chain, or two
snapshots of one image, cost what has changed between them and no more.

Invariants: the changes come in guest order without overlap, whatever the
number of workers; outside of them the two sides read the same; an exact
difference names no unit whose bytes are equal.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NamedTuple

from qcowlib.driver import COMPRESSED
from qcowlib.errors import Error, UsageError
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.backup import changed_ranges
from qcowlib.jobs.compare import part_of, reads_zero, runs_to, same_place
from qcowlib.jobs.copy import read_error
from qcowlib.jobs.overlay import joined, write_overlay
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control, Turn, run
from qcowlib.jobs.plan import Part, Run, Source
from qcowlib.native import first_difference, is_zero, zero_runs
from qcowlib.units import KiB, MiB, round_down, round_up

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.opening import Source as OpenSource

__all__ = ["Change", "Sides", "Unit", "diff", "diff_overlay", "open_sides", "walk"]

DEFAULT_UNIT: Final = 4 * KiB
#: Bytes of one side that a worker holds.
PIECE: Final = MiB


class Change(NamedTuple):
    """*length* guest bytes from *start* differ; with *zero* the new side reads as zeros there."""

    start: int
    length: int
    zero: bool


class Unit(NamedTuple):
    """A change with its new bytes (``None``: zeros), and the CRC-32 of the old ones where they were read."""

    start: int
    length: int
    data: memoryview | None
    old_crc: int | None


class Sides(NamedTuple):
    """Two open images, what is asked about them, and the unit of the answer in bytes.

    Without *old* the *ranges* of a bitmap tell what changed in *new*; *exact*
    reads both sides where the maps do not tell that they are equal.
    """

    old: Image | None
    new: Image
    ranges: tuple[tuple[int, int], ...]
    exact: bool
    unit: int

    @property
    def old_size(self) -> int:
        """Guest bytes of the old side; unknown with a bitmap, and then those of the new one."""
        return self.new.size if self.old is None else self.old.size


class _Piece(NamedTuple):
    """*length* bytes from *start* that may differ; ``None`` stands for zeros.  *whole*: not compared, it counts."""

    start: int
    length: int
    old: Part | None
    new: Part | None
    whole: bool


def diff(
    old: OpenSource | Image | None,
    new: OpenSource | Image,
    *,
    old_format: str | None = None,
    new_format: str | None = None,
    old_snapshot: str | None = None,
    new_snapshot: str | None = None,
    bitmap: str | None = None,
    exact: bool = True,
    unit: int = DEFAULT_UNIT,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: str | bytes | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> list[Change]:
    """Return what is different in *new*, in units of *unit* bytes (a power of two from 512 to 1 MiB), joined.

    *old* ``None`` means *new* itself, for its snapshots, or for *bitmap*,
    which tells what changed since it began.  Without *exact* no guest data is
    read: what may differ counts as different.  What lies behind the end of the
    shorter side is compared with zeros.

    Raises: UsageError; any error of opening; StorageError and CorruptImage for
    what cannot be read; Cancelled.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    found: list[Change] = []

    with ExitStack() as stack:
        sides = open_sides(
            stack,
            old,
            new,
            formats=(old_format, new_format),
            snapshots=(old_snapshot, new_snapshot),
            bitmap=bitmap,
            exact=exact,
            unit=unit,
            references=references,
            cache=cache,
            force_share=force_share,
            secret=secret,
        )
        size = sides.new.size
        walk(sides, lambda piece: _note(found, piece, unit, size), control, data=exact)
    control.end()
    return found


def _note(found: list[Change], piece: Unit, unit: int, size: int) -> None:
    """Add *piece* to *found* in whole units; a unit that is not known to be all zeros counts as data."""
    start, end = piece.start, piece.start + piece.length
    low, high = round_down(start, unit), min(round_up(end, unit), size)
    if piece.data is not None:
        _append(found, low, high, False)
        return
    first = low if low == start else low + unit
    last = high if high == end else round_down(end, unit)
    if first >= last:
        _append(found, low, high, False)
        return
    _append(found, low, first, False)
    _append(found, first, last, True)
    _append(found, last, high, False)


def _append(found: list[Change], start: int, end: int, zero: bool) -> None:
    """Add whole units; the last one told, which may be the first of these, is data if either is."""
    if found and start < found[-1].start + found[-1].length:
        last = found.pop()
        if last.start < start:
            found.append(last._replace(length=start - last.start))
        shared = min(end, last.start + last.length)
        _append(found, start, shared, last.zero and zero)
        start = shared
    if start >= end:
        return
    if found and found[-1].start + found[-1].length == start and found[-1].zero == zero:
        found[-1] = found[-1]._replace(length=end - found[-1].start)
    else:
        found.append(Change(start, end - start, zero))


def diff_overlay(
    old: OpenSource | None,
    new: OpenSource | Image,
    target: str | os.PathLike[str],
    *,
    backing: str | os.PathLike[str],
    backing_format: str,
    check_backing: bool = True,
    compress: bool = False,
    old_format: str | None = None,
    new_format: str | None = None,
    old_snapshot: str | None = None,
    new_snapshot: str | None = None,
    bitmap: str | None = None,
    exact: bool = True,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: str | bytes | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    **options: object,
) -> int:
    """Write what :func:`diff` finds, in whole clusters, to a new overlay *target*; returns the guest bytes it stores.

    *backing*, stored as given, is an image with the content of the old side:
    over it the overlay shows the new side.  *options* are
    :class:`~qcowlib.jobs.creation.NewOptions`.
    Raises: as :func:`diff`; what is begun and fails is removed.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    with ExitStack() as stack:
        sides = open_sides(
            stack,
            old,
            new,
            formats=(old_format, new_format),
            snapshots=(old_snapshot, new_snapshot),
            bitmap=bitmap,
            exact=exact,
            unit=DEFAULT_UNIT,
            references=references,
            cache=cache,
            force_share=force_share,
            secret=secret,
        )
        found: list[tuple[int, int]] = []
        quiet = Control(cancel=cancel, workers=workers, memory=memory)
        walk(sides, lambda piece: found.append((piece.start, piece.length)), quiet, data=exact)
        changed = write_overlay(
            sides.new,
            lambda unit: joined(iter(found), unit, sides.new.size),
            target,
            backing=os.fspath(backing),
            backing_format=backing_format,
            check_backing=check_backing,
            compress=compress,
            references=references,
            cache=cache,
            control=control,
            options=options,
        )
    control.end()
    return changed


def open_sides(
    stack: ExitStack,
    old: OpenSource | Image | None,
    new: OpenSource | Image,
    *,
    formats: tuple[str | None, str | None],
    snapshots: tuple[str | None, str | None],
    bitmap: str | None,
    exact: bool,
    unit: int,
    references: References,
    cache: CacheMode,
    force_share: bool,
    secret: str | bytes | None,
) -> Sides:
    """Open both sides of :func:`diff` on *stack*; the pairs are (old, new).  Raises as it does."""
    if unit & (unit - 1) or not 512 <= unit <= PIECE:
        raise UsageError("the unit must be a power of two from 512 to 1 MiB")
    if bitmap is not None and (old is not None or snapshots != (None, None)):
        raise UsageError("a bitmap takes the place of the old side and of snapshots")
    if old is None and bitmap is None and snapshots == (None, None):
        raise UsageError("an image is compared with another one, a snapshot or a bitmap")

    def opened(source: OpenSource | Image, format: str | None, snapshot: str | None) -> Image:
        if isinstance(source, Image):
            if snapshot is not None:
                raise UsageError("an open image is open at one snapshot already", path=source.path)
            return source
        image = open_image(
            source,
            format=format,
            snapshot=snapshot,
            references=references,
            cache=cache,
            force_share=force_share,
            secret=secret,
        )
        return stack.enter_context(image)

    newer = opened(new, formats[1], snapshots[1])
    if bitmap is not None:
        ranges = tuple(changed_ranges(newer, bitmap, unit))
        return Sides(None, newer, ranges, False, unit)
    older = opened(new if old is None else old, formats[0] if old is not None else formats[1], snapshots[0])
    return Sides(older, newer, (), exact, unit)


def walk(sides: Sides, take: Callable[[Unit], object], control: Control, *, data: bool) -> None:
    """Call *take* for each change in guest order, one at a time; with *data* the new bytes are read.

    What *take* gets is valid until it returns.  Raises as :func:`diff`, and whatever *take* raises.
    """
    control.begin(sides.new.size)

    def work(piece: _Piece, buffer: memoryview, turn: Turn) -> int:
        found: list[Unit] = []
        failed: Error | None = None
        try:
            found = list(_units(piece, buffer, sides, data))
        except Error as error:
            failed = error
        with turn:
            if failed is not None:
                raise failed
            for unit in found:
                take(unit)
        return piece.length

    run(_pieces(sides), work, control, buffer_size=2 * PIECE, amount=control.total)


# -- what may differ -----------------------------------------------------------


def _pieces(sides: Sides) -> Iterator[_Piece]:
    for start, end, old, new in _spans(sides):
        # Pieces end where units do, so that no unit is told twice.
        while start < end:
            stop = min(round_down(start, PIECE) + PIECE, end)
            new_part = part_of(new, start, stop)
            if old is None or not sides.exact:
                yield _Piece(start, stop - start, None, new_part, True)
            else:
                yield _Piece(start, stop - start, part_of(old, start, stop), new_part, False)
            start = stop


def _spans(sides: Sides) -> Iterator[tuple[int, int, Run | None, Run]]:
    """Yield (start, end, old run, new run) of what the maps do not tell to be equal, up to the new side's end."""
    size = sides.new.size
    if sides.old is None:
        yield from _bitmap_spans(sides)
        return
    end = max(sides.old.size, size)
    old_runs, new_runs = runs_to(Source(sides.old, 0), end), runs_to(Source(sides.new, 0), end)
    old = new = None
    position = 0
    while position < size:
        if old is None or old.start + old.length <= position:
            old = next(old_runs)
        if new is None or new.start + new.length <= position:
            new = next(new_runs)
        stop = min(old.start + old.length, new.start + new.length, size)
        equal = (reads_zero(old) and reads_zero(new)) or same_place(old, new, position) or _same_cluster(old, new)
        if not equal:
            yield position, stop, old, new
        position = stop


def _bitmap_spans(sides: Sides) -> Iterator[tuple[int, int, Run | None, Run]]:
    image = sides.new
    source = Source(image, 0)
    for start, end in sides.ranges:
        while start < end:
            for kind, guest, length, host, layer in image.map(start, end - start):
                yield guest, guest + length, None, Run(0, guest, length, source, kind, guest, host, layer)
                start = guest + length


def _same_cluster(old: Run, new: Run) -> bool:
    """Whether both sides are the same compressed cluster of the same file."""
    if old.kind != new.kind or old.kind != COMPRESSED or old.host != new.host or old.guest != new.guest:
        return False
    one, two = old.source.image.layers[old.layer], new.source.image.layers[new.layer]
    identity = getattr(one.data, "identity", None)
    return identity is not None and identity == getattr(two.data, "identity", None)


# -- what does differ ----------------------------------------------------------


def _units(piece: _Piece, buffer: memoryview, sides: Sides, data: bool) -> Iterator[Unit]:
    if piece.whole and not data:
        yield Unit(piece.start, piece.length, None if piece.new is None else buffer[: piece.length], None)
        return
    new = None if piece.new is None else _read(piece.new, piece, buffer[: piece.length])
    if piece.whole:
        yield from _split(piece.start, piece.length, new, None, sides.unit)
        return
    old = None if piece.old is None else _read(piece.old, piece, buffer[PIECE : PIECE + piece.length])
    for start, end in _differing(piece, old, new, sides.unit):
        former = memoryview(_ZEROS)[: end - start] if old is None else old[start:end]
        fresh = None if new is None else new[start:end]
        yield from _split(piece.start + start, end - start, fresh, former, sides.unit)


def _split(start: int, length: int, new: memoryview | None, old: memoryview | None, unit: int) -> Iterator[Unit]:
    """Yield the changes in a range that has changed, zeros apart from data."""
    parts = [(0, length, True)] if new is None else zero_runs(new, unit)
    for first, size, zero in parts:
        crc = None if old is None else zlib.crc32(old[first : first + size])
        yield Unit(start + first, size, None if zero or new is None else new[first : first + size], crc)


def _read(part: Part, piece: _Piece, view: memoryview) -> memoryview:
    try:
        part.source.image.read_runs(part.runs, view, part.base)
    except Error as error:
        raise read_error(part, error, piece.start) from error
    return view


def _differing(piece: _Piece, old: memoryview | None, new: memoryview | None, unit: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) inside *piece*: whole units that differ, joined."""
    start = end = position = 0
    while position < piece.length:
        found = _first_difference(old, new, position)
        if found is None:
            break
        low = max(round_down(piece.start + found, unit) - piece.start, 0)
        high = min(round_down(piece.start + found, unit) + unit - piece.start, piece.length)
        if low > end:
            if start < end:
                yield start, end
            start = low
        elif start == end:
            start = low
        end = position = high
    if start < end:
        yield start, end


def _first_difference(old: memoryview | None, new: memoryview | None, position: int) -> int | None:
    if old is not None and new is not None:
        found = first_difference(old[position:], new[position:])
    else:
        view = old if old is not None else new
        if view is None or is_zero(view[position:]):
            return None
        found = first_difference(view[position:], memoryview(_ZEROS)[: len(view) - position])
    return None if found is None else position + found


_ZEROS: Final = bytes(PIECE)
