# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots of an open image: list, create, apply, delete.

Each change runs with the gate closed and everything committed, in passes over
whole tables, and is published by one write inside the header sector:

======== ===============================================================
create   COPIED cleared in the active tables; references taken for all that
         L1 reaches, L1 copied, new snapshot table; header
apply    COPIED cleared in the snapshot's tables; references taken for all
         that it reaches, new L1 at a new place; header; references of the
         old world released
delete   new snapshot table; header; references released; COPIED set where
         one is left
======== ===============================================================

The gate being closed, commits after the first are quiet: no barrier where
nothing was written.  Between two passes flags and counts disagree, so version 3 has the dirty bit
set durably around all of it; version 2 shows the harmless direction only (a
clear flag where the count is one).

Invariants: I5 (tables are replaced, the switch is one header write), I7 (a
snapshot's mapping is never changed; only flags that nobody may trust there), I1.
"""

from __future__ import annotations

import struct

from qcowlib.driver import DATA
from qcowlib.errors import CorruptImage, Error, UnsupportedFeature, UsageError, printable
from qcowlib.native import RunList, l2_clear_copied, l2_references
from qcowlib.ondisk import (
    COPIED,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    SnapshotEntry,
    next_snapshot_id,
    pack_snapshots,
)
from qcowlib.qcow2.directories import check_snapshot_l1, read_snapshots
from qcowlib.qcow2.ordering import PREPARE
from qcowlib.qcow2.refcounts import AtMaximum
from qcowlib.units import MiB, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from qcowlib.qcow2.image import Qcow2Image
    from qcowlib.qcow2.write import Writer

__all__ = ["apply_snapshot", "create_snapshot", "delete_snapshot", "find_snapshot"]

_MAX_NAME = 255
_BATCH = 4 * MiB
_L1_FIELDS = (36, 48)
_SIZE_FIELD = (24, 32)
_SNAPSHOT_FIELDS = (60, 72)


def find_snapshot(entries: list[SnapshotEntry], wanted: str, *, by_id: bool = True) -> SnapshotEntry | None:
    """Return the entry with id *wanted*, else the first of that name."""
    key = wanted.encode(errors="surrogateescape")
    if by_id:
        for entry in entries:
            if entry.id == key:
                return entry
    for entry in entries:
        if entry.name == key:
            return entry
    return None


async def create_snapshot(writer: Writer, name: str, *, as_qemu: bool = False) -> SnapshotEntry:
    """Take a snapshot called *name* (cut to 255 bytes); returns its entry.

    *as_qemu*: where a count has no room for one more, leave the copy of L1
    allocated, as qemu does: a leak, which scripts made for it may look for.
    """
    change = await _Change.begin(writer)
    try:
        return await change.create(name, as_qemu)
    except BaseException:
        await change.recover()
        raise
    finally:
        change.end()


async def apply_snapshot(writer: Writer, wanted: str, refresh: Callable[[], None]) -> None:
    """Make the guest see snapshot *wanted* (id, else name), its size too; *refresh* tells the chain."""
    change = await _Change.begin(writer)
    try:
        await change.apply(wanted, refresh)
    except BaseException:
        await change.recover()
        raise
    finally:
        change.end()


async def delete_snapshot(writer: Writer, wanted: str, *, by_id: bool = True) -> None:
    """Delete snapshot *wanted* (id unless *by_id* is false, else the first of that name)."""
    change = await _Change.begin(writer)
    try:
        await change.delete(wanted, by_id=by_id)
    except BaseException:
        await change.recover()
        raise
    finally:
        change.end()


class _Change:
    """One structural change of an image that nobody else is writing to."""

    def __init__(self, writer: Writer, entries: list[SnapshotEntry]) -> None:
        self.writer = writer
        self.image: Qcow2Image = writer.image
        self.entries = entries
        self._touched = False

    @classmethod
    async def begin(cls, writer: Writer) -> _Change:
        image = writer.image
        if image.header.has_data_file:
            raise UnsupportedFeature("an image with an external data file has no internal snapshots", path=_name(image))
        await image.start_writing()
        await writer.quiesce()
        try:
            entries = await image.runtime.io(read_snapshots, image.storage, image.header)
            await image.changing.commit(final=True)
            # What that released must be counted on storage before tables are walked.
            await image.changing.commit(final=True, quiet=True)
            if image.changing.mend is not None:
                await image.changing.mend()
        except BaseException:
            writer.resume()
            raise
        return cls(writer, entries)

    def end(self) -> None:
        self.writer.resume()

    # -- the three changes -----------------------------------------------------

    async def create(self, name: str, as_qemu: bool) -> SnapshotEntry:
        image = self.image
        if len(self.entries) >= MAX_SNAPSHOTS:
            raise UsageError(f"an image has at most {MAX_SNAPSHOTS} snapshots", path=_name(image))
        await self._protect()
        l1 = self._active_l1()
        await self._clear_flags(l1)
        count = image.cmap.l1_size
        place = await self._space(8 * count)
        await self._reference(l1, place, leak=as_qemu)
        now = image.runtime.wall_ns()
        entry = SnapshotEntry(
            place,
            count,
            next_snapshot_id(self.entries),
            name.encode(errors="surrogateescape")[:_MAX_NAME],
            now // 10**9 & 0xFFFFFFFF,
            now % 10**9 // 1000 * 1000,
            disk_size=image.header.size,
            icount=0,
        )
        if count:
            image.changing.queue(PREPARE, place, _pack_l1(l1))
        try:
            await self._publish_table([*self.entries, entry])
        except BaseException:
            await self._take_back(l1, place, 8 * count)
            raise
        await self._unprotect()
        return entry

    async def apply(self, wanted: str, refresh: Callable[[], None]) -> None:
        image = self.image
        header, cmap = image.header, image.cmap
        entry = find_snapshot(self.entries, wanted)
        if entry is None:
            raise UsageError(f"Can't find snapshot '{printable(wanted)}'", path=_name(image))
        size = header.size if entry.disk_size is None else entry.disk_size
        old_l1 = self._active_l1()
        old_world = await self._references(old_l1)
        old = (header.l1_table_offset, header.l1_size, header.size)
        new_l1 = await self._snapshot_l1(entry)
        if image.tracker is not None:
            await (image.tracker.begin_resize() if size != header.size else image.tracker.begin())
        await self._protect()
        await self._clear_flags(new_l1)
        new_l1 = [word & ~COPIED for word in new_l1]
        new_l1 += [0] * (header.l1_size - len(new_l1))
        place = await self._space(8 * len(new_l1))
        await self._reference(new_l1, place)
        for changed in image.on_change:
            changed(0, max(header.size, size))
        # One moment for readers and storage alike: the new L1, then its place and size in one header write.
        header.l1_table_offset, header.l1_size, header.size = place, len(new_l1), size
        cmap.load_l1(_pack_l1(new_l1))
        cmap.guard_tables()
        image.reader.forget()
        refresh()
        try:
            image.changing.move_l1()
            image.changing.queue_fields(*_L1_FIELDS)
            image.changing.queue_fields(*_SIZE_FIELD)
            await image.changing.commit(final=True, quiet=True)
        except BaseException:
            header.l1_table_offset, header.l1_size, header.size = old
            cmap.load_l1(_pack_l1(old_l1))
            refresh()
            await self._take_back(new_l1, place, 8 * len(new_l1))
            raise
        self._release(old_world)
        self._free(old[0], 8 * old[1])
        await self._unprotect()
        if image.tracker is not None and size != old[2]:
            await image.tracker.save()

    async def delete(self, wanted: str, *, by_id: bool) -> None:
        image = self.image
        entry = find_snapshot(self.entries, wanted, by_id=by_id)
        if entry is None:
            raise UsageError("snapshot not found", path=_name(image))
        l1 = await self._snapshot_l1(entry)
        references = await self._references(l1)
        await self._protect()
        await self._publish_table([other for other in self.entries if other is not entry])
        self._release(references)
        self._free(entry.l1_table_offset, 8 * entry.l1_size)
        await image.changing.commit(final=True, quiet=True)
        await image.changing.commit(final=True, quiet=True)
        await self._set_flags()
        await self._unprotect()

    # -- steps -----------------------------------------------------------------

    async def _protect(self) -> None:
        """Say durably that flags and counts may disagree from now on."""
        self._touched = True
        if self.image.header.version >= 3 and not self.image.changing.dirty_set:
            await self.image.changing.set_dirty()

    async def _unprotect(self) -> None:
        changing = self.image.changing
        await changing.commit(final=True, quiet=True)
        await changing.commit(final=True, quiet=True)
        if changing.dirty_set and not changing.lazy:
            await changing.clear_dirty()

    async def recover(self) -> None:
        """After a failure: what was released goes, flags are right again; else tried again before the next change."""
        if not self._touched:
            return
        changing = self.image.changing
        changing.mend = self.recover
        try:
            await changing.commit(final=True, quiet=True)
            await changing.commit(final=True, quiet=True)
            await self._set_flags()
            await self._unprotect()
            changing.mend = None
        except Error:
            return

    async def _space(self, length: int) -> int:
        """Clusters for *length* bytes of table; 0 for an empty one."""
        if length == 0:
            return 0
        clusters = round_up(length, self.image.cluster_size) // self.image.cluster_size
        place, _, _ = await self.image.allocation.clusters(clusters, contiguous=True)
        self.image.cmap.guard(place, length)
        return place

    def _free(self, offset: int, length: int) -> None:
        if length:
            length = round_up(length, self.image.cluster_size)
            self.image.changing.freed.add(DATA, offset, length, offset)

    async def _publish_table(self, entries: list[SnapshotEntry]) -> None:
        """Write a new snapshot table at a new place and switch to it."""
        image = self.image
        header = image.header
        data = pack_snapshots(entries, header.size)
        place = await self._space(len(data))
        if data:
            image.changing.queue(PREPARE, place, data)
        old = (header.snapshots_offset, header.nb_snapshots)
        old_length = len(pack_snapshots(self.entries, header.size))
        header.snapshots_offset, header.nb_snapshots = place, len(entries)
        try:
            image.changing.queue_fields(*_SNAPSHOT_FIELDS)
            await image.changing.commit(final=True, quiet=True)
        except BaseException:
            header.snapshots_offset, header.nb_snapshots = old
            self._free(place, len(data))
            raise
        self._free(old[0], old_length if old[1] else 0)

    def _active_l1(self) -> list[int]:
        return [self.image.cmap.l1_entry(index) for index in range(self.image.cmap.l1_size)]

    async def _snapshot_l1(self, entry: SnapshotEntry) -> list[int]:
        data = await self.image.runtime.io(read_snapshot_l1, self.image, entry)
        return list(struct.unpack(f">{len(data) // 8}Q", data))

    async def _tables(self, l1: list[int]) -> AsyncIterator[tuple[int, bytearray]]:
        """Yield (offset, bytes) of every L2 table that *l1* names, in file order, read in large pieces."""
        image = self.image
        size = image.cluster_size
        offsets = sorted({word & OFFSET_MASK for word in l1 if word & OFFSET_MASK})
        index = 0
        while index < len(offsets):
            start = offsets[index]
            if start % size or start + size > round_up(image.storage.size, size):
                raise CorruptImage(f"L2 table offset {start:#x} is unaligned or outside the file", path=_name(image))
            count = 1
            while (
                index + count < len(offsets)
                and count * size < _BATCH
                and offsets[index + count] == start + count * size
            ):
                count += 1
            data = bytearray(count * size)
            await image.runtime.io(image.storage.read_into, start, [data])
            for number in range(count):
                yield start + number * size, data[number * size : (number + 1) * size]
            index += count

    async def _clear_flags(self, l1: list[int]) -> None:
        """Clear COPIED in every table that *l1* reaches, and in the active L1, durably."""
        image = self.image
        extended = image.header.extended_l2
        writes: list[tuple[int, bytes]] = []
        async for offset, table in self._tables(l1):
            if l2_clear_copied(table, extended):
                writes.append((offset, bytes(table)))
                if len(writes) * image.cluster_size >= _BATCH:
                    await image.changing.rewrite(writes)
                    writes = []
        await image.changing.rewrite(writes)
        shared = {word & OFFSET_MASK for word in l1}
        for index, word in enumerate(self._active_l1()):
            if word & COPIED and word & OFFSET_MASK in shared:
                image.cmap.set_l1(index, word & ~COPIED)
        image.cmap.forget()
        await image.changing.commit(final=True, quiet=True)
        l1[:] = [word & ~COPIED for word in l1]

    async def _reference(self, l1: list[int], place: int, *, leak: bool = False) -> None:
        """Take one reference on everything that *l1* reaches; on failure on nothing, and *place* is released.

        With *leak* it is not when a count has no room.
        """
        store = self.image.changing.store
        done = RunList()
        try:
            async for runs in self._reached(l1):
                await store.reference_runs(runs)
                done.extend(runs)
        except BaseException as error:
            await store.release_runs(done, RunList())
            if leak and isinstance(error, AtMaximum):
                self.image.changing.queue(PREPARE, place, _pack_l1(l1))
            else:
                self._free(place, 8 * len(l1))
            raise

    async def _take_back(self, l1: list[int], place: int, length: int) -> None:
        """After a failed publication: release what was taken for it, once the old header fields are durable again.

        If that fails too, what is left are counts that are too high.
        """
        self._free(place, length)
        try:
            self._release(await self._references(l1))
        except Error:
            return

    def _release(self, runs: RunList) -> None:
        """Queue the release of *runs*."""
        self.image.changing.freed.extend(runs)

    async def _references(self, l1: list[int]) -> RunList:
        """Everything that *l1* reaches.  Read before a publication, so that nothing is left to fail behind it."""
        found = RunList()
        async for runs in self._reached(l1):
            found.extend(runs)
        return found

    async def _reached(self, l1: list[int]) -> AsyncIterator[RunList]:
        """Yield what each L2 table below *l1* maps, and the table; once for each time that it is named."""
        image = self.image
        multiple = _multiplicity(l1)
        async for offset, table in self._tables(l1):
            for _ in range(multiple[offset]):
                runs = RunList()
                l2_references(table, image.header.cluster_bits, image.header.extended_l2, runs)
                runs.add(DATA, offset, image.cluster_size, offset)
                yield runs

    async def _set_flags(self) -> None:
        """Set COPIED in the active tables exactly where the count is one."""
        image = self.image
        l1 = self._active_l1()
        writes: list[tuple[int, bytes]] = []
        async for offset, table in self._tables(l1):
            if await self._flag(table, image.header.extended_l2):
                writes.append((offset, bytes(table)))
                if len(writes) * image.cluster_size >= _BATCH:
                    await image.changing.rewrite(writes)
                    writes = []
        await image.changing.rewrite(writes)
        table = bytearray(_pack_l1(l1))
        await self._flag(table, False)
        for index, word in enumerate(l1):
            flagged = int.from_bytes(table[8 * index : 8 * index + 8], "big")
            if flagged != word:
                image.cmap.set_l1(index, flagged)
        image.cmap.forget()

    async def _flag(self, table: bytearray, extended: bool) -> bool:
        store = self.image.changing.store
        before = bytes(table)
        while True:
            # Flags that were set before a block was missing count as well.
            code, value = store.refs.flag_table(table, extended)
            if code == 0:
                return table != before
            await store.load(value)


def read_snapshot_l1(image: Qcow2Image, entry: SnapshotEntry) -> bytes:
    """Read the L1 table of a snapshot (blocking)."""
    check_snapshot_l1(entry, image.cluster_size, image.storage)
    data = bytearray(8 * entry.l1_size)
    image.storage.read_into(entry.l1_table_offset, [data])
    return bytes(data)


def _multiplicity(l1: list[int]) -> dict[int, int]:
    """How often each L2 table is named: more than once only in a damaged image."""
    counts: dict[int, int] = {}
    for word in l1:
        offset = word & OFFSET_MASK
        if offset:
            counts[offset] = counts.get(offset, 0) + 1
    return counts


def _pack_l1(words: list[int]) -> bytes:
    return struct.pack(f">{len(words)}Q", *words)


def _name(image: Qcow2Image) -> str:
    return image.storage.name
