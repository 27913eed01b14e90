# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a copy has to do, from the maps of its sources: units of stretches.

One stretch is guest bytes of one status; a unit is as many stretches as fill a
buffer, in guest order.  Offsets are those of the target: sources follow each
other without a gap.

Invariant: what a map knows to be zero, or leaves to the target's backing file,
is never read.  Where a border between two runs could change what zero
detection finds (it is not on a border of its units), the runs stay apart, as
qemu-img looks at them one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from qcowlib.driver import COMPRESSED, DATA, HOLE
from qcowlib.errors import StorageError
from qcowlib.native import RunList
from qcowlib.ondisk import unpack_compressed
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import SECTOR, MiB, ceil_div, round_up

if TYPE_CHECKING:
    from qcowlib.image import Image

__all__ = [
    "BACKING",
    "BUFFER",
    "COPY",
    "PACKED",
    "ZEROS",
    "Part",
    "Plan",
    "Run",
    "Source",
    "Stretch",
    "clip",
    "runs_of",
]

#: Status of a stretch: to be read, known zero, left to the target's backing file, compressed data to be passed on.
COPY: Final = 0
ZEROS: Final = 1
BACKING: Final = 2
PACKED: Final = 3

BUFFER: Final = 2 * MiB
"""Data of one unit; qemu-img copies in requests of the same size."""

_MOST_STRETCHES = 512
_MOST_PARTS = 4096


class Source(NamedTuple):
    """An open image, whose guest bytes from *first* on (*length* of them) go to *start* of the target."""

    image: Image
    start: int
    first: int = 0
    length: int | None = None

    @property
    def last(self) -> int:
        """Where the guest bytes to be copied end."""
        return self.image.size if self.length is None else self.first + self.length

    @property
    def shift(self) -> int:
        """What to add to an offset in the image for that in the target."""
        return self.start - self.first

    @property
    def end(self) -> int:
        """Where its bytes end in the target."""
        return self.shift + self.last


class Run(NamedTuple):
    """A run of *source* with its status; *kind*, *guest*, *host*, *layer* as the map answered."""

    status: int
    start: int
    length: int
    source: Source
    kind: int
    guest: int
    host: int
    layer: int


class Part(NamedTuple):
    """Bytes to read: *runs* of *source* that begin at its guest offset *base*."""

    source: Source
    runs: RunList
    base: int
    length: int


class Stretch(NamedTuple):
    """*length* bytes at *start* of the target; with COPY, in *parts*.

    With PACKED it is one cluster: *packed* is ``(host offset, bytes)`` in the
    one part's layer.
    """

    status: int
    start: int
    length: int
    parts: tuple[Part, ...] = ()
    packed: tuple[int, int] = (0, 0)


def runs_of(
    sources: Sequence[Source],
    *,
    top_only: bool = False,
    backing_end: int = 0,
    salvage: Callable[[int, StorageError], object] | None = None,
) -> Iterator[list[Run]]:
    """Yield the runs of all *sources*, in lists of one lookup each.

    With *top_only* what the top layer does not say is left to the target's
    backing file, and so are zeros behind its end, *backing_end*.  *salvage* gets
    ``(target offset, error)`` of each sector whose status cannot be told; it is read then.
    """
    for source in sources:
        image = source.image
        offset, size = source.first, source.last
        deep = len(image.layers) > 1
        while offset < size:
            found = []
            runs = image.map(offset, size - offset) if salvage is None else _known(source, offset, salvage)
            for kind, guest, length, host, layer in runs:
                if kind in (DATA, COMPRESSED):
                    status = COPY if layer == 0 or not top_only else BACKING
                else:
                    status = BACKING if top_only and (layer or (kind == HOLE and deep)) else ZEROS
                found.append(Run(status, source.shift + guest, length, source, kind, guest, host, layer))
                offset = guest + length
            yield list(_behind(found, backing_end)) if top_only else found


