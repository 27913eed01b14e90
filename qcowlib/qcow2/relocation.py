# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Which clusters of an image move where, so that the file can be cut: decided without any I/O.

Tables of several clusters and runs that share compressed clusters need room
in one piece.  What lies alone in the places chosen for them makes way first;
then they move, and then whatever is alone behind the new end fills the holes
before it.  Refcount blocks that have nothing to count any more go last.

Invariant: a batch moves only into clusters that are free before it begins, so
that content and counts of both places can be durable before any pointer
changes; the same map gives the same batches, so that a plan is what happens.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from qcowlib.native import (
    BLOCK_CLUSTER,
    DATA_CLUSTER,
    FIXED,
    FREE,
    LINKED,
    PACKED,
    TABLE_CLUSTER,
    assign,
    moves,
)

__all__ = ["ALONE", "BITS", "BLOCKS_GONE", "FREE_RUN", "ITEM", "SINGLE", "UNCOUNTED", "Batch", "Relocation", "Run"]

UNCOUNTED: Final = 5
"""No refcount block speaks of it, so it cannot be taken."""
BITS: Final = 6
"""Bits of a persistent bitmap."""
ITEM: Final = 9
"""Part of a table that is moved as a whole."""
ALONE: Final = 10
"""Compressed clusters that no other host cluster shares."""
BLOCKS_GONE: Final = 12
"""Kind of a batch: refcount blocks with nothing to count."""
SINGLE: Final = (DATA_CLUSTER, ALONE, BITS, TABLE_CLUSTER, BLOCK_CLUSTER)
"""Kinds that move one by one; those that point come behind what they point to."""

_RESERVED: Final = 11
FREE_RUN: Final = re.compile(rb"\0+")
_GROUP: Final = re.compile(rb"(?<!\x08)\x08*\x07")
#: Alike and alone, one behind the other.
_SAME: Final = re.compile(rb"\x01+|\x0a+|\x06+|\x02+|\x03+")
#: Free, alone, and what does not make way.
_WAY: Final = bytes(0 if kind == FREE else 1 if kind in SINGLE else 2 for kind in range(256))
#: Free, used, and what is neither.
_USED: Final = bytes(0 if kind == FREE else 2 if kind == UNCOUNTED else 1 for kind in range(256))
#: How many stretches are looked at for the cheapest place.
_TRIED: Final = 1024

Run = tuple[int, int, int]
"""Old cluster, new cluster, how many."""


class Batch(NamedTuple):
    """Clusters of one *kind* that move together; with *head* the run shares a compressed cluster with the one before.

    Of such a run the cluster before the old place is copied before the new one, and stays.
    """

    kind: int
    runs: list[Run]
    head: bool = False


class _Place(NamedTuple):
    old: int
    new: int
    length: int
    head: bool
    marks: bytes


