# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
from libc.stdint cimport uint64_t

from qcowlib._cluster cimport ClusterMap
from qcowlib._extent cimport RunVec
from qcowlib._io cimport LayerFds
from qcowlib._refcount cimport Refcounts

cdef class ChainMap:
    cdef readonly int count
    cdef list maps
    cdef void **cmaps
    cdef uint64_t *sizes
    cdef readonly LayerFds fds
    cdef public bint fast_read
    cdef public bint fast_write
    # Set only while no other writer is inside: allocations may be made in the hit lane.
    cdef public bint fast_allocate
    cdef Refcounts refs
    cdef uint64_t pins[2]
    cdef int parity
    cdef int need_layer
    cdef uint64_t need_l1
    cdef int resolve_into(self, uint64_t pos, uint64_t length, size_t limit, RunVec *out) noexcept nogil
    cdef bint _plain(self, RunVec *vec) noexcept nogil
    cdef int _write_vec(self, RunVec *vec, const char *buf, uint64_t base, uint64_t *fail) noexcept nogil
    cdef bint _read_into(self, char *buf, uint64_t length, uint64_t offset, bint nowait)
    cdef int _write_new(self, ClusterMap m, const char *buf, uint64_t length, uint64_t offset)
    cdef int _look_up(self, uint64_t offset, uint64_t length, uint64_t place, RunVec *one, RunVec *out)
