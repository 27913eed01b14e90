# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A new image written front to back, as a conversion does.

The caller announces the guest's runs in ascending order and is told where in
the file their bytes go; it writes them itself, in any order and from any
thread.  The builder makes the tables: an L2 table leaves memory once the runs
have passed it, everything else goes out in :meth:`Builder.finish`.

Invariant: I11, the header comes last, after a flush; what the caller has not
written before :meth:`Builder.finish` is not covered by it.  Host clusters are
taken in the order in which ``qemu-img convert`` takes them.

Not here: reading, compressing, encrypting or writing guest data.
"""

from __future__ import annotations

import errno
from typing import Final

from qcowlib.errors import OutOfRange, StorageError, UsageError
from qcowlib.native import add_refcount, fill_entries
from qcowlib.ondisk import CRYPT_LUKS, SUBCLUSTERS, ZERO, Header, pack_compressed
from qcowlib.qcow2.layout import NewImage
from qcowlib.storage.base import Storage
from qcowlib.units import MiB, ceil_div, round_up

__all__ = ["Builder"]

# QEMU copies in requests of this size; it shows in where refcount blocks go.
_REQUEST: Final = 2 * MiB
_ALL_ALLOCATED: Final = (1 << SUBCLUSTERS) - 1
_ALL_ZERO: Final = _ALL_ALLOCATED << SUBCLUSTERS


class Builder:
    """Places the runs of one new image; used by one thread, the data writes by any.

    *header* is what :func:`qcowlib.qcow2.create.new_header` gives; it is
    complete after :meth:`finish`.  *encryption_header* is stored in the image.
    *zeroed* tells that *storage* reads as zeros where nothing was written (a
    new or emptied file); else the rest of a partly used cluster is zeroed here.
    Raises: UsageError, StorageError.
    """

    def __init__(
        self, storage: Storage, header: Header, *, encryption_header: bytes = b"", zeroed: bool = True
    ) -> None:
        if header.crypt_method == CRYPT_LUKS and not encryption_header:
            raise UsageError("an encrypted image needs its encryption header")
        self.header = header
        self._storage = storage
        self._zeroed = zeroed
        self._image = NewImage(storage, header)
        self._table = bytearray()
        self._l1_index = -1
        self._l2_offset = 0
        self._position = 0
        # The last cluster of plain data: guest number, host offset, end of its data in guest bytes.
        self._last = -1
        self._last_host = 0
        self._last_end = 0
        # Where compressed data goes on, and how many clusters share the host cluster there.
        self._packed_end = 0
        self._packed_refs = 0
        self._counted: dict[int, bytearray] = {}
        self._image.begin()
        if encryption_header:
            self._image.write_encryption_header(encryption_header)
        if header.data_file_raw and header.size:
            # The metadata must be there for the whole disk.
            self._map_data_file(0, header.size)

    # -- runs ----------------------------------------------------------------------

    def place_data(self, guest_offset: int, length: int) -> list[tuple[int, int]]:
        """Allocate for *length* bytes at *guest_offset*; return ``(host_offset, length)`` in guest order.

        Any alignment; over a backing file whole clusters (with extended L2
        whole subclusters).  With an external data file the offsets are those
        of that file, and what its clusters hold beside the run is the caller's.
        Raises: OutOfRange, UsageError.
        """
        end = self._advance(guest_offset, length)
        header = self.header
        unit = header.subcluster_size
        if header.backing_file is not None and (guest_offset % unit or (end % unit and end != header.size)):
            raise UsageError("over a backing file data must come in whole clusters")
        if header.has_data_file:
            if length and not header.data_file_raw:
                self._map_data_file(guest_offset, end)
            return [(guest_offset, length)] if length else []
        runs: list[tuple[int, int]] = []
        position = guest_offset
        if length and position >> header.cluster_bits == self._last:
            position = self._extend_last(position, end, runs)
        boundary = position
        while position < end:
            boundary = min(end, boundary + self._step(position))
            stop = ceil_div(boundary, header.cluster_size)
            self._allocate(position, stop, end, runs)
            position = min(end, stop << header.cluster_bits)
        return runs

    def place_zero(self, guest_offset: int, length: int) -> None:
        """Make whole clusters read as zeros whatever the backing file holds.

        The end may be the end of the disk.  With a raw external data file
        nothing happens: the zeros must be in that file.
        Raises: OutOfRange, UsageError (also for version 2, which has no such entry).
        """
        end = self._advance(guest_offset, length)
        header = self.header
        if header.version < 3:
            raise UsageError("version 2 has no zero clusters")
        if guest_offset % header.cluster_size or (end % header.cluster_size and end != header.size):
            raise UsageError("a zero run must be whole clusters")
        if header.data_file_raw:
            return
        first, last = guest_offset >> header.cluster_bits, ceil_div(end, header.cluster_size)
        while first < last:
            index = self._enter(first)
            count = min(last - first, header.l2_entries - index)
            if header.extended_l2:
                fill_entries(self._table, index, count, 0, 0, 2, _ALL_ZERO)
            else:
                fill_entries(self._table, index, count, ZERO, 0, 1, 0)
            first += count

    def place_compressed(self, guest_cluster: int, length: int) -> int:
        """Allocate *length* compressed bytes for cluster number *guest_cluster*; return their host offset.

        Compressed clusters are packed byte by byte; the caller writes exactly
        these bytes.  Raises: OutOfRange, UsageError, StorageError (ENOTSUP) beside an external data file.
        """
        header = self.header
        cluster_bits = header.cluster_bits
        if header.has_data_file:
            raise StorageError(
                errno.ENOTSUP, path=self._storage.name, operation="write", offset=guest_cluster << cluster_bits
            )
        if not 0 < length < header.cluster_size:
            raise UsageError("compressed data must be smaller than a cluster")
        guest = guest_cluster << cluster_bits
        self._advance(guest, max(1, min(header.cluster_size, header.size - guest)))
        index = self._enter(guest_cluster)
        if self._packed_refs == header.refcount_max:
            self._packed_end = 0
        offset = self._image.placement.allocate_bytes(self._packed_end, length)
        end = offset + length
        for cluster in range(offset >> cluster_bits, ((end - 1) >> cluster_bits) + 1):
            self._packed_refs = self._count(cluster)
        self._packed_end = end if end % header.cluster_size else 0
        self._image.tail = max(self._image.tail, end)
        entry = pack_compressed(offset, length, cluster_bits)
        fill_entries(self._table, index, 1, entry, 0, header.l2_entry_size // 8, 0)
        return offset

    def finish(self) -> Header:
        """Write all tables, flush, write the header; return it.

        All data must have been written, and an external data file flushed.
        Raises: StorageError.  Invariant: I11
        """
        self._fill_rest((self._last + 1) << self.header.cluster_bits)
        self._write_table()
        return self._image.finish(self._counted)

    # -- steps ---------------------------------------------------------------------

    def _advance(self, guest_offset: int, length: int) -> int:
        end = guest_offset + length
        if guest_offset < 0 or length < 0 or end > self.header.size:
            raise OutOfRange(f"bytes {guest_offset} to {end} are not inside {self.header.size} bytes")
        if guest_offset < self._position:
            raise UsageError("runs must ascend")
        self._position = end
        self._fill_rest(guest_offset)
        return end

    def _enter(self, cluster: int) -> int:
        """Make the L2 table of guest *cluster* the current one; return the entry's index."""
        l1_index, index = divmod(cluster, self.header.l2_entries)
        if l1_index != self._l1_index:
            self._write_table()
            self._l1_index = l1_index
            self._table = bytearray(self.header.cluster_size)
            self._l2_offset = self._image.new_l2(l1_index)
        return index

    def _write_table(self) -> None:
        if self._l1_index >= 0:
            self._storage.write(self._l2_offset, [self._table])

    def _step(self, position: int) -> int:
        """Return how many bytes to place at once: a request, or as many as place themselves alike."""
        header = self.header
        table = header.l2_entries << header.cluster_bits
        # One cluster may become the L2 table.
        room = (self._image.placement.tail_room() - 1) << header.cluster_bits
        return max(_REQUEST, min(room, table - position % table) // _REQUEST * _REQUEST)

    def _allocate(self, position: int, stop: int, end: int, runs: list[tuple[int, int]]) -> None:
        """Give guest clusters from *position* to cluster *stop* a place, for data up to *end*."""
        header, placement = self.header, self._image.placement
        cluster_bits = header.cluster_bits
        cluster, expected = position >> cluster_bits, 0
        while cluster < stop:
            index = self._enter(cluster)
            want = min(stop - cluster, header.l2_entries - index)
            got = placement.allocate_at(expected, want) if expected else 0
            start = expected
            if not got:
                start, got = placement.allocate(want), want
            host = start << cluster_bits
            self._image.link(self._table, index, got, host, _ALL_ALLOCATED)
            upto = min(end, (cluster + got) << cluster_bits)
            self._trim(index, got, position, upto)
            inside = position & (header.cluster_size - 1)
            if inside and not self._zeroed:
                self._storage.zero(host, inside)
            _append(runs, host + inside, upto - position)
            cluster, expected, position = cluster + got, start + got, upto
            self._last, self._last_host = cluster - 1, (expected - 1) << cluster_bits
            self._reach(upto)

    def _extend_last(self, position: int, end: int, runs: list[tuple[int, int]]) -> int:
        """Use the cluster that the run before ended in; return where it ends."""
        header = self.header
        upto = min(end, (self._last + 1) << header.cluster_bits)
        runs.append((self._last_host + position % header.cluster_size, upto - position))
        self._reach(upto)
        if header.extended_l2:
            index = self._last % header.l2_entries
            self._or_bitmap(index, _subclusters(position, upto, header))
        return upto

    def _reach(self, upto: int) -> None:
        """The last cluster has data up to guest offset *upto*: QEMU writes its last subcluster whole."""
        self._last_end = upto
        inside = round_up(upto - (self._last << self.header.cluster_bits), self.header.subcluster_size)
        self._image.tail = max(self._image.tail, self._last_host + inside)

    def _fill_rest(self, upto: int) -> None:
        """Zero what follows the data in the last cluster, up to guest offset *upto*."""
        if self._zeroed or self._last < 0 or self.header.has_data_file:
            return
        cluster_size = self.header.cluster_size
        upto = min(upto, (self._last + 1) * cluster_size)
        if self._last_end < upto:
            self._storage.zero(self._last_host + self._last_end % cluster_size, upto - self._last_end)
            self._last_end = upto

    def _map_data_file(self, position: int, end: int) -> None:
        """Map guest clusters to the same place of the external data file."""
        header = self.header
        while position < end:
            cluster = position >> header.cluster_bits
            index = self._enter(cluster)
            last = ceil_div(end, header.cluster_size)
            count = min(last - cluster, header.l2_entries - index)
            old = self._bitmap(index) if cluster == self._last else 0
            self._image.link(self._table, index, count, cluster << header.cluster_bits, _ALL_ALLOCATED)
            upto = min(end, (cluster + count) << header.cluster_bits)
            self._trim(index, count, position, upto)
            self._or_bitmap(index, old)
            position = upto
            self._last = cluster + count - 1

    # -- subclusters ---------------------------------------------------------------

    def _trim(self, index: int, count: int, start: int, end: int) -> None:
        """Leave out the subclusters before *start* and after *end* of *count* entries."""
        header = self.header
        if not header.extended_l2:
            return
        cluster_size = header.cluster_size
        if start % cluster_size or count == 1:
            self._set_bitmap(index, _subclusters(start, end, header))
        if end % cluster_size and count > 1:
            self._set_bitmap(index + count - 1, _subclusters(end // cluster_size * cluster_size, end, header))

    def _bitmap(self, index: int) -> int:
        at = index * 16 + 8
        return int.from_bytes(self._table[at : at + 8], "big") if self.header.extended_l2 else 0

    def _set_bitmap(self, index: int, bitmap: int) -> None:
        at = index * 16 + 8
        self._table[at : at + 8] = bitmap.to_bytes(8, "big")

    def _or_bitmap(self, index: int, bitmap: int) -> None:
        if self.header.extended_l2:
            self._set_bitmap(index, self._bitmap(index) | bitmap)

    # -- refcounts above one ---------------------------------------------------------

    def _count(self, cluster: int) -> int:
        """Add a reference of compressed data to host *cluster*; return how many it has."""
        index, entry = divmod(cluster, self._image.placement.per_block)
        block = self._counted.get(index)
        if block is None:
            block = self._counted[index] = bytearray(self.header.cluster_size)
        return add_refcount(block, entry, self.header.refcount_order)


def _subclusters(start: int, end: int, header: Header) -> int:
    """Return the allocation bits of guest bytes *start* to *end*, at most one cluster from *start*'s."""
    base = start // header.cluster_size * header.cluster_size
    first = (start - base) // header.subcluster_size
    last = min(ceil_div(end - base, header.subcluster_size), SUBCLUSTERS)
    return (1 << last) - (1 << first)


def _append(runs: list[tuple[int, int]], host: int, length: int) -> None:
    if runs and runs[-1][0] + runs[-1][1] == host:
        runs[-1] = (runs[-1][0], runs[-1][1] + length)
    else:
        runs.append((host, length))
