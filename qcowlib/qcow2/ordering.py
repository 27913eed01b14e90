# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The ordered write-back: the only place that writes metadata of an open image.

A commit takes a *cut*, a copy of everything that changed, and sends it in
ranks, with a barrier (flush of the data file, then of the image) between:

======= ===================================================== =================
PREPARE new tables, refcount increments                       barrier
GROW    refcount table entries of new blocks, its new place   barrier, if used
PUBLISH entries in reachable L2 tables, L1, header fields     barrier
RECLAIM references that nothing on storage uses any more      in memory; rides on
        are taken away                                        the next PREPARE
======= ===================================================== =================

Guest data was written before its entry came into the cut, so the first barrier
makes it durable before anything points at it.  What changes while a cut is
under way belongs to the next one, since the cut is a copy.

Invariants kept here: I1, I2, I5, I8 (the ranks), I4 (RECLAIM only after the
last barrier and after every older pin), L5 (after a failed barrier nothing is
published by this handle any more).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from qcowlib.errors import CorruptImage, Error, StorageError
from qcowlib.native import RunList
from qcowlib.ondisk import INCOMPAT_CORRUPT, INCOMPAT_DIRTY, OFFSET_MASK
from qcowlib.qcow2.header_update import write_header
from qcowlib.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NamedTuple

    from qcowlib.native import ChainMap, ClusterMap
    from qcowlib.ondisk import Header
    from qcowlib.qcow2.refcounts import RefcountStore
    from qcowlib.runtime import Runtime
    from qcowlib.storage.base import Storage
else:
    from qcowlib.records import NamedTuple

__all__ = ["GROW", "PREPARE", "PUBLISH", "Mutex", "Writeback"]

PREPARE: Final = 0
GROW: Final = 1
PUBLISH: Final = 2

_HEADER_FIELDS: Final = 104

Write = tuple[int, bytes]


class Mutex:
    """One coroutine at a time; fairness is not promised."""

    __slots__ = ("_held", "_queue")

    def __init__(self, runtime: Runtime) -> None:
        self._held = False
        self._queue = runtime.queue()

    async def __aenter__(self) -> None:
        while self._held:
            await self._queue.wait()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        self._queue.wake_all()


class _Cut(NamedTuple):
    ranks: tuple[list[Write], list[Write], list[Write]]
    undo: list[Callable[[], None]]
    freed: RunList
    unmapped: RunList
    quiet: bool = False

    @property
    def empty(self) -> bool:
        return not any(self.ranks)


def _put_first(queue: list[Write], kept: list[Write]) -> None:
    queue[:0] = kept


