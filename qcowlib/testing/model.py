# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a guest was promised, and whether an image keeps it.

Invariant (I6, I7): after a cut each sector reads its last flushed value or one
written later, whole; a snapshot that was reported made reads as it was made.

Every sector that the model hands out for writing tells its place and version,
so what is found can be classed:

========== ================================================================
CORRUPT    refcounts too low, COPIED on shared clusters, broken pointers
UNREADABLE it does not open, or a sector cannot be read
LOST       a sector is older than its last flushed value
ALIEN      a sector shows what was written to another place
THIRD      a sector shows what was never there
SNAPSHOT   a snapshot is missing, or differs from what it was
STALEFLAG  a COPIED bit is clear though the refcount is one
LEAK       a refcount is too high (allowed after a cut)
========== ================================================================

With the dirty bit set, refcounts and COPIED flags may be anything: whoever
opens the image rebuilds them.  The model works in one thread, on positions of
an :class:`~qcowlib.testing.recorder.OpLog`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from qcowlib.testing.crash import CrashState, Finding
from qcowlib.testing.recorder import OpLog
from qcowlib.testing.reference import ReferenceError, RefImage, reference_check, reference_read

__all__ = ["SECTOR", "VERDICTS", "GuestModel", "tagged"]

SECTOR = 512
VERDICTS = ("CORRUPT", "UNREADABLE", "LOST", "ALIEN", "THIRD", "SNAPSHOT", "STALEFLAG", "LEAK")

_ZERO = 0
_BASE = -1
_FOREVER = 1 << 62
_TAG = struct.Struct(">2sHIQ")


