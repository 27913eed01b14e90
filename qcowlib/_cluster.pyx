# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Mapping of guest clusters of one layer: L1 and cached L2 tables.

No I/O and no policy: a question is answered, or the answer is which table must
be loaded first.  Tables are kept as they lie on storage (big-endian); an entry
is decoded where it is used.

Invariants: a slot belongs to one L1 index and ``slot_of`` finds it; a slot with
dirty bytes is never evicted; what a lookup sees changes only inside one call
made with the GIL held, so that a lookup is one moment of the image.  Host
offsets are checked for alignment and for the external data file's rule before
they leave this module (Invariant: I9).
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from qcowlib._extent cimport RunList, RunVec, rv_append
from qcowlib._ondisk cimport (
    QC_COMPRESSED, QC_COPIED, QC_NO_OFFSET, QC_OFFSET_MASK, QC_ZERO,
    RUN_COMPRESSED, RUN_DATA, RUN_HOLE, RUN_ZERO, qc_be64, qc_put64, qc_swap64,
)

cdef enum:
    OK = 0
    NEED = 1
    CORRUPT = 2

# What was found wrong; the texts are in qcow2/tables.py.
BAD_L2_OFFSET = 1
BAD_DATA_OFFSET = 2
BAD_ZERO_V2 = 3
BAD_COMPRESSED_DATA_FILE = 4
BAD_DATA_FILE_OFFSET = 5
BAD_SUBCLUSTERS = 6


cdef inline uint64_t low32(uint64_t bitmap) noexcept nogil:
    return bitmap & 0xFFFFFFFFULL