class Writeback:
    """What changed in memory and must reach storage, for one image open for writing."""

    def __init__(
        self,
        runtime: Runtime,
        storage: Storage,
        data: Storage,
        header: Header,
        cmap: ClusterMap,
        store: RefcountStore,
    ) -> None:
        self.runtime = runtime
        self.storage = storage
        self.data = data
        self.header = header
        self.cmap = cmap
        self.store = store
        self.refs = store.refs
        self.chain_map: ChainMap | None = None
        self.unit = max(512, storage.align.offset)
        #: Space whose references go after the next commit; *unmapped* is given back to the file system too.
        self.freed = RunList()
        self.unmapped = RunList()
        self.failed: Error | None = None
        #: Metadata that contradicts itself, met while writing: see :meth:`mark_corrupt`.
        self.damage: CorruptImage | None = None
        self.lazy = header.lazy_refcounts
        #: The dirty bit is durable; with *dirty_tried* it may be on storage.
        self.dirty_set = self.dirty_tried = False
        #: A failed change left COPIED flags that do not fit the counts.  Awaited before the next change of that
        #: kind and at the end; until it succeeds the dirty bit stays.
        self.mend: Callable[[], Awaitable[None]] | None = None
        #: Counts the batches of released clusters: what was free to append to may not be ours any more.
        self.releases = 0
        self.on_release: list[Callable[[], None]] = []
        self._queued: tuple[list[Write], list[Write], list[Write]] = ([], [], [])
        self._fields: list[tuple[int, int]] = []
        self._new_l1 = False
        self._new_refcount_table = False
        self._limbo: list[tuple[RunList, RunList]] = []
        self._old_limbo: list[tuple[RunList, RunList]] = []
        self._mutex = Mutex(runtime)
        #: Something was written here after the last barrier.
        self._unsynced = False

    # -- queueing --------------------------------------------------------------

    def queue(self, rank: int, offset: int, data: bytes) -> None:
        """Have *data* written at *offset* with the next commit, in *rank*."""
        self._queued[rank].append((offset, data))

    def queue_fields(self, start: int, end: int) -> None:
        """Publish header bytes *start* to *end*, inside the first sector, as they are when the next commit begins.

        Whoever takes a failed change of the header back needs no more than
        that: the next commit writes the old fields again.
        """
        self._fields.append((start, end))

    def move_l1(self) -> None:
        """L1 was given a new place in the header: written whole there, then published (I5)."""
        self._new_l1 = True

    def move_refcount_table(self) -> None:
        """The refcount table was given a new place in the header."""
        self._new_refcount_table = True

    def check(self) -> None:
        """Raise if an earlier barrier failed: nothing may be published any more (L5)."""
        if self.failed is not None:
            raise self.failed

    def check_overlap(self, offset: int, length: int) -> None:
        """Refuse to use host bytes that hold metadata (I9).  Raises CorruptImage with qemu's text."""
        if self.cmap.guarded_in(offset, length):
            name = self._owner(offset, length)
            text = f"Preventing invalid write on metadata (overlaps with {name})"
            self.damage = CorruptImage(text, path=self.storage.name)
            raise self.damage

    def _owner(self, offset: int, length: int) -> str:
        header = self.header
        places = (
            ("qcow2_header", 0, header.cluster_size),
            ("active L1 table", header.l1_table_offset, 8 * header.l1_size),
            ("refcount table", header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size),
        )
        for name, start, size in places:
            if size and start < offset + length and offset < round_up(start + size, header.cluster_size):
                return name
        for index in range(self.refs.table_size):
            if offset <= self.refs.block_offset(index) < offset + length:
                return "refcount block"
        return "active L2 table"

    # -- commit ----------------------------------------------------------------

    async def commit(self, *, final: bool = False, quiet: bool = False) -> None:
        """Make everything changed so far durable, in order.

        With *final* postponed refcounts are written too.  *quiet*: nobody wrote
        guest data since the last barrier, so that none is needed for nothing.
        Raises StorageError; after a failed write the changes stay queued, after
        a failed barrier every later commit fails.
        """
        async with self._mutex:
            self.check()
            cut = self._collect(final)._replace(quiet=quiet)
            try:
                # Looked at in the cut: the hit lane may change tables at any time.
                if self.lazy and not self.dirty_set and not cut.empty:
                    await self.set_dirty()
                await self._send(cut)
            except BaseException:
                for undo in reversed(cut.undo):
                    undo()
                raise
            finally:
                self.cmap.written()
                self.refs.written()
                self.store.generation += 1
            await self._reclaim(cut)

    async def set_dirty(self) -> None:
        """Set the dirty bit durably: refcounts on storage may be stale from now on."""
        self.dirty_tried = True
        self.header.incompatible_features |= INCOMPAT_DIRTY
        try:
            await self._write(self.storage, 72, self.header.pack_fields()[72:80])
            await self.barrier()
        except BaseException:
            self.header.incompatible_features &= ~INCOMPAT_DIRTY
            raise
        self.dirty_set = True

    async def clear_dirty(self) -> None:
        """Clear the dirty bit: everything counted is on storage."""
        self.header.incompatible_features &= ~INCOMPAT_DIRTY
        await self._write(self.storage, 72, self.header.pack_fields()[72:80])
        await self.barrier()
        self.dirty_set = self.dirty_tried = False

    async def write_fields(self, start: int, end: int) -> None:
        """Write header bytes *start* to *end*, inside the first sector, durably; a failure is final."""
        try:
            await self._write(self.storage, start, self.header.pack_fields()[start:end])
        except StorageError as error:
            self._fail(error)
            raise
        await self.barrier()

    async def replace_header(self) -> None:
        """Write the whole header area, durably; everything else is committed and nobody is writing.

        A failure is final: the fields in memory and on storage may differ.
        """
        async with self._mutex:
            self.check()
            try:
                await self.runtime.io(write_header, self.storage, self.header)
            except StorageError as error:
                self._fail(error)
                raise

    async def mark_corrupt(self, damage: CorruptImage) -> None:
        """Set the corrupt bit durably (version 3) and publish nothing more: only a repair may write now.

        Source: qemu does the same when a write meets metadata that cannot be right.
        """
        self.failed = damage
        if self.chain_map is not None:
            self.chain_map.fast_write = self.chain_map.fast_allocate = False
        if self.header.version >= 3:
            self.header.incompatible_features |= INCOMPAT_CORRUPT
            await self._write(self.storage, 72, self.header.pack_fields()[72:80])
            await self.runtime.io(self.storage.flush)

    async def rewrite(self, writes: list[Write]) -> None:
        """Rewrite whole tables in place now: only flags that the dirty bit excuses may differ.

        Durable with the next barrier: that of a commit comes before what it publishes.
        """
        await self._write_all(writes)

    def _collect(self, final: bool) -> _Cut:
        ranks: tuple[list[Write], list[Write], list[Write]] = ([], [], [])
        undo: list[Callable[[], None]] = []
        self._collect_tables(ranks, undo)
        if not self.lazy or final:
            self._collect_refcounts(ranks, undo)
        for rank, queued in enumerate(self._queued):
            ranks[rank].extend(queued)
            undo.append(partial(_put_first, queued, list(queued)))
            queued.clear()
        fields, packed = list(self._fields), self.header.pack_fields()
        ranks[PUBLISH].extend((start, packed[start:end]) for start, end in fields)
        undo.append(lambda: self._fields.extend(fields))
        self._fields.clear()
        self._join_header(ranks[PUBLISH])
        freed, unmapped = self.freed, self.unmapped
        self.freed, self.unmapped = RunList(), RunList()
        undo.append(lambda: self._put_back(freed, unmapped))
        return _Cut(ranks, undo, freed, unmapped)

    def _join_header(self, publish: list[Write]) -> None:
        """Make the header fields of a cut one write inside the first sector: all of them change, or none (I5)."""
        fields = [write for write in publish if write[0] < _HEADER_FIELDS]
        if len(fields) > 1:
            start = min(offset for offset, _ in fields)
            end = max(offset + len(data) for offset, data in fields)
            publish[:] = [write for write in publish if write[0] >= _HEADER_FIELDS]
            publish.append((start, self.header.pack_fields()[start:end]))

    def _put_back(self, freed: RunList, unmapped: RunList) -> None:
        for kept, now in ((freed, self.freed), (unmapped, self.unmapped)):
            for run in now:
                kept.add(*run)
        self.freed, self.unmapped = freed, unmapped

    def _collect_tables(
        self, ranks: tuple[list[Write], list[Write], list[Write]], undo: list[Callable[[], None]]
    ) -> None:
        cmap = self.cmap
        for index, _, _, fresh in cmap.dirty():
            place = cmap.l1_entry(index) & OFFSET_MASK
            start, data = cmap.take(index, fresh, self.unit)
            ranks[PREPARE if fresh else PUBLISH].append((place + start, data))
            undo.append(partial(cmap.mark, index, start, start + len(data), fresh))
        offset = self.header.l1_table_offset
        if self._new_l1:
            ranks[PREPARE].append((offset, cmap.l1_bytes(0, cmap.l1_size)))
            ranks[PUBLISH].append((36, self.header.pack_fields()[36:48]))
            self._new_l1 = False
            undo.append(lambda: setattr(self, "_new_l1", True))
        elif cmap.l1_dirty_lo != cmap.l1_dirty_hi:
            per = self.unit // 8
            first = cmap.l1_dirty_lo // per * per
            last = min(-(-cmap.l1_dirty_hi // per) * per, cmap.l1_size)
            ranks[PUBLISH].append((offset + 8 * first, cmap.l1_bytes(first, last)))
            undo.append(lambda: cmap.l1_mark(first, last))
        cmap.l1_clean()

    def _collect_refcounts(
        self, ranks: tuple[list[Write], list[Write], list[Write]], undo: list[Callable[[], None]]
    ) -> None:
        refs = self.refs
        for index, _, _ in refs.dirty():
            place = refs.block_offset(index)
            start, data = refs.take(index, self.unit)
            ranks[PREPARE].append((place + start, data))
            undo.append(partial(refs.mark, index, start, start + len(data)))
        offset = self.header.refcount_table_offset
        if self._new_refcount_table:
            ranks[PREPARE].append((offset, refs.table_bytes(0, refs.table_size)))
            ranks[GROW].append((48, self.header.pack_fields()[48:60]))
            self._new_refcount_table = False
            undo.append(lambda: setattr(self, "_new_refcount_table", True))
        elif refs.table_dirty_lo != refs.table_dirty_hi:
            per = self.unit // 8
            first = refs.table_dirty_lo // per * per
            last = min(-(-refs.table_dirty_hi // per) * per, refs.table_size)
            ranks[GROW].append((offset + 8 * first, refs.table_bytes(first, last)))
            undo.append(lambda: refs.table_mark(first, last))
        refs.table_clean()

    async def _send(self, cut: _Cut) -> None:
        prepare, grow, publish = cut.ranks
        await self._write_all(prepare)
        if self._unsynced or not cut.quiet:
            await self.barrier()
        if grow:
            await self._write_all(grow)
            await self.barrier()
        if publish:
            await self._write_all(publish)
            await self.barrier()

    async def _write_all(self, writes: list[Write]) -> None:
        """Write in file order, adjacent pieces in one call."""
        writes.sort(key=lambda write: write[0])
        self._unsynced |= bool(writes)
        index = 0
        while index < len(writes):
            start, data = writes[index]
            buffers, end = [data], start + len(data)
            index += 1
            while index < len(writes) and writes[index][0] == end and len(buffers) < 256:
                buffers.append(writes[index][1])
                end += len(writes[index][1])
                index += 1
            await self.runtime.io(self.storage.write, start, buffers)

    async def _write(self, storage: Storage, offset: int, data: bytes) -> None:
        self._unsynced = True
        await self.runtime.io(storage.write, offset, [data])

    async def barrier(self) -> None:
        """Everything written before is durable when this returns; a failure is final (L5)."""
        try:
            if self.header.has_data_file:
                await self.runtime.io(self.data.flush)
            await self.runtime.io(self.storage.flush)
        except StorageError as error:
            self._fail(error)
            raise
        self._unsynced = False

    def _fail(self, error: Error) -> None:
        self.failed = error
        if self.chain_map is not None:
            self.chain_map.fast_write = self.chain_map.fast_allocate = False

    # -- reclaim ---------------------------------------------------------------

    async def _reclaim(self, cut: _Cut) -> None:
        """Release what the cut unmapped, once no operation uses the old offsets (I4)."""
        if len(cut.freed) or len(cut.unmapped):
            self._limbo.append((cut.freed, cut.unmapped))
        if self.chain_map is not None and self.chain_map.pinned:
            if not self.chain_map.advance():
                return
            ready, self._old_limbo, self._limbo = self._old_limbo, self._limbo, []
        else:
            ready, self._old_limbo, self._limbo = self._old_limbo + self._limbo, [], []
        try:
            while ready:
                freed, unmapped = ready.pop()
                await self._punch(unmapped)
                freed.extend(unmapped)
                await self._release(freed)
        finally:
            self._limbo.extend(ready)

    async def _punch(self, unmapped: RunList, count: int = 1) -> None:
        """Give space back to the file system while its count still keeps it from being reused (I4)."""
        if not len(unmapped):
            return
        plain = RunList()
        plain.extend(unmapped)
        # In host order: what was scattered in the guest often lies together in the file.
        plain.sort_by_host()
        try:
            for _, _, length, host, _ in await self.store.counted(plain, count):
                length = min(length, self.storage.size - host)
                if length > 0:
                    await self.runtime.io(self.storage.discard, host, length)
        except StorageError:
            # A hint that failed costs space only; the guest's request was carried out.
            return

    async def punch_free(self, gone: RunList) -> None:
        """Give back those clusters of *gone* that are free by now; nobody else may be changing the image."""
        await self._punch(gone, 0)

    async def _release(self, freed: RunList) -> None:
        """Drop a reference on every run, never twice; what an error leaves over waits for the next commit."""
        self.releases += 1
        for forget in self.on_release:
            forget()
        emptied = RunList()
        freed.sort_by_host()
        try:
            await self.store.release_runs(freed, emptied)
        finally:
            self.cmap.unguard_runs(emptied)
            if len(freed):
                self._limbo.append((freed, RunList()))
