# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Seal what a guest's disk holds, and tell later whether it still does.

A check finds tables that are wrong; data that went wrong silently it cannot
see.  A seal (:mod:`.seal_file`) has a hash of each unit; :func:`verify` reads
the disk through its chain and names the guest ranges that are not as they
were.  With another copy, :func:`heal` puts them right, which also finishes a
copy that was cut off; two seals tell what differs without reading the disks.

Invariants: zeros are known from the map where it tells and hashed nowhere; a
unit is good only if all of it was read and has its hash; what changes a disk
writes nothing but what the seal says.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from qcowlib.driver import COMPRESSED, DATA
from qcowlib.errors import CorruptImage, Error, StorageError, UsageError
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.backup import changed_ranges
from qcowlib.jobs.diff import Change
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control, Turn, run
from qcowlib.jobs.seal_file import Seal, SealWriter, unit_hash
from qcowlib.native import is_zero
from qcowlib.units import KiB, MiB, ceil_div, round_down, round_up

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.opening import Source as OpenSource

__all__ = ["Damage", "Sealed", "Verified", "diff_seals", "heal", "seal", "seal_name", "verify"]

DEFAULT_UNIT: Final = 64 * KiB
_PIECE: Final = MiB

DamageKind = Literal["changed", "unreadable"]


class Sealed(NamedTuple):
    """A seal was written: hashes in it, guest bytes that were read for it, and what names its content."""

    hashes: int
    read: int
    digest: str


class Damage(NamedTuple):
    """*length* guest bytes from *start* are not as sealed: other bytes, or none that can be read (*reason*)."""

    start: int
    length: int
    kind: DamageKind
    reason: str = ""


class Verified(NamedTuple):
    """What :func:`verify` found; true when the disk is as it was sealed.

    *size* is the guest bytes of the disk, *sealed_size* those of the seal;
    behind the shorter of them nothing was compared.  *read* is guest bytes.
    """

    damages: tuple[Damage, ...]
    size: int
    sealed_size: int
    read: int
    healed: int = 0

    def __bool__(self) -> bool:
        return not self.damages and self.size == self.sealed_size


def seal_name(path: str | os.PathLike[str]) -> str:
    """Return the usual name of the seal of an image."""
    return f"{os.fspath(path)}.seal"


