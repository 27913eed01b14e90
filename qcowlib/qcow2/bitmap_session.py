# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Persistent dirty bitmaps of an image open for writing: recording changes, and changing bitmaps.

Before the first change of guest data every enabled bitmap is flagged in use,
durably: only flags change, each inside one sector, so a cut leaves some of
them flagged, and none is wrong yet.  What changes then is kept in memory, one
record for all bitmaps of a granularity.  Saving (at close, and before anything
is done to a bitmap):

======= ==================================================================
PREPARE pages with new bits at new places, new tables, a new directory
        without the flags, refcounts                               barrier
PUBLISH the bitmaps extension of the header (:mod:`.header_update`) barrier
RECLAIM what the old directory alone used
======= ==================================================================

Pages without new bits stay where they are.  A disabled bitmap is only touched
when the size changes, so it survives a cut that an enabled one does not.

Invariants: no reader ever trusts a bitmap that lacks a bit of what was
written since it was enabled (the flag is durable first, and goes with the bits
in one write); I5 and I1 as above; I10: autoclear bit 0 is set exactly while
there is a directory that this module keeps.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from qcowlib.driver import DATA, Bitmap
from qcowlib.errors import CorruptImage, UnsupportedFeature, UsageError, printable
from qcowlib.native import bitmap_merge, bitmap_set
from qcowlib.ondisk import (
    AUTOCLEAR_BITMAPS,
    MAX_BITMAPS,
    BitmapEntry,
    BitmapsExtension,
    bitmap_table_entries,
    pack_bitmap_directory,
)
from qcowlib.qcow2.bitmap import (
    ALL_ONES,
    AUTO,
    IN_USE,
    Pages,
    Table,
    dirty_ranges,
    find_bitmap,
    granularity_bits,
    new_entry,
    usable,
)
from qcowlib.qcow2.directories import read_bitmaps
from qcowlib.qcow2.ordering import Mutex
from qcowlib.units import MiB, ceil_div

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.qcow2.write import Writer

__all__ = ["BitmapSession", "session_of"]

_BATCH = 1 * MiB
#: Pages that records may have to hold in memory: as many as the largest single bitmap has.
_MAX_PAGES = 1 << 20

Range = tuple[int, int]


