# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Lists of runs as C arrays: no Python object per run until somebody asks.

Invariant: runs are in guest order without gaps, and two neighbours that
continue each other (same kind and layer, host offsets that follow) are one run.
Compressed clusters are never merged: each has a descriptor of its own.
"""
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc

from qcowlib._ondisk cimport QC_NO_OFFSET, RUN_COMPRESSED, RUN_DATA, RUN_HOLE, RUN_ZERO


cdef class RunList:
    """A growable array of runs (kind, guest, length, host, layer)."""

    def __dealloc__(self):
        free(self.runs)

    cdef int append(self, int kind, uint64_t guest, uint64_t length, uint64_t host, int layer) except -1 nogil:
        cdef Run *last
        cdef size_t room
        cdef void *grown
        if length == 0:
            return 0
        if self.count and kind != RUN_COMPRESSED:
            last = &self.runs[self.count - 1]
            if last.kind == kind and last.layer == layer and (
                host == QC_NO_OFFSET if last.host == QC_NO_OFFSET else host == last.host + last.length
            ):
                last.length += length
                return 0
        if self.count == self.room:
            room = self.room * 2 if self.room else 16
            grown = realloc(self.runs, room * sizeof(Run))
            if grown == NULL:
                with gil:
                    raise MemoryError()
            self.runs = <Run *> grown
            self.room = room
        last = &self.runs[self.count]
        last.kind = kind
        last.guest = guest
        last.length = length
        last.host = host
        last.layer = layer
        self.count += 1
        return 0

    def add(self, int kind, uint64_t guest, uint64_t length, uint64_t host=QC_NO_OFFSET, int layer=0):
        """Append one run, merging it into the last one where it continues it."""
        self.append(kind, guest, length, host, layer)

    def clear(self):
        """Forget all runs, keep the memory."""
        self.count = 0

    def __len__(self):
        return self.count

    def __getitem__(self, Py_ssize_t index):
        if index < 0:
            index += self.count
        if index < 0 or <size_t> index >= self.count:
            raise IndexError(index)
        cdef Run *run = &self.runs[index]
        return (run.kind, run.guest, run.length, run.host, run.layer)

    def __iter__(self):
        cdef size_t index = 0
        while index < self.count:
            yield self[index]
            index += 1