class Relocation:
    """*kinds* says what each cluster is, *items* where tables begin and their clusters, *blocks* the refcount blocks.

    *spare* clusters behind the file's end may be used on the way.  All three
    are kept current while :meth:`batches` is consumed.
    """

    def __init__(
        self, kinds: bytearray, items: list[tuple[int, int]], blocks: dict[int, int], per_block: int, batch: int
    ) -> None:
        self.kinds = kinds
        self.items = dict(items)
        self.blocks = dict(blocks)
        self.per_block = per_block
        self.batch = batch
        self.end = 0

    def batches(self) -> Iterator[Batch]:
        """Yield what to do, in order; a batch counts as done when the next one is asked for."""
        yield from self._make_room()
        while True:
            self.end = self._end()
            yield from self._fill()
            gone = self._idle_blocks()
            if not gone:
                return
            runs = [(self.blocks[index], index, 1) for index in gone]
            yield Batch(BLOCKS_GONE, runs)
            for cluster, index, _ in runs:
                self.kinds[cluster] = FREE
                del self.blocks[index]
                first = index * self.per_block
                length = max(0, min(len(self.kinds) - first, self.per_block))
                self.kinds[first : first + length] = bytes([UNCOUNTED]) * length

    # -- where the file can end --------------------------------------------------

    def _ideal(self) -> int:
        """The least number of clusters with room for all, if everything found its place."""
        used = self.kinds.translate(_USED)
        blocks = sorted(self.blocks)
        low, high = 1 + max(self.kinds.rfind(FIXED), 0), 1 + used.rfind(1)
        while low < high:
            middle = (low + high) // 2
            gone = sum(index * self.per_block >= middle for index in blocks)
            if used.count(0, 0, middle) + gone >= used.count(1, middle):
                high = middle
            else:
                low = middle + 1
        return low

    def _end(self) -> int:
        """The least number of clusters with room for all, if only what is alone moves."""
        way = self.kinds.translate(_WAY)
        fixed = bytes(2 if kind in (FIXED, PACKED, LINKED, ITEM) else 0 for kind in range(256))
        low = 1 + max(self.kinds.translate(fixed).rfind(2), 0)
        high = max(low, 1 + way.rfind(1))
        while low < high:
            middle = (low + high) // 2
            if way.count(0, 0, middle) >= way.count(1, middle):
                high = middle
            else:
                low = middle + 1
        return low

    def _idle_blocks(self) -> list[int]:
        return [index for index in sorted(self.blocks) if index and index * self.per_block >= self.end]

    # -- what is alone -----------------------------------------------------------

    def _fill(self) -> Iterator[Batch]:
        kinds, end = self.kinds, self.end
        places = array("Q", bytes(8 * (len(kinds) - end)))
        for kind in SINGLE:
            free, source = 0, end
            while True:
                first = source
                free, source, got = assign(kinds, end, kind, places, free, source, self.batch)
                if not got:
                    break
                runs = moves(places, end, first - end, source - end)
                places[first - end : source - end] = array("Q", bytes(8 * (source - first)))
                yield from self._moved(Batch(kind, runs))

    def _moved(self, batch: Batch, left: int = FREE) -> Iterator[Batch]:
        """Yield *batch* of what is alone, then note that it moved; its old places become *left*."""
        if not batch.runs:
            return
        yield batch
        for old, new, count in batch.runs:
            self.kinds[new : new + count] = bytes([batch.kind]) * count
            self.kinds[old : old + count] = bytes([left]) * count
        if batch.kind == BLOCK_CLUSTER:
            owner = {cluster: index for index, cluster in self.blocks.items()}
            for old, new, count in batch.runs:
                for number in range(count):
                    self.blocks[owner[old + number]] = new + number

    # -- what needs room in one piece --------------------------------------------

    def _make_room(self) -> Iterator[Batch]:
        """Move tables and runs of compressed clusters that reach behind the end to be."""
        ideal = self._ideal()
        evicted: list[Run] = []
        tables = self._place_items(ideal, evicted)
        whole, parts = self._place_packed(ideal, evicted)
        for kind in SINGLE:
            yield from self._evict(kind, [run for run in evicted if run[1] == kind])
        if tables:
            yield Batch(ITEM, [(place.old, place.new, place.length) for place in tables])
            self._settle(tables)
            for place in tables:
                self.items[place.new] = self.items.pop(place.old)
        if whole:
            yield Batch(PACKED, [(place.old, place.new, place.length) for place in whole])
            self._settle(whole)
        for place in parts:
            yield Batch(PACKED, [(place.old, place.new, place.length)], place.head)
            self._settle([place])

    def _settle(self, places: list[_Place]) -> None:
        for place in places:
            self.kinds[place.old : place.old + place.length] = bytes(place.length)
            self.kinds[place.new : place.new + place.length] = place.marks
            if place.head:
                self.kinds[place.new - 1] = LINKED

    def _place_items(self, ideal: int, evicted: list[Run]) -> list[_Place]:
        found = []
        far = [(count, start) for start, count in self.items.items() if start + count > ideal]
        for count, start in sorted(far, reverse=True):
            new = self._window(count, ideal, evicted)
            if new:
                found.append(_Place(start, new, count, False, bytes([ITEM]) * count))
        return found

    def _place_packed(self, ideal: int, evicted: list[Run]) -> tuple[list[_Place], list[_Place]]:
        whole: list[_Place] = []
        parts: list[_Place] = []
        first = len(self.kinds[:ideal].rstrip(bytes([LINKED])))
        groups = [match.span() for match in _GROUP.finditer(self.kinds, first)]
        for start, end in sorted(groups, key=lambda span: span[0] - span[1]):
            new = self._window(end - start, ideal, evicted)
            if new:
                whole.append(self._taken(start, end, new, False))
                continue
            while end > max(start, ideal):
                # The part behind the end, or as much of its tail as there is room for; one more for what is shared.
                begin = max(start, ideal)
                room = self._window(end - begin + (begin > start), ideal, evicted)
                if not room:
                    most = self._widest(ideal)
                    if most < 2:
                        break
                    begin = end - most + 1
                    room = self._window(most, ideal, evicted)
                    if not room:
                        break
                parts.append(self._taken(begin, end, room + (begin > start), begin > start))
                end = begin
        return whole, parts

    def _taken(self, start: int, end: int, new: int, head: bool) -> _Place:
        marks = bytes(self.kinds[start:end])
        self.kinds[start:end] = bytes([_RESERVED]) * (end - start)
        if head:
            self.kinds[start - 1] = PACKED
        return _Place(start, new, end - start, head, marks)

    def _window(self, count: int, ideal: int, evicted: list[Run]) -> int:
        """Reserve *count* clusters in one piece before *ideal*, those least in use; returns the first, or 0."""
        kinds = self.kinds
        new = kinds.find(bytes(count), 1, ideal)
        if new < 0:
            new = self._cheapest(count, ideal)
        free = kinds.count(FREE, new, new + count)
        busy = sum(run[2] for run in evicted) + count - free
        if not new or kinds.count(FREE) - free < busy:
            return 0
        for match in _SAME.finditer(kinds, new, new + count):
            evicted.append((match.start(), kinds[match.start()], match.end() - match.start()))
        kinds[new : new + count] = bytes([_RESERVED]) * count
        return new

    def _cheapest(self, count: int, ideal: int) -> int:
        way = self.kinds.translate(_WAY)
        best, cost = 0, count + 1
        for number, match in enumerate(re.finditer(rb"[\0\x01]+", way[:ideal])):
            start, end = max(match.start(), 1), match.end()
            if number > _TRIED or end - start < count:
                continue
            for place in (start, end - count):
                busy = way.count(1, place, place + count)
                if busy < cost:
                    best, cost = place, busy
        return best

    def _widest(self, ideal: int) -> int:
        """The length of the longest stretch before *ideal* that can make way."""
        free = self.kinds.count(FREE)
        way = self.kinds.translate(_WAY)[1:ideal]
        return min(free, max((len(piece) for piece in way.split(b"\x02")), default=0))

    def _evict(self, kind: int, sources: list[Run]) -> Iterator[Batch]:
        """Let what is alone in reserved places move into the lowest free ones."""
        runs: list[Run] = []
        at = 0
        for old, _, length in sources:
            while length:
                match = FREE_RUN.search(self.kinds, at)
                if match is None:
                    break
                step = min(length, match.end() - match.start())
                runs.append((old, match.start(), step))
                old, length, at = old + step, length - step, match.start() + step
        yield from self._moved(Batch(kind, runs), _RESERVED)
