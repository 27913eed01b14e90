# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Consistency check of an image: what qemu-img check finds, as values.

Invariant: nothing is written, and nothing but the given storage is touched.
The counts, the findings and their order are those of qemu-img 7.2; findings
beyond a limit are counted in ``suppressed``.

Order of work: snapshot table; references (:mod:`.references`); comparison
with the stored refcounts by cluster number; COPIED flags of the active tables.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from qcowlib.errors import FormatError
from qcowlib.ondisk import (
    HEADER_READ,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE,
    MAX_SNAPSHOTS,
    Header,
    ShortTable,
    SnapshotEntry,
    header_read_size,
    parse_snapshots,
    snapshot_table_size,
)
from qcowlib.qcow2.references import DEFAULT_LIMIT, Finding, Log, ReferenceWalk
from qcowlib.storage.base import Storage
from qcowlib.units import ceil_div

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NamedTuple
else:
    from qcowlib.records import NamedTuple


__all__ = [
    "Comparison",
    "Report",
    "SnapshotTable",
    "check",
    "compare",
    "copied_finding",
    "read_header",
    "read_snapshots",
]

_COMPLETE_EXTRA: Final = 16


class Report:
    """What a check found; the counts have the names of qemu-img's JSON output.

    ``findings`` are in qemu-img's order, ``suppressed`` how many more there
    were.  ``failure`` is the errno of a check that could not be finished (the
    counts then mean nothing), else 0.  After a repair ``repairs`` holds what
    the repair said, and everything else is the check made after it.
    """

    __slots__ = (
        "allocated_clusters",
        "check_errors",
        "compressed_clusters",
        "corruptions",
        "corruptions_fixed",
        "failure",
        "findings",
        "fragmented_clusters",
        "image_end_offset",
        "leaks",
        "leaks_fixed",
        "repairs",
        "suppressed",
        "total_clusters",
    )

    def __init__(self) -> None:
        self.check_errors = 0
        self.corruptions = 0
        self.leaks = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.image_end_offset = 0
        self.total_clusters = 0
        self.allocated_clusters = 0
        self.fragmented_clusters = 0
        self.compressed_clusters = 0
        self.failure = 0
        self.suppressed = 0
        self.findings: Sequence[Finding] = ()
        self.repairs: Sequence[Finding] = ()

    def __repr__(self) -> str:
        return (
            f"<Report corruptions={self.corruptions} leaks={self.leaks} check_errors={self.check_errors}"
            f" failure={self.failure}>"
        )

    @property
    def clean(self) -> bool:
        """Nothing is wrong."""
        return self.exit_status == 0

    @property
    def exit_status(self) -> int:
        """qemu-img's exit status: 0 clean, 1 the check failed, 2 corruptions, 3 leaks only."""
        if self.failure or self.check_errors:
            return 1
        return 2 if self.corruptions else 3 if self.leaks else 0


class SnapshotTable(NamedTuple):
    """The snapshot table as it was read; ``size`` is its length in bytes.

    ``corruptions`` counts what a repair has to rewrite the table for,
    ``failure`` is an errno if it cannot be read.
    """

    entries: Sequence[SnapshotEntry] = ()
    size: int = 0
    corruptions: int = 0
    failure: int = 0


def read_header(storage: Storage, *, writable: bool = False) -> Header:
    """Return the header of the image in *storage*, let through as a check needs it.

    Raises: FormatError, UnsupportedFeature for what cannot be opened.
    """
    size = storage.size
    first = bytearray(min(HEADER_READ, size))
    storage.read_into(0, [first])
    wanted = min(header_read_size(bytes(first)), size)
    if wanted > len(first):
        first = bytearray(wanted)
        storage.read_into(0, [first])
    return Header.parse(bytes(first), size, path=storage.name, writable=writable, repair=True)


def _parse_table(storage: Storage, header: Header, count: int, fix: bool) -> list[SnapshotEntry]:
    """Read the table in growing pieces: its length is known only at its end."""
    available = storage.size - header.snapshots_offset
    length = min(available, 1 << 16)
    while True:
        data = bytearray(max(length, 0))
        if data:
            storage.read_into(header.snapshots_offset, [data])
        try:
            return parse_snapshots(memoryview(data), count, complete=length >= available, repair=fix, path=storage.name)
        except ShortTable as short:
            length = min(available, max(short.needed, 2 * length, 4096), 2 * MAX_SNAPSHOT_TABLE)


