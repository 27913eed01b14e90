# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
from libc.stdint cimport int32_t, uint64_t

cdef struct Run:
    uint64_t guest
    uint64_t length
    uint64_t host      # byte offset, raw compressed entry, or QC_NO_OFFSET
    int32_t kind       # RunKind
    int32_t layer      # depth in the chain, 0 = top

cdef struct RunVec:
    Run *runs
    size_t count
    size_t room
    bint borrowed      # runs is caller's memory (a C stack): never freed, copied when it grows

cdef int rv_append(RunVec *v, int kind, uint64_t guest, uint64_t length, uint64_t host, int layer) noexcept nogil
cdef void rv_free(RunVec *v) noexcept nogil

cdef class RunList:
    cdef RunVec v
