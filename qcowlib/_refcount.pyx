# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Reference counts of host clusters, and the allocator.

No I/O: a question is answered, or the answer names the refcount block that must
be loaded (NEED) or made (NO_BLOCK) first.

Invariants: a count in memory is never below the references that storage may
still show, because callers decrement only what is durably unmapped
(Invariant: I1, I4); counts never wrap; a dirty block is never evicted.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from qcowlib._extent cimport Run, RunList, rv_append
from qcowlib._ondisk cimport (
    QC_COMPRESSED, QC_COPIED, QC_OFFSET_MASK, QC_RT_OFFSET_MASK, RUN_COMPRESSED, RUN_DATA,
    qc_be64, qc_get_refcount, qc_put64, qc_set_refcount,
)

cdef enum:
    OK = 0
    NEED = 1
    NO_BLOCK = 2
    RANGE = 3              # a count would leave 0 .. 2**bits - 1

cdef class Refcounts:
    """All counts of one image; *limit* clean blocks are kept in memory."""

    def __cinit__(self, unsigned cluster_bits, unsigned order, table, uint64_t limit):
        cdef Py_buffer view
        cdef uint64_t i
        if cluster_bits < 9 or cluster_bits > 21 or order > 6:
            raise ValueError(order)
        self.cluster_bits = cluster_bits
        self.order = order
        self.per_bits = cluster_bits + 3 - order
        self.per_block = 1ULL << self.per_bits
        self.maximum = 0xFFFFFFFFFFFFFFFFULL if order == 6 else (1ULL << (1U << order)) - 1
        self.limit = limit if limit > 4 else 4
        PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
        try:
            self._resize(view.len // 8)
            for i in range(self.table_size):
                self.table[i] = qc_be64(<uint8_t *> view.buf + 8 * i)
        finally:
            PyBuffer_Release(&view)

    def __dealloc__(self):
        cdef uint64_t i
        if self.blocks != NULL:
            for i in range(self.table_size):
                free(self.blocks[i].data)
        free(self.blocks)
        free(self.table)

    cdef int _resize(self, uint64_t count) except -1:
        cdef uint64_t *table
        cdef Block *blocks
        if count > (1ULL << 20) or count < self.table_size:
            raise ValueError(count)
        table = <uint64_t *> calloc(count + 1, sizeof(uint64_t))
        blocks = <Block *> calloc(count + 1, sizeof(Block))
        if table == NULL or blocks == NULL:
            free(table)
            free(blocks)
            raise MemoryError()
        if self.table_size:
            memcpy(table, self.table, self.table_size * sizeof(uint64_t))
            memcpy(blocks, self.blocks, self.table_size * sizeof(Block))
        free(self.table)
        free(self.blocks)
        self.table = table
        self.blocks = blocks
        self.table_size = count
        return 0

    def grow_table(self, uint64_t entries):
        """Room for *entries* refcount blocks; the caller writes the new table."""
        self._resize(entries)

    def block_offset(self, uint64_t index):
        """Where refcount block *index* lies; 0 when there is none."""
        if index >= self.table_size:
            return 0
        return self.table[index] & QC_RT_OFFSET_MASK

    def raw_entry(self, uint64_t index):
        """The refcount table entry as it is on storage."""
        if index >= self.table_size:
            raise IndexError(index)
        return self.table[index]

    def table_bytes(self, uint64_t first, uint64_t last):
        """Table entries *first* to *last* (exclusive) as they lie on storage."""
        cdef uint64_t i
        if first > last or last > self.table_size:
            raise IndexError(last)
        out = bytearray(8 * (last - first))
        cdef unsigned char *raw = out
        for i in range(first, last):
            qc_put64(raw + 8 * (i - first), self.table[i])
        return bytes(out)

    def table_clean(self):
        """Nothing of the refcount table is dirty any more."""
        self.table_dirty_lo = self.table_dirty_hi = 0

    def table_mark(self, uint64_t first, uint64_t last):
        """Entries *first* to *last* are not on storage yet."""
        if self.table_dirty_lo == self.table_dirty_hi:
            self.table_dirty_lo = first
            self.table_dirty_hi = last
        else:
            self.table_dirty_lo = min(self.table_dirty_lo, first)
            self.table_dirty_hi = max(self.table_dirty_hi, last)

    def loaded(self, uint64_t index):
        """Whether block *index* is in memory."""
        return index < self.table_size and self.blocks[index].data != NULL

    def install(self, uint64_t index, data):
        """Put the bytes of block *index* into memory."""
        cdef Py_buffer view
        if index >= self.table_size:
            raise IndexError(index)
        if self.blocks[index].data != NULL:
            return
        self._room()
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len != 1LL << self.cluster_bits:
                raise ValueError("a refcount block is one cluster")
            self.blocks[index].data = <uint8_t *> malloc(view.len)
            if self.blocks[index].data == NULL:
                raise MemoryError()
            memcpy(self.blocks[index].data, view.buf, view.len)
            self.loaded_count += 1
        finally:
            PyBuffer_Release(&view)

    def make(self, uint64_t index, uint64_t offset):
        """Start an all-zero block *index* at *offset*, written whole at the next commit."""
        if index >= self.table_size or self.blocks[index].data != NULL:
            raise IndexError(index)
        self._room()
        self.blocks[index].data = <uint8_t *> calloc(1, 1ULL << self.cluster_bits)
        if self.blocks[index].data == NULL:
            raise MemoryError()
        self.loaded_count += 1
        self.blocks[index].dirty_lo = 0
        self.blocks[index].dirty_hi = 1U << self.cluster_bits
        self.table[index] = offset
        self.table_mark(index, index + 1)

    cdef void _room(self) noexcept:
        cdef uint64_t _tries
        cdef Block *block
        if self.loaded_count < self.limit:
            return
        for _tries in range(self.table_size):
            self.hand = (self.hand + 1) % self.table_size
            block = &self.blocks[self.hand]
            if block.data != NULL and block.dirty_lo == block.dirty_hi and not block.writing:
                free(block.data)
                block.data = NULL
                self.loaded_count -= 1
                return

    # -- counts --------------------------------------------------------------------------------------------------

    def get(self, uint64_t cluster):
        """``(0, count)`` or ``(NEED, block index)``."""
        cdef uint64_t index = cluster >> self.per_bits
        if index >= self.table_size or (self.table[index] & QC_RT_OFFSET_MASK) == 0:
            return OK, 0
        if self.blocks[index].data == NULL:
            return NEED, index
        return OK, qc_get_refcount(self.blocks[index].data, cluster & (self.per_block - 1), self.order)

    def change(self, uint64_t first, uint64_t count, bint increment):
        """Add or take one reference on *count* clusters; all of them or none.

        Returns ``(0, 0)``, ``(NEED, block)``, ``(NO_BLOCK, block)`` or
        ``(RANGE, cluster)``.
        """
        cdef uint64_t cluster, index, value, last = first + count
        cdef Block *block
        if count == 0:
            return OK, 0
        for index in range(first >> self.per_bits, ((last - 1) >> self.per_bits) + 1):
            if index >= self.table_size or (self.table[index] & QC_RT_OFFSET_MASK) == 0:
                return NO_BLOCK, index
            if self.blocks[index].data == NULL:
                return NEED, index
        for cluster in range(first, last):
            value = qc_get_refcount(
                self.blocks[cluster >> self.per_bits].data, cluster & (self.per_block - 1), self.order)
            if (value == self.maximum) if increment else (value == 0):
                return RANGE, cluster
        for cluster in range(first, last):
            block = &self.blocks[cluster >> self.per_bits]
            value = qc_get_refcount(block.data, cluster & (self.per_block - 1), self.order)
            value = value + 1 if increment else value - 1
            self._set(block, cluster & (self.per_block - 1), value)
            if value == 0 and cluster < self.hint:
                self.hint = cluster
        return OK, 0

    cdef void _span(self, Run *run, uint64_t *first, uint64_t *count) noexcept nogil:
        """The host clusters of a run."""
        cdef uint64_t host = run.host, length = run.length
        cdef unsigned shift
        if run.kind == RUN_COMPRESSED:
            # Source: the compressed cluster descriptor; data ends with its last sector.
            shift = 70 - self.cluster_bits
            length = (((host & (QC_COMPRESSED - 1)) >> shift) + 1) * 512
            host &= (1ULL << (shift if shift < 56 else 56)) - 1
            length -= host & 511
        first[0] = host >> self.cluster_bits
        count[0] = ((host + length - 1) >> self.cluster_bits) - first[0] + 1 if length else 0

    def change_runs(self, RunList runs not None, size_t index, uint64_t inside, bint increment, RunList out not None):
        """Add or take one reference on each cluster of *runs*, from cluster *inside* of run *index* on.

        Taking one that is not there changes nothing.  Clusters whose count
        becomes 0 go to *out*.  Returns ``(code, where, index, inside)``: 0, or
        NEED with the block, or, adding, NO_BLOCK or RANGE with the cluster; and
        how far it came.
        """
        cdef uint64_t first = 0, count = 0, block, value, cluster
        cdef Run *run
        while index < runs.v.count:
            run = &runs.v.runs[index]
            self._span(run, &first, &count)
            while inside < count:
                cluster = first + inside
                block = cluster >> self.per_bits
                if block >= self.table_size or (self.table[block] & QC_RT_OFFSET_MASK) == 0:
                    if increment:
                        return NO_BLOCK, cluster, index, inside
                elif self.blocks[block].data == NULL:
                    return NEED, block, index, inside
                else:
                    value = qc_get_refcount(self.blocks[block].data, cluster & (self.per_block - 1), self.order)
                    if increment and value == self.maximum:
                        return RANGE, cluster, index, inside
                    if increment:
                        self._set(&self.blocks[block], cluster & (self.per_block - 1), value + 1)
                    elif value:
                        self._set(&self.blocks[block], cluster & (self.per_block - 1), value - 1)
                        if value == 1:
                            if cluster < self.hint:
                                self.hint = cluster
                            if rv_append(&out.v, RUN_DATA, cluster << self.cluster_bits, 1ULL << self.cluster_bits,
                                         cluster << self.cluster_bits, 0) < 0:
                                raise MemoryError()
                inside += 1
            inside = 0
            index += 1
        return OK, 0, index, inside

    def counted(self, RunList runs not None, size_t index, uint64_t inside, uint64_t wanted, RunList out not None):
        """Append to *out* the clusters of *runs*, compressed ones apart, whose count is *wanted*.

        Arguments and result as :meth:`change_runs`.
        """
        cdef uint64_t first = 0, count = 0, block, cluster
        while index < runs.v.count:
            self._span(&runs.v.runs[index], &first, &count)
            if runs.v.runs[index].kind == RUN_COMPRESSED:
                count = 0
            while inside < count:
                cluster = first + inside
                block = cluster >> self.per_bits
                if block < self.table_size and self.table[block] & QC_RT_OFFSET_MASK:
                    if self.blocks[block].data == NULL:
                        return NEED, block, index, inside
                    if qc_get_refcount(
                        self.blocks[block].data, cluster & (self.per_block - 1), self.order
                    ) == wanted:
                        if rv_append(&out.v, RUN_DATA, cluster << self.cluster_bits, 1ULL << self.cluster_bits,
                                     cluster << self.cluster_bits, 0) < 0:
                            raise MemoryError()
                inside += 1
            inside = 0
            index += 1
        return OK, 0, index, inside

    cdef void _set(self, Block *block, uint64_t i, uint64_t value) noexcept nogil:
        cdef uint32_t lo = (i << self.order) >> 3
        cdef uint32_t hi = ((i + 1) << self.order) + 7 >> 3
        qc_set_refcount(block.data, i, self.order, value)
        if block.dirty_lo == block.dirty_hi:
            block.dirty_lo = lo
            block.dirty_hi = hi
        else:
            if lo < block.dirty_lo:
                block.dirty_lo = lo
            if hi > block.dirty_hi:
                block.dirty_hi = hi

    cdef int find(self, uint64_t count, bint contiguous, uint64_t *first, uint64_t *got) noexcept nogil:
        """Look for free clusters from the hint upwards; on NEED or NO_BLOCK *first* is the block."""
        cdef uint64_t cluster = self.hint, index
        cdef Block *block
        first[0] = got[0] = 0
        while got[0] < count:
            index = cluster >> self.per_bits
            if index >= self.table_size or (self.table[index] & QC_RT_OFFSET_MASK) == 0:
                if got[0] and not contiguous:
                    break
                first[0] = index
                return NO_BLOCK
            block = &self.blocks[index]
            if block.data == NULL:
                if got[0] and not contiguous:
                    break
                first[0] = index
                return NEED
            if qc_get_refcount(block.data, cluster & (self.per_block - 1), self.order) == 0:
                if got[0] == 0:
                    first[0] = cluster
                got[0] += 1
            elif got[0] and not contiguous:
                break
            else:
                got[0] = 0
            cluster += 1
        return OK

    cdef void take_run(self, uint64_t first, uint64_t got, bint move_hint) noexcept nogil:
        """Give free clusters their first reference."""
        cdef uint64_t i
        for i in range(first, first + got):
            self._set(&self.blocks[i >> self.per_bits], i & (self.per_block - 1), 1)
        if move_hint:
            self.hint = first + got
        if first + got > self.high_water:
            self.high_water = first + got

    cdef void drop_run(self, uint64_t first, uint64_t got) noexcept nogil:
        """Take the only reference from clusters that were never published."""
        cdef uint64_t i
        for i in range(first, first + got):
            self._set(&self.blocks[i >> self.per_bits], i & (self.per_block - 1), 0)
        if first < self.hint:
            self.hint = first

    def allocate(self, uint64_t count, bint contiguous):
        """Find free clusters from the hint upwards and give them one reference.

        Returns ``(0, first, got, fresh)`` with ``1 <= got <= count`` (exactly
        *count* when *contiguous*), *fresh* when none of them was ever in use,
        or ``(NEED, block, 0, False)``, or ``(NO_BLOCK, block, 0, False)``:
        that block must be made before the search can go on.
        """
        cdef uint64_t first = 0, got = 0
        cdef int code
        cdef bint fresh
        if count == 0:
            raise ValueError(count)
        code = self.find(count, contiguous, &first, &got)
        if code != OK:
            return code, first, 0, False
        fresh = first >= self.high_water
        # A contiguous request may have passed smaller gaps: they stay findable.
        self.take_run(first, got, not contiguous or first == self.hint or count == 1)
        return OK, first, got, fresh

    def first_free(self, uint64_t cluster):
        """The first cluster from *cluster* on that has no reference: ``(0, cluster)`` or ``(NEED, block)``."""
        cdef uint64_t index
        while True:
            index = cluster >> self.per_bits
            if index >= self.table_size or (self.table[index] & QC_RT_OFFSET_MASK) == 0:
                return OK, cluster
            if self.blocks[index].data == NULL:
                return NEED, index
            if qc_get_refcount(self.blocks[index].data, cluster & (self.per_block - 1), self.order) == 0:
                return OK, cluster
            cluster += 1

    def flag_table(self, table, bint extended):
        """Set COPIED in each uncompressed entry of an L1 or L2 table exactly where the count is one.

        Returns ``(0, changed)`` or ``(NEED, block index)``, after which the call is repeated.
        """
        cdef Py_buffer view
        cdef uint64_t i, count, e, wanted, offset, index
        cdef unsigned shift = 4 if extended else 3
        cdef uint8_t *at
        cdef bint changed = False
        PyObject_GetBuffer(table, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            count = view.len >> shift
            for i in range(count):
                at = <uint8_t *> view.buf + (i << shift)
                e = qc_be64(at)
                offset = e & QC_OFFSET_MASK
                if e & QC_COMPRESSED or offset == 0:
                    continue
                index = (offset >> self.cluster_bits) >> self.per_bits
                wanted = e & ~QC_COPIED
                if index < self.table_size and self.table[index] & QC_RT_OFFSET_MASK:
                    if self.blocks[index].data == NULL:
                        return NEED, index
                    if qc_get_refcount(self.blocks[index].data, (offset >> self.cluster_bits) & (self.per_block - 1),
                                       self.order) == 1:
                        wanted |= QC_COPIED
                if wanted != e:
                    qc_put64(at, wanted)
                    changed = True
        finally:
            PyBuffer_Release(&view)
        return OK, changed

    def drop_empty(self, uint64_t index):
        """Forget block *index*, in memory and settled, if it counts nothing but itself; returns where it lay, else 0.

        The caller has the table entry written, then releases the cluster.
        """
        cdef Block *block
        cdef uint64_t i, offset, own
        if index >= self.table_size:
            raise IndexError(index)
        block = &self.blocks[index]
        offset = self.table[index] & QC_RT_OFFSET_MASK
        if offset == 0 or block.data == NULL or block.dirty_lo != block.dirty_hi or block.writing:
            return 0
        own = offset >> self.cluster_bits
        for i in range(self.per_block):
            if (index << self.per_bits) + i != own and qc_get_refcount(block.data, i, self.order):
                return 0
        free(block.data)
        block.data = NULL
        self.loaded_count -= 1
        self.table[index] = 0
        self.table_mark(index, index + 1)
        return offset

    def used_in(self, data):
        """How many counts in the bytes of one block are not zero."""
        cdef Py_buffer view
        cdef uint64_t i, used = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len != 1LL << self.cluster_bits:
                raise ValueError("a refcount block is one cluster")
            for i in range(self.per_block):
                used += qc_get_refcount(<uint8_t *> view.buf, i, self.order) != 0
        finally:
            PyBuffer_Release(&view)
        return used

    # -- write back ----------------------------------------------------------------------------------------------

    def dirty(self):
        """``[(block index, first byte, last byte + 1)]`` of unwritten bytes."""
        cdef uint64_t i
        cdef list out = []
        for i in range(self.table_size):
            if self.blocks[i].data != NULL and self.blocks[i].dirty_lo != self.blocks[i].dirty_hi:
                out.append((i, self.blocks[i].dirty_lo, self.blocks[i].dirty_hi))
        return out

    def take(self, uint64_t index, uint32_t unit):
        """Copy the dirty bytes, widened to multiples of *unit*, and mark them clean: ``(start, bytes)``."""
        cdef Block *block
        cdef uint32_t lo, hi
        if index >= self.table_size or self.blocks[index].data == NULL:
            raise IndexError(index)
        block = &self.blocks[index]
        lo = block.dirty_lo // unit * unit
        hi = (block.dirty_hi + unit - 1) // unit * unit
        if hi > (1U << self.cluster_bits):
            hi = 1U << self.cluster_bits
        block.dirty_lo = block.dirty_hi = 0
        block.writing = True
        return lo, PyBytes_FromStringAndSize(<char *> block.data + lo, hi - lo)

    def written(self):
        """Every copy that :meth:`take` gave out is on storage, or marked dirty again."""
        cdef uint64_t i
        for i in range(self.table_size):
            self.blocks[i].writing = False

    def mark(self, uint64_t index, uint32_t lo, uint32_t hi):
        """Mark bytes dirty again (a write of them failed)."""
        if index < self.table_size and self.blocks[index].data != NULL and lo < hi <= (1U << self.cluster_bits):
            if self.blocks[index].dirty_lo == self.blocks[index].dirty_hi:
                self.blocks[index].dirty_lo = lo
                self.blocks[index].dirty_hi = hi
            else:
                self.blocks[index].dirty_lo = min(self.blocks[index].dirty_lo, lo)
                self.blocks[index].dirty_hi = max(self.blocks[index].dirty_hi, hi)
