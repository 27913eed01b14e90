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

cdef class RunList:
    cdef Run *runs
    cdef size_t count
    cdef size_t room
    cdef int append(self, int kind, uint64_t guest, uint64_t length, uint64_t host, int layer) except -1 nogil
