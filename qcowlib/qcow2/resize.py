# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Changing the virtual size of an open image.

Growing: a larger L1 at a new place, zeros over what would show through, then
one header write.  Shrinking: the header first, then the clusters behind the
new end are unmapped and released, and the end of the file is cut.

Invariants: the size changes by one write inside the header sector (I5); bytes
that come back into the image read as zeros, whatever an earlier shrink or a
longer backing file left there; a cut leaves the old size or the new one.
"""

from __future__ import annotations

import errno
from functools import partial

from qcowlib.driver import DATA
from qcowlib.errors import CorruptImage, StorageError, UsageError
from qcowlib.ondisk import MAX_L1_BYTES, l1_entries
from qcowlib.storage.space import reserve_space
from qcowlib.units import SECTOR, MiB, ceil_div, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qcowlib.qcow2.create import Preallocation
    from qcowlib.qcow2.image import Qcow2Image
    from qcowlib.qcow2.write import Writer

__all__ = ["cut_tail", "resize"]

_PIECE = 64 * MiB
_SHORT = 1 * MiB
_SIZE_FIELD = (24, 32)


async def resize(
    writer: Writer,
    size: int,
    *,
    backing_size: int,
    refresh: Callable[[], None],
    preallocation: Preallocation = "off",
    shrink: bool = False,
    sparse: bool = True,
) -> None:
    """Make the image *size* bytes.

    *backing_size* is the length of the layer below (0 without one); *refresh*
    tells the chain that the size changed.  Shrinking needs *shrink*.  Without
    *sparse* a longer layer below makes zeros of all new bytes, as in qemu.
    Raises: UsageError with qemu's words, StorageError.
    """
    image = writer.image
    _check(image, size, preallocation, shrink)
    await image.start_writing()
    await writer.quiesce()
    try:
        # Another one may have come first.
        _check(image, size, preallocation, shrink)
        old = image.header.size
        if image.tracker is not None:
            await image.tracker.begin_resize()
        await image.changing.commit()
        if size >= old:
            hidden = backing_size if sparse or backing_size <= old else size
            await _grow(writer, old, size, hidden, refresh, preallocation)
        else:
            await _shrink(writer, size, refresh)
        if image.tracker is not None:
            await image.tracker.save()
    finally:
        writer.resume()


def _check(image: Qcow2Image, size: int, preallocation: Preallocation, shrink: bool) -> None:
    header = image.header
    if size % SECTOR:
        raise UsageError("The new size must be a multiple of 512", path=image.storage.name)
    if header.version == 2 and header.nb_snapshots:
        raise UsageError("Can't resize a v2 image which has snapshots", path=image.storage.name)
    if size < header.size:
        if preallocation != "off":
            raise UsageError("Preallocation can't be used for shrinking an image", path=image.storage.name)
        if not shrink:
            raise UsageError("Use the --shrink option to perform a shrink operation.", path=image.storage.name)


async def _publish_size(writer: Writer, size: int, refresh: Callable[[], None], *, quiet: bool = False) -> None:
    image = writer.image
    old = image.header.size
    image.header.size = size
    try:
        image.changing.queue_fields(*_SIZE_FIELD)
        await image.changing.commit(quiet=quiet)
    except BaseException:
        image.header.size = old
        raise
    finally:
        refresh()


async def _grow(
    writer: Writer, old: int, size: int, backing_size: int, refresh: Callable[[], None], preallocation: Preallocation
) -> None:
    image = writer.image
    header = image.header
    if header.data_file_raw and preallocation == "off":
        # Source: whoever reads the raw file alone sees the same bytes, so the mapping is made at once.
        preallocation = "metadata"
    await _grow_l1(writer, size)
    if old < backing_size or preallocation != "off":
        # The place of the old L1 is the first to be taken, as in qemu.
        await image.changing.commit(quiet=True)
    header.size = size
    refresh()
    try:
        edge = round_up(old, image.cluster_size)
        # An earlier shrink may have left entries behind the end, and bytes in the last cluster.
        await writer.unmap_behind(edge)
        # Clusters given first keep their space as zero clusters; the size is not published yet.
        if preallocation == "metadata":
            await _preallocate(writer, edge, size, preallocation)
        await _zero(writer, old, min(size, max(edge, backing_size)))
        if preallocation in ("falloc", "full"):
            await _preallocate(writer, edge, size, preallocation)
        if image.header.has_data_file and image.data.size < size:
            await image.runtime.io(image.data.resize, size)
    except BaseException:
        header.size = old
        refresh()
        raise
    header.size = old
    await _publish_size(writer, size, refresh)


async def _grow_l1(writer: Writer, size: int) -> None:
    """Give L1 room for *size* bytes, at a new place."""
    image = writer.image
    header, cmap = image.header, image.cmap
    needed = l1_entries(size, header.cluster_bits, header.extended_l2)
    if needed * 8 > MAX_L1_BYTES:
        raise StorageError(
            errno.EFBIG,
            path=image.storage.name,
            operation="resize",
            message="Failed to grow the L1 table: File too large",
        )
    if needed <= cmap.l1_size:
        return
    old_offset, old_size = header.l1_table_offset, header.l1_size
    clusters = round_up(8 * needed, image.cluster_size) // image.cluster_size
    offset, _, _ = await image.allocation.clusters(clusters, contiguous=True)
    cmap.grow_l1(needed)
    cmap.guard(offset, 8 * needed)
    header.l1_table_offset, header.l1_size = offset, needed
    image.changing.move_l1()
    if old_size:
        length = round_up(8 * old_size, image.cluster_size)
        image.changing.freed.add(DATA, old_offset, length, old_offset)


async def _zero(writer: Writer, start: int, end: int) -> None:
    """Make guest bytes [start, end) read as zeros, the gate being closed."""
    while start < end:
        start += await writer.zero_piece(start, min(end - start, _PIECE), False)


async def _preallocate(writer: Writer, start: int, end: int, mode: Preallocation) -> None:
    """Give every cluster of [start, end) space of its own, reading as zeros."""
    image = writer.image
    cmap, size = image.cmap, image.cluster_size
    end = round_up(end, size)
    # A short stretch is as quick to write, and file systems place it better than a short reservation.
    short = end - start <= _SHORT
    while start < end:
        room = await writer.own_table(start)
        count = min(end - start, room, _PIECE) // size
        if cmap.has_data_file:
            host, got, fresh = start, count, True
        else:
            host, got, fresh = await image.allocation.clusters(count)
        if mode != "metadata":
            reserve = partial(reserve_space, image.data, host, got * size, full=mode == "full" or short)
            await image.runtime.io(reserve)
        elif not fresh:
            await image.runtime.io(image.data.zero, host, got * size)
        elif image.data.size < host + got * size:
            await image.runtime.io(image.data.resize, host + got * size)
        await writer.own_table(start)
        valid = start if cmap.extended and mode == "metadata" else start + got * size
        cmap.set_data(start, got, host, start, valid, image.changing.freed)
        start += got * size


async def _shrink(writer: Writer, size: int, refresh: Callable[[], None]) -> None:
    image = writer.image
    # Quiet: the gate is closed, and nothing here writes guest data.
    await _publish_size(writer, size, refresh, quiet=True)
    await writer.unmap_behind(round_up(size, image.cluster_size))
    await image.changing.commit(quiet=True)
    # Counts of what was released are only in memory until the next commit.
    await image.changing.commit(quiet=True)
    await _drop_empty_blocks(writer)
    if image.header.has_data_file:
        await image.runtime.io(image.data.resize, size)
    else:
        await cut_tail(writer)


async def _drop_empty_blocks(writer: Writer) -> None:
    """Let go of refcount blocks that count nothing any more; everything is committed.

    Order: the entries of the refcount table, barrier, then the counts of the blocks' clusters (I1, I4).
    """
    changing = writer.image.changing
    store = changing.store
    if changing.lazy:
        return  # counts and the table would be written by one commit, at the end
    for index in range(1, store.refs.table_size):
        if not store.refs.block_offset(index):
            continue
        await store.load(index)
        offset = store.refs.drop_empty(index)
        if offset:
            changing.freed.add(DATA, offset, writer.image.cluster_size, offset)
    await changing.commit(quiet=True)
    await changing.commit(quiet=True)


async def cut_tail(writer: Writer) -> None:
    """Shorten the file to its last used cluster; block devices keep their size."""
    image = writer.image
    if getattr(image.storage, "is_block", False):
        return
    store = image.changing.store
    last = ceil_div(image.storage.size, image.cluster_size)
    while last > 0:
        index = (last - 1) // store.refs.per_block
        if not store.refs.block_offset(index):
            last = index * store.refs.per_block
            continue
        if await store.get(last - 1):
            break
        last -= 1
    end = last * image.cluster_size
    if end < image.cluster_size:
        raise CorruptImage("the header cluster is counted as free", path=image.storage.name)
    if end < image.storage.size:
        await image.runtime.io(image.storage.resize, end)
        image.allocation.lower_water(last)
