# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
from libc.stdint cimport uint64_t

from qcowlib._extent cimport RunList, RunVec

cdef struct FdSeg:
    uint64_t start
    uint64_t length
    uint64_t position
    int fd

cdef struct LayerIo:
    FdSeg *segs
    int count
    uint64_t pad       # bytes missing at the end of the file read as zero up to a multiple of this
    int direct         # 1: may be read and written through its descriptors

cdef enum:
    IO_MISSING = -100000   # a run lies past the end of its file

cdef class LayerFds:
    cdef LayerIo *layers
    cdef int count
    cdef list graveyard
    cdef int read_vec(self, RunVec *v, char *buf, uint64_t base, bint nowait, uint64_t *fail) noexcept nogil
    cdef int write_at(self, int layer, uint64_t offset, const char *buf, uint64_t length, uint64_t *fail) noexcept nogil
    cdef int _read_direct(self, RunList runs, char *buf, uint64_t base, uint64_t *fail, int *layer) noexcept nogil
