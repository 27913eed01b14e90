# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Counts of references: what mapping tables name, beside the stored refcounts.

Invariant: no function looks outside the buffers it is given or makes a Python
object per entry; scans run without the GIL.  Counts never wrap, and their
memory follows the clusters that are referenced, not the length of the file.
"""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free, qsort, realloc
from libc.string cimport memcpy, memset

from qcowlib._ondisk cimport (
    QC_COMPRESSED,
    QC_COPIED,
    QC_L1_RESERVED,
    QC_L2_RESERVED,
    QC_OFFSET_MASK,
    QC_ZERO,
    qc_be64,
    qc_get_refcount,
    qc_set_refcount,
)

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    /* Largest of n counts. */
    static inline unsigned qr_max(const uint16_t *p, size_t n) {
        unsigned top = 0;
        for (size_t i = 0; i < n; i++) top = p[i] > top ? p[i] : top;
        return top;
    }
    static inline void qr_add(uint16_t *p, size_t n, uint16_t weight) {
        for (size_t i = 0; i < n; i++) p[i] = (uint16_t)(p[i] + weight);
    }
    /* Whether n big-endian 16-bit refcounts are all 1. */
    static inline int qr_ones(const uint8_t *p, size_t n) {
        uint16_t w, odd = 0;
        for (size_t i = 0; i < n; i++) { memcpy(&w, p + 2 * i, 2); odd |= w ^ 0x0100; }
        return odd == 0;
    }
    /* Whether n counts equal n big-endian 16-bit refcounts. */
    static inline int qr_equal(const uint16_t *p, const uint8_t *q, size_t n) {
        uint16_t w, odd = 0;
        for (size_t i = 0; i < n; i++) { memcpy(&w, q + 2 * i, 2); odd |= p[i] ^ __builtin_bswap16(w); }
        return odd == 0;
    }
    /* How many big-endian words from p on follow each other by step, at most n. */
    static inline size_t qr_run(const uint8_t *p, size_t n, uint64_t step) {
        uint64_t first, word; size_t i = 1;
        memcpy(&first, p, 8); first = __builtin_bswap64(first);
        for (; i < n; i++) {
            memcpy(&word, p + 8 * i, 8);
            if (__builtin_bswap64(word) != first + i * step) break;
        }
        return i;
    }
    """
    unsigned qr_max(const uint16_t *p, size_t n) noexcept nogil
    void qr_add(uint16_t *p, size_t n, uint16_t weight) noexcept nogil
    bint qr_ones(const uint8_t *p, size_t n) noexcept nogil
    bint qr_equal(const uint16_t *p, const uint8_t *q, size_t n) noexcept nogil
    size_t qr_run(const uint8_t *p, size_t n, uint64_t step) noexcept nogil

cdef enum:
    CHUNK_BITS = 9  # 512 counts: one far reference costs 1 KiB
    CHUNK = 1 << CHUNK_BITS
    NEARBY = 1 << 30
    FULL = 65535  # a count that large continues in a dictionary
    MAX_CLUSTERS = 0x7FFFFFFF  # Source: what qemu-img check accepts

# What a table scan reports; check.py holds the texts.
cdef enum:
    E_RESERVED = 1
    E_COMPRESSED_COPIED = 2
    E_COMPRESSED_DATA_FILE = 3
    E_COMPRESSED_BITMAP = 4
    E_BITMAP = 5
    E_PREALLOCATED_UNALIGNED = 6
    E_DATA_UNALIGNED = 7
    E_UNALLOCATED_BITMAP = 8
    E_PAST_END = 9
    E_OVERFLOW = 10
    E_TABLE_UNALIGNED = 11
    E_TABLE = 12
    E_COPIED = 13

EVENT_RESERVED = E_RESERVED
EVENT_COMPRESSED_COPIED = E_COMPRESSED_COPIED
EVENT_COMPRESSED_DATA_FILE = E_COMPRESSED_DATA_FILE
EVENT_COMPRESSED_BITMAP = E_COMPRESSED_BITMAP
EVENT_BITMAP = E_BITMAP
EVENT_PREALLOCATED_UNALIGNED = E_PREALLOCATED_UNALIGNED
EVENT_DATA_UNALIGNED = E_DATA_UNALIGNED
EVENT_UNALLOCATED_BITMAP = E_UNALLOCATED_BITMAP
EVENT_PAST_END = E_PAST_END
EVENT_OVERFLOW = E_OVERFLOW
EVENT_TABLE_UNALIGNED = E_TABLE_UNALIGNED
EVENT_TABLE = E_TABLE
EVENT_COPIED = E_COPIED


