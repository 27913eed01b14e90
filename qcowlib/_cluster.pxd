# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
from cpython.buffer cimport Py_buffer
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from qcowlib._extent cimport RunVec

cdef struct Slot:
    uint8_t *table
    uint32_t l1_index
    uint32_t dirty_lo      # bytes of the table that storage does not have yet; lo == hi: none
    uint32_t dirty_hi
    bint busy              # holds the table of l1_index
    bint used              # touched since the clock hand passed
    bint fresh             # not reachable on storage yet: written whole before it is published
    bint writing           # a copy of it is on the way to storage

cdef enum WriteAction:
    WRITE_NEED = -1        # a table must be loaded (or made) first
    WRITE_CORRUPT = -2
    WRITE_IN_PLACE = 0     # overwrite at host
    WRITE_REUSE = 1        # this cluster's own space, but the entry changes
    WRITE_ALLOCATE = 2     # new clusters

cdef class ClusterMap:
    cdef readonly unsigned cluster_bits
    cdef readonly uint64_t cluster_size
    cdef readonly bint extended
    cdef readonly bint has_data_file
    cdef readonly bint old_version
    cdef public uint64_t size
    cdef unsigned l2_bits
    cdef readonly uint32_t l2_entries
    cdef unsigned entry_shift
    cdef unsigned sub_bits
    cdef readonly uint32_t l1_size
    cdef uint64_t *l1
    cdef int32_t *slot_of
    cdef Slot *slots
    cdef readonly int slot_count
    cdef int slots_made
    cdef int hand
    cdef readonly int dirty_count
    # Host clusters that hold metadata (open addressing; 0 = free, else cluster + 1).
    # Part of the file that a caller keeps in memory; length 0: none.
    cdef Py_buffer lent
    cdef uint64_t lent_offset
    cdef uint64_t lent_length
    cdef uint64_t *guarded
    cdef uint64_t guarded_mask
    cdef uint64_t guarded_count
    cdef readonly uint32_t l1_dirty_lo
    cdef readonly uint32_t l1_dirty_hi
    # The last corruption met: what, and the numbers for the message.
    cdef readonly int bad
    cdef readonly uint64_t bad_value
    cdef readonly uint64_t bad_l1
    cdef readonly uint64_t bad_l2
    cdef uint64_t *_entry(self, uint64_t guest) noexcept nogil
    cdef uint64_t _gap(self, uint64_t pos, uint64_t maxlen) noexcept nogil
    cdef int lookup(self, uint64_t pos, uint64_t maxlen, int *kind, uint64_t *host, uint64_t *length) noexcept nogil
    cdef int _lookup_ext(
        self, uint8_t *table, uint64_t pos, uint64_t maxlen, int *kind, uint64_t *host, uint64_t *length
    ) noexcept nogil
    cdef int _corrupt(self, int what, uint64_t value, uint64_t l1, uint64_t l2) noexcept nogil
    cdef int plan(self, uint64_t pos, uint64_t maxlen, uint64_t *host, uint64_t *length) noexcept nogil
    cdef int _guard_one(self, uint64_t cluster) except -1
    cdef bint _is_guarded(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _resize_l1(self, uint32_t count) except -1
    cdef int _take_slot(self) except -2
    cdef void _own(self, int number, uint32_t index) noexcept
    cdef void _dirty(self, Slot *slot, uint32_t lo, uint32_t hi) noexcept nogil
    cdef int _free_old(self, uint64_t e, uint64_t host, RunVec *freed) except -1
    cdef uint64_t _sub_mask(self, uint64_t cluster, uint64_t lo, uint64_t hi) noexcept nogil
    cdef void _touch(self, uint64_t guest, uint32_t count) noexcept
    cdef int _write_class(
        self, uint64_t e, uint64_t bitmap, uint64_t pos, uint64_t maxlen, uint64_t *host
    ) noexcept nogil
