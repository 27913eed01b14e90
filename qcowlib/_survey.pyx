# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a disk and of a file are, summed up by cells of equal size.

Invariant: reads only; memory is the number of cells times that of categories,
and one byte a unit of the file, whatever the image holds; what lies outside
counts for nothing.
"""
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from qcowlib._extent cimport Run, RunList
from qcowlib._ondisk cimport (
    QC_COMPRESSED,
    QC_OFFSET_MASK,
    RUN_COMPRESSED,
    RUN_DATA,
    RUN_END,
    RUN_HOLE,
    RUN_SPARSE,
    qc_be64,
    qc_comp_length,
    qc_comp_offset,
    qc_get_refcount,
)

cdef enum:
    # What refers to a unit of the file.
    OTHER = 1          # header, L1, snapshot table, bitmaps, encryption header
    TABLE = 2          # L2
    REFCOUNT = 4       # refcount table and blocks
    ACTIVE = 8         # data that the guest sees
    SNAPSHOT = 16      # data that a snapshot holds
    PACKED = 32        # compressed
    COUNTED = 64       # the refcount is not zero

MARK_OTHER = OTHER
MARK_TABLE = TABLE
MARK_REFCOUNT = REFCOUNT
MARK_ACTIVE = ACTIVE
MARK_SNAPSHOT = SNAPSHOT


cdef class Tally:
    """Bytes by cell and category: cell *i* covers *cell_bytes* from ``i * cell_bytes`` on."""

    cdef uint64_t *counts
    cdef readonly uint64_t total
    cdef readonly uint64_t cell_bytes
    cdef readonly int cells
    cdef readonly int categories

    def __cinit__(self, uint64_t total, uint64_t cell_bytes, int categories):
        if cell_bytes == 0 or categories < 1 or categories > 64:
            raise ValueError("a cell has bytes and 1 to 64 categories")
        if total // cell_bytes >= (1 << 20):
            raise ValueError("too many cells")
        self.total = total
        self.cell_bytes = cell_bytes
        self.cells = <int> ((total + cell_bytes - 1) // cell_bytes)
        self.categories = categories
        self.counts = <uint64_t *> calloc(<size_t> self.cells * <size_t> categories + 1, sizeof(uint64_t))
        if self.counts == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.counts)

    cdef void _add(self, uint64_t start, uint64_t length, int category) noexcept nogil:
        cdef uint64_t cell, room
        if start >= self.total:
            return
        if length > self.total - start:
            length = self.total - start
        while length:
            cell = start // self.cell_bytes
            room = (cell + 1) * self.cell_bytes - start
            if room > length:
                room = length
            self.counts[cell * <uint64_t> self.categories + <uint64_t> category] += room
            start += room
            length -= room

    def add(self, uint64_t start, uint64_t length, int category):
        """Count *length* bytes from *start* in *category*.  Raises ValueError for an unknown one."""
        if category < 0 or category >= self.categories:
            raise ValueError("no such category")
        self._add(start, length, category)

    def add_kinds(self, RunList runs not None):
        """Count *runs* by their kind (at least 6 categories)."""
        cdef size_t i
        cdef Run *run
        if self.categories < 6:
            raise ValueError("kinds take 6 categories")
        with nogil:
            for i in range(runs.v.count):
                run = &runs.v.runs[i]
                if 0 <= run.kind < 6:
                    self._add(run.guest, run.length, run.kind)

    def add_depths(self, RunList runs not None):
        """Count *runs*: holes in category 0, layer *n* in category ``n + 1``, all deeper ones in the last."""
        cdef size_t i
        cdef int category
        cdef Run *run
        with nogil:
            for i in range(runs.v.count):
                run = &runs.v.runs[i]
                category = 0
                if run.kind != RUN_HOLE and run.kind != RUN_END:
                    category = run.layer + 1
                    if category >= self.categories:
                        category = self.categories - 1
                self._add(run.guest, run.length, category)

    def add_pieces(self, RunList runs not None, uint64_t small, uint64_t large):
        """Count stored *runs* by length: below *small* in 3, below *large* in 2, else in 1; all others in 0."""
        cdef size_t i
        cdef int category
        cdef Run *run
        if self.categories < 4:
            raise ValueError("pieces take 4 categories")
        with nogil:
            for i in range(runs.v.count):
                run = &runs.v.runs[i]
                category = 0
                if run.kind == RUN_DATA or run.kind == RUN_SPARSE or run.kind == RUN_COMPRESSED:
                    category = 3 if run.length < small else 2 if run.length < large else 1
                self._add(run.guest, run.length, category)

    def __getitem__(self, int cell):
        """Return the bytes of one cell, by category."""
        if cell < 0 or cell >= self.cells:
            raise IndexError(cell)
        cdef uint64_t *first = self.counts + <size_t> cell * <size_t> self.categories
        return tuple([first[i] for i in range(self.categories)])

    def __len__(self):
        return self.cells


cdef class Owners:
    """What refers to each unit (a power of two of bytes, at least a cluster) of a file of *size* bytes."""

    cdef uint8_t *marks
    cdef uint64_t size
    cdef uint64_t units
    cdef unsigned cluster_bits
    cdef unsigned unit_bits

    def __cinit__(self, uint64_t size, unsigned cluster_bits, unsigned unit_bits):
        if not 9 <= cluster_bits <= 21 or not cluster_bits <= unit_bits < 63:
            raise ValueError("a unit is a cluster or more")
        self.size = size
        self.cluster_bits = cluster_bits
        self.unit_bits = unit_bits
        self.units = (size >> unit_bits) + 1
        if self.units > (1 << 26):
            raise ValueError("too many units")
        self.marks = <uint8_t *> calloc(self.units, 1)
        if self.marks == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.marks)

    cdef void _mark(self, uint64_t offset, uint64_t length, uint8_t mark) noexcept nogil:
        cdef uint64_t unit, last
        if length == 0 or offset >= self.size:
            return
        if length > self.size - offset:
            length = self.size - offset
        last = (offset + length - 1) >> self.unit_bits
        for unit in range(offset >> self.unit_bits, last + 1):
            self.marks[unit] |= mark

    def mark(self, uint64_t offset, uint64_t length, int mark):
        """Something of kind *mark* lies at *offset*."""
        self._mark(offset, length, <uint8_t> mark)

    def mark_entries(self, const uint8_t[::1] table not None, size_t stride, int mark):
        """Mark what the entries of an L2 table (*stride* 8, or 16 with subclusters) refer to as *mark*."""
        cdef size_t at, length = <size_t> table.shape[0]
        cdef const uint8_t *data
        cdef uint64_t entry, cluster = 1ULL << self.cluster_bits
        if stride != 8 and stride != 16:
            raise ValueError("an entry has 8 or 16 bytes")
        if length < stride:
            return
        data = &table[0]
        with nogil:
            for at in range(length // stride):
                entry = qc_be64(data + at * stride)
                if entry & QC_COMPRESSED:
                    self._mark(
                        qc_comp_offset(entry, self.cluster_bits),
                        qc_comp_length(entry, self.cluster_bits),
                        <uint8_t> (mark | PACKED),
                    )
                elif entry & QC_OFFSET_MASK:
                    self._mark(entry & QC_OFFSET_MASK, cluster, <uint8_t> mark)

    def mark_counted(self, const uint8_t[::1] block not None, uint64_t first, unsigned order):
        """Mark the clusters from number *first* on whose refcount in *block* is not zero."""
        cdef uint64_t i, count, cluster = 1ULL << self.cluster_bits
        cdef const uint8_t *data
        if order > 6:
            raise ValueError("refcounts have 1 to 64 bits")
        if block.shape[0] == 0:
            return
        count = (<uint64_t> block.shape[0] * 8) >> order
        if first > (self.size >> self.cluster_bits):
            return
        data = &block[0]
        with nogil:
            for i in range(count):
                if qc_get_refcount(data, i, order):
                    self._mark((first + i) << self.cluster_bits, cluster, COUNTED)

    def tally(self, Tally into not None):
        """Count the file in *into*: free, other metadata, L2, refcounts, data, packed, shared, snapshot, leaked."""
        cdef uint64_t unit
        cdef uint8_t mark
        cdef int category
        if into.categories < 9:
            raise ValueError("owners take 9 categories")
        with nogil:
            for unit in range(self.units):
                mark = self.marks[unit]
                if mark & OTHER:
                    category = 1
                elif mark & TABLE:
                    category = 2
                elif mark & REFCOUNT:
                    category = 3
                elif mark & ACTIVE and mark & SNAPSHOT:
                    category = 6
                elif mark & SNAPSHOT:
                    category = 7
                elif mark & PACKED:
                    category = 5
                elif mark & ACTIVE:
                    category = 4
                else:
                    category = 8 if mark & COUNTED else 0
                into._add(unit << self.unit_bits, 1ULL << self.unit_bits, category)