cdef struct TableRef:
    uint64_t offset
    uint64_t weight  # references from all L1 tables
    uint64_t active  # of these, from the active one
    uint64_t flags   # TABLE_EVENTS, TABLE_COPIED


cdef enum:
    TABLE_EVENTS = 1
    TABLE_COPIED = 2


cdef int _by_offset(const void *a, const void *b) noexcept nogil:
    cdef uint64_t left = (<const TableRef *> a).offset
    cdef uint64_t right = (<const TableRef *> b).offset
    return (left > right) - (left < right)


cdef uint8_t _UNREADABLE = 0  # its address marks a refcount block that cannot be read


cdef class ReferenceCounts:
    """References counted for each host cluster, next to the stored refcounts.

    *file_size* bounds what may be referenced: a region that ends a cluster or
    more past it is not counted.  Stored refcounts are looked up in blocks
    given by :meth:`set_block`.  Counts stop at what the refcount width holds;
    what does not fit is added to ``overflows``.

    ``clusters`` is the number of host clusters compared; one more than the
    file has when something reaches into the cluster behind the end.
    """

    cdef uint16_t **chunks
    cdef const uint8_t **blocks
    cdef list kept  # buffers that blocks point into
    cdef const uint8_t *last_kept
    cdef dict excess
    cdef object limit
    cdef uint64_t small_limit
    cdef uint64_t block_bits
    cdef uint64_t block_count
    cdef uint64_t chunk_count
    cdef readonly uint64_t clusters
    cdef readonly uint64_t file_size
    cdef readonly unsigned cluster_bits
    cdef readonly unsigned refcount_order
    cdef readonly bint extended
    cdef readonly bint data_file
    cdef readonly uint64_t allocated
    cdef readonly uint64_t compressed
    cdef readonly uint64_t fragmented
    cdef readonly uint64_t corruptions
    cdef readonly uint64_t copied_errors
    cdef readonly uint64_t overflows
    cdef readonly uint64_t entries
    cdef readonly uint64_t uncounted  # compressed clusters left out, which may lie anywhere
    cdef readonly uint64_t beyond  # where the references close behind the end stop
    cdef list events
    cdef bint tracing
    cdef bint fixing

    def __init__(
        self, unsigned cluster_bits, unsigned refcount_order, uint64_t file_size, uint64_t block_count,
        *, bint extended=False, bint data_file=False,
    ):
        if not 9 <= cluster_bits <= 21 or refcount_order > 6 or block_count > 1 << 24:
            raise ValueError("geometry out of range")
        if self.chunks != NULL:
            raise ValueError("counts cannot be set up twice")
        self.cluster_bits = cluster_bits
        self.refcount_order = refcount_order
        self.extended = extended
        self.data_file = data_file
        self.file_size = file_size
        self.clusters = (file_size + (<uint64_t> 1 << cluster_bits) - 1) >> cluster_bits
        if self.clusters > MAX_CLUSTERS or file_size >> 62:
            raise ValueError("too many clusters")
        # Not by shifts: those of C would wrap.
        self.limit = <uint64_t> 0xFFFFFFFFFFFFFFFFULL >> (64 - (1 << refcount_order))
        self.small_limit = self.limit if refcount_order <= 4 else FULL - 1
        self.block_bits = cluster_bits + 3 - refcount_order
        self.block_count = block_count
        self.chunk_count = ((self.clusters + 1) >> CHUNK_BITS) + 1
        self.chunks = <uint16_t **> calloc(self.chunk_count, sizeof(uint16_t *))
        self.blocks = <const uint8_t **> calloc(block_count + 1, sizeof(uint8_t *))
        if self.chunks == NULL or self.blocks == NULL:
            raise MemoryError()
        self.kept = []
        self.excess = {}
        self.events = []

    def __dealloc__(self):
        cdef uint64_t index
        if self.chunks != NULL:
            for index in range(self.chunk_count):
                free(self.chunks[index])
        free(self.chunks)
        free(self.blocks)

    def set_block(self, uint64_t index, const uint8_t[::1] block, uint64_t start=0):
        """Use the cluster at *start* of *block* as refcount block *index*; None if it cannot be read."""
        if index >= self.block_count:
            raise IndexError(index)
        if block is None:
            self.blocks[index] = &_UNREADABLE
            return
        cdef uint64_t length = <uint64_t> block.shape[0]
        if start > length or length - start < <uint64_t> 1 << self.cluster_bits:
            raise ValueError("short refcount block")
        if self.last_kept != &block[0]:
            self.kept.append(block)
            self.last_kept = &block[0]
        self.blocks[index] = &block[0] + start

    cdef inline int _stored(self, uint64_t cluster, uint64_t *value) noexcept nogil:
        """Fetch the stored refcount; non-zero if its block cannot be read."""
        cdef uint64_t index = cluster >> self.block_bits
        cdef const uint8_t *block
        value[0] = 0
        if index >= self.block_count:
            return 0
        block = self.blocks[index]
        if block == NULL:
            return 0
        if block == &_UNREADABLE:
            return 1
        value[0] = qc_get_refcount(block, cluster & ((<uint64_t> 1 << self.block_bits) - 1), self.refcount_order)
        return 0

    def stored(self, uint64_t cluster):
        """Return the stored refcount, or None where its block cannot be read."""
        cdef uint64_t value
        return None if self._stored(cluster, &value) else value

    def counted(self, uint64_t cluster):
        """Return how often *cluster* was counted."""
        if cluster >= self.clusters or self.chunks[cluster >> CHUNK_BITS] == NULL:
            return 0
        cdef uint64_t small = self.chunks[cluster >> CHUNK_BITS][cluster & (CHUNK - 1)]
        return small + self.excess.get(cluster, 0)

    def grow(self, uint64_t file_size):
        """Take the file to be *file_size* bytes; it never shrinks."""
        cdef uint64_t clusters = (file_size + (<uint64_t> 1 << self.cluster_bits) - 1) >> self.cluster_bits
        cdef uint64_t count = ((clusters + 1) >> CHUNK_BITS) + 1
        cdef void *grown
        if file_size < self.file_size or clusters > MAX_CLUSTERS or file_size >> 62:
            raise ValueError("too many clusters")
        if count > self.chunk_count:
            grown = realloc(self.chunks, count * sizeof(uint16_t *))
            if grown == NULL:
                raise MemoryError()
            self.chunks = <uint16_t **> grown
            memset(self.chunks + self.chunk_count, 0, (count - self.chunk_count) * sizeof(uint16_t *))
            self.chunk_count = count
        self.file_size = file_size
        if clusters > self.clusters:
            self.clusters = clusters

    def find_free(self, uint64_t first, uint64_t count):
        """Return the first cluster from *first* on that begins *count* uncounted ones; the end is free."""
        cdef uint64_t cluster = first
        cdef uint64_t start = first
        cdef const uint16_t *chunk
        while cluster < self.clusters and cluster - start < count:
            chunk = self.chunks[cluster >> CHUNK_BITS]
            if chunk == NULL:
                cluster = (cluster | (CHUNK - 1)) + 1
                continue
            if chunk[cluster & (CHUNK - 1)]:
                start = cluster + 1
            cluster += 1
        return start

    def next_counted(self, uint64_t first):
        """Return the first counted cluster from *first* on, or ``clusters``."""
        cdef uint64_t cluster = first
        cdef const uint16_t *chunk
        while cluster < self.clusters:
            chunk = self.chunks[cluster >> CHUNK_BITS]
            if chunk == NULL:
                cluster = (cluster | (CHUNK - 1)) + 1
                continue
            if chunk[cluster & (CHUNK - 1)]:
                return cluster
            cluster += 1
        return self.clusters

    def pack_block(self, uint64_t index):
        """Return refcount block *index* with the counts as they are now."""
        cdef uint64_t cluster = index << self.block_bits
        cdef uint64_t end = min((index + 1) << self.block_bits, self.clusters)
        cdef uint64_t start = cluster
        cdef const uint16_t *chunk
        block = bytearray(1 << self.cluster_bits)
        cdef uint8_t[::1] view = block
        cdef uint64_t value
        while cluster < end:
            chunk = self.chunks[cluster >> CHUNK_BITS]
            if chunk == NULL:
                cluster = (cluster | (CHUNK - 1)) + 1
                continue
            value = chunk[cluster & (CHUNK - 1)]
            if value:
                if value == FULL:
                    value = self.counted(cluster)
                qc_set_refcount(&view[0], cluster - start, self.refcount_order, value)
            cluster += 1
        return block

    cdef int _event(self, int code, uint64_t index, uint64_t value, uint64_t extra) except -1 nogil:
        """Note one finding of the table at hand (traces only; scans count)."""
        if self.tracing:
            with gil:
                self.events.append((code, index, value, extra))
        return 0

    cdef int _add(self, uint64_t cluster, uint64_t weight) except -1 nogil:
        """Count *weight* more references of *cluster*, up to the limit."""
        cdef uint16_t *chunk = self.chunks[cluster >> CHUNK_BITS]
        cdef uint64_t total
        if chunk == NULL:
            chunk = <uint16_t *> calloc(CHUNK, sizeof(uint16_t))
            if chunk == NULL:
                with gil:
                    raise MemoryError()
            self.chunks[cluster >> CHUNK_BITS] = chunk
        total = chunk[cluster & (CHUNK - 1)] + weight
        if total <= self.small_limit:
            chunk[cluster & (CHUNK - 1)] = <uint16_t> total
        else:
            self._add_slowly(cluster, weight, &chunk[cluster & (CHUNK - 1)])
        if cluster >= self.clusters:
            self.clusters = cluster + 1
        return 0

    cdef int _add_slowly(self, uint64_t cluster, uint64_t weight, uint16_t *small) except -1 nogil:
        cdef uint64_t over = 0
        if self.refcount_order <= 4:
            over = small[0] + weight - self.small_limit
            small[0] = <uint16_t> self.small_limit
        else:
            with gil:
                total = <object> small[0] + self.excess.get(cluster, 0) + weight
                if total > self.limit:
                    over = total - self.limit
                    total = self.limit
                small[0] = FULL if total > FULL else total
                if total > FULL:
                    self.excess[cluster] = total - FULL
        if over:
            self.overflows += over
            self._event(E_OVERFLOW, 0, cluster << self.cluster_bits, 0)
        return 0

    cdef int _reference(self, uint64_t offset, uint64_t length, uint64_t weight) except -1 nogil:
        """Count a region; one that ends a cluster or more past the file is a finding."""
        cdef uint64_t size = <uint64_t> 1 << self.cluster_bits
        cdef uint64_t cluster
        cdef uint64_t last
        if length == 0:
            return 0
        if offset >= self.file_size + size or length >= self.file_size + size - offset:
            self.corruptions += weight
            if offset < self.file_size + NEARBY and length < NEARBY:
                self.beyond = max(self.beyond, offset + length)
            self._event(E_PAST_END, 0, offset, length)
            return 1
        last = (offset + length - 1) >> self.cluster_bits
        cluster = offset >> self.cluster_bits
        while cluster <= last:
            self._add(cluster, weight)
            cluster += 1
        return 0

    def reference(self, uint64_t offset, uint64_t length, uint64_t weight=1):
        """Count *weight* references of every cluster that the region touches."""
        with nogil:
            self._reference(offset, length, weight)

    def trace(self, bint fixing=False):
        """Collect events from now on; *fixing* leaves out of the counts what a repair would drop."""
        self.tracing = True
        self.fixing = fixing

    def take_events(self):
        """Return and forget the collected ``(code, index, value, extra)`` tuples."""
        events, self.events = self.events, []
        return events

    cdef int _compressed(self, uint64_t index, uint64_t entry, uint64_t bitmap, TableRef *table) except -1 nogil:
        cdef unsigned shift = 70 - self.cluster_bits
        cdef uint64_t offset = entry & ((<uint64_t> 1 << shift) - 1)
        cdef uint64_t sectors = ((entry & (QC_COMPRESSED - 1)) >> shift) + 1
        if entry & QC_COPIED:
            self.corruptions += table.weight
            self._event(E_COMPRESSED_COPIED, index, offset, 0)
            table.flags |= TABLE_EVENTS
            entry &= ~QC_COPIED
        if self.data_file or bitmap:
            self.corruptions += table.weight
            self.uncounted += 1
            self._event(E_COMPRESSED_DATA_FILE if self.data_file else E_COMPRESSED_BITMAP, index, entry, 0)
            table.flags |= TABLE_EVENTS
            return 0
        if self._reference(offset, sectors * 512 - (offset & 511), table.weight):
            table.flags |= TABLE_EVENTS
        self.allocated += table.active
        self.compressed += table.active
        self.fragmented += table.active
        return 0

    cdef int _allocated(
        self, uint64_t index, uint64_t entry, uint64_t bitmap, TableRef *table, uint64_t *expected
    ) except -1 nogil:
        """Count one standard entry that has a host cluster."""
        cdef uint64_t offset = entry & QC_OFFSET_MASK
        cdef uint64_t size = <uint64_t> 1 << self.cluster_bits
        cdef uint64_t refcount = 1
        cdef bint contains_data
        if table.active and table.offset:
            if self.data_file or not self._stored(offset >> self.cluster_bits, &refcount):
                if (refcount == 1) != ((entry & QC_COPIED) != 0):
                    self.copied_errors += table.active
                    table.flags |= TABLE_COPIED
        if (bitmap >> 32) & bitmap:
            self.corruptions += table.weight
            self._event(E_BITMAP, index, offset, 0)
            table.flags |= TABLE_EVENTS
        if offset & (size - 1):
            self.corruptions += table.weight
            table.flags |= TABLE_EVENTS
            contains_data = (bitmap & 0xFFFFFFFFULL) != 0 if self.extended else (entry & QC_ZERO) == 0
            self._event(E_DATA_UNALIGNED if contains_data else E_PREALLOCATED_UNALIGNED, index, offset, 0)
            if self.fixing and not contains_data:
                return 0
        self.allocated += table.active
        if expected[0] and offset != expected[0]:
            self.fragmented += table.active
        expected[0] = offset + size
        if not self.data_file and self._reference(offset, size, table.weight):
            table.flags |= TABLE_EVENTS
        return 0

    cdef bint _plain_run(self, uint64_t entry, uint64_t count, TableRef *table) noexcept nogil:
        """Count *count* adjacent clusters at once; False, and nothing done, unless all is as usual.

        As usual: inside the file, no count near its limit, and COPIED set
        with a stored 16-bit refcount of 1.
        """
        cdef uint64_t first = (entry & QC_OFFSET_MASK) >> self.cluster_bits
        cdef uint64_t last = first + count
        cdef uint64_t cluster
        cdef uint64_t step
        cdef uint64_t mask = ((<uint64_t> 1 << self.block_bits) - 1)
        cdef const uint8_t *block
        cdef uint16_t *chunk
        cdef bint check_copied = table.active != 0 and table.offset != 0
        if last << self.cluster_bits > self.file_size:
            return False
        if check_copied and not (entry & QC_COPIED and self.refcount_order == 4):
            return False
        cluster = first
        while cluster < last:
            step = min(last - cluster, CHUNK - (cluster & (CHUNK - 1)), mask + 1 - (cluster & mask))
            chunk = self.chunks[cluster >> CHUNK_BITS]
            if chunk == NULL:
                chunk = self.chunks[cluster >> CHUNK_BITS] = <uint16_t *> calloc(CHUNK, sizeof(uint16_t))
            if chunk == NULL or qr_max(chunk + (cluster & (CHUNK - 1)), step) + table.weight > self.small_limit:
                return False
            if check_copied:
                if cluster >> self.block_bits >= self.block_count:
                    return False
                block = self.blocks[cluster >> self.block_bits]
                if block == NULL or block == &_UNREADABLE or not qr_ones(block + (cluster & mask) * 2, step):
                    return False
            cluster += step
        cluster = first
        while cluster < last:
            step = min(last - cluster, CHUNK - (cluster & (CHUNK - 1)))
            qr_add(self.chunks[cluster >> CHUNK_BITS] + (cluster & (CHUNK - 1)), step, <uint16_t> table.weight)
            cluster += step
        return True

    cdef uint64_t _plain(self, const uint8_t *data, uint64_t room, TableRef *table, uint64_t *expected) noexcept nogil:
        """Count the run of plain clusters at the start of *data*; returns its length or 0."""
        cdef uint64_t entry = qc_be64(data)
        cdef uint64_t size = <uint64_t> 1 << self.cluster_bits
        cdef uint64_t count
        if entry & (QC_COMPRESSED | QC_L2_RESERVED | QC_ZERO | (size - 1)) or not entry & QC_OFFSET_MASK:
            return 0
        count = qr_run(data, room, size)
        if count < 8 or not self._plain_run(entry, count, table):
            return 0
        self.allocated += table.active * count
        if expected[0] and entry & QC_OFFSET_MASK != expected[0]:
            self.fragmented += table.active
        expected[0] = (entry & QC_OFFSET_MASK) + size * count
        return count

    cdef int _scan(self, const uint8_t *data, TableRef *table) except -1 nogil:
        """Count one L2 table, in the order of its entries."""
        cdef unsigned width = 16 if self.extended else 8
        cdef uint64_t count = (<uint64_t> 1 << self.cluster_bits) / width
        cdef uint64_t entry
        cdef uint64_t bitmap = 0
        cdef uint64_t expected = 0
        cdef uint64_t following = 0
        cdef uint64_t index
        cdef uint64_t run
        cdef uint64_t tried = 0
        self.entries += count
        while following < count:
            index = following
            following += 1
            entry = qc_be64(data + index * width)
            if self.extended:
                bitmap = qc_be64(data + index * width + 8)
            elif entry and index >= tried and not self.data_file:
                run = self._plain(data + index * width, count - index, table, &expected)
                if run:
                    following = index + run
                    continue
                tried = index + 8
            if entry == 0 and bitmap == 0:
                continue
            if entry & QC_COMPRESSED:
                self._compressed(index, entry, bitmap, table)
                continue
            if entry & QC_L2_RESERVED:
                self.corruptions += table.weight
                self._event(E_RESERVED, index, entry, 0)
                table.flags |= TABLE_EVENTS
            if entry & QC_OFFSET_MASK or (
                self.data_file and entry & QC_COPIED and (self.extended or (entry & QC_ZERO) == 0)
            ):
                self._allocated(index, entry, bitmap, table, &expected)
            elif bitmap & 0xFFFFFFFFULL:
                self.corruptions += table.weight
                self._event(E_UNALLOCATED_BITMAP, index, entry, 0)
                table.flags |= TABLE_EVENTS
        return 0

    def scan_tables(self, const uint8_t[::1] data not None, uint64_t base, TableSet tables not None,
                    size_t first, size_t last):
        """Count L2 tables *first* to *last* of *tables*; *data* is the file from byte *base* on."""
        cdef size_t index
        cdef uint64_t size = <uint64_t> 1 << self.cluster_bits
        cdef uint64_t length = <uint64_t> data.shape[0]
        if last > tables.count or first > last:
            raise IndexError(last)
        for index in range(first, last):
            if tables.refs[index].offset < base or tables.refs[index].offset - base + size > length:
                raise ValueError("table outside the buffer")
        with nogil:
            for index in range(first, last):
                self._scan(&data[0] + (tables.refs[index].offset - base), &tables.refs[index])

    def trace_table(self, const uint8_t[::1] data not None, bint active):
        """Count one L2 table given as *data*, collecting its events."""
        cdef TableRef table
        if <uint64_t> data.shape[0] < <uint64_t> 1 << self.cluster_bits:
            raise ValueError("short table")
        table.offset = 0
        table.weight = 1
        table.active = active
        table.flags = 0
        self._scan(&data[0], &table)

    def copied_of_table(self, const uint8_t[::1] data not None):
        """Return ``(index, entry, refcount)`` where COPIED disagrees with the stored refcount."""
        cdef unsigned width = 16 if self.extended else 8
        cdef uint64_t entry
        cdef uint64_t refcount
        cdef uint64_t index
        found = []
        for index in range((<uint64_t> 1 << self.cluster_bits) / width):
            if <uint64_t> data.shape[0] < (index + 1) * width:
                break
            entry = qc_be64(&data[index * width])
            if entry & QC_COMPRESSED or not (
                entry & QC_OFFSET_MASK
                or (self.data_file and entry & QC_COPIED and (self.extended or (entry & QC_ZERO) == 0))
            ):
                continue
            refcount = 1
            if not self.data_file and self._stored((entry & QC_OFFSET_MASK) >> self.cluster_bits, &refcount):
                continue
            if (refcount == 1) != ((entry & QC_COPIED) != 0):
                found.append((index, entry, refcount))
        return found

    cdef uint64_t _last_counted(self, uint64_t first, uint64_t end) noexcept nogil:
        """Return the last counted cluster of a part of one chunk, or 0."""
        cdef const uint16_t *chunk = self.chunks[first >> CHUNK_BITS]
        while end > first:
            end -= 1
            if chunk[end & (CHUNK - 1)]:
                return end
        return 0

    def fix_block(self, uint64_t index, bint up, bint down):
        """Return refcount block *index* with wrong refcounts set right, or None if none is.

        *up* raises those that are too low (not from 0), *down* lowers those
        that are too high.  Clusters that were not compared keep theirs.
        """
        cdef uint64_t first = index << self.block_bits
        cdef uint64_t end = min((index + 1) << self.block_bits, self.clusters)
        cdef uint64_t cluster
        cdef uint64_t stored
        cdef uint64_t counted
        cdef const uint8_t *block = self.blocks[index] if index < self.block_count else NULL
        cdef uint8_t[::1] view
        result = None
        if block == NULL or block == &_UNREADABLE:
            return None
        for cluster in range(first, end):
            stored = qc_get_refcount(block, cluster - first, self.refcount_order)
            counted = self._small(cluster)
            if counted == FULL:
                counted = self.counted(cluster)
            if (down and stored > counted) or (up and 0 < stored < counted):
                if result is None:
                    result = bytearray(1 << self.cluster_bits)
                    view = result
                    memcpy(&view[0], block, 1 << self.cluster_bits)
                qc_set_refcount(&view[0], cluster - first, self.refcount_order, counted)
        return result

    cdef inline uint64_t _small(self, uint64_t cluster) noexcept nogil:
        cdef const uint16_t *chunk = self.chunks[cluster >> CHUNK_BITS]
        return chunk[cluster & (CHUNK - 1)] if chunk != NULL else 0

    def compare(self, size_t limit):
        """Compare counted and stored refcounts of all clusters.

        Returns ``(leaks, corruptions, unreadable, missing, highest, events)``:
        clusters stored too high, too low, in blocks that cannot be read,
        whether a counted cluster has stored 0, the highest cluster with
        either, and at most *limit* ``(cluster, stored or None, counted)``.
        """
        cdef uint64_t leaks = 0
        cdef uint64_t low = 0
        cdef uint64_t unreadable = 0
        cdef uint64_t highest = 0
        cdef uint64_t cluster = 0
        cdef uint64_t end
        cdef uint64_t stored
        cdef uint64_t counted
        cdef uint64_t step = min(<uint64_t> CHUNK, <uint64_t> 1 << self.block_bits)
        cdef uint64_t mask = (<uint64_t> 1 << self.block_bits) - 1
        cdef bint missing = False
        cdef const uint16_t *chunk
        cdef const uint8_t *block
        found = []
        with nogil:
            while cluster < self.clusters:
                end = cluster + step if self.clusters - cluster > step else self.clusters
                chunk = self.chunks[cluster >> CHUNK_BITS]
                block = NULL
                if cluster >> self.block_bits < self.block_count:
                    block = self.blocks[cluster >> self.block_bits]
                if chunk == NULL and block == NULL:
                    cluster = end
                    continue
                if self.refcount_order == 4 and chunk != NULL and block != NULL and block != &_UNREADABLE:
                    if qr_equal(chunk + (cluster & (CHUNK - 1)), block + (cluster & mask) * 2, end - cluster):
                        highest = max(highest, self._last_counted(cluster, end))
                        cluster = end
                        continue
                while cluster < end:
                    counted = chunk[cluster & (CHUNK - 1)] if chunk != NULL else 0
                    if self._stored(cluster, &stored):
                        unreadable += 1
                        if unreadable + leaks + low <= limit:
                            with gil:
                                found.append((cluster, None, counted))
                        cluster += 1
                        continue
                    if stored or counted:
                        highest = cluster
                    if stored != counted or counted == FULL:
                        with gil:
                            total = self.counted(cluster)
                            if stored < total:
                                low += 1
                                missing = missing or stored == 0
                            elif stored > total:
                                leaks += 1
                            if stored != total and unreadable + leaks + low <= limit:
                                found.append((cluster, stored, total))
                    cluster += 1
        return leaks, low, unreadable, bool(missing), highest, found


