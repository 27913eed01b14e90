# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Another refcount width: a whole new refcount structure beside the old one, switched by one sector.

======= ================================================================
PREPARE space for new blocks and a new table, counted in the old structure;
        their content, which counts the old structure too          barrier
PUBLISH place, length and width in one write of the header sector   barrier
RECLAIM the old table and blocks, counted down in the new structure
======= ================================================================

Invariant: at every cut one of the two structures is complete and counts at
least what is referred to (I1, I5, I8); a width that cannot hold a count is
refused before anything is published.

Source of what is reported on the way: qemu-img amend -p.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qcowlib.driver import DATA
from qcowlib.errors import CorruptImage, StorageError, UsageError
from qcowlib.native import convert_refcounts, is_zero
from qcowlib.ondisk import MAX_REFCOUNT_TABLE_BYTES
from qcowlib.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qcowlib.qcow2.image import Qcow2Image

__all__ = ["change_refcount_width"]

_FIELDS = (48, 104)


async def change_refcount_width(image: Qcow2Image, order: int, report: Callable[[int, int], object]) -> None:
    """Make refcounts ``2**order`` bits wide; the image is committed and nobody is writing.

    *report* gets ``(done, total)``.  The engine starts again from storage.
    Raises: UsageError with qemu's words for a count that is too large.
    """
    change = _Change(image, order, report)
    try:
        await change.allocate()
        await change.write()
    except BaseException:
        await change.give_back()
        raise
    # With what it grew by for the new one.
    old = change.structure()
    await change.publish()
    await image.runtime.io(image.reload)
    await image.start_writing()
    for offset, length in old:
        image.changing.freed.add(DATA, offset, length, offset)
    await image.changing.commit(final=True)
    await image.changing.commit(final=True)


class _Change:
    """One run; blocks of the new structure by index, as far as they count something."""

    def __init__(self, image: Qcow2Image, order: int, report: Callable[[int, int], object]) -> None:
        self.image = image
        self.order = order
        self.report = report
        self.size = image.cluster_size
        #: Refcounts in a block of the old structure, and of the new one.
        self.per_old = self.size * 8 >> image.header.refcount_order
        self.per_new = self.size * 8 >> order
        self.blocks: dict[int, int] = {}
        self.table = self.table_clusters = self._walks = 0

    def structure(self) -> list[tuple[int, int]]:
        """Places of the old structure."""
        header, refs = self.image.header, self.image.refs
        places = [(refs.block_offset(index), self.size) for index in range(refs.table_size) if refs.block_offset(index)]
        return [*places, (header.refcount_table_offset, header.refcount_table_clusters * self.size)]

    # -- space -----------------------------------------------------------------

    async def allocate(self) -> None:
        """Take space until everything counted has a block; taking it may grow the old structure."""
        walk = 0
        while await self._walk(walk, max(walk + 2, 3)):
            walk += 1
            await self._allocate_table()
        self._walks = walk + 1

    async def _walk(self, walk: int, walks: int) -> bool:
        """Give a block to every part of the old structure that counts something; false if all had one."""
        # What earlier walks took must be on storage to be seen.
        await self.image.changing.commit(final=True)
        entries = self.image.refs.table_size
        allocated = False
        for index in range(entries):
            self.report(walk * entries + index, walks * entries)
            if not self.image.refs.block_offset(index):
                continue
            data = await self._old_block(index)
            for new, piece in self._pieces(index, data):
                if new not in self.blocks and not is_zero(piece):
                    self.blocks[new] = (await self.image.allocation.clusters(1))[0]
                    allocated = True
        self.report((walk + 1) * entries, walks * entries)
        return allocated

    async def _allocate_table(self) -> None:
        clusters = ceil_div((max(self.blocks) + 1) * 8, self.size)
        if clusters * self.size > MAX_REFCOUNT_TABLE_BYTES:
            raise StorageError(
                errno.EFBIG, path=self.image.storage.name, operation="amend", message="Reference count table too large"
            )
        if clusters != self.table_clusters:
            if self.table:
                await self.image.allocation.release(self.table, self.table_clusters)
            self.table = (await self.image.allocation.clusters(clusters, contiguous=True))[0]
            self.table_clusters = clusters

    async def give_back(self) -> None:
        """Nothing of the new structure was published."""
        for offset in self.blocks.values():
            await self.image.allocation.release(offset, 1)
        if self.table:
            await self.image.allocation.release(self.table, self.table_clusters)

    async def _old_block(self, index: int) -> bytearray:
        block = bytearray(self.size)
        await self.image.runtime.io(self.image.storage.read_into, self.image.refs.block_offset(index), [block])
        return block

    def _pieces(self, index: int, data: bytearray) -> Iterator[tuple[int, memoryview]]:
        """Cut an old block where new ones begin: ``(number of the new block, bytes)``."""
        view = memoryview(data)
        first = index * self.per_old
        step = min(self.per_new, self.per_old)
        width = len(data) * step // self.per_old
        for number in range(self.per_old // step):
            yield (first + number * step) // self.per_new, view[number * width : (number + 1) * width]

    # -- content ---------------------------------------------------------------

    async def write(self) -> None:
        """Write the new blocks and the new table, durably."""
        image, refs = self.image, self.image.refs
        entries = refs.table_size
        block, current = bytearray(self.size), -1
        for index in range(entries):
            self.report(self._walks * entries + index, (self._walks + 1) * entries)
            if not refs.block_offset(index):
                continue
            data = await self._old_block(index)
            first = index * self.per_old
            for new, piece in self._pieces(index, data):
                if new != current:
                    await self._flush(current, block)
                    block, current = bytearray(self.size), new
                self._convert(piece, block, max(first, new * self.per_new))
        await self._flush(current, block)
        self.report((self._walks + 1) * entries, (self._walks + 1) * entries)
        table = bytearray(self.table_clusters * self.size)
        for index, offset in self.blocks.items():
            table[8 * index : 8 * index + 8] = offset.to_bytes(8, "big")
        await image.runtime.io(image.storage.write, self.table, [table])
        await image.changing.barrier()

    def _convert(self, piece: memoryview, block: bytearray, first: int) -> None:
        found = convert_refcounts(piece, self.image.header.refcount_order, block, first % self.per_new, self.order)
        if found is not None:
            number, value = found
            raise UsageError(
                f"Cannot decrease refcount entry width to {1 << self.order} bits: Cluster at offset "
                f"{(first + number) * self.size:#x} has a refcount of {value}",
                path=self.image.storage.name,
            )

    async def _flush(self, index: int, block: bytearray) -> None:
        if index in self.blocks:
            await self.image.runtime.io(self.image.storage.write, self.blocks[index], [block])
        elif any(block):
            raise CorruptImage("refcounts changed while their width was changed", path=self.image.storage.name)

    async def publish(self) -> None:
        """Invariant: I5, place and width change by one write inside the header sector."""
        image, header = self.image, self.image.header
        header.refcount_table_offset, header.refcount_table_clusters = self.table, self.table_clusters
        header.refcount_order = self.order
        await image.changing.write_fields(*_FIELDS)
