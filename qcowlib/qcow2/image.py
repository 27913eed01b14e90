# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One open QCOW2 image (one layer): life cycle, and the parts that work on it.

Opening reads the header and the L1 table, nothing else; refcounts and L2
tables come when they are needed.

Invariants: an unknown incompatible bit refuses the image, an unknown autoclear
bit is cleared durably before the first write (I10); a session that wrote ends
with every change committed, or with its error raised.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from qcowlib.errors import CorruptImage, FormatError, ReadOnly, UnsupportedFeature
from qcowlib.native import Refcounts
from qcowlib.ondisk import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_MASK,
    CRYPT_NONE,
    MAX_L1_BYTES,
    Header,
    SnapshotEntry,
    snapshot_table_size,
)
from qcowlib.qcow2.directories import check_snapshot_l1, read_header, read_snapshots
from qcowlib.qcow2.grow import Allocator
from qcowlib.qcow2.ordering import Mutex, Writeback
from qcowlib.qcow2.read import Cipher, LayerReader
from qcowlib.qcow2.refcounts import RefcountStore
from qcowlib.qcow2.tables import CACHE_BYTES, L2Tables, make_map
from qcowlib.storage.wrapper import guest_side
from qcowlib.units import ceil_div

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from qcowlib.native import ChainMap, ClusterMap
    from qcowlib.runtime import Runtime
    from qcowlib.storage.base import Storage
else:
    Protocol = object

__all__ = ["Qcow2Image", "Tracker"]


def _allocated_bytes(storage: Storage) -> int | None:
    fileno = getattr(storage, "fileno", None)
    if fileno is None or getattr(storage, "is_block", False):
        return None
    return os.fstat(fileno()).st_blocks * 512


def count_used(storage: Storage, header: Header, clusters: int, enough: int) -> int:
    """Count host clusters below *clusters* with a refcount (blocking), up to about *enough*."""
    table = bytearray(header.refcount_table_clusters * header.cluster_size)
    storage.read_into(header.refcount_table_offset, [table])
    counts = Refcounts(header.cluster_bits, header.refcount_order, table, 4)
    block = bytearray(header.cluster_size)
    used = 0
    for index in range(min(counts.table_size, ceil_div(clusters, counts.per_block))):
        offset = counts.block_offset(index)
        if offset and offset % header.cluster_size == 0 and offset < storage.size:
            storage.read_into(offset, [block])
            used += counts.used_in(block)
            if used >= enough:
                break
    return used


class Tracker(Protocol):
    """Who keeps the persistent bitmaps of an image open for writing (:mod:`.bitmap_session`)."""

    async def load(self) -> None:
        """Before the first change of the session."""

    async def begin(self, *, every: bool = False) -> None:
        """Before guest data changes, each time: quick, except for the first."""

    async def begin_resize(self) -> None:
        """Before the size changes; raises UsageError where a bitmap does not allow it."""

    async def save(self) -> None:
        """After the size changed, and at the end; nobody is writing."""