def _known(source: Source, offset: int, tell: Callable[[int, StorageError], object]) -> RunList:
    """Return the map from *offset* on, as far as it can be told.  Source: qemu-img asks for a quarter, each time."""
    left = source.last - offset
    count = ceil_div(left, SECTOR)
    while True:
        length = min(count * SECTOR, left)
        try:
            return source.image.map(offset, length)
        except StorageError as error:
            if count == 1:
                tell(source.shift + offset, error)
                return source.image.map(offset, length, holes=False)
        count = ceil_div(count, 4)


def _behind(runs: Iterable[Run], backing_end: int) -> Iterator[Run]:
    """Leave zeros at or after *backing_end* unallocated."""
    for run in runs:
        end = run.start + run.length
        if run.status != ZEROS or end <= backing_end:
            yield run
        elif run.start >= backing_end:
            yield run._replace(status=BACKING)
        else:
            inside = backing_end - run.start
            yield run._replace(length=inside)
            yield run._replace(status=BACKING, start=backing_end, length=run.length - inside, guest=run.guest + inside)


def clip(run: Run, start: int, end: int, runs: RunList) -> None:
    """Add to *runs* the part of *run* between target offsets *start* and *end*."""
    inside = start - run.start
    host = run.host + inside if run.kind == DATA else run.host
    runs.add(run.kind, run.guest + inside, end - start, host, run.layer)