def seal(
    source: OpenSource | Image,
    target: str | os.PathLike[str],
    *,
    format: str | None = None,
    snapshot: str | None = None,
    unit: int = DEFAULT_UNIT,
    bitmap: str | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: str | bytes | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Sealed:
    """Write the seal of *source* to the file *target*, which is replaced when all of it is known.

    With *bitmap* the seal at *target* is brought up to date: only what that
    bitmap of *source* has recorded since is read; the caller clears it then.
    *unit*, 4 KiB to 2 MiB, is ignored there.  Raises: UsageError; any error
    of opening; StorageError and CorruptImage for what cannot be read; Cancelled.
    """
    if unit & (unit - 1) or not 4 * KiB <= unit <= 2 * MiB:
        raise UsageError("the unit of a seal must be a power of two from 4 KiB to 2 MiB")
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    with ExitStack() as stack:
        image = _open(stack, source, format, snapshot, references, cache, force_share, secret)
        old = None if bitmap is None else stack.enter_context(Seal(target))
        unit = unit if old is None else old.unit
        ranges = _ranges(image, old, bitmap)
        writer = SealWriter(os.fspath(target), image.size, unit)
        try:
            made = _Sealing(image, ranges, unit, old, writer, control).run()
        except BaseException:
            writer.abandon()
            raise
    control.end()
    return made


def plan_seal(
    source: OpenSource | Image,
    target: str | os.PathLike[str] | None = None,
    *,
    format: str | None = None,
    snapshot: str | None = None,
    bitmap: str | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: str | bytes | None = None,
) -> int:
    """Return how many guest bytes :func:`seal` of the same arguments reads and hashes; with *bitmap*, of *target*.

    Raises: as :func:`seal`.
    """
    with ExitStack() as stack:
        image = _open(stack, source, format, snapshot, references, cache, force_share, secret)
        if bitmap is not None and target is None:
            raise UsageError("a bitmap brings the seal of a file up to date: name it", path=image.path)
        old = None if bitmap is None or target is None else stack.enter_context(Seal(target))
        unit = DEFAULT_UNIT if old is None else old.unit
        ranges = _ranges(image, old, bitmap)
        return sum(high - low for start, end in ranges for low, high in _stored(image, start, end, unit))


def _ranges(image: Image, old: Seal | None, bitmap: str | None) -> list[tuple[int, int]]:
    """What has to be looked at, as (start, end) in whole units of the seal: everything, or what *bitmap* tells."""
    if old is None or bitmap is None:
        return [(0, image.size)]
    ranges = changed_ranges(image, bitmap, old.unit)
    if old.size == image.size:
        return list(ranges)
    # What grew or went away is in no bitmap.
    low = round_down(min(old.size, image.size), old.unit)
    return [*((start, min(end, low)) for start, end in ranges if start < low), (low, image.size)]


def _open(
    stack: ExitStack,
    source: OpenSource | Image,
    format: str | None,
    snapshot: str | None,
    references: References,
    cache: CacheMode,
    force_share: bool,
    secret: str | bytes | None,
    mode: Literal["r", "r+"] = "r",
) -> Image:
    if isinstance(source, Image):
        return source
    opened = open_image(
        source,
        mode,
        format=format,
        snapshot=snapshot,
        references=references,
        cache=cache,
        force_share=force_share,
        secret=secret,
    )
    return stack.enter_context(opened)


def _stored(image: Image, start: int, end: int, unit: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of whole units in the range that hold anything but known zeros, in pieces."""
    most = max(_PIECE, unit)
    low = high = start
    while start < end:
        for kind, guest, length, _, _ in image.map(start, end - start):
            start = guest + length
            if kind not in (DATA, COMPRESSED):
                continue
            first, last = max(round_down(guest, unit), high), min(round_up(guest + length, unit), end)
            if first > high:
                yield from _pieces(low, high, most)
                low = first
            high = max(high, last)
    yield from _pieces(low, high, most)


def _pieces(low: int, high: int, most: int) -> Iterator[tuple[int, int]]:
    for start in range(low, high, most):
        yield start, min(start + most, high)


class _Sealing:
    """One run of :func:`seal`."""

    def __init__(
        self,
        image: Image,
        ranges: list[tuple[int, int]],
        unit: int,
        old: Seal | None,
        writer: SealWriter,
        control: Control,
    ) -> None:
        self.image = image
        self.ranges = ranges
        self.unit = unit
        self.old = old
        self.writer = writer
        self.control = control
        self.hashes = self.read = 0
        self._old_units = self._units_kept()
        self._kept = next(self._old_units, None)

    def run(self) -> Sealed:
        image, unit = self.image, self.unit
        self.control.begin(sum(end - start for start, end in self.ranges))
        pieces = (piece for start, end in self.ranges for piece in _stored(image, start, end, unit))
        run(pieces, self._work, self.control, buffer_size=max(_PIECE, unit), amount=self.control.total)
        self._keep(ceil_div(image.size, unit))
        return Sealed(self.hashes, self.read, self.writer.finish())

    def _work(self, piece: tuple[int, int], buffer: memoryview, turn: Turn) -> int:
        start, end = piece
        view = buffer[: end - start]
        self.image.preadinto(view, start)
        found = [
            (start + at) // self.unit for at in range(0, len(view), self.unit) if not is_zero(view[at : at + self.unit])
        ]
        pieces = (view[number * self.unit - start :][: self.unit] for number in found)
        hashes = [unit_hash(piece, self.unit) for piece in pieces]
        with turn:
            self._keep(start // self.unit)
            for number, digest in zip(found, hashes, strict=True):
                self._add(number, digest)
            self.read += end - start
        return end - start

    def _add(self, number: int, digest: bytes) -> None:
        self.writer.add(number, digest)
        self.hashes += 1

    def _keep(self, upto: int) -> None:
        """Take the old hashes of units below *upto*, as far as that was not done."""
        while self._kept is not None and self._kept < upto:
            self._add(self._kept, self._old_hash(self._kept))
            self._kept = next(self._old_units, None)

    def _old_hash(self, number: int) -> bytes:
        found = None if self.old is None else self.old.hash_of(number)
        return found or b""

    def _units_kept(self) -> Iterator[int]:
        """Yield the units of the old seal that are in no range, and still on the disk."""
        last = ceil_div(self.image.size, self.unit)
        at = 0
        for first, count in self.old.runs() if self.old is not None else ():
            for number in range(first, min(first + count, last)):
                while at < len(self.ranges) and self.ranges[at][1] <= number * self.unit:
                    at += 1
                if at == len(self.ranges) or number * self.unit < self.ranges[at][0]:
                    yield number


# -- judging -------------------------------------------------------------------


class _Judge:
    """Compares a disk with a seal, and mends it from *source* where there is one, or with *dry* only counts that."""

    def __init__(
        self, image: Image, sealed: Seal, source: Image | None, control: Control, *, dry: bool = False
    ) -> None:
        self.dry = dry
        self.image = image
        self.seal = sealed
        self.source = source
        self.control = control
        self.unit = sealed.unit
        self.end = min(image.size, sealed.size)
        self.damages: list[Damage] = []
        self.read = self.healed = 0

    def run(self) -> Verified:
        self.control.begin(self.end)
        run(
            self._todo(),
            self._work,
            self.control,
            buffer_size=max(_PIECE, self.unit),
            amount=self.control.total,
        )
        return Verified(tuple(self.damages), self.image.size, self.seal.size, self.read, self.healed)

    def amount(self) -> int:
        """Guest bytes that are looked at."""
        return sum(end - start for start, end in self._todo())

    def _todo(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of whole units that hold anything here or in the seal, each once, in order."""
        most = max(_PIECE, self.unit)
        sealed = self._sealed()
        stored = _stored(self.image, 0, self.end, self.unit)
        one, two = next(sealed, None), next(stored, None)
        position = 0
        while one is not None or two is not None:
            if two is None or (one is not None and one[0] <= two[0]):
                span, one = one, next(sealed, None)
            else:
                span, two = two, next(stored, None)
            if span is not None and span[1] > position:
                yield from _pieces(max(span[0], position), span[1], most)
                position = span[1]

    def _sealed(self) -> Iterator[tuple[int, int]]:
        for first, count in self.seal.runs():
            start, end = first * self.unit, min((first + count) * self.unit, self.end)
            if start < end:
                yield start, end

    def _work(self, piece: tuple[int, int], buffer: memoryview, turn: Turn) -> int:
        start, end = piece
        view = buffer[: end - start]
        found: list[Damage] = []
        try:
            self.image.preadinto(view, start)
            found = list(self._changed(view, start))
        except (StorageError, CorruptImage):
            found = list(self._one_by_one(view, start))
        with turn:
            self.read += end - start
            for damage in found:
                if self.source is None or not self._heal(damage):
                    self._note(damage)
        return end - start

    def _changed(self, view: memoryview, start: int) -> Iterator[Damage]:
        for at in range(0, len(view), self.unit):
            if not self._is_good(view[at : at + self.unit], start + at):
                yield Damage(start + at, min(self.unit, len(view) - at), "changed")

    def _one_by_one(self, view: memoryview, start: int) -> Iterator[Damage]:
        for at in range(0, len(view), self.unit):
            piece = view[at : at + self.unit]
            try:
                self.image.preadinto(piece, start + at)
            except (StorageError, CorruptImage) as error:
                yield Damage(start + at, len(piece), "unreadable", str(error))
                continue
            yield from self._changed(piece, start + at)

    def _is_good(self, data: memoryview, at: int) -> bool:
        wanted = self.seal.hash_of(at // self.unit)
        if wanted is None:
            return is_zero(data)
        if at + len(data) == self.end < self.seal.size and self.end % self.unit:
            # The disk ends inside this unit: nothing can be said of a part.
            return True
        return unit_hash(data, self.unit) == wanted

    def _heal(self, damage: Damage) -> bool:
        """Copy the unit from the source if that has what was sealed; returns whether it had."""
        source = self.source
        if source is None:
            return False
        data = memoryview(bytearray(damage.length))
        try:
            source.preadinto(data, damage.start)
        except Error:
            return False
        if not self._is_good(data, damage.start):
            return False
        if not self.dry and is_zero(data):
            self.image.zero(damage.length, damage.start)
        elif not self.dry:
            self.image.pwrite(data, damage.start)
        self.healed += damage.length
        return True

    def _note(self, damage: Damage) -> None:
        if self.damages:
            last = self.damages[-1]
            if (last.kind, last.reason, last.start + last.length) == (damage.kind, damage.reason, damage.start):
                self.damages[-1] = last._replace(length=last.length + damage.length)
                return
        self.damages.append(damage)


def verify(
    source: OpenSource | Image,
    sealed: str | os.PathLike[str],
    *,
    format: str | None = None,
    snapshot: str | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: str | bytes | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Verified:
    """Tell where the disk of *source* is not as the seal in the file *sealed* says.

    Raises: CorruptImage for a damaged seal; any error of opening; Cancelled.
    What cannot be read is part of the answer.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    with ExitStack() as stack:
        judged = stack.enter_context(Seal(sealed))
        image = _open(stack, source, format, snapshot, references, cache, force_share, secret)
        found = _Judge(image, judged, None, control).run()
    control.end()
    return found


def plan_verify(
    source: OpenSource | Image,
    sealed: str | os.PathLike[str],
    *,
    format: str | None = None,
    snapshot: str | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: str | bytes | None = None,
) -> int:
    """Return how many guest bytes :func:`verify` of the same arguments reads: what the disk or the seal holds.

    Raises: as :func:`verify`.
    """
    with ExitStack() as stack:
        judged = stack.enter_context(Seal(sealed))
        image = _open(stack, source, format, snapshot, references, cache, force_share, secret)
        return _Judge(image, judged, None, Control()).amount()


def heal(
    target: OpenSource | Image,
    source: OpenSource | Image,
    sealed: str | os.PathLike[str],
    *,
    format: str | None = None,
    source_format: str | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    secret: str | bytes | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    plan: bool = False,
) -> Verified:
    """Bring *target* to what was sealed, unit by unit from *source*; what is left is in the answer.

    It gets the sealed size.  So a copy that was cut off is finished, and a
    disk with silent damage is mended from a replica; units that are right
    already are not written.  A unit of *source* is used only if it has its hash.
    With *plan* both are read and nothing is written: the answer is what would be
    mended and what would be left, up to the end of the shorter of disk and seal.
    Raises: as :func:`verify`.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    with ExitStack() as stack:
        judged = stack.enter_context(Seal(sealed))
        other = _open(stack, source, source_format, None, references, cache, False, secret)
        image = _open(stack, target, format, None, references, cache, False, secret, "r" if plan else "r+")
        if not plan and image.size != judged.size:
            image.resize(judged.size, shrink=True)
        found = _Judge(image, judged, other, control, dry=plan).run()
        image.flush()
    control.end()
    return found


def diff_seals(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> list[Change]:
    """Return what differs between the disks of two seals of the same unit, in order; no disk is read.

    Raises: UsageError for different units; StorageError, CorruptImage.
    """
    with Seal(old) as before, Seal(new) as after:
        if before.unit != after.unit:
            raise UsageError(f"the seals have different units, {before.unit} and {after.unit} bytes")
        found: list[Change] = []
        for number in _units_of(before, after):
            start = number * after.unit
            length = min(after.unit, after.size - start)
            wanted = after.hash_of(number)
            if length <= 0 or before.hash_of(number) == wanted:
                continue
            zero = wanted is None
            last = found[-1] if found else None
            if last is not None and last.start + last.length == start and last.zero == zero:
                found[-1] = last._replace(length=last.length + length)
            else:
                found.append(Change(start, length, zero))
        return found


def _units_of(one: Seal, two: Seal) -> Iterator[int]:
    """Yield each unit that has a hash in one of the seals, once, in order."""
    position = 0
    for first, count in heapq.merge(one.runs(), two.runs()):
        yield from range(max(first, position), first + count)
        position = max(position, first + count)
