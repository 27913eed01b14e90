# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Writing guest data into one layer: overwrite, allocate with copy-on-write, zero, discard.

A write is cut into pieces of one kind.  In place: the bytes go where they are
mapped.  Otherwise the range is locked, space is taken, head and tail of the
outer clusters are read through the chain and written together with the
payload, and only then the mapping changes in memory; storage learns of it with
the next commit.

Invariants: an entry enters the map after its data was written, never before
(I2); a cluster whose COPIED flag is clear is never changed (I7); what an entry
used before is released through the write-back, never directly (I4).  On any
error the space taken is given back and nothing was mapped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

from qcowlib.driver import DATA
from qcowlib.errors import CorruptImage, OutOfRange, UnsupportedFeature, UsageError
from qcowlib.locks import Gate, RangeLock
from qcowlib.native import RunList
from qcowlib.ondisk import COMPRESSED as COMPRESSED_FLAG
from qcowlib.ondisk import COPIED, CRYPT_LUKS, OFFSET_MASK, pack_compressed
from qcowlib.units import SECTOR, MiB, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from qcowlib.qcow2.image import Qcow2Image

__all__ = ["Writer"]

_NEED: Final = -1
_CORRUPT: Final = -2
_IN_PLACE: Final = 0
_REUSE: Final = 1
_ALLOCATE: Final = 2

#: Data written by one call at most: what an allocation may have to give back.
_PIECE = 32 * MiB
_ZEROS = memoryview(bytes(2 * MiB))

ReadGuest = Callable[[int, memoryview], Awaitable[None]]
ReadsZero = Callable[[int, int], Awaitable[bool]]


