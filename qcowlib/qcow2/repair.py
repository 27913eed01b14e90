# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Repair of an image: what ``qemu-img check -r`` mends, at no moment less than it was.

Invariant: guest data is never written, and a cut at any write leaves an image
that a renewed repair brings to the same end.  A broken refcount structure is
never mended in place: a complete new one is written into space that nothing
refers to, made durable, and published by one write of the header (I5, I8);
only then the old one is released.  In place go changes of single entries that
are right by themselves: refcounts that were too low (raised first, I1), too
high (lowered only after a barrier), COPIED flags (I3), mapping entries without
data.  A table that shares its cluster with anything else is not touched.
Dirty and corrupt bits are cleared last, after a barrier.
"""

from __future__ import annotations

import errno
from typing import Final, Literal

from qcowlib.errors import ReadOnly, UsageError
from qcowlib.native import EVENT_PREALLOCATED_UNALIGNED
from qcowlib.ondisk import (
    AUTOCLEAR_MASK,
    COPIED,
    INCOMPAT_CORRUPT,
    INCOMPAT_DIRTY,
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
    REFCOUNT_TABLE_OFFSET_MASK,
    ZERO,
    Header,
    pack_snapshots,
)
from qcowlib.qcow2.check import (
    Report,
    SnapshotTable,
    check,
    compare,
    copied_finding,
    fill_statistics,
    read_header,
    read_snapshots,
)
from qcowlib.qcow2.references import DEFAULT_LIMIT, Event, Finding, Log, ReferenceWalk
from qcowlib.storage.base import Storage
from qcowlib.units import ceil_div

__all__ = ["repair"]

_AT_REFCOUNT_TABLE: Final = 48
_AT_SNAPSHOTS: Final = 60
_AT_INCOMPATIBLE: Final = 72
_AT_AUTOCLEAR: Final = 88


def repair(storage: Storage, level: Literal["leaks", "all"] = "leaks", *, limit: int = DEFAULT_LIMIT) -> Report:
    """Repair the image in *storage*, check it again and return that report.

    ``leaks`` only releases what nothing uses; ``all`` mends every corruption
    that can be mended without guessing.  If nothing could be repaired the
    report is that of the repairing check itself.
    Raises: UsageError, ReadOnly, FormatError for what is no image,
    StorageError if reading or writing fails (then the repair may be repeated).
    """
    if level not in ("leaks", "all"):
        raise UsageError(f"unknown repair level: {level!r}")
    if not storage.writable:
        raise ReadOnly("the image is not open for writing", path=storage.name)
    first = _Repair(storage, level == "all", limit).run()
    if first.failure or not (first.corruptions_fixed or first.leaks_fixed):
        return first
    report = check(storage, limit=limit)
    report.corruptions_fixed = first.corruptions_fixed
    report.leaks_fixed = first.leaks_fixed
    report.repairs = first.findings
    return report


class _Repair:
    """One repairing pass; the counts go as qemu-img's."""

    def __init__(self, storage: Storage, everything: bool, limit: int) -> None:
        self._storage = storage
        self._all = everything
        self._limit = limit
        self._log = Log(limit)
        self._report = Report()
        self._header = read_header(storage, writable=True)

    def run(self) -> Report:
        """Do it all; see the module for the order."""
        report, log = self._report, self._log
        table = read_snapshots(self._storage, self._header, log, self._all)
        if table.failure:
            report.check_errors = 1
            report.corruptions = table.corruptions
            report.failure = table.failure
        else:
            self._mend(table)
        report.findings = log.findings
        report.suppressed = log.suppressed
        return report

    def _mend(self, table: SnapshotTable) -> None:
        report = self._report
        self._clear_autoclear()
        walk = self._first_walk(table)
        if not report.failure:
            walk = self._mend_refcounts(walk, table)
        if not report.failure:
            self._mend_copied(walk)
            if table.corruptions and self._all:
                self._mend_snapshots(table)
            else:
                report.corruptions += table.corruptions
        if not (report.failure or report.check_errors or report.corruptions):
            self._mark_clean()

    # -- writing -------------------------------------------------------------------

    def _clear_autoclear(self) -> None:
        """Drop unknown autoclear bits, durably, before the first write (I10), and as qemu also if there is none."""
        header = self._header
        if header.version >= 3 and header.autoclear_features & ~AUTOCLEAR_MASK:
            header.autoclear_features &= AUTOCLEAR_MASK
            self._storage.write(_AT_AUTOCLEAR, [header.autoclear_features.to_bytes(8, "big")])
            self._storage.flush()

    def _write(self, offset: int, data: bytes | bytearray) -> None:
        self._storage.write(offset, [data])

    def _publish(self, offset: int, data: bytes) -> None:
        """Write a few adjacent header fields between two barriers; they lie in one sector."""
        self._storage.flush()
        self._write(offset, data)
        self._storage.flush()

    def _mark_clean(self) -> None:
        header = self._header
        if header.incompatible_features & (INCOMPAT_DIRTY | INCOMPAT_CORRUPT):
            header.incompatible_features &= ~(INCOMPAT_DIRTY | INCOMPAT_CORRUPT)
            self._publish(_AT_INCOMPATIBLE, header.incompatible_features.to_bytes(8, "big"))

    # -- references ------------------------------------------------------------------

    def _walk(self, table: SnapshotTable, *, fixing: bool = False) -> ReferenceWalk:
        walk = ReferenceWalk(
            self._storage, self._header, table.entries, table.size, self._limit, fixing=fixing and self._all
        )
        walk.load_refcounts()
        walk.count()
        return walk

    def _first_walk(self, table: SnapshotTable) -> ReferenceWalk:
        """Count references, mending mapping entries that have no data on the way."""
        walk = self._walk(table, fixing=True)
        fixed = 0
        if walk.must_trace and self._all:
            fixed = self._trace_and_fix(walk)
        elif walk.must_trace:
            walk.trace(self._log)
        if fixed:
            self._storage.flush()
            walk = self._walk(table, fixing=True)
            self._report.corruptions_fixed += fixed
        self._log.extend(walk.tail)
        self._report.failure = walk.failure
        return walk

    def _trace_and_fix(self, walk: ReferenceWalk) -> int:
        """Make unaligned zero clusters plain zero clusters; they hold no data."""
        fixed = 0
        header = self._header

        def fix(table: int, events: list[Event]) -> Finding | None:
            nonlocal fixed
            broken = [index for code, index, _, _ in events if code == EVENT_PREALLOCATED_UNALIGNED]
            if broken and not self._owned(walk, table, walk.tables.weight_of(table)):
                # An unaligned table ends in what may be guest data; qemu writes there.
                self._report.check_errors += len(broken)
                return Finding("unaligned", "error", "ERROR: Overlap check failed", table)
            for index in broken:
                place = table + index * header.l2_entry_size
                entry = bytearray(header.l2_entry_size)
                if header.extended_l2:
                    self._storage.read_into(place, [entry])
                    # Nothing is allocated in it; what reads as zeros goes on to.
                    entry[:8] = bytes(8)
                else:
                    entry[:] = ZERO.to_bytes(8, "big")
                self._write(place, entry)
            fixed += len(broken)
            return None

        walk.trace(self._log, fix)
        return fixed

    def _owned(self, walk: ReferenceWalk, offset: int, expected: int) -> bool:
        """Whether the cluster at *offset* is a table and nothing else."""
        if offset % self._header.cluster_size or walk.counts.overflows or not expected:
            return False
        return walk.counts.counted(offset >> self._header.cluster_bits) == expected

    # -- refcounts -------------------------------------------------------------------

    def _mend_refcounts(self, walk: ReferenceWalk, table: SnapshotTable) -> ReferenceWalk:
        """Make the stored refcounts those counted; returns the walk that is true afterwards."""
        report, log = self._report, self._log
        found = compare(walk, log, marking=True)
        before = walk.corruptions
        if walk.rebuild or found.missing or found.unreadable or (walk.outside and self._all):
            if not self._all:
                log.add(Finding("rebuild", "error", "ERROR need to rebuild refcount structures"))
                report.failure = errno.EIO
                return walk
            log.add(Finding("rebuild", "note", "Rebuilding refcount structure"))
            walk = self._rebuild_until_complete(walk, table)
            if report.failure:
                return walk
            if walk.must_trace:
                walk.trace(log)
            log.extend(walk.tail)
            report.corruptions_fixed += max(0, before + found.corruptions - walk.corruptions)
            self._tell_fixes(walk, log)
        else:
            if found.corruptions or found.leaks:
                self._tell_fixes(walk, log)
            if self._all:
                report.corruptions_fixed += found.corruptions
                self._write_blocks(walk, up=True, down=False)
                self._storage.flush()
            else:
                report.corruptions += found.corruptions
        report.leaks_fixed += found.leaks
        report.corruptions += walk.corruptions
        self._write_blocks(walk, up=self._all, down=True)
        self._storage.flush()
        fill_statistics(report, walk, found.highest)
        return self._walk(table)

    def _rebuild_until_complete(self, walk: ReferenceWalk, table: SnapshotTable) -> ReferenceWalk:
        """Rebuild; once more if that made the file reach what broken entries refer to."""
        for _ in range(3):
            if not self._rebuild(walk):
                self._report.failure = errno.EFBIG
                break
            walk = self._walk(table, fixing=True)
            if not walk.counts.compare(1)[3]:
                break
        return walk

    def _tell_fixes(self, walk: ReferenceWalk, log: Log) -> None:
        """Tell each refcount again, as repaired where it will be."""
        own = Log(max(log.room, 1))
        compare(walk, own)
        for finding in own.findings:
            if finding.kind == "leak" or (finding.kind == "refcount" and self._all):
                word = finding.message.split(" cluster ", 1)[1]
                log.add(finding._replace(message=f"Repairing cluster {word}"))
            else:
                log.add(finding)
        log.suppressed += own.suppressed

    def _write_blocks(self, walk: ReferenceWalk, *, up: bool, down: bool) -> None:
        for index, entry in walk.refcount_table.items():
            block = walk.counts.fix_block(index, up, down)
            if block is not None:
                self._write(entry & REFCOUNT_TABLE_OFFSET_MASK, block)

    def _rebuild(self, walk: ReferenceWalk) -> bool:
        """Write a new refcount structure and publish it (I8); False if it would be too large.

        Blocks exist where something is counted, each as near as free space
        allows; the old structure still counts as used.
        """
        size = self._header.cluster_size
        placer = _Placer(walk, self._header)
        blocks: dict[int, int] = {}
        self._place_blocks(walk, placer, blocks, 0, None)
        while True:
            clusters = ceil_div((max(blocks) + 1) * 8, size)
            if clusters * size > MAX_REFCOUNT_TABLE_BYTES:
                return False
            table = placer.take(0, clusters)
            self._place_blocks(walk, placer, blocks, table, table + clusters)
            if (max(blocks) + 1) * 8 <= clusters * size:
                break
        content = bytearray(clusters * size)
        for index, cluster in blocks.items():
            self._write(cluster * size, walk.counts.pack_block(index))
            content[index * 8 : index * 8 + 8] = (cluster * size).to_bytes(8, "big")
        self._write(table * size, content)
        self._header.refcount_table_offset = table * size
        self._header.refcount_table_clusters = clusters
        self._publish(_AT_REFCOUNT_TABLE, (table * size).to_bytes(8, "big") + clusters.to_bytes(4, "big"))
        return True

    def _place_blocks(
        self, walk: ReferenceWalk, placer: _Placer, blocks: dict[int, int], first: int, last: int | None
    ) -> None:
        """Give every range of clusters with counted ones from *first* to *last* a block."""
        per_block = self._header.cluster_size * 8 // self._header.refcount_bits
        cluster = walk.counts.next_counted(first)
        while cluster < (walk.counts.clusters if last is None else last):
            index = cluster // per_block
            if index not in blocks:
                place = placer.take(index * per_block, 1)
                blocks[index] = place
                # What was placed behind *last* needs a block as well.
                if last is not None:
                    last = max(last, place + 1)
            cluster = walk.counts.next_counted((index + 1) * per_block)

    # -- COPIED ----------------------------------------------------------------------

    def _mend_copied(self, walk: ReferenceWalk) -> None:
        """Set COPIED where the refcount is one and clear it elsewhere, if refcounts can be trusted."""
        report = self._report
        can = self._all or not (report.check_errors or report.corruptions or report.leaks)
        seen: set[tuple[int | None, int]] = set()
        changes: dict[int, dict[int, int]] = {}
        if not walk.counts.copied_errors:
            return
        for table, index, entry, refcount in walk.copied_mismatches():
            place = self._entry_place(walk, table, index) if can else None
            if (table, index) in seen:
                continue
            self._log.add(copied_finding(table, index, entry, refcount, repaired=place is not None))
            if place is None:
                report.corruptions += 1
                continue
            seen.add((table, index))
            report.corruptions_fixed += 1
            word = entry | COPIED if refcount == 1 else entry & ~COPIED
            changes.setdefault(place >> 9, {})[place] = word
            if len(changes) > 1 << 14:
                self._write_sectors(changes)
                changes.clear()
        self._write_sectors(changes)
        self._storage.flush()

    def _entry_place(self, walk: ReferenceWalk, table: int | None, index: int) -> int | None:
        """Return where an entry lies, or None if its table must not be written."""
        header = self._header
        if table is None:
            place = header.l1_table_offset + index * 8
            cluster = place // header.cluster_size * header.cluster_size
            return place if self._owned(walk, cluster, 1) else None
        if not self._owned(walk, table, walk.tables.weight_of(table & OFFSET_MASK)):
            return None
        return table + index * header.l2_entry_size

    def _write_sectors(self, changes: dict[int, dict[int, int]]) -> None:
        """Change entries, a sector a write: each is right whatever becomes of the others."""
        for number, words in sorted(changes.items()):
            sector = bytearray(min(512, self._storage.size - number * 512))
            self._storage.read_into(number * 512, [sector])
            for place, word in words.items():
                at = place - number * 512
                sector[at : at + 8] = word.to_bytes(8, "big")
            self._write(number * 512, sector)

    # -- snapshot table ----------------------------------------------------------------

    def _mend_snapshots(self, table: SnapshotTable) -> None:
        """Write the table anew at another place, publish it, release the old one (I5)."""
        header = self._header
        walk = self._walk(table)
        if walk.failure:
            self._report.failure = walk.failure
            return
        data = pack_snapshots(table.entries, header.virtual_size)
        place = 0
        if data:
            placer = _Placer(walk, header)
            clusters = ceil_div(len(data), header.cluster_size)
            first = placer.take(0, clusters)
            place = first * header.cluster_size
            self._write(place, data.ljust(clusters * header.cluster_size, b"\0"))
            if not self._count_in_place(walk, first, clusters) and not self._rebuild(walk):
                self._report.failure = errno.EFBIG
                return
        header.nb_snapshots, header.snapshots_offset = len(table.entries), place
        self._publish(_AT_SNAPSHOTS, len(table.entries).to_bytes(4, "big") + place.to_bytes(8, "big"))
        self._report.corruptions_fixed += table.corruptions
        fresh = SnapshotTable(table.entries, len(data))
        self._write_blocks(self._walk(fresh), up=False, down=True)
        self._storage.flush()

    def _count_in_place(self, walk: ReferenceWalk, first: int, count: int) -> bool:
        """Store the counts of new clusters in the blocks there are; False if one is missing."""
        per_block = self._header.cluster_size * 8 // self._header.refcount_bits
        wanted = range(first // per_block, (first + count - 1) // per_block + 1)
        if any(index not in walk.refcount_table for index in wanted):
            return False
        for index in wanted:
            place = walk.refcount_table[index] & REFCOUNT_TABLE_OFFSET_MASK
            self._write(place, walk.counts.pack_block(index))
        return True


class _Placer:
    """Finds clusters that nothing refers to, and counts them as used.

    Where broken tables may refer to clusters that were not counted, only space
    behind the end is taken.  Space behind the end begins behind what broken
    entries refer to there.
    """

    def __init__(self, walk: ReferenceWalk, header: Header) -> None:
        self._counts = walk.counts
        self._bits = header.cluster_bits
        self._clusters = walk.counts.clusters
        self._end = max(self._clusters, ceil_div(walk.counts.beyond, header.cluster_size))
        self._first = 0 if walk.complete else self._end

    def take(self, first: int, count: int) -> int:
        """Return the first of *count* adjacent free clusters at or behind *first*."""
        cluster = self._counts.find_free(max(first, self._first), count)
        if cluster + count > self._clusters and cluster < self._end:
            cluster = self._counts.find_free(self._end, count)
        end = (cluster + count) << self._bits
        if end > self._counts.file_size:
            self._counts.grow(end)
        self._counts.reference(cluster << self._bits, count << self._bits)
        self._counts.take_events()
        return cluster