class Qcow2Image:
    """A layer; its coroutines run on *runtime*, its blocking parts anywhere.

    *data* is the external data file, where the image has one.
    """

    format = "qcow2"

    def __init__(
        self,
        runtime: Runtime,
        storage: Storage,
        header: Header,
        *,
        data: Storage | None = None,
        cipher: Cipher | None = None,
        writable: bool = False,
        cache_bytes: int = CACHE_BYTES,
        snapshot: SnapshotEntry | None = None,
    ) -> None:
        self.runtime = runtime
        self.storage = storage
        self.data = data if data is not None else guest_side(storage)
        self.header = header
        self.writable = writable
        if header.has_data_file and data is None:
            raise FormatError("'data-file' is required for this image", path=storage.name)
        if header.crypt_method != CRYPT_NONE and cipher is None:
            raise UnsupportedFeature("the image is encrypted and no key was given", path=storage.name)
        if writable and header.is_dirty:
            raise FormatError("the refcounts are stale (dirty bit): repair them before writing", path=storage.name)
        self.reader = LayerReader(storage, self.data, header, cipher)
        self.cmap: ClusterMap = make_map(header, cache_bytes)
        self.tables = L2Tables(runtime, storage, header, self.cmap)
        self.snapshot = snapshot
        self._load_l1(snapshot)
        self.chain_map: ChainMap | None = None
        self._preallocated: bool | None = None
        #: Called before guest bytes [offset, offset + length) change (dirty bitmaps).
        self.on_change: list[Callable[[int, int], None]] = []
        #: Keeps persistent bitmaps current; without one, enabled bitmaps are given up by the first write.
        self.tracker: Tracker | None = None
        #: Lines of the repair that opening began with.
        self.repairs: tuple[str, ...] = ()
        self._started = False
        self._start_mutex = Mutex(runtime)
        self.writeback: Writeback | None = None
        self.allocator: Allocator | None = None

    # -- opening ---------------------------------------------------------------

    def _load_l1(self, snapshot: SnapshotEntry | None) -> None:
        offset = self.header.l1_table_offset if snapshot is None else snapshot.l1_table_offset
        count = self.header.l1_size if snapshot is None else snapshot.l1_size
        if snapshot is not None:
            check_snapshot_l1(snapshot, self.header.cluster_size, self.storage)
        length = 8 * count
        size = self.storage.size
        if length > MAX_L1_BYTES or (length and (offset % self.header.cluster_size or offset + length > size)):
            raise CorruptImage("Could not read L1 table: Input/output error", path=self.storage.name)
        table = bytearray(length)
        if length:
            self.storage.read_into(offset, [table])
        self.cmap.load_l1(table)

    def looks_preallocated(self) -> bool:
        """Whether data clusters may be holes of the file (blocking).

        Source: qemu takes a file for preallocated when clearly more clusters
        are counted than the file system has given it; the image's own file,
        where the data lie in another one too.
        """
        allocated = _allocated_bytes(self.storage)
        if allocated is None:
            return False
        clusters = ceil_div(self.storage.size, self.header.cluster_size)
        given = allocated >> self.header.cluster_bits
        threshold = max(given * 10 // 9, given + 2)
        if clusters < threshold:
            return False
        if self._preallocated is None or self.writable:
            self._preallocated = count_used(self.storage, self.header, clusters, threshold) >= threshold
        return self._preallocated

    @property
    def size(self) -> int:
        """Guest bytes."""
        if self.snapshot is not None and self.snapshot.disk_size is not None:
            return self.snapshot.disk_size
        return self.header.virtual_size

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster."""
        return self.header.cluster_size

    @property
    def plain(self) -> bool:
        """Whether DATA runs are stored as the guest sees them."""
        return self.reader.cipher is None

    @property
    def refs(self) -> Refcounts:
        """Refcounts of an image open for writing."""
        return self.changing.refs

    @property
    def changing(self) -> Writeback:
        """The write-back; raises ReadOnly unless open for writing and started."""
        if self.writeback is None:
            raise ReadOnly("the image is open for reading", path=self.storage.name)
        self.writeback.check()
        return self.writeback

    @property
    def allocation(self) -> Allocator:
        """The allocator; raises ReadOnly unless open for writing and started."""
        if self.allocator is None:
            raise ReadOnly("the image is open for reading", path=self.storage.name)
        return self.allocator

    def read_run(self, kind: int, host: int, guest: int, length: int, view: memoryview) -> None:
        """Fill *view* from one DATA or COMPRESSED run (blocking, thread-safe)."""
        self.reader.read_run(kind, host, guest, length, view)

    def read_packed(self, clusters: list[tuple[int, int, int]], view: memoryview) -> None:
        """Fill whole clusters of *view*: ``(compressed entry, guest offset, place)`` each (blocking, thread-safe)."""
        self.reader.read_packed(clusters, view)

    async def start_writing(self) -> None:
        """Before the first change: load refcounts, clear bits that our writes make untrue (I10)."""
        if self._started:
            return
        if not self.writable or self.snapshot is not None:
            raise ReadOnly("the image is open for reading", path=self.storage.name)
        async with self._start_mutex:
            if self._started:
                return
            header = self.header
            table = bytearray(header.refcount_table_clusters * header.cluster_size)
            if header.refcount_table_offset >= self.storage.size:
                raise CorruptImage("the refcount table lies past the end of the file", path=self.storage.name)
            await self.runtime.io(self.storage.read_into, header.refcount_table_offset, [table])
            store = RefcountStore(self.runtime, self.storage, header, table)
            writeback = Writeback(self.runtime, self.storage, self.data, header, self.cmap, store)
            writeback.chain_map = self.chain_map
            writeback.on_release.append(self.reader.forget)
            await self.runtime.io(self._guard_metadata, store)
            if self.tracker is not None:
                await self.tracker.load()
            await self._clear_autoclear(writeback)
            self.tables.make_room = writeback.commit
            self.tables.generation = lambda: store.generation
            self.writeback = writeback
            self.allocator = Allocator(writeback)
            self._started = True

    def _guard_metadata(self, store: RefcountStore) -> None:
        """Tell the map where metadata lies, so that guest data never goes there (I9); blocking."""
        header, cmap = self.header, self.cmap
        cmap.guard(0, header.cluster_size)
        cmap.guard(header.l1_table_offset, 8 * header.l1_size)
        cmap.guard(header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size)
        for index in range(store.refs.table_size):
            if store.refs.block_offset(index):
                cmap.guard(store.refs.block_offset(index), header.cluster_size)
        cmap.guard_tables()
        entries = read_snapshots(self.storage, header)
        cmap.guard(header.snapshots_offset, snapshot_table_size(entries))
        for entry in entries:
            cmap.guard(entry.l1_table_offset, min(8 * entry.l1_size, MAX_L1_BYTES))

    async def _clear_autoclear(self, writeback: Writeback) -> None:
        header = self.header
        keep = header.autoclear_features & AUTOCLEAR_MASK
        if keep & AUTOCLEAR_BITMAPS and self.tracker is None:
            keep &= ~AUTOCLEAR_BITMAPS
        if keep != header.autoclear_features:
            header.autoclear_features = keep
            await self.runtime.io(self.storage.write, 88, [header.pack_fields()[88:96]])
            await writeback.barrier()

    def reload(self) -> None:
        """Start again from what is on storage (blocking): it was repaired, or has another version or refcount width."""
        fresh = read_header(self.storage, writable=self.writable)
        for name in Header.__slots__:
            setattr(self.header, name, getattr(fresh, name))
        if self.cmap.old_version != (self.header.version == 2):
            self.cmap = self.tables.cmap = make_map(self.header, self.cmap.slot_count << self.header.cluster_bits)
            if self.chain_map is not None:
                self.chain_map.replace_map(0, self.cmap)
        self._load_l1(self.snapshot)
        self.reader.forget()
        self.writeback = self.allocator = None
        self._started = False

    # -- ending ----------------------------------------------------------------

    async def flush(self) -> None:
        """Make every finished change durable."""
        if self.writeback is not None:
            await self.writeback.commit()
        elif self.writable:
            await self.runtime.io(self.storage.flush)

    async def finish(self) -> None:
        """Commit everything, postponed refcounts too, and clear the dirty bit."""
        writeback = self.writeback
        if writeback is None:
            return
        writeback.check()
        await writeback.commit(final=True)
        try:
            if self.tracker is not None:
                await self.tracker.save()
        finally:
            # Released space was only taken back in memory: that must reach storage too.
            await writeback.commit(final=True, quiet=self.tracker is None)
        if writeback.mend is not None:
            await writeback.mend()
        if writeback.dirty_tried and writeback.mend is None:
            await writeback.clear_dirty()
