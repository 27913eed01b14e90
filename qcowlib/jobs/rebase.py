# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Changing what an image stands on, its content unchanged or (unsafe) not looked at.

Order: what the new backing file would show otherwise is copied into the image
and made durable, while it still stands on the old one; then the header changes
by one sector (:mod:`qcowlib.qcow2.header_update`).

Invariants: at every moment the image shows the same bytes, on the old or on the
new backing file; a job that was cut is finished by calling it again (L6).
Without a new backing file it is the flattening of a chain.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from qcowlib.driver import HOLE, NO_OFFSET
from qcowlib.errors import Error, UsageError, printable
from qcowlib.gate import References, parse_name, qemu_like, resolve_name
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.compare import part_of, reads_zero, runs_to, same_place
from qcowlib.jobs.copy import read_error
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control, Turn, run
from qcowlib.jobs.plan import BUFFER, Part, Run, Source
from qcowlib.jobs.targets import WriteBehind
from qcowlib.native import first_difference
from qcowlib.qcow2.header_update import set_backing
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import SECTOR, round_down

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.opening import Secrets

__all__ = ["check_backing_fits", "flatten", "rebase"]

_MOST_PIECES = 512


def rebase(
    path: str | bytes | os.PathLike[str],
    backing: str | os.PathLike[str] | None,
    backing_format: str | None = None,
    *,
    format: str | None = None,
    unsafe: bool = False,
    sparse: bool = True,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    source_cache: CacheMode = "writeback",
    secret: Secrets | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> None:
    """Make *backing* (the name as stored; ``None`` or empty: nothing) the backing file of the image at *path*.

    With *unsafe* only the header changes: for a backing file that was moved or
    that is known to have the same content.  Its format is not looked at then.
    Without *sparse* zeros that the old backing file shows become data, as with qemu-img.

    Raises: UsageError, before anything is changed, also when the name does not
    fit; Busy; Cancelled; any error of opening; StorageError.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    name = None if backing is None else os.fspath(backing) or None
    if name is not None and backing_format is None:
        raise UsageError(f"Could not change the backing file to '{printable(name)}': backing format must be specified")
    if name is not None and not unsafe and backing_format not in ("raw", "qcow2"):
        raise UsageError(f"Invalid format name: '{printable(backing_format or '')}'")
    with open_image(
        path, "r+", format=format, references=references, cache=cache, secret=secret, backing=not unsafe
    ) as image:
        top = image.layers[0]
        stored = _Backing(name, backing_format)
        if not isinstance(top, Qcow2Image):
            raise UsageError(f"{stored.problem}: Operation not supported")
        _check_fits(top, stored)
        if not unsafe:
            _copy_difference(image, stored, references, source_cache, control, sparse)
        image.flush()
        _publish(top, stored)
    control.end()


def flatten(
    path: str | bytes | os.PathLike[str],
    *,
    format: str | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    secret: Secrets | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> None:
    """Copy everything that the image at *path* shows of its chain into it, and let go of the chain.

    The same as :func:`rebase` onto nothing; interrupted, it is finished by
    calling it again.  Raises as :func:`rebase`.
    """
    rebase(
        path,
        None,
        format=format,
        references=references,
        cache=cache,
        secret=secret,
        progress=progress,
        cancel=cancel,
        rate=rate,
        workers=workers,
        memory=memory,
    )


class _Backing(NamedTuple):
    """What the header is to say."""

    name: str | None
    format: str | None

    @property
    def problem(self) -> str:
        """The start of an error line."""
        return f"Could not change the backing file to '{printable(self.name or '')}'"

    def fields(self) -> tuple[bytes | None, bytes | None]:
        """Name and format as the header stores them."""
        if self.name is None:
            return None, None
        return os.fsencode(self.name), os.fsencode(self.format or "")


def check_backing_fits(top: Qcow2Image, name: str, backing_format: str) -> None:
    """Raise UsageError if the header of *top* has no room for that backing file."""
    _check_fits(top, _Backing(name, backing_format))


def _check_fits(top: Qcow2Image, stored: _Backing) -> None:
    trial = top.header.copy()
    trial.backing_file, trial.backing_format = stored.fields()
    try:
        trial.pack()
    except UsageError as error:
        raise UsageError(f"{stored.problem}: {error.message}", path=top.storage.name) from error


def _publish(top: Qcow2Image, stored: _Backing) -> None:
    """Change the header on storage, then the engine's; everything else is committed."""
    name, format = stored.fields()
    try:
        header = set_backing(top.storage, name, format)
    except UsageError as error:
        raise UsageError(f"{stored.problem}: {error.message}", path=top.storage.name) from error
    for field in ("backing_file", "backing_file_offset", "backing_format", "header_length", "unknown_extensions"):
        setattr(top.header, field, getattr(header, field))


# -- the copy --------------------------------------------------------------------


class _Piece(NamedTuple):
    """*length* bytes from *start* as they are now and as the new backing file shows them; ``None``: zeros."""

    start: int
    length: int
    old: Part | None
    new: Part | None


def _copy_difference(
    image: Image, stored: _Backing, references: References, cache: CacheMode, control: Control, sparse: bool
) -> None:
    # Source: qemu-img writes zeros as such only where the old backing file has ended.
    below = image.layers[1].size if len(image.layers) > 1 else 0
    zeros_from = 0 if sparse else below
    if stored.name is None:
        _copy(image, None, control, zeros_from)
        return
    try:
        path = resolve_name("backing", parse_name(stored.name, owner=image.path).path, image.path)
        new = open_image(path, format=stored.format, references=references, cache=cache)
    except Error as error:
        error.message = f"Could not open new backing file '{printable(stored.name)}': {error.message}"
        error.args = (error.message, *error.args[1:])
        raise
    with new:
        _copy(image, new, control, zeros_from)


def _copy(image: Image, new: Image | None, control: Control, zeros_from: int) -> None:
    top = image.layers[0]
    unit, zero_unit = SECTOR, 0
    if isinstance(top, Qcow2Image):
        unit = top.header.subcluster_size
        zero_unit = unit if top.header.version > 2 else 0
    half = BUFFER // 2
    zeros = memoryview(bytes(half))
    behind = WriteBehind(image)

    def differing(pieces: list[_Piece], buffer: memoryview) -> Iterator[tuple[_Piece, int, memoryview]]:
        used = 0
        for piece in pieces:
            views = [zeros[: piece.length]] * 2
            for number, part in enumerate((piece.old, piece.new)):
                if part is not None:
                    views[number] = buffer[number * half + used : number * half + used + piece.length]
                    _read(part, views[number], number == 0)
            used += piece.length
            for start, end in _differing(views[0], views[1], piece.start, unit):
                yield piece, piece.start + start, views[0][start:end]

    def work(pieces: list[_Piece], buffer: memoryview, turn: Turn) -> int:
        found = list(differing(pieces, buffer))
        with turn:
            data: list[tuple[int, memoryview]] = []
            for piece, at, view in found:
                # Zeros must be stored: what reads as zeros now need not on the new backing file.
                if piece.old is None and zero_unit and at >= zeros_from and not (at | len(view)) % zero_unit:
                    image.zero(len(view), at)
                else:
                    data.append((at, view))
            image.pwrite_many(data)
            behind.add(sum(len(view) for _, view in data))
        behind.start()
        return sum(piece.length for piece in pieces)

    control.begin(image.size)
    run(_units(_pieces(image, new, half), half), work, control, buffer_size=2 * half, amount=image.size)


def _units(pieces: Iterator[_Piece], most: int) -> Iterator[list[_Piece]]:
    """Join *pieces* into units of at most *most* bytes: scattered clusters are written by few calls."""
    unit: list[_Piece] = []
    held = 0
    for piece in pieces:
        if unit and (held + piece.length > most or len(unit) >= _MOST_PIECES):
            yield unit
            unit, held = [], 0
        unit.append(piece)
        held += piece.length
    if unit:
        yield unit


def _read(part: Part, view: memoryview, old: bool) -> None:
    image = part.source.image
    try:
        image.read_runs(part.runs, view, part.base)
    except Error as error:
        which = "old" if old else "new"
        raise read_error(
            part, error, part.base, f"error while reading from {which} backing file at byte {{}}"
        ) from error


def _differing(old: memoryview, new: memoryview, start: int, unit: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges that differ, widened to *unit* of the guest (*start* is where the views begin)."""
    position = first = last = 0
    while position < len(old):
        found = first_difference(old[position:], new[position:])
        if found is None:
            break
        low = max(round_down(start + position + found, unit) - start, position)
        position = min(round_down(start + position + found, unit) + unit - start, len(old))
        if low > last and last > first:
            yield first, last
            first = low
        elif last == first:
            first = low
        last = position
    if last > first:
        yield first, last


def _pieces(image: Image, new: Image | None, most: int) -> Iterator[_Piece]:
    """Yield what must be looked at: not in the image itself, and not the same in both by their maps."""
    shared = _shared_from(image, new)
    size = image.size
    theirs = _new_runs(image, new)
    other: Run | None = None
    position = 0
    for mine in runs_to(Source(image, 0), size):
        end = mine.start + mine.length
        ours = mine.layer == 0 and mine.kind != HOLE
        while position < end:
            if other is None or other.start + other.length <= position:
                other = next(theirs)
                continue
            stop = min(end, other.start + other.length)
            known = (reads_zero(mine) and reads_zero(other)) or same_place(mine, other, position)
            if not ours and mine.layer < shared and not known:
                for start in range(position, stop, most):
                    upto = min(start + most, stop)
                    yield _Piece(start, upto - start, part_of(mine, start, upto), part_of(other, start, upto))
            position = stop


def _new_runs(image: Image, new: Image | None) -> Iterator[Run]:
    """The runs of the new backing file, at least as long as *image*; zeros where there is none."""
    if new is None:
        yield Run(0, 0, image.size, Source(image, 0), HOLE, 0, NO_OFFSET, 0)
    else:
        yield from runs_to(Source(new, 0), max(image.size, new.size))


def _shared_from(image: Image, new: Image | None) -> int:
    """The layer of *image* that is the new backing file: from there on nothing can differ."""
    count = len(image.layers)
    if new is None:
        return count
    wanted = getattr(new.layers[0].storage, "identity", None)
    for number in range(1, count):
        if wanted is not None and getattr(image.layers[number].storage, "identity", None) == wanted:
            return number
    return count