def read_snapshots(storage: Storage, header: Header, log: Log, fix: bool = False) -> SnapshotTable:
    """Read the snapshot table and tell what is wrong with it; *fix* drops what is too much."""
    count = header.nb_snapshots
    corruptions = 0
    if count > MAX_SNAPSHOTS and fix:
        text = f"Discarding {count - MAX_SNAPSHOTS} overhanging snapshots"
        log.add(Finding("snapshot", "corruption", text, header.snapshots_offset, "header"))
        corruptions += count - MAX_SNAPSHOTS
        count = MAX_SNAPSHOTS
    if count > MAX_SNAPSHOTS:
        _snapshot_error(log, "ERROR snapshot table too large")
        text = f"You can force-remove all {count - MAX_SNAPSHOTS} overhanging snapshots with qemu-img check -r all"
        log.add(Finding("snapshot", "note", text))
        return SnapshotTable(failure=errno.EFBIG)
    if header.snapshots_offset % header.cluster_size or header.snapshots_offset >> 62:
        _snapshot_error(log, "ERROR snapshot table offset invalid")
        return SnapshotTable(failure=errno.EINVAL)
    try:
        entries = _parse_table(storage, header, count, fix)
    except FormatError as error:
        _snapshot_error(log, f"ERROR failed to read the snapshot table: {error.message}")
        if error.hint:
            log.add(Finding("snapshot", "note", error.hint))
        return SnapshotTable(failure=errno.EFBIG if "too big" in error.message else errno.EINVAL)
    corruptions += _too_much_extra(entries, log)
    if len(entries) < count:
        text = f"Discarding {count - len(entries)} overhanging snapshots (snapshot table is too big)"
        log.add(Finding("snapshot", "corruption", text, header.snapshots_offset, "snapshot table"))
        corruptions += count - len(entries)
    if header.version >= 3:
        for index, entry in enumerate(entries):
            if entry.extra_size < _COMPLETE_EXTRA:
                corruptions += 1
                text = f"{'Repairing' if fix else 'ERROR'} snapshot table entry {index} is incomplete"
                log.add(Finding("snapshot", "corruption", text, header.snapshots_offset, "snapshot table"))
    return SnapshotTable(entries, snapshot_table_size(entries), corruptions)


def _too_much_extra(entries: Sequence[SnapshotEntry], log: Log) -> int:
    found = 0
    for index, entry in enumerate(entries):
        if entry.extra_size > MAX_SNAPSHOT_EXTRA:
            found += 1
            amount = f"{entry.extra_size} > {MAX_SNAPSHOT_EXTRA}"
            text = f"Discarding too much extra metadata in snapshot table entry {index} ({amount})"
            log.add(Finding("snapshot", "corruption", text, None, f"snapshot table entry {index}"))
    return found


def _snapshot_error(log: Log, text: str) -> None:
    log.add(Finding("snapshot", "error", text, None, "header", True))


class Comparison(NamedTuple):
    """Counted against stored refcounts.

    ``missing`` tells that something in use has refcount 0, so that no
    allocation may be trusted and the whole structure is to be rebuilt.
    ``mismatches`` are ``(cluster, stored, counted)``; stored is ``None`` where
    the refcount block cannot be read.
    """

    leaks: int
    corruptions: int
    unreadable: int
    missing: bool
    highest: int
    mismatches: Sequence[tuple[int, int | None, int]]

    @property
    def total(self) -> int:
        """How many clusters differ."""
        return self.leaks + self.corruptions + self.unreadable


