# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcowlib._extent cimport Run

cdef struct Block:
    uint8_t *data          # NULL: not in memory
    uint32_t dirty_lo      # bytes storage does not have yet; lo == hi: none
    uint32_t dirty_hi
    bint writing           # a copy of it is on the way to storage

cdef class Refcounts:
    cdef readonly unsigned cluster_bits
    cdef readonly unsigned order
    cdef readonly uint64_t per_block
    cdef readonly uint64_t table_size
    cdef readonly uint64_t maximum
    cdef public uint64_t hint
    # First cluster that was never given out nor ever in the file: there a growing file has only zeros.
    cdef public uint64_t high_water
    cdef uint64_t *table
    cdef Block *blocks
    cdef uint64_t loaded_count
    cdef uint64_t limit
    cdef uint64_t hand
    cdef unsigned per_bits
    cdef readonly uint64_t table_dirty_lo
    cdef readonly uint64_t table_dirty_hi
    cdef int _resize(self, uint64_t count) except -1
    cdef void _room(self) noexcept
    cdef void _span(self, Run *run, uint64_t *first, uint64_t *count) noexcept nogil
    cdef void _set(self, Block *block, uint64_t i, uint64_t value) noexcept nogil
    cdef int find(self, uint64_t count, bint contiguous, uint64_t *first, uint64_t *got) noexcept nogil
    cdef void take_run(self, uint64_t first, uint64_t got, bint move_hint) noexcept nogil
    cdef void drop_run(self, uint64_t first, uint64_t got) noexcept nogil
