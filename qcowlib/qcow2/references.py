# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Counts every reference to every host cluster, and tells what is wrong on the way.

Invariant: reading only, and bounded: each mapping table is read once whatever
names it, in file order and in large pieces, holes are not read, findings are
kept up to a limit (the rest is counted), and work is bounded by the length of
the file, so that no image can make a check endless.

Two walks.  :meth:`ReferenceWalk.count` is the fast one: it counts all tables
in file order with the number of L1 entries that name each.  Only when it met
something wrong, :meth:`ReferenceWalk.trace` visits the tables concerned again
in the order of qemu-img's work, to say so in the same lines.

Source: the messages are what qemu-img 7.2 prints, without its name in front.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator, Sequence

from qcowlib.errors import FormatError, printable
from qcowlib.native import (
    EVENT_PAST_END,
    EVENT_RESERVED,
    EVENT_TABLE,
    ReferenceCounts,
    TableSet,
)
from qcowlib.ondisk import (
    MAX_L1_BYTES,
    REFCOUNT_TABLE_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    BitmapEntry,
    Header,
    SnapshotEntry,
    parse_bitmap_directory,
)
from qcowlib.storage.base import Storage
from qcowlib.units import KiB, MiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NamedTuple
else:
    from qcowlib.records import NamedTuple


__all__ = ["DEFAULT_LIMIT", "Finding", "Log", "ReferenceWalk", "Tracer"]

DEFAULT_LIMIT: Final = 1024
_PIECE: Final = 4 * MiB
_GAP: Final = 128 * KiB
_TRACE_PIECE: Final = 32 * KiB
# Source: a read of qemu's that would end behind this fails; before it, bytes past the end are zeros.
_MAX_READ: Final = (1 << 63) - (1 << 30) - (2 << 20)
_BITMAP_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_BITMAP_RESERVED: Final = 0xFF00_0000_0000_01FE


class Finding(NamedTuple):
    """One thing that is wrong.

    ``kind`` is a short word (``leak``, ``refcount``, ``copied``, ``reserved``,
    ``past-end``, ``overflow``, ``unaligned``, ``compressed``, ``subclusters``,
    ``refcount-table``, ``snapshot``, ``unreadable``, ``rebuild``), ``severity``
    is ``corruption``, ``leak``, ``error`` (the check itself failed there) or
    ``note`` (counted nowhere).  ``message`` is qemu-img's text; ``prefixed``
    tells that qemu-img puts its name in front of it.  ``host_offset`` is the
    byte in the file it is about, ``owner`` the table that holds the entry, and
    ``guest_offset`` the guest byte that the entry is of (in a snapshot's own
    disk where it owns the table).
    """

    kind: str
    severity: str
    message: str
    host_offset: int | None = None
    owner: str | None = None
    prefixed: bool = False
    guest_offset: int | None = None


class Log:
    """Findings in order, at most *limit*; ``suppressed`` counts those that are left out."""

    __slots__ = ("findings", "limit", "suppressed")

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.findings: list[Finding] = []
        self.limit = limit
        self.suppressed = 0

    @property
    def room(self) -> int:
        """How many findings may still be added."""
        return self.limit - len(self.findings)

    def add(self, finding: Finding) -> None:
        """Keep *finding*, or count it."""
        if self.room > 0:
            self.findings.append(finding)
        else:
            self.suppressed += 1

    def extend(self, other: Log) -> None:
        """Add all of *other* behind."""
        for finding in other.findings:
            self.add(finding)
        self.suppressed += other.suppressed


# What the table scans report: kind, text of (index, value, extra).
_TEXTS: Final[dict[int, tuple[str, str]]] = {
    1: ("reserved", "ERROR found l2 entry with reserved bits set: {1:x}"),
    2: ("compressed", "ERROR: coffset=0x{1:x}: copied flag must never be set for compressed clusters"),
    3: ("compressed", "ERROR compressed cluster {0} with data file, entry=0x{1:x}"),
    4: ("compressed", "ERROR compressed cluster {0} with non-zero subcluster allocation bitmap, entry=0x{1:x}"),
    5: ("subclusters", "ERROR offset={1:x}: Allocated cluster has corrupted subcluster allocation bitmap"),
    6: ("unaligned", "{3} offset={1:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."),
    7: ("unaligned", "ERROR offset={1:x}: Data cluster is not properly aligned; L2 entry corrupted."),
    8: ("subclusters", "ERROR: Unallocated cluster has non-zero subcluster allocation map"),
    9: (
        "past-end",
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more:"
        " offset 0x{1:x} size 0x{2:x}",
    ),
    10: ("overflow", "ERROR: overflow cluster offset=0x{1:x}"),
    11: ("unaligned", "ERROR l2_offset={1:x}: Table is not cluster aligned; L1 entry corrupted"),
}
_NO_PLACE: Final = (1, 8)
#: Told of a range of the file, not of an entry.
_NO_ENTRY: Final = (9, 10)
_OVERFLOW_HINT: Final = Finding(
    "overflow",
    "note",
    "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy"
    " if the image cannot be opened for writing",
)