class Plan:
    """Cuts runs into units.

    *unit* is the granularity of zero detection in bytes (0: none, zeros are
    copied like data), *cluster* the size of clusters that the target takes
    whole (0: any bytes will do), *single* whether each is a stretch of its own
    (to be compressed), *keep_zeros* whether zeros must be written (the target does not read
    as zeros by itself).  *codec* is the compression type of the target where
    compressed clusters of a source may be passed on as they are; *salvage* is as in :func:`runs_of`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        unit: int,
        cluster: int,
        keep_zeros: bool,
        single: bool = False,
        codec: int | None = None,
        top_only: bool = False,
        backing_end: int = 0,
        salvage: Callable[[int, StorageError], object] | None = None,
    ) -> None:
        self.sources = sources
        self.salvage = salvage
        self.unit = unit
        # Where runs may be joined without a difference to detection in each of them.
        self.join = 1 if not unit else unit if unit & (unit - 1) == 0 else 1 << 63
        self.cluster = cluster
        self.single = single
        self.keep_zeros = keep_zeros
        self.codec = codec
        self.top_only = top_only
        self.backing_end = backing_end
        self.buffer = max(BUFFER, cluster)
        self.total = sources[-1].end if sources else 0

    def _runs(self) -> Iterator[list[Run]]:
        found = runs_of(self.sources, top_only=self.top_only, backing_end=self.backing_end, salvage=self.salvage)
        for runs in found:
            if self.unit:
                yield runs
            else:
                yield [run._replace(status=COPY) if run.status == ZEROS else run for run in runs]

    def amount(self) -> int:
        """Return the bytes that will be copied, as progress counts them."""
        return sum(run.length for runs in self._runs() for run in runs if run.status == COPY)

    def units(self) -> Iterator[list[Stretch]]:
        """Yield the units in order; each holds at most :attr:`buffer` bytes of COPY."""
        unit: list[Stretch] = []
        held = 0
        for stretch in self._all():
            size = stretch.length if stretch.status == COPY else stretch.packed[1]
            if unit and (held + size > self.buffer or len(unit) >= _MOST_STRETCHES):
                yield unit
                unit, held = [], 0
            unit.append(stretch)
            held += size
        if unit:
            yield unit

    def _all(self) -> Iterator[Stretch]:
        if not self.cluster:
            return self._stretches()
        return self._clusters() if self.single else self._joined(self._clusters())

    # -- plain -----------------------------------------------------------------

    def _stretches(self) -> Iterator[Stretch]:
        parts: list[Part] = []
        start = end = 0
        for run in (run for runs in self._runs() for run in runs):
            if run.status == BACKING:
                continue
            if run.status == ZEROS:
                if self.keep_zeros:
                    if parts:
                        yield Stretch(COPY, start, end - start, tuple(parts))
                        parts = []
                    yield Stretch(ZEROS, run.start, run.length)
                continue
            position, stop = run.start, run.start + run.length
            while position < stop:
                joined = position == end and end % self.join == 0
                if parts and (not joined or end - start >= self.buffer or len(parts[-1].runs) >= _MOST_PARTS):
                    yield Stretch(COPY, start, end - start, tuple(parts))
                    parts = []
                if not parts:
                    start = position
                upto = min(stop, start + self.buffer)
                self._append(parts, run, position, upto)
                position = end = upto
        if parts:
            yield Stretch(COPY, start, end - start, tuple(parts))

    @staticmethod
    def _append(parts: list[Part], run: Run, start: int, end: int) -> None:
        if parts and parts[-1].source is run.source:
            last = parts[-1]
            clip(run, start, end, last.runs)
            parts[-1] = last._replace(length=last.length + end - start)
        else:
            runs = RunList()
            clip(run, start, end, runs)
            parts.append(Part(run.source, runs, start - run.source.shift, end - start))

    def _joined(self, stretches: Iterator[Stretch]) -> Iterator[Stretch]:
        """Join stretches of COPY that follow each other."""
        held: Stretch | None = None
        for stretch in stretches:
            if (
                held is not None
                and held.status == stretch.status == COPY
                and held.start + held.length == stretch.start
                and held.length + stretch.length <= self.buffer
            ):
                held = held._replace(length=held.length + stretch.length, parts=held.parts + stretch.parts)
                continue
            if held is not None:
                yield held
            held = stretch
        if held is not None:
            yield held

    # -- whole clusters ------------------------------------------------------------

    def _clusters(self) -> Iterator[Stretch]:
        """Whole clusters of the target: a cluster that is not of one status is read whole."""
        pieces: list[tuple[Run, int, int]] = []
        for runs in self._runs():
            ends = self._packed_ends(runs) if self.codec is not None else {}
            for run in runs:
                position, stop = run.start, run.start + run.length
                while position < stop:
                    border = min(round_up(position + 1, self.cluster), self.total)
                    if not pieces and run.status != COPY and stop >= border:
                        upto = stop if stop == self.total else stop // self.cluster * self.cluster
                        if run.status == ZEROS and self.keep_zeros:
                            yield Stretch(ZEROS, position, upto - position)
                    else:
                        upto = min(border, stop)
                        pieces.append((run, position, upto))
                        if upto == border:
                            made = self._cluster(pieces, ends)
                            if made is not None:
                                yield made
                            pieces = []
                    position = upto

    def _cluster(self, pieces: list[tuple[Run, int, int]], ends: dict[int, int]) -> Stretch | None:
        run, start, _ = pieces[0]
        length = pieces[-1][2] - start
        statuses = {piece.status for piece, _, _ in pieces}
        if statuses == {BACKING}:
            return None
        if statuses == {ZEROS}:
            return Stretch(ZEROS, start, length) if self.keep_zeros else None
        parts: list[Part] = []
        for piece, begin, end in pieces:
            self._append(parts, piece, begin, end)
        if len(pieces) == 1 and run.kind == COMPRESSED and run.host in ends and run.length == length:
            offset, _ = unpack_compressed(run.host, self.cluster.bit_length() - 1)
            return Stretch(PACKED, start, length, tuple(parts), (offset, ends[run.host] - offset))
        return Stretch(COPY, start, length, tuple(parts))

    def _packed_ends(self, runs: list[Run]) -> dict[int, int]:
        """Where the data of compressed clusters ends, by L2 entry, as far as another one follows it.

        The format stores sectors; what follows the end of a stream in its last
        sector is somebody else's data and must not be copied along.
        """
        bits = self.cluster.bit_length() - 1
        places: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for run in runs:
            layer = run.source.image.layers[run.layer]
            if run.kind != COMPRESSED or not isinstance(layer, Qcow2Image) or run.guest % self.cluster:
                continue
            if layer.cluster_size != self.cluster or layer.header.compression_type != self.codec:
                continue
            offset, length = unpack_compressed(run.host, bits)
            places.setdefault((id(run.source), run.layer), []).append((offset, offset + length, run.host))
        ends = {}
        for found in places.values():
            found.sort()
            for (_, end, entry), (after, _, _) in itertools.pairwise(found):
                if end - 512 <= after <= end:
                    ends[entry] = after
        return ends