def compare(walk: ReferenceWalk, log: Log, *, marking: bool = False) -> Comparison:
    """Compare refcounts by cluster number and tell each difference.

    *marking* words the finding about an unusable block as a writer does.
    """
    result = Comparison(*walk.counts.compare(max(log.room, 1)))
    bits = walk.header.cluster_bits
    told_unreadable = False
    for cluster, stored, counted in result.mismatches:
        place = cluster << bits
        if stored is None:
            if not told_unreadable:
                told_unreadable = _tell_unaligned(walk, log, cluster, marking)
            text = f"Can't get refcount for cluster {cluster}: Input/output error"
            log.add(Finding("unreadable", "error", text, place))
        elif stored < counted:
            text = f"ERROR cluster {cluster} refcount={stored} reference={counted}"
            log.add(Finding("refcount", "corruption", text, place))
        else:
            text = f"Leaked cluster {cluster} refcount={stored} reference={counted}"
            log.add(Finding("leak", "leak", text, place))
    log.suppressed += result.total - len(result.mismatches)
    return result


def _tell_unaligned(walk: ReferenceWalk, log: Log, cluster: int, marking: bool) -> bool:
    """Say once why a block cannot be read; False if its place is not the reason."""
    index = cluster >> (walk.header.cluster_bits + 3 - walk.header.refcount_order)
    offset = walk.refcount_table[index] >> 9 << 9
    if offset % walk.header.cluster_size == 0:
        return False
    where = f"Refblock offset {offset:#x} unaligned (reftable index: {f'{index:#x}' if index else 0})"
    if marking:
        text = f"qcow2: Marking image as corrupt: {where}; further corruption events will be suppressed"
    else:
        text = f"qcow2: Image is corrupt: {where}; further non-fatal corruption events will be suppressed"
    log.add(Finding("unreadable", "note", text, offset, "refcount table"))
    return True


def copied_finding(table: int | None, index: int, entry: int, refcount: int, *, repaired: bool = False) -> Finding:
    """Return the finding about one COPIED flag; *table* is ``None`` for the L1 itself."""
    word = "Repairing" if repaired else "ERROR"
    if table is None:
        text = f"{word} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
        return Finding("copied", "corruption", text, entry & 0x00FF_FFFF_FFFF_FE00, f"active L1 entry {index}")
    text = f"{word} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"
    return Finding("copied", "corruption", text, entry & 0x00FF_FFFF_FFFF_FE00, f"L2 at {table:#x}")


def fill_statistics(report: Report, walk: ReferenceWalk, highest: int) -> None:
    """Take the figures that are no findings from *walk*."""
    header = walk.header
    report.total_clusters = ceil_div(header.virtual_size, header.cluster_size)
    report.allocated_clusters = walk.counts.allocated
    report.fragmented_clusters = walk.counts.fragmented
    report.compressed_clusters = walk.counts.compressed
    report.image_end_offset = (highest + 1) << header.cluster_bits


def check(storage: Storage, *, limit: int = DEFAULT_LIMIT) -> Report:
    """Check the image in *storage* and return the report; nothing is written.

    At most *limit* findings are kept.  An external data file is not needed:
    what lies in it is not counted.
    Raises: FormatError, UnsupportedFeature if it cannot be opened at all,
    StorageError if it cannot be read.
    """
    header = read_header(storage)
    report = Report()
    log = Log(limit)
    table = read_snapshots(storage, header, log)
    report.corruptions = table.corruptions
    report.failure = table.failure
    if table.failure:
        report.check_errors = 1
    else:
        _check_references(report, ReferenceWalk(storage, header, table.entries, table.size, limit), log)
    report.findings = log.findings
    report.suppressed = log.suppressed
    return report


def _check_references(report: Report, walk: ReferenceWalk, log: Log) -> None:
    walk.load_refcounts()
    walk.count()
    if walk.must_trace:
        walk.trace(log)
    log.extend(walk.tail)
    report.corruptions += walk.corruptions
    if walk.failure:
        report.failure = walk.failure
        return
    found = compare(walk, log)
    report.leaks += found.leaks
    copied = walk.counts.copied_errors
    if copied and found.unreadable:
        # A table whose own count cannot be read is passed over; the counting pass does not know that.
        copied = sum(1 for _ in walk.copied_mismatches())
    report.corruptions += found.corruptions + copied
    report.check_errors += found.unreadable
    if copied:
        for mismatch in walk.copied_mismatches():
            if log.room <= 0:
                break
            log.add(copied_finding(*mismatch))
        told = sum(finding.kind == "copied" for finding in log.findings)
        log.suppressed += copied - told
    fill_statistics(report, walk, found.highest)