def tagged(sector: int, version: int) -> bytes:
    """Return the 512 bytes that version *version* (from 1) of *sector* has."""
    return _TAG.pack(b"\xa5G", version >> 32 & 0xFFFF, version & 0xFFFFFFFF, sector) * (SECTOR // _TAG.size)


def _parse(data: bytes) -> tuple[int, int] | None:
    """Return (sector, version) of tagged bytes, ``None`` for anything else."""
    magic, high, low, sector = _TAG.unpack_from(data)
    version = high << 32 | low
    return (sector, version) if magic == b"\xa5G" and data == tagged(sector, version) else None


class _Write(NamedTuple):
    """Sector values that a change may leave, issued and completed at log positions.

    ``done`` is ``_FOREVER`` while it runs and for ever if it failed.
    """

    issued: int
    done: int
    values: frozenset[int]


class _Snapshot:
    """``versions`` frozen between the positions ``begun`` and ``deleted``; sure from ``made`` to ``deleting``."""

    def __init__(self, begun: int, versions: list[frozenset[int]]) -> None:
        self.begun = begun
        self.versions = versions
        self.made = self.deleting = self.deleted = _FOREVER


class GuestModel:
    """The guest's view of one image of *size* bytes (a multiple of 512).

    *base* is what it reads before the first write (a backing layer), zeros
    where it ends.  Use :meth:`write`, :meth:`zero`, :meth:`discard`,
    :meth:`flush`, :meth:`snapshot`, :meth:`revert` and :meth:`delete` as
    contexts around the calls of the image.
    """

    def __init__(self, size: int, log: OpLog | None = None, *, base: bytes = b"") -> None:
        self.size = size
        self.log = OpLog() if log is None else log
        self.base = base + bytes(size - len(base))
        count = size // SECTOR
        self._version = 0
        self._writes: list[list[_Write]] = [[_Write(-1, -1, frozenset((_BASE,)))] for _ in range(count)]
        #: (position where it was asked, position where it returned) of successful flushes.
        self._flushes: list[tuple[int, int]] = []
        self._snapshots: dict[str, _Snapshot] = {}
        #: (begin, end) of reverts, which change all sectors at once.
        self._reverts: list[tuple[int, int, list[frozenset[int]]]] = []

    def content(self) -> bytes:
        """Return what a reader sees now.  Of a discarded or failed sector one of the possible values."""
        return b"".join(self._bytes(sector, min(writes[-1].values)) for sector, writes in enumerate(self._writes))

    def _bytes(self, sector: int, version: int) -> bytes:
        if version == _ZERO:
            return bytes(SECTOR)
        if version == _BASE:
            return self.base[sector * SECTOR : (sector + 1) * SECTOR]
        return tagged(sector, version)

    @contextmanager
    def _change(self, offset: int, length: int, values: frozenset[int] | None) -> Iterator[None]:
        """Register a change while the caller makes it; a failed one may have happened in part."""
        sectors = range(offset // SECTOR, (offset + length) // SECTOR)
        # Marks make positions strictly ordered: what a mark follows was complete when it was made.
        issued = self.log.mark(f"guest change {offset}+{length}")
        before = {}
        for sector in sectors:
            writes = self._writes[sector]
            before[sector] = len(writes)
            new = values if values is not None else self._allowed(sector, issued, issued) | {_ZERO}
            writes.append(_Write(issued, _FOREVER, new))
        yield
        done = self.log.position
        for sector in sectors:
            self._writes[sector][before[sector]] = self._writes[sector][before[sector]]._replace(done=done)

    @contextmanager
    def write(self, offset: int, length: int) -> Iterator[bytes]:
        """Give the bytes to write at *offset* (sectors); leaving the context means that the write returned."""
        self._version += 1
        version = self._version
        with self._change(offset, length, frozenset((version,))):
            first = offset // SECTOR
            yield b"".join(tagged(sector, version) for sector in range(first, first + length // SECTOR))

    @contextmanager
    def zero(self, offset: int, length: int) -> Iterator[None]:
        """The range is made zero."""
        with self._change(offset, length, frozenset((_ZERO,))):
            yield

    @contextmanager
    def discard(self, offset: int, length: int) -> Iterator[None]:
        """The range is discarded: afterwards each sector reads as before, or zero."""
        with self._change(offset, length, None):
            yield

    @contextmanager
    def flush(self) -> Iterator[None]:
        """A flush; only if it returns without an error it promises anything."""
        asked = self.log.mark("guest flush")
        yield
        self._flushes.append((asked, self.log.position))

    @contextmanager
    def snapshot(self, name: str) -> Iterator[None]:
        """An internal snapshot of what is there now; made, with the guest data durable, when it returns."""
        asked = self.log.mark(f"snapshot {name}")
        # Of a change that failed anything may be there: all values since the last one that returned.
        versions = [self._allowed(sector, asked, asked) for sector in range(len(self._writes))]
        frozen = self._snapshots[name] = _Snapshot(asked, versions)
        yield
        frozen.made = self.log.position
        self._flushes.append((asked, self.log.position))

    @contextmanager
    def revert(self, name: str) -> Iterator[None]:
        """All sectors go back to snapshot *name*, all or none, durable when it returns."""
        versions = self._snapshots[name].versions
        begin = self.log.mark(f"revert {name}")
        index = len(self._reverts)
        self._reverts.append((begin, _FOREVER, versions))
        for sector, values in enumerate(versions):
            self._writes[sector].append(_Write(begin, _FOREVER, values))
        try:
            yield
        finally:
            # A failed one is over too, with either outcome; what follows is not a part of it.
            end = self.log.position
            self._reverts[index] = (begin, end, versions)
        for sector, writes in enumerate(self._writes):
            writes[-1] = _Write(begin, end, versions[sector])
        self._flushes.append((end, end))

    @contextmanager
    def delete(self, name: str) -> Iterator[None]:
        """Snapshot *name* is deleted."""
        frozen = self._snapshots[name]
        frozen.deleting = self.log.mark(f"delete {name}")
        yield
        frozen.deleted = self.log.position

    def allowed(self, sector: int, position: int) -> frozenset[int]:
        """Return the versions that *sector* may have after a cut at *position* of the log."""
        return self._allowed(sector, position, self._flushed(position))

    def _flushed(self, position: int) -> int:
        """Return when the last flush was asked that had returned at *position*."""
        return max((asked for asked, returned in self._flushes if returned <= position), default=-1)

    def _allowed(self, sector: int, position: int, flushed: int) -> frozenset[int]:
        values: frozenset[int] = frozenset()
        for write in reversed(self._writes[sector]):
            if write.issued <= position:
                values |= write.values
                if write.done <= flushed:
                    break
        return values

    def judge(self, content: bytes, position: int) -> list[Finding]:
        """Class each sector of *content* as read after a cut at *position*; one finding a class."""
        found: dict[str, Finding] = {}
        flushed = self._flushed(position)
        for sector in range(self.size // SECTOR):
            data = content[sector * SECTOR : (sector + 1) * SECTOR]
            allowed = self._allowed(sector, position, flushed)
            if any(data == self._bytes(sector, version) for version in allowed):
                continue
            finding = self._class(sector, data, allowed)
            found.setdefault(finding.verdict, finding)
        if not found:
            found.update(self._judge_reverts(content, position))
        return list(found.values())

    def _class(self, sector: int, data: bytes, allowed: frozenset[int]) -> Finding:
        where = f"sector {sector} allows {sorted(allowed)} but"
        known = _parse(data)
        if known is not None and known[0] != sector:
            return Finding("ALIEN", f"{where} shows version {known[1]} of sector {known[0]}")
        version = known[1] if known is not None else None
        if version is None:
            version = _ZERO if not any(data) else _BASE if data == self._bytes(sector, _BASE) else None
        ever = {value for write in self._writes[sector] for value in write.values}
        if version is not None and (version in ever or version <= 0):
            return Finding("LOST", f"{where} shows the older {version}")
        return Finding("THIRD", f"{where} shows {data[:16].hex()}")

    def _judge_reverts(self, content: bytes, position: int) -> dict[str, Finding]:
        """A cut during a revert must show all of the old state or all of the new one."""
        for begin, end, versions in self._reverts:
            if not begin < position < end:
                continue
            old = new = True
            flushed = self._flushed(begin)
            for sector in range(self.size // SECTOR):
                data = content[sector * SECTOR : (sector + 1) * SECTOR]
                new = new and any(data == self._bytes(sector, version) for version in versions[sector])
                before = self._allowed(sector, begin - 1, flushed)
                old = old and any(data == self._bytes(sector, version) for version in before)
            if not old and not new:
                return {"THIRD": Finding("THIRD", "a cut revert shows old and new sectors together")}
        return {}

    def judge_snapshots(self, image: RefImage, position: int, base: bytes) -> list[Finding]:
        """Compare each snapshot that must or may exist after a cut at *position*."""
        findings = []
        present = {entry.name for entry in image.snapshots}
        for name, frozen in self._snapshots.items():
            if name not in present:
                if frozen.made <= position <= frozen.deleting:
                    findings.append(Finding("SNAPSHOT", f"{name} is missing"))
                continue
            if frozen.begun > position or frozen.deleted <= position:
                findings.append(Finding("SNAPSHOT", f"{name} exists"))
            try:
                content = reference_read(image, backing=base, snapshot=name)
            except ReferenceError as error:
                findings.append(Finding("SNAPSHOT", f"{name} cannot be read: {error}"))
                continue
            for sector, versions in enumerate(frozen.versions):
                data = content[sector * SECTOR : (sector + 1) * SECTOR]
                if not any(data == self._bytes(sector, version) for version in versions):
                    shown = _parse(data) or data[:16].hex()
                    findings.append(
                        Finding("SNAPSHOT", f"{name} sector {sector} shows {shown}, not {sorted(versions)}")
                    )
                    break
        return findings

    def oracle(self, state: CrashState) -> Sequence[Finding]:
        """Judge a crash state of one qcow2 file, or of one and its data file; for :func:`.crash.explore`."""
        data = bytes(state.images[1]) if len(state.images) > 1 else None
        findings = []
        try:
            image = RefImage(bytes(state.images[0]), data)
            findings += _judge_structure(image)
            content = reference_read(image, backing=self.base)
        except ReferenceError as error:
            return [*findings, Finding("UNREADABLE", str(error))]
        seen = {finding.verdict for finding in findings}
        for position in sorted({state.first, state.last}):
            for finding in (*self.judge(content, position), *self.judge_snapshots(image, position, self.base)):
                if finding.verdict not in seen:
                    seen.add(finding.verdict)
                    findings.append(finding)
        return findings


def _judge_structure(image: RefImage) -> list[Finding]:
    result = reference_check(image)
    findings = []
    if result.corrupt:
        findings.append(Finding("CORRUPT", "the corrupt bit is set"))
    if not result.dirty:
        bad = [text for text in result.messages if not text.startswith("leaked")]
        if result.corruptions > result.stale:
            findings.append(Finding("CORRUPT", bad[0]))
        elif result.stale:
            findings.append(Finding("STALEFLAG", bad[0]))
    if result.leaks:
        findings.append(Finding("LEAK", f"{result.leaks} clusters"))
    return findings