Event = tuple[int, int, int, int]


class _Reader:
    """Reads pieces of the file into one buffer, and knows its holes."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.size = storage.size
        self._buffer = bytearray()

    def read(self, offset: int, length: int) -> memoryview:
        """Return *length* bytes, valid until the next call; zeros past the end."""
        if length > len(self._buffer):
            self._buffer = bytearray(max(length, min(_PIECE, self.size)))
        view = memoryview(self._buffer)[:length]
        self._storage.read_into(offset, [view])
        return view

    def keep(self, offset: int, length: int) -> bytearray:
        """Return *length* bytes of their own."""
        data = bytearray(length)
        self._storage.read_into(offset, [data])
        return data

    def data_from(self, offset: int) -> tuple[bool, int]:
        """Return whether *offset* is in data, and where that stops being so."""
        for extent in self._storage.extents(offset, self.size - offset):
            if extent.length:
                return extent.kind == "data", extent.start + extent.length
        return True, self.size

    def words(self, offset: int, count: int, limit: int = _PIECE) -> Iterator[tuple[int, memoryview]]:
        """Yield ``(index, bytes)`` of the parts of a table of 64-bit words that are not in holes."""
        position = offset
        end = min(offset + count * 8, self.size)
        while position < end:
            is_data, until = self.data_from(position)
            # A word may begin in a hole and end in data.
            until = min(until, end)
            stop = offset + (until - offset + 7 * is_data) // 8 * 8
            while is_data and position < stop:
                length = min(limit, stop - position)
                yield (position - offset) // 8, self.read(position, length)
                position += length
            if stop <= position < until:
                # Less than a word of the hole is left: take the word as data.
                yield (position - offset) // 8, self.read(position, 8)
                stop = position + 8
            position = max(stop, position)


Tracer = Callable[[int, list[Event]], "Finding | None"]
"""Told the offset of a table and its events, when a repair traces; says why it repairs nothing."""


class ReferenceWalk:
    """All references of one image; see the module.

    *snapshots* and *snapshots_size* are the snapshot table as it was read.
    After :meth:`count`: ``counts`` holds the references next to the stored
    refcounts, ``tail`` the findings behind the mapping tables, ``corruptions``
    all findings counted so, ``rebuild`` whether the refcount table is broken,
    ``outside`` how many blocks it has behind the end of the file,
    ``lost_tables`` how many snapshots have an L1 table that cannot be, ``failure``
    an errno where the walk had to end.  *fixing* words findings for a repair.
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        snapshots: Sequence[SnapshotEntry],
        snapshots_size: int,
        limit: int = DEFAULT_LIMIT,
        *,
        fixing: bool = False,
    ) -> None:
        self.header = header
        self.snapshots = snapshots
        self.reader = _Reader(storage)
        self.tail = Log(limit)
        self.rebuild = False
        self.outside = 0
        self.lost_tables = 0
        self.failure = 0
        self._word = "Repairing" if fixing else "ERROR"
        self.refcount_table: dict[int, int] = {}
        self._storage = storage
        self._snapshots_size = snapshots_size
        self._own_corruptions = 0
        self._traceable = 0
        # Mapping tables of a sound image do not overlap; this much and a margin.
        self._budget = self.reader.size // 2 + (1 << 24)
        self.tables = TableSet()
        self.counts = self._new_counts()

    def _new_counts(self) -> ReferenceCounts:
        header = self.header
        entries = header.refcount_table_clusters * header.cluster_size // 8
        try:
            return ReferenceCounts(
                header.cluster_bits,
                header.refcount_order,
                self.reader.size,
                entries,
                extended=header.extended_l2,
                data_file=header.has_data_file,
            )
        except ValueError as error:
            raise FormatError("the file has too many clusters to check", path=self._storage.name) from error

    @property
    def corruptions(self) -> int:
        """How many findings are corruptions."""
        return self.counts.corruptions + self.counts.overflows + self._own_corruptions

    @property
    def complete(self) -> bool:
        """Whether everything that the image refers to inside the file was counted."""
        return not (self.lost_tables or self.counts.uncounted)

    @property
    def must_trace(self) -> bool:
        """Whether the mapping tables have findings that only :meth:`trace` tells."""
        return self._traceable > 0

    # -- stored refcounts --------------------------------------------------------

    def load_refcounts(self) -> None:
        """Read the refcount table, and every block once."""
        header, reader = self.header, self.reader
        size = header.cluster_size
        entries = header.refcount_table_clusters * size // 8
        for first, piece in reader.words(header.refcount_table_offset, entries):
            for index, entry in _nonzero_words(piece):
                self.refcount_table[first + index] = entry
        places: dict[int, list[int]] = {}
        for index, entry in self.refcount_table.items():
            offset = entry & REFCOUNT_TABLE_OFFSET_MASK
            if offset % size or offset > _MAX_READ:
                self.counts.set_block(index, None)
            elif 0 < offset < reader.size:
                places.setdefault(offset, []).append(index)
        self._load_blocks(places)

    def _load_blocks(self, places: dict[int, list[int]]) -> None:
        size = self.header.cluster_size
        offsets = sorted(places)
        at = 0
        while at < len(offsets):
            start = offsets[at]
            is_data, until = self.reader.data_from(start)
            last = at + 1
            if not is_data and start + size <= until:
                at = last
                continue
            while last < len(offsets) and offsets[last] == offsets[last - 1] + size <= start + _PIECE - size:
                last += 1
            data = self.reader.keep(start, offsets[last - 1] + size - start)
            for offset in offsets[at:last]:
                for index in places[offset]:
                    self.counts.set_block(index, data, offset - start)
            at = last

    # -- the fast walk -----------------------------------------------------------

    def count(self) -> None:
        """Count all references, reading in file order."""
        header, counts = self.header, self.counts
        counts.reference(0, header.cluster_size)
        self._add_l1(header.l1_table_offset, header.l1_size, 1, active=True)
        if self.snapshots and header.has_data_file:
            self._own_corruptions += 1
        shared: dict[tuple[int, int], int] = {}
        for snapshot in self.snapshots:
            if self._snapshot_finding(snapshot):
                self._own_corruptions += 1
                self.lost_tables += 1
            elif snapshot.l1_size:
                key = snapshot.l1_table_offset, snapshot.l1_size
                shared[key] = shared.get(key, 0) + 1
        for (offset, entries), weight in shared.items():
            self._add_l1(offset, entries, weight, active=False)
        self.tables.finish()
        self._scan_tables()
        self._traceable = self.corruptions
        counts.trace()
        self._reference(header.snapshots_offset, self._snapshots_size)
        self._reference(header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size)
        if header.crypto is not None:
            self._reference(header.crypto.offset, header.crypto.length)
        if header.bitmaps is not None and header.bitmaps_valid and not self.failure:
            self._count_bitmaps(header.bitmaps.directory_offset, header.bitmaps.directory_size)
        if not self.failure:
            self._count_refcount_blocks()

    def _spend(self) -> bool:
        """Return whether the walk may go on."""
        if self.counts.entries > self._budget:
            self.failure = errno.EFBIG
        return not self.failure

    def _add_l1(self, offset: int, entries: int, weight: int, *, active: bool) -> None:
        if entries:
            self.counts.reference(offset, entries * 8, weight)
        for _, piece in self.reader.words(offset, entries):
            if not self._spend():
                break
            self.tables.add_l1(self.counts, piece, weight, active)

    def _scan_tables(self) -> None:
        tables, reader, size = self.tables, self.reader, self.header.cluster_size
        at = 0
        data_until = 0
        while at < len(tables) and self._spend():
            offset = tables.offset(at)
            if offset >= data_until:
                is_data, until = reader.data_from(offset)
                if not is_data and offset + size <= until:
                    at = max(at + 1, tables.first_from(until - size + 1))
                    continue
                data_until = until
            last, end = tables.window(at, size, max(_PIECE, size), _GAP)
            self.counts.scan_tables(reader.read(offset, end - offset), offset, tables, at, last)
            at = last

    def _reference(self, offset: int, length: int) -> None:
        if length:
            self.counts.reference(offset, length)
            self._log_events(self.tail, self.counts.take_events(), None)

    def _count_bitmaps(self, offset: int, length: int) -> None:
        self._reference(offset, length)
        header = self.header
        count = header.bitmaps.nb_bitmaps if header.bitmaps is not None else 0
        data = self.reader.keep(offset, length)
        bitmaps = parse_bitmap_directory(
            memoryview(data), count, header.virtual_size, header.cluster_bits, path=self._storage.name
        )
        for bitmap in bitmaps:
            self._reference(bitmap.table_offset, bitmap.table_size * 8)
            self._budget -= bitmap.table_size
            if not self._spend():
                return
            for _, piece in self.reader.words(bitmap.table_offset, bitmap.table_size):
                for _, entry in _nonzero_words(piece):
                    place = entry & _BITMAP_OFFSET
                    if entry & _BITMAP_RESERVED or (place and (entry & 1 or place % header.cluster_size)):
                        self._broken_bitmap(bitmap)
                        return
                    if place:
                        self._reference(place, header.cluster_size)

    def _broken_bitmap(self, bitmap: BitmapEntry) -> None:
        """A table that opening would load makes the image unusable, another one ends the check."""
        if not bitmap.in_use:
            text = f"Could not read bitmap_table table from image for bitmap '{printable(bitmap.name)}'"
            raise FormatError(f"{text}: Invalid argument", path=self._storage.name)
        self._own_corruptions += 1
        self.failure = errno.EINVAL

    def _count_refcount_blocks(self) -> None:
        size = self.header.cluster_size
        for index, entry in self.refcount_table.items():
            offset = entry & REFCOUNT_TABLE_OFFSET_MASK
            if entry & REFCOUNT_TABLE_RESERVED:
                self._broken_table(f"ERROR refcount table entry {index} has reserved bits set", offset)
            elif offset % size:
                text = "is not cluster aligned; refcount table entry corrupted"
                self._broken_table(f"ERROR refcount block {index} {text}", offset)
            elif offset // size >= self.counts.clusters:
                self._own_corruptions += 1
                self.outside += 1
                text = f"{self._word} refcount block {index} is outside image"
                self.tail.add(Finding("refcount-table", "corruption", text, offset, "refcount table"))
            elif offset:
                self._reference(offset, size)
                found = self.counts.counted(offset // size)
                if found != 1:
                    self._broken_table(f"ERROR refcount block {index} refcount={found}", offset)

    def _broken_table(self, message: str, offset: int) -> None:
        self._own_corruptions += 1
        self.rebuild = True
        self.tail.add(Finding("refcount-table", "corruption", message, offset, "refcount table"))

    # -- the walk in qemu-img's order ----------------------------------------------

    def trace(self, log: Log, fixer: Tracer | None = None) -> None:
        """Add the findings of header, L1 and L2 tables to *log*, in order.

        With *fixer*, it is told each table's events and may rewrite entries of
        the table before anything else is read.
        """
        header = self.header
        counts = self._new_counts()
        counts.trace(fixer is not None)
        before = len(log.findings) + log.suppressed
        self._trace_reference(counts, log, 0, header.cluster_size, None)
        self._trace_l1(counts, log, header.l1_table_offset, header.l1_size, True, fixer)
        if self.snapshots and header.has_data_file:
            text = f"ERROR {len(self.snapshots)} snapshots in image with data file"
            log.add(Finding("snapshot", "corruption", text, header.snapshots_offset, "snapshot table"))
        for snapshot in self.snapshots:
            finding = self._snapshot_finding(snapshot)
            if finding:
                log.add(finding)
            else:
                self._trace_l1(counts, log, snapshot.l1_table_offset, snapshot.l1_size, False, fixer)
            if log.room <= 0 or counts.entries > self._budget:
                break
        told = len(log.findings) + log.suppressed - before
        log.suppressed += max(0, self._traceable - told)

    def _trace_reference(self, counts: ReferenceCounts, log: Log, offset: int, length: int, owner: str | None) -> None:
        if length:
            counts.reference(offset, length)
            self._log_events(log, counts.take_events(), owner)

    def _trace_l1(
        self, counts: ReferenceCounts, log: Log, offset: int, entries: int, active: bool, fixer: Tracer | None
    ) -> None:
        """Tell the findings of one L1 table and of the tables it names."""
        name = "active L1" if active else f"L1 at {offset:#x}"
        size = self.header.cluster_size
        every = self.counts.overflows > 0
        self._trace_reference(counts, log, offset, entries * 8, name)
        for first, piece in self.reader.words(offset, entries, _TRACE_PIECE):
            # Copied, because the reader's one buffer is used for the tables below.
            for event in self.tables.trace_l1(counts, bytes(piece), first, every):
                code, index, value, _ = event
                owner = f"{name} entry {index}"
                if code == EVENT_PAST_END:
                    self._trace_reference(counts, log, value, size, owner)
                elif code == EVENT_RESERVED:
                    text = f"ERROR found L1 entry with reserved bits set: {value:x}"
                    at = index * self.header.l2_entries * size
                    log.add(Finding("reserved", "corruption", text, None, owner, False, at))
                elif code == EVENT_TABLE:
                    counts.trace_table(self.reader.read(value, size), active)
                    events = counts.take_events()
                    guest = index * self.header.l2_entries * size
                    refused = None if fixer is None else fixer(value, events)
                    fixed = fixer is not None and refused is None
                    self._log_events(log, events, f"L2 at {value:#x}", fixed, guest)
                    if refused is not None:
                        log.add(refused)
                else:
                    table = index * self.header.l2_entries * size - index * size
                    self._log_events(log, [event], owner, False, table)
                if log.room <= 0 and fixer is None:
                    return
            if counts.entries > self._budget:
                return

    def _log_events(
        self, log: Log, events: Sequence[Event], owner: str | None, fixing: bool = False, guest: int | None = None
    ) -> None:
        """Add *events* as findings; *guest* is the guest offset of the first entry of the table they are of."""
        if log.room <= 0:
            log.suppressed += len(events)
            return
        word = "Repairing" if fixing else "ERROR"
        for code, index, value, extra in events:
            kind, text = _TEXTS[code]
            place = None if code in _NO_PLACE else value
            at = None if guest is None or code in _NO_ENTRY else guest + index * self.header.cluster_size
            log.add(Finding(kind, "corruption", text.format(index, value, extra, word), place, owner, False, at))
            if kind == "overflow" and log.room > 0:
                log.findings.append(_OVERFLOW_HINT)

    def _snapshot_finding(self, snapshot: SnapshotEntry) -> Finding | None:
        """Return what is wrong with the L1 table pointer of a snapshot."""
        if snapshot.l1_table_offset % self.header.cluster_size:
            what = f"l1_offset={_hex(snapshot.l1_table_offset)}: L1 table is not cluster aligned"
        elif snapshot.l1_size > MAX_L1_BYTES // 8:
            what = f"l1_size={_hex(snapshot.l1_size)}: L1 table is too large"
        else:
            return None
        # Up to a NUL, as C prints them.
        name, title = (printable(word.partition(b"\0")[0]) for word in (snapshot.id, snapshot.name))
        text = f"ERROR snapshot {name} ({title}) {what}; snapshot table entry corrupted"
        return Finding("snapshot", "corruption", text, snapshot.l1_table_offset, f"snapshot {name}")

    # -- COPIED --------------------------------------------------------------------

    def copied_mismatches(self) -> Iterator[tuple[int | None, int, int, int]]:
        """Yield ``(table offset or None for the L1, index, entry, stored refcount)`` in order.

        Of the active tables only; an entry reached twice is told twice.
        """
        header = self.header
        for first, piece in self.reader.words(header.l1_table_offset, header.l1_size, _TRACE_PIECE):
            for code, index, entry, refcount in self.tables.copied_of_l1(self.counts, bytes(piece), first):
                if code != EVENT_TABLE:
                    yield None, index, entry, refcount
                    continue
                table = self.reader.read(entry, header.cluster_size)
                for position, word, stored in self.counts.copied_of_table(table):
                    yield entry, position, word, stored


def _hex(value: int) -> str:
    """Return *value* as C prints it with ``%#x``: zero has no prefix."""
    return f"{value:#x}" if value else "0"


def _nonzero_words(piece: memoryview) -> Iterator[tuple[int, int]]:
    words = array("Q", piece.tobytes())
    words.byteswap()
    for index, word in enumerate(words):
        if word:
            yield index, word