cdef class TableSet:
    """The L2 tables that L1 tables name: each offset once, with how often, in file order."""

    cdef TableRef *refs
    cdef size_t count
    cdef size_t room
    cdef bint in_order

    def __cinit__(self):
        self.in_order = True

    def __dealloc__(self):
        free(self.refs)

    def __len__(self):
        return self.count

    cdef int _append(self, uint64_t offset, uint64_t weight, bint active) except -1 nogil:
        cdef void *grown
        cdef size_t room
        cdef TableRef *ref
        if self.count == self.room:
            self._merge()
            if self.count * 4 >= self.room * 3:
                room = self.room * 2 if self.room else 256
                grown = realloc(self.refs, room * sizeof(TableRef))
                if grown == NULL:
                    with gil:
                        raise MemoryError()
                self.refs = <TableRef *> grown
                self.room = room
        if self.count and self.refs[self.count - 1].offset >= offset:
            self.in_order = False
        ref = &self.refs[self.count]
        ref.offset = offset
        ref.weight = weight
        ref.active = weight if active else 0
        ref.flags = 0
        self.count += 1
        return 0

    cdef void _merge(self) noexcept nogil:
        """Sort by offset and add up what names the same table."""
        cdef size_t index
        cdef size_t kept = 0
        if self.in_order or self.count < 2:
            return
        qsort(self.refs, self.count, sizeof(TableRef), _by_offset)
        for index in range(1, self.count):
            if self.refs[index].offset == self.refs[kept].offset:
                self.refs[kept].weight += self.refs[index].weight
                self.refs[kept].active += self.refs[index].active
            else:
                kept += 1
                self.refs[kept] = self.refs[index]
        self.count = kept + 1
        self.in_order = True

    def add_l1(self, ReferenceCounts counts not None, const uint8_t[::1] table not None, uint64_t weight, bint active):
        """Count the L2 tables that an L1 table (or a part of one) names.

        Returns the number of findings in the L1 table itself.  Entries whose
        table starts behind the end of the file are counted and not kept.
        """
        cdef uint64_t index
        cdef uint64_t entry
        cdef uint64_t offset
        cdef uint64_t refcount
        cdef uint64_t found = counts.corruptions + counts.copied_errors + counts.overflows
        cdef uint64_t size = <uint64_t> 1 << counts.cluster_bits
        for index in range(<uint64_t> table.shape[0] // 8):
            entry = qc_be64(&table[index * 8])
            if entry == 0:
                continue
            offset = entry & QC_OFFSET_MASK
            if entry & QC_L1_RESERVED:
                counts.corruptions += weight
            if offset & (size - 1):
                counts.corruptions += weight
            counts._reference(offset, size, weight)
            if active and offset and not counts._stored(offset >> counts.cluster_bits, &refcount):
                if (refcount == 1) != ((entry & QC_COPIED) != 0):
                    counts.copied_errors += weight
            if offset < counts.file_size:
                self._append(offset, weight, active)
        counts.entries += <uint64_t> table.shape[0] // 8
        return counts.corruptions + counts.copied_errors + counts.overflows - found

    def finish(self):
        """Bring the tables into file order; call before any index is used."""
        with nogil:
            self._merge()

    def offset(self, size_t index):
        """Return where table *index* lies in the file."""
        if index >= self.count:
            raise IndexError(index)
        return self.refs[index].offset

    def window(self, size_t first, uint64_t size, uint64_t length, uint64_t gap):
        """Return ``(last, end)``: tables *first* to *last* fit in *length* bytes that end at *end*.

        A hole of more than *gap* bytes between two tables ends the window.
        """
        cdef size_t index = first
        cdef uint64_t start
        cdef uint64_t end = 0
        if first >= self.count:
            raise IndexError(first)
        start = self.refs[first].offset
        while index < self.count and self.refs[index].offset + size - start <= length:
            if index > first and self.refs[index].offset > end + gap:
                break
            end = self.refs[index].offset + size
            index += 1
        return index, end

    def first_from(self, uint64_t offset):
        """Return the index of the first table at or behind *offset*."""
        cdef size_t low = 0
        cdef size_t high = self.count
        cdef size_t middle
        while low < high:
            middle = (low + high) // 2
            if self.refs[middle].offset < offset:
                low = middle + 1
            else:
                high = middle
        return low

    def weight_of(self, uint64_t offset):
        """Return how many L1 entries name the table at *offset*."""
        cdef size_t index = self.first_from(offset)
        return self.refs[index].weight if index < self.count and self.refs[index].offset == offset else 0

    cdef uint64_t _flags(self, uint64_t offset):
        cdef size_t index = self.first_from(offset)
        if index < self.count and self.refs[index].offset == offset:
            return self.refs[index].flags
        return 0

    def trace_l1(self, ReferenceCounts counts not None, const uint8_t[::1] table not None, uint64_t first,
                 bint every):
        """Return the events of a part of an L1 table, whose first entry has index *first*.

        ``EVENT_PAST_END`` asks to count the table (with *every*: each one, else only
        what lies past the end); ``EVENT_TABLE`` to trace a table, with *every* or
        where it has findings.
        """
        cdef uint64_t index
        cdef uint64_t entry
        cdef uint64_t offset
        cdef uint64_t size = <uint64_t> 1 << counts.cluster_bits
        events = []
        for index in range(<uint64_t> table.shape[0] // 8):
            entry = qc_be64(&table[index * 8])
            if entry == 0:
                continue
            offset = entry & QC_OFFSET_MASK
            if entry & QC_L1_RESERVED:
                events.append((E_RESERVED, first + index, entry, 0))
            if every or offset >= counts.file_size:
                events.append((E_PAST_END, first + index, offset, size))
            if offset & (size - 1):
                events.append((E_TABLE_UNALIGNED, first + index, offset, 0))
            if offset < counts.file_size and (every or self._flags(offset) & TABLE_EVENTS):
                events.append((E_TABLE, first + index, offset, 0))
        return events

    def copied_of_l1(self, ReferenceCounts counts not None, const uint8_t[::1] table not None, uint64_t first):
        """Return COPIED events of a part of the active L1 table and of tables with such findings."""
        cdef uint64_t index
        cdef uint64_t entry
        cdef uint64_t offset
        cdef uint64_t refcount
        events = []
        for index in range(<uint64_t> table.shape[0] // 8):
            entry = qc_be64(&table[index * 8])
            offset = entry & QC_OFFSET_MASK
            if not offset or counts._stored(offset >> counts.cluster_bits, &refcount):
                continue
            if (refcount == 1) != ((entry & QC_COPIED) != 0):
                events.append((E_COPIED, first + index, entry, refcount))
            if self._flags(offset) & TABLE_COPIED:
                events.append((E_TABLE, first + index, offset, 0))
        return events