cdef class ClusterMap:
    """The mapping of one QCOW2 layer.

    *slots* is the number of L2 tables kept in memory; memory for a slot is
    taken when it is first used.
    """

    def __cinit__(self, unsigned cluster_bits, uint64_t size, bint extended, bint has_data_file, bint old_version,
                  int slots):
        if cluster_bits < 9 or cluster_bits > 21 or slots < 2:
            raise ValueError(cluster_bits)
        self.cluster_bits = cluster_bits
        self.cluster_size = 1ULL << cluster_bits
        self.extended = extended
        self.has_data_file = has_data_file
        self.old_version = old_version
        self.size = size
        self.entry_shift = 4 if extended else 3
        self.l2_bits = cluster_bits - self.entry_shift
        self.l2_entries = 1U << self.l2_bits
        self.sub_bits = cluster_bits - 5
        self.slot_count = slots
        self.slots = <Slot *> calloc(slots, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError()

    def __dealloc__(self):
        cdef int i
        if self.slots != NULL:
            for i in range(self.slots_made):
                free(self.slots[i].table)
            free(self.slots)
        free(self.l1)
        free(self.slot_of)
        free(self.guarded)
        if self.lent_length:
            PyBuffer_Release(&self.lent)

    # -- L1 ------------------------------------------------------------------------------------------------------

    def load_l1(self, table):
        """Take *table* (big-endian bytes) as the L1 table; forgets every L2 table."""
        cdef Py_buffer view
        cdef uint32_t i, count
        cdef const uint8_t *raw
        PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
        try:
            count = view.len // 8
            self.lend(b"", 0, 0)
            self._resize_l1(0)
            self._resize_l1(count)
            raw = <const uint8_t *> view.buf
            for i in range(count):
                self.l1[i] = qc_be64(raw + 8ULL * i)
        finally:
            PyBuffer_Release(&view)
        self.l1_dirty_lo = self.l1_dirty_hi = 0

    def grow_l1(self, uint32_t count):
        """Make room for *count* entries; the new ones are empty and not marked dirty."""
        if count < self.l1_size:
            raise ValueError(count)
        self._resize_l1(count)

    cdef int _resize_l1(self, uint32_t count) except -1:
        cdef uint64_t *l1
        cdef int32_t *slot_of
        cdef int i
        if count == 0:
            for i in range(self.slots_made):
                self.slots[i].busy = self.slots[i].fresh = self.slots[i].writing = False
                self.slots[i].dirty_lo = self.slots[i].dirty_hi = 0
            if self.slot_of != NULL:
                memset(self.slot_of, 0, self.l1_size * sizeof(int32_t))
            self.l1_size = 0
            self.dirty_count = 0
            return 0
        l1 = <uint64_t *> calloc(count, sizeof(uint64_t))
        slot_of = <int32_t *> calloc(count, sizeof(int32_t))
        if l1 == NULL or slot_of == NULL:
            free(l1)
            free(slot_of)
            raise MemoryError()
        if self.l1_size:
            memcpy(l1, self.l1, self.l1_size * sizeof(uint64_t))
            memcpy(slot_of, self.slot_of, self.l1_size * sizeof(int32_t))
        free(self.l1)
        free(self.slot_of)
        self.l1 = l1
        self.slot_of = slot_of
        self.l1_size = count
        return 0

    def forget(self):
        """Drop every L2 table from memory; none may be dirty."""
        cdef int i
        if self.dirty_count:
            raise ValueError("dirty tables cannot be forgotten")
        for i in range(self.slots_made):
            if self.slots[i].busy:
                self.slot_of[self.slots[i].l1_index] = 0
                self.slots[i].busy = False

    def l1_entry(self, uint32_t index):
        """The raw L1 entry."""
        if index >= self.l1_size:
            raise IndexError(index)
        return self.l1[index]

    def set_l1(self, uint32_t index, uint64_t entry):
        """Change an L1 entry in memory and mark it dirty."""
        if index >= self.l1_size:
            raise IndexError(index)
        self.l1[index] = entry
        if self.l1_dirty_lo == self.l1_dirty_hi:
            self.l1_dirty_lo = index
            self.l1_dirty_hi = index + 1
        else:
            self.l1_dirty_lo = min(self.l1_dirty_lo, index)
            self.l1_dirty_hi = max(self.l1_dirty_hi, index + 1)

    def l1_bytes(self, uint32_t first, uint32_t last):
        """Entries *first* to *last* (exclusive) as they lie on storage."""
        cdef uint32_t i
        if first > last or last > self.l1_size:
            raise IndexError(last)
        out = bytearray(8 * <size_t> (last - first))
        cdef unsigned char *raw = out
        for i in range(first, last):
            qc_put64(raw + 8ULL * (i - first), self.l1[i])
        return bytes(out)

    def l1_clean(self):
        """Nothing of L1 is dirty any more."""
        self.l1_dirty_lo = self.l1_dirty_hi = 0

    def l1_mark(self, uint32_t first, uint32_t last):
        """Mark entries dirty again (a write of them failed)."""
        if first < last <= self.l1_size:
            self.set_l1(first, self.l1[first])
            self.set_l1(last - 1, self.l1[last - 1])

    # -- L2 tables -----------------------------------------------------------------------------------------------

    def loaded(self, uint32_t index):
        """Whether the table of L1 index *index* is in memory."""
        return index < self.l1_size and self.slot_of[index] != 0

    def missing(self, uint32_t index, uint32_t stop, int most):
        """Tables from *index* on that lie behind each other in the file and are not in memory.

        Returns ``(offset, [l1 indices])``: *most* tables at most, L1 indices below *stop*.
        """
        cdef uint64_t offset, first
        cdef list found = []
        if index >= self.l1_size:
            raise IndexError(index)
        if stop > self.l1_size:
            stop = self.l1_size
        first = self.l1[index] & QC_OFFSET_MASK
        offset = first
        if most > self.slot_count // 2:
            most = self.slot_count // 2
        while index < stop and len(found) < most:
            if self.slot_of[index] or (self.l1[index] & QC_OFFSET_MASK) != offset:
                if (self.l1[index] & QC_OFFSET_MASK) == 0:
                    index += 1
                    continue
                break
            found.append(index)
            offset += self.cluster_size
            index += 1
        return first, found

    def lend(self, table, uint64_t offset, uint64_t length):
        """Look tables up in the buffer *table* too: *length* bytes of the file from *offset* on.

        For going through an image that nobody changes, without a copy of each
        table.  The buffer belongs to the map until the next call; length 0 ends that.
        """
        cdef Py_buffer view
        if length:
            PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
            if length > <uint64_t> view.len:
                PyBuffer_Release(&view)
                raise ValueError("the buffer is too short")
        if self.lent_length:
            PyBuffer_Release(&self.lent)
        self.lent_length = length
        self.lent_offset = offset
        if length:
            self.lent = view

    cdef int _take_slot(self) except -2:
        """A free slot number, evicting a clean table; -1 when all are dirty."""
        cdef Slot *slot
        cdef int _tries
        if self.slots_made < self.slot_count:
            slot = &self.slots[self.slots_made]
            slot.table = <uint8_t *> malloc(self.cluster_size)
            if slot.table == NULL:
                raise MemoryError()
            self.slots_made += 1
            return self.slots_made - 1
        for _tries in range(2 * self.slot_count):
            self.hand = (self.hand + 1) % self.slot_count
            slot = &self.slots[self.hand]
            if not slot.busy:
                return self.hand
            if slot.dirty_lo != slot.dirty_hi or slot.fresh or slot.writing:
                continue
            if slot.used:
                slot.used = False
                continue
            self.slot_of[slot.l1_index] = 0
            slot.busy = False
            return self.hand
        return -1

    def install(self, uint32_t index, table, size_t start=0):
        """Put a table (bytes at *start* of *table*) into memory; false when every slot is dirty."""
        cdef Py_buffer view
        cdef int number
        if index >= self.l1_size:
            raise IndexError(index)
        if self.slot_of[index]:
            return True
        number = self._take_slot()
        if number < 0:
            return False
        PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
        try:
            if start + self.cluster_size > <size_t> view.len:
                raise ValueError("table too short")
            memcpy(self.slots[number].table, <char *> view.buf + start, self.cluster_size)
        finally:
            PyBuffer_Release(&view)
        self._own(number, index)
        return True

    cdef void _own(self, int number, uint32_t index) noexcept:
        cdef Slot *slot = &self.slots[number]
        slot.l1_index = index
        slot.busy = slot.used = True
        slot.fresh = slot.writing = False
        slot.dirty_lo = slot.dirty_hi = 0
        self.slot_of[index] = number + 1

    def make(self, uint32_t index):
        """Start an empty, unpublished table for *index*; false when every slot is dirty."""
        cdef int number
        if index >= self.l1_size:
            raise IndexError(index)
        number = self.slot_of[index] - 1
        if number >= 0:
            raise ValueError("the table exists")
        number = self._take_slot()
        if number < 0:
            return False
        memset(self.slots[number].table, 0, self.cluster_size)
        self._own(number, index)
        self.slots[number].fresh = True
        self.dirty_count += 1
        return True

    def drop(self, uint32_t index, RunList freed):
        """Forget the table of *index* without writing it; the space it maps goes to *freed*."""
        cdef uint32_t i
        if index >= self.l1_size or not self.slot_of[index]:
            raise IndexError(index)
        cdef Slot *slot = &self.slots[self.slot_of[index] - 1]
        for i in range(self.l2_entries):
            self._free_old(qc_be64(slot.table + (<uint64_t> i << self.entry_shift)), 0, &freed.v)
        if slot.fresh or slot.dirty_lo != slot.dirty_hi:
            self.dirty_count -= 1
        slot.fresh = slot.busy = False
        slot.dirty_lo = slot.dirty_hi = 0
        self.slot_of[index] = 0

    def set_fresh(self, uint32_t index):
        """The loaded table of *index* moves to a new place: it must be written whole before L1 names it."""
        if index >= self.l1_size or not self.slot_of[index]:
            raise IndexError(index)
        cdef Slot *slot = &self.slots[self.slot_of[index] - 1]
        if not slot.fresh and slot.dirty_lo == slot.dirty_hi:
            self.dirty_count += 1
        slot.fresh = True

    def dirty(self):
        """The tables with unwritten bytes: ``[(l1 index, first byte, last byte + 1, fresh)]``."""
        cdef int i
        cdef Slot *slot
        cdef list out = []
        for i in range(self.slots_made):
            slot = &self.slots[i]
            if slot.busy and (slot.fresh or slot.dirty_lo != slot.dirty_hi):
                out.append((slot.l1_index, slot.dirty_lo, slot.dirty_hi, bool(slot.fresh)))
        return out

    def room(self, uint32_t index):
        """Whether the table of *index* is dirty already, or may become so before a commit is needed."""
        cdef Slot *slot
        if self.dirty_count + 2 < self.slot_count:
            return True
        if index >= self.l1_size or not self.slot_of[index]:
            return False
        slot = &self.slots[self.slot_of[index] - 1]
        return slot.fresh or slot.dirty_lo != slot.dirty_hi

    def take(self, uint32_t index, bint whole, uint32_t unit):
        """Copy the dirty bytes of a table, widened to multiples of *unit*, and mark it clean.

        Returns ``(start byte in the table, bytes)``.  The table stays in memory
        until :meth:`written`: what is on storage is older than it.
        """
        if index >= self.l1_size or not self.slot_of[index]:
            raise IndexError(index)
        cdef Slot *slot = &self.slots[self.slot_of[index] - 1]
        cdef uint32_t lo = 0, hi = self.cluster_size
        if not whole:
            lo = slot.dirty_lo // unit * unit
            hi = min((slot.dirty_hi + unit - 1) // unit * unit, <uint32_t> self.cluster_size)
        if slot.fresh or slot.dirty_lo != slot.dirty_hi:
            self.dirty_count -= 1
        slot.dirty_lo = slot.dirty_hi = 0
        slot.fresh = False
        slot.writing = True
        return lo, PyBytes_FromStringAndSize(<char *> slot.table + lo, hi - lo)

    def written(self):
        """Every copy that :meth:`take` gave out is on storage, or marked dirty again."""
        cdef int i
        for i in range(self.slots_made):
            self.slots[i].writing = False

    def mark(self, uint32_t index, uint32_t lo, uint32_t hi, bint fresh):
        """Mark bytes of a table dirty again (a write of them failed)."""
        if index < self.l1_size and self.slot_of[index] and lo <= hi <= self.cluster_size:
            self._dirty(&self.slots[self.slot_of[index] - 1], lo, hi)
            if fresh:
                self.set_fresh(index)

    cdef void _dirty(self, Slot *slot, uint32_t lo, uint32_t hi) noexcept nogil:
        if slot.dirty_lo == slot.dirty_hi:
            if not slot.fresh:
                self.dirty_count += 1
            slot.dirty_lo = lo
            slot.dirty_hi = hi
        else:
            if lo < slot.dirty_lo:
                slot.dirty_lo = lo
            if hi > slot.dirty_hi:
                slot.dirty_hi = hi

    def table(self, uint32_t index):
        """A copy of the table in memory."""
        if index >= self.l1_size or not self.slot_of[index]:
            raise IndexError(index)
        return PyBytes_FromStringAndSize(<char *> self.slots[self.slot_of[index] - 1].table, self.cluster_size)

    # -- lookup --------------------------------------------------------------------------------------------------

    cdef int _corrupt(self, int what, uint64_t value, uint64_t l1, uint64_t l2) noexcept nogil:
        self.bad = what
        self.bad_value = value
        self.bad_l1 = l1
        self.bad_l2 = l2
        return CORRUPT

    cdef uint64_t *_entry(self, uint64_t guest) noexcept nogil:
        """The entry of a guest offset in a loaded table, or NULL."""
        cdef uint64_t index = guest >> (self.cluster_bits + self.l2_bits)
        cdef Slot *slot
        if index >= self.l1_size or self.slot_of[index] == 0:
            return NULL
        slot = &self.slots[self.slot_of[index] - 1]
        slot.used = True
        return <uint64_t *> (
            slot.table + (((guest >> self.cluster_bits) & (self.l2_entries - 1)) << self.entry_shift)
        )

    cdef uint64_t _gap(self, uint64_t pos, uint64_t maxlen) noexcept nogil:
        """Guest bytes from *pos* on, at most *maxlen*, for which L1 has no table."""
        cdef uint64_t span = 1ULL << (self.cluster_bits + self.l2_bits)
        cdef uint64_t index = pos >> (self.cluster_bits + self.l2_bits)
        cdef uint64_t covered = span - (pos & (span - 1))
        index += 1
        while covered < maxlen and index < self.l1_size and (self.l1[index] & QC_OFFSET_MASK) == 0:
            covered += span
            index += 1
        return maxlen if index >= self.l1_size or covered > maxlen else covered

    cdef int lookup(self, uint64_t pos, uint64_t maxlen, int *kind, uint64_t *host, uint64_t *length) noexcept nogil:
        """One run at *pos*, as long as one table and one kind allow; OK, NEED or CORRUPT."""
        cdef unsigned span_bits = self.cluster_bits + self.l2_bits
        cdef uint64_t index = pos >> span_bits
        cdef uint64_t inside, covered, e, offset, expect, step
        cdef uint64_t mask = QC_OFFSET_MASK | QC_ZERO | QC_COMPRESSED
        cdef uint32_t i
        cdef uint8_t *table
        if index >= self.l1_size or (self.l1[index] & QC_OFFSET_MASK) == 0:
            kind[0] = RUN_HOLE
            host[0] = QC_NO_OFFSET
            length[0] = self._gap(pos, maxlen)
            return OK
        offset = self.l1[index] & QC_OFFSET_MASK
        if offset & (self.cluster_size - 1):
            return self._corrupt(1, offset, index, 0)
        if self.slot_of[index]:
            self.slots[self.slot_of[index] - 1].used = True
            table = self.slots[self.slot_of[index] - 1].table
        elif offset >= self.lent_offset and offset - self.lent_offset + self.cluster_size <= self.lent_length:
            table = <uint8_t *> self.lent.buf + (offset - self.lent_offset)
        else:
            return NEED
        if self.extended:
            return self._lookup_ext(table, pos, maxlen, kind, host, length)
        i = (pos >> self.cluster_bits) & (self.l2_entries - 1)
        inside = pos & (self.cluster_size - 1)
        covered = self.cluster_size - inside
        e = qc_be64(table + 8ULL * i)
        if e & QC_COMPRESSED:
            if self.has_data_file:
                return self._corrupt(4, e, index, i)
            kind[0] = RUN_COMPRESSED
            host[0] = e
            length[0] = covered if covered < maxlen else maxlen
            return OK
        offset = e & QC_OFFSET_MASK
        if offset & (self.cluster_size - 1):
            return self._corrupt(2, offset, index, i)
        if e & QC_ZERO:
            if self.old_version:
                return self._corrupt(3, e, index, i)
            kind[0] = RUN_ZERO
        elif offset or (self.has_data_file and e & QC_COPIED):
            kind[0] = RUN_DATA
        else:
            kind[0] = RUN_HOLE
        # Source: qemu; an offset of 0 in an external data file counts for data, not for zeros.
        if self.has_data_file and (offset or kind[0] == RUN_DATA):
            if offset != pos - inside:
                return self._corrupt(5, offset, pos - inside, i)
            host[0] = pos
            step = self.cluster_size
        elif offset:
            host[0] = offset + inside
            step = self.cluster_size
        else:
            host[0] = QC_NO_OFFSET
            step = 0
        # Entries that continue this one differ from it by one cluster, or not at all.
        expect = (e & mask) + step
        i += 1
        while covered < maxlen and i < self.l2_entries:
            if (qc_be64(table + 8ULL * i) & mask) != expect:
                break
            expect += step
            covered += self.cluster_size
            i += 1
        length[0] = covered if covered < maxlen else maxlen
        return OK

    cdef int _lookup_ext(self, uint8_t *table, uint64_t pos, uint64_t maxlen, int *kind, uint64_t *host,
                         uint64_t *length) noexcept nogil:
        """As :meth:`lookup`, by subclusters."""
        cdef uint32_t i = (pos >> self.cluster_bits) & (self.l2_entries - 1)
        cdef uint32_t sub = (pos & (self.cluster_size - 1)) >> self.sub_bits
        cdef uint64_t start = pos & ~((1ULL << self.sub_bits) - 1)
        cdef uint64_t covered = 0, e, bitmap, offset, here
        cdef int what, first = -1
        cdef bint placed
        while i < self.l2_entries and covered < maxlen + (pos - start):
            e = qc_be64(table + 16ULL * i)
            bitmap = qc_be64(table + 16ULL * i + 8)
            if e & QC_COMPRESSED:
                if self.has_data_file:
                    return self._corrupt(4, e, pos >> (self.cluster_bits + self.l2_bits), i)
                if first >= 0:
                    break
                kind[0] = RUN_COMPRESSED
                host[0] = e
                covered = self.cluster_size - (pos & (self.cluster_size - 1))
                length[0] = covered if covered < maxlen else maxlen
                return OK
            offset = e & QC_OFFSET_MASK
            if offset & (self.cluster_size - 1):
                return self._corrupt(2, offset, pos >> (self.cluster_bits + self.l2_bits), i)
            placed = offset != 0 or (self.has_data_file and (e & QC_COPIED) != 0)
            if (low32(bitmap) & (bitmap >> 32)) or (low32(bitmap) and not placed):
                return self._corrupt(6, bitmap, pos >> (self.cluster_bits + self.l2_bits), i)
            if placed and self.has_data_file and offset != ((start + covered) & ~(self.cluster_size - 1)):
                return self._corrupt(5, offset, (start + covered) & ~(self.cluster_size - 1), i)
            while sub < 32 and covered < maxlen + (pos - start):
                if (bitmap >> sub) & 1:
                    what = RUN_DATA
                elif (bitmap >> (32 + sub)) & 1:
                    what = RUN_ZERO
                else:
                    what = RUN_HOLE
                here = offset + (<uint64_t> sub << self.sub_bits) if placed else QC_NO_OFFSET
                if first < 0:
                    first = what
                    kind[0] = what
                    host[0] = here
                elif what != first or (
                    here != QC_NO_OFFSET if host[0] == QC_NO_OFFSET else here != host[0] + covered
                ):
                    covered -= pos - start
                    length[0] = covered if covered < maxlen else maxlen
                    if host[0] != QC_NO_OFFSET:
                        host[0] += pos - start
                    return OK
                covered += 1ULL << self.sub_bits
                sub += 1
            sub = 0
            i += 1
        covered -= pos - start
        length[0] = covered if covered < maxlen else maxlen
        if host[0] != QC_NO_OFFSET:
            host[0] += pos - start
        return OK

    # -- metadata places -------------------------------------------------------------------------------------------

    cdef int _guard_one(self, uint64_t cluster) except -1:
        cdef uint64_t *old = self.guarded
        cdef uint64_t size, i, j, at
        if 2 * (self.guarded_count + 1) > self.guarded_mask:
            size = 256 if old == NULL else 2 * (self.guarded_mask + 1)
            self.guarded = <uint64_t *> calloc(size, sizeof(uint64_t))
            if self.guarded == NULL:
                self.guarded = old
                raise MemoryError()
            j = 0 if old == NULL else self.guarded_mask + 1
            self.guarded_mask = size - 1
            for i in range(j):
                if old[i]:
                    at = (old[i] * 0x9E3779B97F4A7C15ULL) >> 20 & self.guarded_mask
                    while self.guarded[at]:
                        at = (at + 1) & self.guarded_mask
                    self.guarded[at] = old[i]
            free(old)
        at = ((cluster + 1) * 0x9E3779B97F4A7C15ULL) >> 20 & self.guarded_mask
        while self.guarded[at]:
            if self.guarded[at] == cluster + 1:
                return 0
            at = (at + 1) & self.guarded_mask
        self.guarded[at] = cluster + 1
        self.guarded_count += 1
        return 0

    cdef bint _is_guarded(self, uint64_t offset, uint64_t length) noexcept nogil:
        cdef uint64_t cluster, at
        if self.guarded == NULL or length == 0:
            return False
        for cluster in range(offset >> self.cluster_bits, ((offset + length - 1) >> self.cluster_bits) + 1):
            at = ((cluster + 1) * 0x9E3779B97F4A7C15ULL) >> 20 & self.guarded_mask
            while self.guarded[at]:
                if self.guarded[at] == cluster + 1:
                    return True
                at = (at + 1) & self.guarded_mask
        return False

    def guard(self, uint64_t offset, uint64_t length):
        """Host bytes from *offset* hold metadata: guest data must never be written there (Invariant: I9)."""
        cdef uint64_t cluster
        if length:
            for cluster in range(offset >> self.cluster_bits, ((offset + length - 1) >> self.cluster_bits) + 1):
                self._guard_one(cluster)

    def guard_tables(self):
        """Guard every L2 table that L1 names."""
        cdef uint32_t i
        for i in range(self.l1_size):
            if self.l1[i] & QC_OFFSET_MASK:
                self._guard_one((self.l1[i] & QC_OFFSET_MASK) >> self.cluster_bits)

    def guarded_in(self, uint64_t offset, uint64_t length):
        """Whether any of these host bytes hold metadata."""
        return self._is_guarded(offset, length)

    def unguard_runs(self, RunList runs not None):
        """As :meth:`unguard`, of the host bytes of every run."""
        cdef size_t i
        for i in range(runs.v.count):
            self.unguard(runs.v.runs[i].host, runs.v.runs[i].length)

    def unguard(self, uint64_t offset, uint64_t length):
        """The clusters were freed and may hold anything."""
        cdef uint64_t cluster, at, hole, home
        if self.guarded == NULL or length == 0:
            return
        for cluster in range(offset >> self.cluster_bits, ((offset + length - 1) >> self.cluster_bits) + 1):
            at = ((cluster + 1) * 0x9E3779B97F4A7C15ULL) >> 20 & self.guarded_mask
            while self.guarded[at] and self.guarded[at] != cluster + 1:
                at = (at + 1) & self.guarded_mask
            if not self.guarded[at]:
                continue
            self.guarded_count -= 1
            # Close the gap: entries behind it move up if their home allows.
            hole = at
            while True:
                self.guarded[hole] = 0
                while True:
                    at = (at + 1) & self.guarded_mask
                    if not self.guarded[at]:
                        break
                    home = (self.guarded[at] * 0x9E3779B97F4A7C15ULL) >> 20 & self.guarded_mask
                    if ((at - home) & self.guarded_mask) >= ((at - hole) & self.guarded_mask):
                        break
                if not self.guarded[at]:
                    break
                self.guarded[hole] = self.guarded[at]
                hole = at

    # -- writing -------------------------------------------------------------------------------------------------

    cdef int _write_class(
        self, uint64_t e, uint64_t bitmap, uint64_t pos, uint64_t maxlen, uint64_t *host
    ) noexcept nogil:
        """How the cluster at *pos* must be written; *host* is where *pos* lies in it."""
        cdef uint64_t offset = e & QC_OFFSET_MASK
        cdef uint64_t inside = pos & (self.cluster_size - 1)
        cdef uint64_t want, last
        if e & QC_COMPRESSED or not e & QC_COPIED:
            return WRITE_ALLOCATE
        if offset == 0 and not self.has_data_file:
            return WRITE_ALLOCATE
        host[0] = offset + inside
        if not self.extended:
            return WRITE_REUSE if e & QC_ZERO else WRITE_IN_PLACE
        last = inside + maxlen
        if last > self.cluster_size:
            last = self.cluster_size
        want = (1ULL << ((last + (1ULL << self.sub_bits) - 1) >> self.sub_bits)) - 1
        want &= ~((1ULL << (inside >> self.sub_bits)) - 1)
        return WRITE_IN_PLACE if (bitmap & want) == want else WRITE_REUSE

    cdef int plan(self, uint64_t pos, uint64_t maxlen, uint64_t *host, uint64_t *length) noexcept nogil:
        """How to write at *pos*, and for how many bytes that holds (host offsets in one piece)."""
        cdef uint64_t *entry = self._entry(pos)
        cdef uint64_t e, guest, bitmap = 0, here = 0, covered, part
        cdef uint64_t index = pos >> (self.cluster_bits + self.l2_bits)
        cdef uint32_t i
        cdef int action, other
        if entry == NULL or not self.l1[index] & QC_COPIED:
            return WRITE_NEED
        i = (pos >> self.cluster_bits) & (self.l2_entries - 1)
        e = qc_swap64(entry[0])
        if self.extended:
            bitmap = qc_swap64(entry[1])
        if not e & QC_COMPRESSED:
            if (e & QC_OFFSET_MASK) & (self.cluster_size - 1):
                self._corrupt(2, e & QC_OFFSET_MASK, index, i)
                return WRITE_CORRUPT
            guest = pos & ~(self.cluster_size - 1)
            if self.has_data_file and e & (QC_OFFSET_MASK | QC_COPIED) and (e & QC_OFFSET_MASK) != guest:
                self._corrupt(5, e & QC_OFFSET_MASK, guest, i)
                return WRITE_CORRUPT
        host[0] = QC_NO_OFFSET
        action = self._write_class(e, bitmap, pos, maxlen, host)
        covered = self.cluster_size - (pos & (self.cluster_size - 1))
        while covered < maxlen:
            i += 1
            if i == self.l2_entries:
                break
            entry += 2 if self.extended else 1
            e = qc_swap64(entry[0])
            if self.extended:
                bitmap = qc_swap64(entry[1])
            other = self._write_class(e, bitmap, pos + covered, maxlen - covered, &here)
            if other != action:
                break
            if action != WRITE_ALLOCATE and here != host[0] + covered:
                break
            covered += self.cluster_size
        part = covered if covered < maxlen else maxlen
        length[0] = part
        return action

    def plan_write(self, uint64_t pos, uint64_t maxlen):
        """``(action, length, host)`` for a write at *pos*; see :c:enum:`WriteAction`."""
        cdef uint64_t host = QC_NO_OFFSET, length = 0
        cdef int action = self.plan(pos, maxlen, &host, &length)
        return action, length, host

    def entry(self, uint64_t guest):
        """``(entry, bitmap)`` of a guest offset whose table is loaded; the bitmap is 0 without extended L2."""
        cdef uint64_t *e = self._entry(guest)
        if e == NULL:
            raise LookupError(guest)
        return qc_swap64(e[0]), qc_swap64(e[1]) if self.extended else 0

    cdef int _free_old(self, uint64_t e, uint64_t host, RunVec *freed) except -1:
        """Note the space that entry *e* used, unless it stays at *host*."""
        cdef uint64_t offset = e & QC_OFFSET_MASK
        cdef int code = 0
        if e & QC_COMPRESSED:
            code = rv_append(freed, RUN_COMPRESSED, 0, 1, e, 0)
        elif offset and offset != host and not self.has_data_file:
            # Guest offsets do not matter here; equal ones behind each other let neighbours merge.
            code = rv_append(freed, RUN_DATA, offset, self.cluster_size, offset, 0)
        if code < 0:
            raise MemoryError()
        return 0

    cdef uint64_t _sub_mask(self, uint64_t cluster, uint64_t lo, uint64_t hi) noexcept nogil:
        """The subclusters of the cluster at guest offset *cluster* inside guest bytes [lo, hi)."""
        cdef uint64_t a = lo - cluster if lo > cluster else 0
        cdef uint64_t b = hi - cluster if hi < cluster + self.cluster_size else self.cluster_size
        if hi <= cluster or a >= b:
            return 0
        a >>= self.sub_bits
        b = (b + (1ULL << self.sub_bits) - 1) >> self.sub_bits
        return ((1ULL << b) - 1) & ~((1ULL << a) - 1)

    def set_data(self, uint64_t guest, uint32_t count, uint64_t host, uint64_t lo, uint64_t hi, RunList freed):
        """Point *count* clusters from *guest* at *host* on; guest bytes [lo, hi) are valid there.

        Space that the old entries used goes to *freed*.  The table must be
        loaded and writable and hold all the clusters.
        """
        cdef uint32_t _i
        cdef uint64_t e, bitmap, valid
        cdef uint64_t *entry = self._entry(guest)
        if entry == NULL or ((guest >> self.cluster_bits) & (self.l2_entries - 1)) + count > self.l2_entries:
            raise LookupError(guest)
        self._touch(guest, count)
        for _i in range(count):
            e = qc_swap64(entry[0])
            self._free_old(e, host, &freed.v)
            entry[0] = qc_swap64(host | QC_COPIED)
            if self.extended:
                bitmap = qc_swap64(entry[1])
                valid = self._sub_mask(guest, lo, hi)
                if e & QC_COMPRESSED:
                    bitmap = 0xFFFFFFFFULL
                else:
                    bitmap = (bitmap | valid) & ~(valid << 32)
                entry[1] = qc_swap64(bitmap)
                entry += 1
            entry += 1
            guest += self.cluster_size
            host += self.cluster_size

    def set_zero(self, uint64_t guest, uint32_t count, bint keep, bint skip_empty, RunList freed):
        """Make *count* whole clusters read as zeros; with *keep* they keep their own space.

        With *skip_empty* entries that are unallocated stay so.
        """
        cdef uint32_t _i
        cdef uint64_t e, place
        cdef uint64_t *entry = self._entry(guest)
        if entry == NULL or ((guest >> self.cluster_bits) & (self.l2_entries - 1)) + count > self.l2_entries:
            raise LookupError(guest)
        self._touch(guest, count)
        for _i in range(count):
            e = qc_swap64(entry[0])
            if skip_empty and e == 0 and (not self.extended or entry[1] == 0):
                entry += 2 if self.extended else 1
                continue
            place = 0
            if not e & QC_COMPRESSED and e & QC_COPIED and (keep or self.has_data_file):
                place = (e & QC_OFFSET_MASK) | QC_COPIED
            self._free_old(e, place & QC_OFFSET_MASK, &freed.v)
            if self.extended:
                entry[0] = qc_swap64(place)
                entry[1] = qc_swap64(0xFFFFFFFF00000000ULL)
                entry += 1
            else:
                entry[0] = qc_swap64(place | QC_ZERO)
            entry += 1

    def set_zero_subclusters(self, uint64_t guest, uint64_t lo, uint64_t hi):
        """Make the subclusters inside guest bytes [lo, hi) of one uncompressed cluster read as zeros."""
        cdef uint64_t *entry = self._entry(guest)
        cdef uint64_t bitmap, mask
        if entry == NULL or not self.extended:
            raise LookupError(guest)
        self._touch(guest, 1)
        mask = self._sub_mask(guest & ~(self.cluster_size - 1), lo, hi)
        bitmap = qc_swap64(entry[1])
        entry[1] = qc_swap64((bitmap & ~mask) | (mask << 32))

    def set_hole(self, uint64_t guest, uint32_t count, RunList freed):
        """Unmap *count* whole clusters: what lies below shows again."""
        cdef uint32_t _i
        cdef uint64_t *entry = self._entry(guest)
        if entry == NULL or ((guest >> self.cluster_bits) & (self.l2_entries - 1)) + count > self.l2_entries:
            raise LookupError(guest)
        self._touch(guest, count)
        for _i in range(count):
            self._free_old(qc_swap64(entry[0]), 0, &freed.v)
            entry[0] = 0
            if self.extended:
                entry[1] = 0
                entry += 1
            entry += 1

    def set_entry(self, uint64_t guest, uint64_t e, uint64_t bitmap):
        """Replace one entry as it is (compressed clusters, repairs)."""
        cdef uint64_t *entry = self._entry(guest)
        if entry == NULL:
            raise LookupError(guest)
        self._touch(guest, 1)
        entry[0] = qc_swap64(e)
        if self.extended:
            entry[1] = qc_swap64(bitmap)

    cdef void _touch(self, uint64_t guest, uint32_t count) noexcept:
        cdef uint64_t index = guest >> (self.cluster_bits + self.l2_bits)
        cdef uint32_t i = (guest >> self.cluster_bits) & (self.l2_entries - 1)
        self._dirty(&self.slots[self.slot_of[index] - 1], i << self.entry_shift, (i + count) << self.entry_shift)


# -- whole tables as bytes (snapshots) ------------------------------------------------------------------------------

def l2_references(table, unsigned cluster_bits, bint extended, RunList out not None):
    """Append to *out* the space that an L2 table uses: DATA runs of whole clusters, COMPRESSED entries."""
    cdef Py_buffer view
    cdef uint64_t e, offset, i, count
    cdef unsigned shift = 4 if extended else 3
    cdef int code = 0
    PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
    try:
        count = view.len >> shift
        for i in range(count):
            e = qc_be64(<uint8_t *> view.buf + (i << shift))
            offset = e & QC_OFFSET_MASK
            if e & QC_COMPRESSED:
                code = rv_append(&out.v, RUN_COMPRESSED, 0, 1, e, 0)
            elif offset:
                code = rv_append(&out.v, RUN_DATA, offset, 1ULL << cluster_bits, offset, 0)
            if code < 0:
                raise MemoryError()
    finally:
        PyBuffer_Release(&view)


def l2_clear_copied(table, bint extended):
    """Clear the COPIED flag of every entry of a table in memory; returns whether one was set."""
    cdef Py_buffer view
    cdef uint64_t i, count
    cdef unsigned shift = 4 if extended else 3
    cdef uint8_t found = 0
    cdef uint8_t *at
    PyObject_GetBuffer(table, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        count = view.len >> shift
        for i in range(count):
            at = <uint8_t *> view.buf + (i << shift)
            # Big-endian: the flag is the top bit of the first byte; compressed entries never have it.
            found |= at[0] & 0x80
            at[0] &= 0x7F
    finally:
        PyBuffer_Release(&view)
    return found != 0