class Writer:
    """Changes guest content of the top layer of a chain.

    *read_guest* fills a buffer with what the guest sees; *reads_zero* tells
    whether a guest range is known to read as zeros without reading it.
    """

    def __init__(
        self,
        image: Qcow2Image,
        read_guest: ReadGuest,
        reads_zero: ReadsZero,
        *,
        has_backing: bool,
        punch: bool = True,
        lane: bool = True,
    ) -> None:
        self.image = image
        self.read_guest = read_guest
        self.reads_zero = reads_zero
        self.has_backing = has_backing
        self.punch = punch
        self._lane = lane
        self.ranges = RangeLock(image.runtime)
        self.gate = Gate(image.runtime)

    # -- entry points ----------------------------------------------------------

    async def write(self, offset: int, data: memoryview) -> None:
        """Write *data* at guest *offset*; the caller has checked the bounds."""
        await self._each(offset, len(data), lambda at, most: self._write_piece(at, data[at - offset :][:most]))

    async def write_many(self, pieces: list[tuple[int, memoryview]]) -> None:
        """Write each ``(guest offset, data)``, ascending and apart.

        Whole clusters that need space get it together, and are written by one call.
        """
        image = self.image
        if image.on_change or not image.plain or image.cmap.extended or image.cmap.has_data_file:
            for offset, data in pieces:
                await self.write(offset, data)
        elif pieces:
            start, (last, data) = pieces[0][0], pieces[-1]
            left = deque(pieces)
            await self._each(start, last + len(data) - start, lambda at, _: self._write_next(at, left))

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zeros, giving space back where *unmap* allows."""
        await self._each(offset, length, lambda at, most: self.zero_piece(at, most, unmap))

    async def discard(self, offset: int, length: int) -> None:
        """Forget whole clusters inside the range; they read as zeros, or as below in version 2 without backing."""
        size = self.image.cluster_size
        start = round_up(offset, size)
        end = offset + length
        end = end if end >= self.image.size else round_down(end, size)
        # Source: qemu; its bitmaps record all that was named, also where no cluster is whole.
        if start < end or self.image.tracker is not None:
            await self._each(start, max(end - start, 0), self._discard_piece, named=(offset, length))

    async def _each(
        self,
        offset: int,
        length: int,
        piece: Callable[[int, int], Awaitable[int]],
        *,
        named: tuple[int, int] | None = None,
    ) -> None:
        """Run *piece* over the range under the gate and the range lock; it returns how far it came.

        *named* is the range that counts as changed, where it is a larger one.
        """
        image = self.image
        await image.start_writing()
        await self.gate.enter()
        self._set_lane()
        try:
            if image.tracker is not None:
                await image.tracker.begin()
            size = image.cluster_size
            claim = await self.ranges.acquire(round_down(offset, size), round_up(offset + length, size))
            try:
                if offset + length > round_up(image.size, size):
                    raise OutOfRange("the image was made smaller meanwhile", path=image.storage.name)
                for changed in image.on_change:
                    changed(*(named or (offset, length)))
                end = offset + length
                while offset < end:
                    image.changing.check()
                    offset += await piece(offset, min(end - offset, _PIECE))
            except CorruptImage as error:
                if error is image.changing.damage:
                    await image.changing.mark_corrupt(error)
                raise
            finally:
                self.ranges.release(claim)
        finally:
            self.gate.leave()
            self._set_lane()

    async def quiesce(self) -> None:
        """Let no writer in and wait for those inside; the hit lane is closed too.  Ends with :meth:`resume`."""
        await self.gate.close()
        self._set_lane()

    def resume(self) -> None:
        """Let writers in again."""
        self.gate.open()
        self._set_lane()

    def _set_lane(self) -> None:
        """Open or close the compiled lane for writes that need no engine.

        It overwrites in place while nothing structural happens, and allocates
        while no other writer is inside, since it does not know their ranges.
        It is closed for images whose writes must be seen (bitmaps) or changed
        (encryption) on the way, and beside other writers where these copy what
        is already in place (subclusters) or write what no entry tells (a raw
        data file).
        """
        image = self.image
        lane = image.chain_map
        if lane is None:
            return
        simple = image.plain and not image.on_change and image.writeback is not None and not self.gate.closed
        alone = self.gate.pins == 0
        lane.fast_write = self._lane and (
            simple
            and image.writeback is not None
            and image.writeback.failed is None
            and (alone or not (image.cmap.extended or image.header.data_file_raw))
        )
        lane.fast_allocate = lane.fast_write and alone
        lane.set_refs(image.writeback.refs if image.writeback is not None else None)

    # -- tables ----------------------------------------------------------------

    async def own_table(self, guest: int) -> int:
        """Make the L2 table for *guest* loaded and ours alone; returns guest bytes to the end of its range."""
        image = self.image
        cmap, tables = image.cmap, image.tables
        index = tables.index(guest)
        span = cmap.l2_entries << cmap.cluster_bits
        while True:
            entry = cmap.l1_entry(index)
            if entry & OFFSET_MASK == 0:
                if not cmap.room(index):
                    await tables.room()
                    continue
                place, _, _ = await image.allocation.clusters(1)
                if cmap.l1_entry(index) & OFFSET_MASK or not cmap.make(index):
                    await image.allocation.release(place, 1)
                    continue
                cmap.set_l1(index, place | COPIED)
                cmap.guard(place, image.cluster_size)
            elif not cmap.loaded(index):
                await tables.load(index)
                continue
            elif not entry & COPIED:
                if not cmap.room(index):
                    await tables.room()
                    continue
                place, _, _ = await image.allocation.clusters(1)
                if cmap.l1_entry(index) != entry or not cmap.loaded(index):
                    await image.allocation.release(place, 1)
                    continue
                # The old table stays as it is: a snapshot may own it (I5, I7).
                cmap.set_fresh(index)
                cmap.set_l1(index, place | COPIED)
                cmap.guard(place, image.cluster_size)
                old = entry & OFFSET_MASK
                image.changing.freed.add(DATA, old, image.cluster_size, old)
            elif not cmap.room(index):
                await tables.room()
                continue
            return (index + 1) * span - guest

    # -- data ------------------------------------------------------------------

    async def _write_piece(self, offset: int, data: memoryview) -> int:
        most = min(len(data), await self.own_table(offset))
        action, length, host = self.image.cmap.plan_write(offset, most)
        if action == _NEED:
            return 0
        if action == _CORRUPT:
            self.image.changing.damage = self.image.tables.corruption()
            raise self.image.changing.damage
        data = data[:length]
        if action == _IN_PLACE:
            await self._store(host, offset, [data])
            return length
        if action == _REUSE:
            return await self._write_reuse(offset, data, host)
        return await self._write_allocate(offset, data)

    async def _write_next(self, at: int, left: deque[tuple[int, memoryview]]) -> int:
        """Write the first of the pieces that are *left*, all at or behind *at*; returns how far that came."""
        image = self.image
        together = await self._to_allocate(left)
        if not together:
            offset, data = left.popleft()
            done = await self._write_piece(offset, data)
            if done < len(data):
                left.appendleft((offset + done, data[done:]))
            return offset + done - at
        size = image.cluster_size
        host, count, _ = await image.allocation.clusters(sum(len(data) for _, data in together) // size)
        try:
            together = _first_bytes(together, count * size)
            await self._store(host, together[0][0], [data for _, data in together])
            for offset, data in together:
                await self.own_table(offset)
                part = len(data) // size
                image.cmap.set_data(offset, part, host, offset, offset + len(data), image.changing.freed)
                host, count = host + len(data), count - part
        except BaseException:
            if count:
                await image.allocation.release(host, count)
            raise
        offset = at
        for start, data in together:
            whole = left.popleft()[1]
            offset = start + len(data)
            if len(data) < len(whole):
                left.appendleft((offset, whole[len(data) :]))
        return offset - at

    async def _to_allocate(self, left: deque[tuple[int, memoryview]]) -> list[tuple[int, memoryview]]:
        """The leading pieces that are whole clusters in need of space, cut where their tables end."""
        image, found = self.image, []
        for offset, data in left:
            most = min(len(data), await self.own_table(offset))
            if offset % image.cluster_size or len(data) % image.cluster_size:
                break
            action, length, _ = image.cmap.plan_write(offset, most)
            if action != _ALLOCATE:
                break
            found.append((offset, data[:length]))
            if length < len(data):
                break
        return found

    async def _write_reuse(self, offset: int, data: memoryview, host: int) -> int:
        """Write into clusters that have their own space, but read as zeros or from below there."""
        cmap = self.image.cmap
        size = self.image.cluster_size
        unit = size // 32 if cmap.extended else size
        start, end = round_down(offset, unit), min(round_up(offset + len(data), unit), round_up(self.image.size, size))
        await self._store_with_edges(start, offset, data, end, host - (offset - start), fresh=False)
        await self.own_table(offset)
        first = round_down(offset, size)
        count = (round_up(end, size) - first) // size
        cmap.set_data(first, count, host - (offset - first), start, end, self.image.changing.freed)
        return len(data)

    async def _write_allocate(self, offset: int, data: memoryview) -> int:
        image = self.image
        cmap, size = image.cmap, image.cluster_size
        first = round_down(offset, size)
        wanted = (round_up(offset + len(data), size) - first) // size
        if cmap.has_data_file:
            host, count, fresh = first, wanted, False
        else:
            host, count, fresh = await image.allocation.clusters(wanted)
        data = data[: first + count * size - offset]
        try:
            start, end = self._copied_range(offset, offset + len(data))
            await self._store_with_edges(start, offset, data, end, host + (start - first), fresh=fresh)
            # Other operations may have evicted the table meanwhile.
            await self.own_table(offset)
        except BaseException:
            if not cmap.has_data_file:
                await image.allocation.release(host, count)
            raise
        cmap.set_data(first, count, host, start, end, image.changing.freed)
        return len(data)

    def _copied_range(self, start: int, end: int) -> tuple[int, int]:
        """The guest range that must be valid in new clusters for a write to [start, end)."""
        cmap, size = self.image.cmap, self.image.cluster_size
        first, last = round_down(start, size), round_up(end, size)
        if not cmap.extended:
            return first, last
        unit = size // 32
        # Space that moves (shared or compressed) takes everything it holds along.
        head = first if self._occupied(start) else round_down(start, unit)
        tail = last if self._occupied(end - 1) else round_up(end, unit)
        return head, tail

    def _occupied(self, guest: int) -> bool:
        entry, _ = self.image.cmap.entry(guest)
        return bool(entry & (COMPRESSED_FLAG | OFFSET_MASK))

    async def _store_with_edges(
        self, start: int, offset: int, data: memoryview, end: int, host: int, *, fresh: bool
    ) -> None:
        """Write guest range [start, end) at *host*: *data* at *offset*, around it what the guest sees now."""
        stop = offset + len(data)
        head = await self._edge(start, offset, fresh)
        tail = await self._edge(stop, end, fresh)
        buffers = [part for part in (head, data, tail) if part is not None and len(part)]
        if head is None:
            host += offset - start
            start = offset
        await self._store(host, start, buffers)
        if tail is None and stop < end and self.image.reader.cipher is not None:
            raise CorruptImage("an encrypted cluster was left incomplete", path=self.image.storage.name)

    async def _edge(self, start: int, end: int, fresh: bool) -> memoryview | None:
        """The guest's bytes in [start, end); ``None`` when they are zeros that need not be written."""
        if start == end:
            return None
        encrypted = self.image.reader.cipher is not None
        if await self.reads_zero(start, end - start):
            # Space behind the end of a growing file reads as zeros by itself.
            if fresh and not encrypted:
                return None
            return _ZEROS[: end - start]
        edge = memoryview(bytearray(end - start))
        await self.read_guest(start, edge)
        return edge

    async def _store(self, host: int, guest: int, buffers: list[memoryview]) -> None:
        """Write *buffers* at *host* of the data storage, encrypting on the way."""
        image = self.image
        cipher = image.reader.cipher
        if not image.header.has_data_file:
            image.changing.check_overlap(host, sum(len(part) for part in buffers))
        pin = image.chain_map.pin() if image.chain_map is not None else 0
        try:
            if cipher is not None:
                start, host, buffers = await self._encrypt_ready(host, guest, buffers)
                number = host if image.header.crypt_method == CRYPT_LUKS else start
                await image.runtime.io(cipher.encrypt, buffers[0], number // SECTOR)
            await image.runtime.io(image.data.write, host, buffers)
        finally:
            if image.chain_map is not None:
                image.chain_map.unpin(pin)

    async def _encrypt_ready(
        self, host: int, guest: int, buffers: list[memoryview]
    ) -> tuple[int, int, list[memoryview]]:
        """One private buffer of whole sectors around *buffers*: ``(guest start, host start, [buffer])``."""
        total = sum(len(part) for part in buffers)
        start, end = round_down(guest, SECTOR), round_up(guest + total, SECTOR)
        joined = memoryview(bytearray(end - start))
        if start != guest:
            await self.read_guest(start, joined[:SECTOR])
        if end != guest + total and (end - SECTOR != start or start == guest):
            await self.read_guest(end - SECTOR, joined[-SECTOR:])
        position = guest - start
        for part in buffers:
            joined[position : position + len(part)] = part
            position += len(part)
        return start, host - (guest - start), [joined]

    # -- zeros -----------------------------------------------------------------

    async def zero_piece(self, offset: int, length: int, unmap: bool) -> int:
        """Zero some bytes at *offset*, inside the gate; returns how many."""
        image = self.image
        size = image.cluster_size
        unit = size // 32 if image.cmap.extended else size
        end = offset + length
        last = end >= image.size
        if offset % unit or (length < unit and not last):
            part = min(length, unit - offset % unit)
            return await self._write_zeros(offset, part)
        whole = length if last else round_down(length, unit)
        if image.header.version == 2:
            return await self._zero_v2(offset, whole)
        await self.own_table(offset)
        if offset % size or (whole < size and not last):
            return await self._zero_subclusters(offset, min(whole, size - offset % size), last)
        if not last:
            whole = round_down(whole, size)
        return await self._map_clusters(
            offset, whole, lambda at, count: image.cmap.set_zero(at, count, not unmap, False, self._given_back()), unmap
        )

    async def _zero_v2(self, offset: int, length: int) -> int:
        if self.has_backing:
            return await self._write_zeros(offset, min(length, 1 * MiB))
        return await self._discard_piece(offset, length)

    async def _write_zeros(self, offset: int, length: int) -> int:
        if await self.reads_zero(offset, length):
            return length
        return await self._write_piece(offset, _ZEROS[: min(length, len(_ZEROS))])

    async def _zero_subclusters(self, offset: int, length: int, last: bool) -> int:
        """Zero subclusters of one cluster by their bits; a compressed or shared one by writing."""
        image = self.image
        cmap = image.cmap
        entry, _ = cmap.entry(offset)
        if entry & COMPRESSED_FLAG or (entry & OFFSET_MASK and not entry & COPIED):
            return await self._write_zeros(offset, length)
        if image.header.data_file_raw:
            await image.runtime.io(image.data.zero, offset, length)
        end = round_up(offset + length, image.cluster_size // 32) if last else offset + length
        cmap.set_zero_subclusters(offset, offset, end)
        return length

    # -- discard ---------------------------------------------------------------

    async def _discard_piece(self, offset: int, length: int) -> int:
        image = self.image
        if image.header.version == 2 and self.has_backing:
            return length
        if not self.has_backing and image.cmap.l1_entry(image.tables.index(offset)) & OFFSET_MASK == 0:
            span = image.cmap.l2_entries << image.cmap.cluster_bits
            return min(length, span - offset % span)
        return await self._map_clusters(offset, length, self._discard_clusters, True)

    def _discard_clusters(self, offset: int, count: int) -> None:
        """Source: qemu; version 3 leaves zero clusters where something was, or a backing file would show."""
        image = self.image
        freed = self._given_back()
        if image.header.version == 2:
            image.cmap.set_hole(offset, count, freed)
        else:
            image.cmap.set_zero(offset, count, False, not self.has_backing, freed)

    def _given_back(self) -> RunList:
        """Where space goes that the guest gave up."""
        return self.image.changing.unmapped if self.punch else self.image.changing.freed

    async def _map_clusters(self, offset: int, length: int, change: Callable[[int, int], None], unmap: bool) -> int:
        """Apply *change* to the whole clusters of the range inside one table; returns the bytes covered."""
        image = self.image
        size = image.cluster_size
        room = await self.own_table(offset)
        length = min(length, room)
        count = round_up(length, size) // size
        if image.cmap.has_data_file:
            operation = image.data.discard if unmap and not image.header.data_file_raw else image.data.zero
            await image.runtime.io(operation, offset, min(length, max(image.data.size - offset, 0)))
            await self.own_table(offset)
        change(offset, count)
        return length

    async def unmap_behind(self, start: int, gone: RunList | None = None) -> None:
        """Drop every mapping from cluster-aligned guest offset *start* to the end of L1 (the gate is closed).

        The space goes to *gone*, by default to what is released and punched after the next commit.
        """
        image = self.image
        cmap = image.cmap
        gone = image.changing.unmapped if gone is None else gone
        span = cmap.l2_entries << cmap.cluster_bits
        index = start // span
        while index < cmap.l1_size:
            if cmap.l1_entry(index) & OFFSET_MASK == 0:
                index += 1
                continue
            if start > index * span:
                await self.own_table(start)
                count = ((index + 1) * span - start) // image.cluster_size
                cmap.set_hole(start, count, gone)
            else:
                await self._drop_table(index, gone)
            index += 1

    async def _drop_table(self, index: int, gone: RunList) -> None:
        """Release an L2 table and everything it maps: its L1 entry goes, the table itself stays as it is."""
        image = self.image
        cmap = image.cmap
        while not cmap.loaded(index):
            await image.tables.load(index)
        place = cmap.l1_entry(index) & OFFSET_MASK
        cmap.drop(index, gone)
        cmap.set_l1(index, 0)
        image.changing.freed.add(DATA, place, image.cluster_size, place)

    # -- compressed ------------------------------------------------------------

    async def write_compressed(self, offset: int, cluster: memoryview) -> None:
        """Store one guest cluster compressed; where that does not shrink it, plain.

        Raises: UsageError unless it is one whole cluster that has no space yet.
        """
        image = self.image
        size = image.cluster_size
        if offset % size or len(cluster) != size or offset >= image.size:
            raise UsageError("compressed writes take one whole cluster", path=image.storage.name)
        if image.cmap.has_data_file or image.reader.cipher is not None:
            raise UnsupportedFeature("this image cannot hold compressed clusters", path=image.storage.name)
        packed = await image.runtime.io(image.reader.codec.compress, cluster)
        if packed is None:
            await self.write(offset, cluster[: min(size, image.size - offset)])
            return
        await self._each(offset, size, lambda at, _: self._compressed_piece(at, packed))

    async def _compressed_piece(self, offset: int, packed: bytes) -> int:
        image = self.image
        await self.own_table(offset)
        entry, _ = image.cmap.entry(offset)
        if entry & (OFFSET_MASK | COMPRESSED_FLAG):
            raise UsageError("compressed data can only be written where nothing is allocated", path=image.storage.name)
        place = await image.allocation.compressed(len(packed))
        try:
            await image.runtime.io(image.data.write, place, [packed])
            await self.own_table(offset)
        except BaseException:
            await image.allocation.release_compressed(place, len(packed))
            raise
        image.cmap.set_entry(
            offset, COMPRESSED_FLAG | pack_compressed(place, len(packed), image.header.cluster_bits), 0
        )
        return image.cluster_size


def _first_bytes(pieces: list[tuple[int, memoryview]], length: int) -> list[tuple[int, memoryview]]:
    """The pieces that hold the first *length* bytes, the last one cut."""
    found = []
    for offset, data in pieces:
        if length:
            found.append((offset, data[:length]))
        length -= min(length, len(data))
    return found
