# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Zero clusters made data, or holes where nothing lies below: version 2 has none.

Table by table, also those of snapshots: zeros are written and new clusters
counted first (PREPARE), then the entries change in place (PUBLISH); what an
entry referred to and does not any more is released (RECLAIM).  An entry that
changes shows the same bytes before and after, so a cut anywhere changes no
content (I6, I7), and a table that is shared changes for all at once.

Source: what qemu-img amend makes of zero clusters, and what it reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowlib.driver import DATA
from qcowlib.errors import CorruptImage
from qcowlib.ondisk import COMPRESSED, COPIED, CRYPT_LUKS, OFFSET_MASK, ZERO
from qcowlib.qcow2.directories import check_snapshot_l1, read_snapshots
from qcowlib.qcow2.ordering import PUBLISH
from qcowlib.units import SECTOR, MiB, round_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from qcowlib.qcow2.image import Qcow2Image

__all__ = ["expand_zeros", "has_compressed"]

_BATCH = 4 * MiB


async def expand_zeros(image: Qcow2Image, has_backing: bool, report: Callable[[int, int], object]) -> None:
    """Leave no zero cluster in the image; it is committed, without subclusters, and nobody is writing.

    *report* gets ``(visited, total)`` L1 entries, of the active table and of
    all snapshots.
    """
    l1s = await _l1_tables(image)
    total = sum(len(l1) for l1 in l1s)
    run = _Run(image, has_backing)
    visited = 0
    for l1 in l1s:
        for index, word in enumerate(l1):
            if word & OFFSET_MASK:
                await run.table(word & OFFSET_MASK, index)
            visited += 1
            report(visited, total)
    await run.commit()
    image.cmap.forget()
    image.reader.forget()


async def has_compressed(image: Qcow2Image) -> bool:
    """Whether any table, also of a snapshot, has a compressed cluster; the image is committed."""
    for l1 in await _l1_tables(image):
        for word in l1:
            if word & OFFSET_MASK:
                table = await _read_table(image, word & OFFSET_MASK)
                if any(table[at] & 0x40 for at in range(0, len(table), image.header.l2_entry_size)):
                    return True
    return False


async def _l1_tables(image: Qcow2Image) -> list[list[int]]:
    """The active L1 table, then those of the snapshots."""
    found = [[image.cmap.l1_entry(index) for index in range(image.cmap.l1_size)]]
    for entry in await image.runtime.io(read_snapshots, image.storage, image.header):
        check_snapshot_l1(entry, image.cluster_size, image.storage)
        data = bytearray(8 * entry.l1_size)
        await image.runtime.io(image.storage.read_into, entry.l1_table_offset, [data])
        found.append([int.from_bytes(data[at : at + 8], "big") for at in range(0, len(data), 8)])
    return found


async def _read_table(image: Qcow2Image, offset: int) -> bytearray:
    if offset % image.cluster_size or offset + image.cluster_size > round_up(image.storage.size, image.cluster_size):
        raise CorruptImage(f"L2 table offset {offset:#x} is unaligned or outside the file", path=image.storage.name)
    table = bytearray(image.cluster_size)
    await image.runtime.io(image.storage.read_into, offset, [table])
    return table


class _Run:
    """The tables of one image, each once."""

    def __init__(self, image: Qcow2Image, has_backing: bool) -> None:
        self.image = image
        self.has_backing = has_backing
        self._seen: set[int] = set()
        self._waiting = 0

    async def table(self, offset: int, l1_index: int) -> None:
        """Change one L2 table, which L1 entry *l1_index* names."""
        image = self.image
        if offset in self._seen:
            return
        self._seen.add(offset)
        table = await _read_table(image, offset)
        owners = await image.changing.store.get(offset >> image.header.cluster_bits)
        changed = False
        for at in range(0, len(table), 8):
            # The flag is in the last byte: most entries end here.
            if table[at + 7] & ZERO and not table[at] & (COMPRESSED >> 56):
                guest = (l1_index * image.header.l2_entries + at // 8) * image.cluster_size
                word = await self._entry(int.from_bytes(table[at : at + 8], "big"), guest, owners)
                table[at : at + 8] = word.to_bytes(8, "big")
                changed = True
        if changed:
            image.changing.queue(PUBLISH, offset, bytes(table))
            self._waiting += len(table)
            if self._waiting >= _BATCH:
                await self.commit()

    async def commit(self) -> None:
        """Make what changed durable, in order."""
        self._waiting = 0
        await self.image.changing.commit(final=True)
        # What was released is counted down on storage too.
        await self.image.changing.commit(final=True)

    async def _entry(self, word: int, guest: int, owners: int) -> int:
        """Return what takes the place of a zero entry, in a table with *owners* references."""
        image = self.image
        bits, size, store = image.header.cluster_bits, image.cluster_size, image.changing.store
        place = word & OFFSET_MASK
        if place and place % size == 0 and await store.get(place >> bits) == owners:
            # Nobody else looks at it: its bytes mean nothing until the flag is gone.
            await self._write_zeros(place, guest)
            return place | (word & COPIED)
        for _ in range(owners if place else 0):
            image.changing.freed.add(DATA, place, size, place)
        if not self.has_backing:
            return 0
        place, _, _ = await image.allocation.clusters(1)
        for _ in range(owners - 1):
            await store.change(place >> bits, 1, True)
        await self._write_zeros(place, guest)
        return place | (COPIED if owners == 1 else 0)

    async def _write_zeros(self, place: int, guest: int) -> None:
        image = self.image
        size, cipher = image.cluster_size, image.reader.cipher
        image.changing.check_overlap(place, size)
        if cipher is None:
            await image.runtime.io(image.storage.zero, place, size)
            return
        data = bytearray(size)
        number = place if image.header.crypt_method == CRYPT_LUKS else guest
        await image.runtime.io(cipher.encrypt, data, number // SECTOR)
        await image.runtime.io(image.storage.write, place, [data])