class BitmapSession:
    """The bitmaps of one image open for writing; one object, made by :func:`session_of`."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.image = writer.image
        self.path = writer.image.storage.name
        #: As on storage, but for the in-use flags that this session set.
        self.entries: list[BitmapEntry] = []
        self._loaded = False
        #: Names of the bitmaps that this session flagged.
        self._flagged: set[bytes] = set()
        #: Granularity bits -> what changed since the flags were set.
        self._records: dict[int, Pages] = {}
        self._size = 0
        self._too_fine = False
        self._mutex = Mutex(self.image.runtime)

    # -- recording -------------------------------------------------------------

    async def load(self) -> None:
        """Read the directory; called before the first change of the session."""
        if self._loaded:
            return
        image = self.image
        self.entries = await image.runtime.io(read_bitmaps, image.storage, image.header)
        self._size = image.header.virtual_size
        extension = image.header.bitmaps
        if self.entries and extension is not None:
            image.cmap.guard(extension.directory_offset, extension.directory_size)
            for entry in self.entries:
                image.cmap.guard(entry.table_offset, 8 * entry.table_size)
        self._loaded = True
        self._set_recording()

    def _set_recording(self) -> None:
        """Record changes (which closes the compiled lane) exactly while a bitmap is enabled."""
        widths = {entry.granularity_bits for entry in self.entries if entry.auto and not entry.in_use}
        bits = self.image.header.cluster_bits
        pages = sum(bitmap_table_entries(self._size, width, bits) for width in widths)
        self._too_fine = pages > _MAX_PAGES
        self._records = {width: self._records.get(width) or Pages(width, bits) for width in widths}
        hooks = self.image.on_change
        if self._records and self.changed not in hooks:
            hooks.append(self.changed)
        elif not self._records and self.changed in hooks:
            hooks.remove(self.changed)

    def changed(self, offset: int, length: int) -> None:
        """Guest bytes are about to change; the flags are durable already."""
        for record in self._records.values():
            record.add(offset, length)

    async def begin(self, *, every: bool = False) -> None:
        """Flag the enabled bitmaps (or every one) in use, durably, unless that is done."""
        if not every and (self._flagged or not self._records):
            return
        if self._too_fine:
            raise UnsupportedFeature(
                "the enabled bitmaps are too fine to be kept current", path=self.path, hint="Disable or remove some."
            )
        async with self._mutex:
            wanted = {e.name for e in self.entries if not e.in_use and (every or e.auto)}
            if not wanted <= self._flagged:
                flagged = [e._replace(flags=e.flags | IN_USE) if e.name in wanted else e for e in self.entries]
                await self._rewrite_flags(flagged)
                self._flagged |= wanted

    async def _rewrite_flags(self, entries: list[BitmapEntry]) -> None:
        """Write the directory where it lies: nothing but flags may differ, each is inside one sector."""
        extension = self.image.header.bitmaps
        if extension is None:
            raise CorruptImage("the bitmap directory is gone", path=self.path)
        await self.image.changing.rewrite([(extension.directory_offset, pack_bitmap_directory(entries))])
        await self.image.changing.barrier()

    async def begin_resize(self) -> None:
        """Before the size changes: refuse where a bitmap cannot follow, else flag every one."""
        await self.load()
        for entry in self.entries:
            usable(entry, self.path)
        await self.begin(every=True)

    # -- saving ----------------------------------------------------------------

    async def save(self) -> None:
        """Write what was recorded, fit tables to the size, and take the flags away; nobody else is writing."""
        size = self.image.header.virtual_size
        if not self._flagged:
            self._size = size
            return
        if size > self._size:
            # Space may come back that held something when the bitmap began: what grew counts as changed.
            self.changed(self._size, size - self._size)
        saved: list[BitmapEntry] = []
        async with _Space(self) as space:
            for entry in self.entries:
                if entry.name in self._flagged:
                    record = self._records.get(entry.granularity_bits) if entry.auto else None
                    entry = await self._fold(space, entry, record)
                saved.append(entry)
            if saved == self.entries:
                await self._rewrite_flags(saved)
            else:
                await self._publish(space, saved)
        self._flagged.clear()
        self._records.clear()
        self._size = size
        self._set_recording()

    async def _fold(self, space: _Space, entry: BitmapEntry, pages: Pages | None) -> BitmapEntry:
        """Return *entry* with the bits of *pages* too, and a table as the size wants it; writes to new places only."""
        image = self.image
        header = image.header
        count = bitmap_table_entries(header.virtual_size, entry.granularity_bits, header.cluster_bits)
        table = await image.runtime.io(Table, image.storage, header, entry)
        for index in range(count, len(table)):
            space.drop(table[index])
        table.resize(count)
        touched = {} if pages is None else {index: page for index, page in pages.pages.items() if index < count}
        last = self._trim(entry, count)
        if header.virtual_size < self._size and last and count and count - 1 not in touched:
            touched[count - 1] = bytearray()
        altered = count != entry.table_size or entry.table_offset == 0
        for index in sorted(touched):
            more = touched[index]
            old = await image.runtime.io(table.page, index)
            if old is None:
                continue
            page = bytearray(old) if more is not None else bytearray(b"\xff") * len(old)
            if more:
                bitmap_merge(page, more)
            if last and index == count - 1:
                bitmap_set(page, 8 * len(page) - last, last, False)
            if page != old:
                altered = True
                space.drop(table[index])
                table[index] = 0
                if any(page):
                    await space.page(table, index, page)
        await space.end_pages()
        if not altered:
            return entry
        space.drop_range(entry.table_offset, 8 * entry.table_size)
        place = await space.store(bytes(table.data))
        return entry._replace(table_offset=place, table_size=count)

    def _trim(self, entry: BitmapEntry, count: int) -> int:
        """How many bits at the end of *count* pages stand for nothing."""
        header = self.image.header
        return (count * 8 << header.cluster_bits) - ceil_div(header.virtual_size, entry.granularity)

    async def _publish(self, space: _Space, entries: list[BitmapEntry]) -> None:
        """Switch to a new directory of *entries*; what *space* dropped is released."""
        image = self.image
        header, changing = image.header, image.changing
        old, old_autoclear = header.bitmaps, header.autoclear_features
        extension = None
        if entries:
            directory = pack_bitmap_directory(entries)
            place = await space.store(directory)
            extension = BitmapsExtension(len(entries), len(directory), place)
        # Invariant: I1, I2 (all that the new directory reaches, and its counts, are durable first).
        await changing.commit(final=True)
        if old is not None and header.bitmaps_valid:
            space.drop_range(old.directory_offset, old.directory_size)
        header.bitmaps = extension
        header.autoclear_features &= ~AUTOCLEAR_BITMAPS
        if extension is not None:
            header.autoclear_features |= AUTOCLEAR_BITMAPS
        try:
            await changing.replace_header()
        except BaseException:
            header.bitmaps, header.autoclear_features = old, old_autoclear
            raise
        self.entries = entries
        space.published()
        await changing.commit(final=True)
        # What was released must be counted on storage too.
        await changing.commit(final=True)

    # -- changing bitmaps ------------------------------------------------------

    @asynccontextmanager
    async def _structural(self) -> AsyncIterator[_Space]:
        """Everything saved and nobody writing; what the body takes goes back if it fails."""
        image = self.image
        await image.start_writing()
        await self.writer.quiesce()
        try:
            await self.load()
            await image.changing.commit(final=True)
            await self.save()
            async with _Space(self) as space:
                yield space
        finally:
            self._set_recording()
            self.writer.resume()

    def _find(self, name: str) -> BitmapEntry:
        return usable(find_bitmap(self.entries, name, self.path), self.path)

    def _with(self, entry: BitmapEntry) -> list[BitmapEntry]:
        return [entry if other.name == entry.name else other for other in self.entries]

    def _new(self, name: str, granularity: int | None, flags: int) -> BitmapEntry:
        # Source: qemu looks at the granularity before it looks for the name.
        if granularity is not None:
            granularity_bits(granularity)
        if any(entry.name == name.encode(errors="surrogateescape") for entry in self.entries):
            raise UsageError(f"Bitmap already exists: {printable(name)}", path=self.path)
        entry = new_entry(self.image.header, name, granularity, flags, self.path)
        if len(self.entries) >= MAX_BITMAPS:
            refused = f"Can't make bitmap '{printable(name)}' persistent in '{self.path}': "
            raise UsageError(refused + "Maximum number of persistent bitmaps is already reached", path=self.path)
        return entry

    async def add(self, name: str, granularity: int | None, *, disabled: bool) -> None:
        """Make an empty bitmap."""
        async with self._structural() as space:
            entry = self._new(name, granularity, 0 if disabled else AUTO)
            entries = [
                await self._moved(space, other) if other.auto and not other.in_use else other for other in self.entries
            ]
            await self._publish(space, [*entries, await self._fold(space, entry, None)])

    async def _moved(self, space: _Space, entry: BitmapEntry) -> BitmapEntry:
        """Return *entry* with its table at a new place.

        Source: qemu stores enabled bitmaps anew then, and files are to be as long as its.
        """
        image = self.image
        table = await image.runtime.io(Table, image.storage, image.header, entry)
        space.drop_range(entry.table_offset, 8 * entry.table_size)
        return entry._replace(table_offset=await space.store(bytes(table.data)))

    async def remove(self, name: str) -> None:
        """Delete a bitmap, an inconsistent one too."""
        async with self._structural() as space:
            entry = find_bitmap(self.entries, name, self.path)
            await self._drop(space, entry)
            await self._publish(space, [other for other in self.entries if other is not entry])

    async def remove_all(self) -> None:
        """Delete every bitmap."""
        async with self._structural() as space:
            for entry in self.entries:
                await self._drop(space, entry)
            if self.image.header.bitmaps is not None:
                await self._publish(space, [])

    async def _drop(self, space: _Space, entry: BitmapEntry) -> None:
        image = self.image
        space.drop_range(entry.table_offset, 8 * entry.table_size)
        try:
            table = await image.runtime.io(Table, image.storage, image.header, entry)
            values = [table[index] for index in range(len(table))]
        except CorruptImage:
            # Whatever it meant stays counted: leaked, for a repair to find.
            return
        for value in values:
            space.drop(value)

    async def clear(self, *names: str) -> None:
        """Forget what bitmaps recorded, all by one switch of the directory."""
        async with self._structural() as space:
            emptied = {}
            for entry in [self._find(name) for name in dict.fromkeys(names)]:
                await self._drop(space, entry)
                emptied[entry.name] = await self._fold(space, entry._replace(table_offset=0), None)
            await self._publish(space, [emptied.get(entry.name, entry) for entry in self.entries])

    async def replace(self, name: str, by: str) -> None:
        """Delete bitmap *name* and give its name to bitmap *by*, by one switch of the directory."""
        async with self._structural() as space:
            entry, heir = find_bitmap(self.entries, name, self.path), self._find(by)
            if entry is heir:
                raise UsageError("a bitmap cannot take its own place", path=self.path)
            await self._drop(space, entry)
            renamed = [heir._replace(name=entry.name) if other is heir else other for other in self.entries]
            await self._publish(space, [other for other in renamed if other is not entry])

    async def enable(self, name: str, enabled: bool) -> None:
        """Start or stop recording."""
        async with self._structural():
            entry = self._find(name)
            if entry.auto == enabled:
                return
            entries = self._with(entry._replace(flags=entry.flags ^ AUTO))
            if enabled:
                # Whatever of this reaches storage, from now on changes are recorded.
                self.entries = entries
            await self._rewrite_flags(entries)
            self.entries = entries

    async def merge_from(self, target: str, source: str, other: tuple[int, Iterator[Range]] | None) -> None:
        """Set in *target* what is set in bitmap *source* of this image, or what *other* (its size, ranges) yields."""
        image = self.image
        async with self._structural() as space:
            entry = self._find(target)
            if other is None:
                ranges = iter(dirty_ranges(image.storage, image.header, self._find(source)))
            else:
                size, ranges = other
                if size != image.size:
                    raise UsageError(
                        f"Bitmaps are of different sizes (destination size is {image.size}, "
                        f"source size is {size}) and can't be merged",
                        path=self.path,
                    )
            merged = await self._fold(space, entry, await self._pages(entry, ranges))
            if merged is not entry:
                await self._publish(space, self._with(merged))

    async def _pages(self, entry: BitmapEntry, ranges: Iterator[Range]) -> Pages:
        pages = Pages(entry.granularity_bits, self.image.header.cluster_bits)
        await self.image.runtime.io(_collect, pages, ranges)
        return pages

    async def add_filled(self, bitmaps: list[tuple[Bitmap, Iterator[Range]]], *, skip_broken: bool) -> list[str]:
        """Add bitmaps with what the iterators yield, by one switch; returns the inconsistent ones left out."""
        broken = [bitmap.name for bitmap, _ in bitmaps if bitmap.inconsistent]
        if broken and not skip_broken:
            raise UsageError(
                f"Cannot copy inconsistent bitmap '{printable(broken[0])}'",
                path=self.path,
                hint="Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
            )
        async with self._structural() as space:
            added = list(self.entries)
            for bitmap, ranges in bitmaps:
                if not bitmap.inconsistent:
                    entry = self._new(bitmap.name, bitmap.granularity, AUTO if bitmap.enabled else 0)
                    added.append(await self._fold(space, entry, await self._pages(entry, ranges)))
            if len(added) != len(self.entries):
                await self._publish(space, added)
        return broken

    # -- looking ---------------------------------------------------------------

    async def listed(self) -> list[BitmapEntry]:
        """The bitmaps as they will be when the session ends."""
        await self.load()
        return self.entries

    def recorded(self, entry: BitmapEntry) -> Pages | None:
        """What an enabled bitmap has recorded since the last save."""
        return self._records.get(entry.granularity_bits) if entry.auto else None


class _Space:
    """Clusters taken and dropped by one change: given back if it fails, released once it is published."""

    def __init__(self, session: BitmapSession) -> None:
        self.image = session.image
        self._taken: list[tuple[int, int]] = []
        self._dropped: list[tuple[int, int]] = []
        self._pages: list[tuple[Table, int, bytearray]] = []

    async def __aenter__(self) -> _Space:
        return self

    async def __aexit__(self, *_: object) -> None:
        for place, count in self._taken:
            self.image.cmap.unguard(place, count * self.image.cluster_size)
            await self.image.allocation.release(place, count)

    def published(self) -> None:
        """What was taken is reachable now, what was dropped is not."""
        image = self.image
        self._taken.clear()
        for place, length in self._dropped:
            image.changing.freed.add(DATA, place, length, place)
        self._dropped.clear()

    def drop(self, value: int) -> None:
        """The page of a table entry is not used any more."""
        if value > ALL_ONES and not self.image.cmap.guarded_in(value, self.image.cluster_size):
            self._dropped.append((value, self.image.cluster_size))

    def drop_range(self, offset: int, length: int) -> None:
        """A table or directory is not used any more."""
        if offset and length:
            size = self.image.cluster_size
            self._dropped.append((offset, ceil_div(length, size) * size))

    async def store(self, data: bytes) -> int:
        """Write a table or directory at a new place, and return it."""
        image = self.image
        count = ceil_div(len(data), image.cluster_size)
        place, _, _ = await image.allocation.clusters(count, contiguous=True)
        self._taken.append((place, count))
        image.cmap.guard(place, len(data))
        await image.runtime.io(image.storage.write, place, [data])
        return place

    async def page(self, table: Table, index: int, page: bytearray) -> None:
        """Have a page written at a new place, several by one call."""
        self._pages.append((table, index, page))
        if len(self._pages) * self.image.cluster_size >= _BATCH:
            await self.end_pages()

    async def end_pages(self) -> None:
        """Write the pages that wait."""
        image = self.image
        while self._pages:
            place, count, _ = await image.allocation.clusters(len(self._pages))
            self._taken.append((place, count))
            await image.runtime.io(image.storage.write, place, [page for _, _, page in self._pages[:count]])
            for number, (table, index, _) in enumerate(self._pages[:count]):
                table[index] = place + number * image.cluster_size
            del self._pages[:count]


def _collect(pages: Pages, ranges: Iterator[Range]) -> None:
    for offset, length in ranges:
        pages.add(offset, length)


def session_of(writer: Writer) -> BitmapSession:
    """Return the session of an image open for writing, made and attached by the first call."""
    tracker = writer.image.tracker
    if isinstance(tracker, BitmapSession):
        return tracker
    session = BitmapSession(writer)
    writer.image.tracker = session
    return session
