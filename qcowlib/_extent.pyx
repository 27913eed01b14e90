# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Lists of runs as C arrays: no Python object per run until somebody asks.

Invariant: runs are in guest order, and two neighbours that continue each other
(same kind and layer, host offsets that follow) are one run.  Compressed
clusters are never merged: each has a descriptor of its own.
"""
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy, strlen

from qcowlib._ondisk cimport QC_NO_OFFSET, RUN_COMPRESSED, RUN_HOLE, RUN_SPARSE, RUN_ZERO


cdef int rv_append(RunVec *v, int kind, uint64_t guest, uint64_t length, uint64_t host, int layer) noexcept nogil:
    """Append a run, merging it where it continues the last; -1 when memory is out."""
    cdef Run *last
    cdef size_t room
    cdef Run *grown
    if length == 0:
        return 0
    if v.count and kind != RUN_COMPRESSED:
        last = &v.runs[v.count - 1]
        if last.kind == kind and last.layer == layer and last.guest + last.length == guest:
            if (host == QC_NO_OFFSET) if last.host == QC_NO_OFFSET else (host == last.host + last.length):
                last.length += length
                return 0
    if v.count == v.room:
        room = v.room * 2 if v.room else 16
        if v.borrowed:
            grown = <Run *> malloc(room * sizeof(Run))
            if grown != NULL:
                memcpy(grown, v.runs, v.count * sizeof(Run))
        else:
            grown = <Run *> realloc(v.runs, room * sizeof(Run))
        if grown == NULL:
            return -1
        v.borrowed = False
        v.runs = grown
        v.room = room
    last = &v.runs[v.count]
    last.kind = kind
    last.guest = guest
    last.length = length
    last.host = host
    last.layer = layer
    v.count += 1
    return 0


cdef void rv_free(RunVec *v) noexcept nogil:
    if not v.borrowed:
        free(v.runs)
    v.runs = NULL
    v.count = v.room = 0


cdef int _by_host(const void *a, const void *b) noexcept nogil:
    cdef const Run *one = <const Run *> a
    cdef const Run *two = <const Run *> b
    return (one.host > two.host) - (one.host < two.host)


cdef class RunList:
    """A growable array of runs (kind, guest, length, host, layer)."""

    def __dealloc__(self):
        rv_free(&self.v)

    def add(self, int kind, uint64_t guest, uint64_t length, uint64_t host=QC_NO_OFFSET, int layer=0):
        """Append one run, merging it into the last one where it continues it."""
        if rv_append(&self.v, kind, guest, length, host, layer) < 0:
            raise MemoryError()

    def extend(self, RunList other not None):
        """Append all runs of *other*."""
        cdef size_t i
        cdef Run *run
        for i in range(other.v.count):
            run = &other.v.runs[i]
            if rv_append(&self.v, run.kind, run.guest, run.length, run.host, run.layer) < 0:
                raise MemoryError()

    def sort_by_host(self):
        """Put the runs in the order of their host offsets, compressed clusters last; join those that follow."""
        cdef size_t i, count = self.v.count
        cdef Run run
        if count:
            qsort(self.v.runs, count, sizeof(Run), _by_host)
        # In place: never more runs than were read already.
        self.v.count = 0
        for i in range(count):
            run = self.v.runs[i]
            rv_append(&self.v, run.kind, run.guest, run.length, run.host, run.layer)

    def clear(self):
        """Forget all runs, keep the memory."""
        self.v.count = 0

    @property
    def end(self):
        """Guest offset behind the last run; 0 when there is none."""
        if self.v.count == 0:
            return 0
        return self.v.runs[self.v.count - 1].guest + self.v.runs[self.v.count - 1].length

    def __len__(self):
        return self.v.count

    def __getitem__(self, Py_ssize_t index):
        if index < 0:
            index += self.v.count
        if index < 0 or <size_t> index >= self.v.count:
            raise IndexError(index)
        cdef Run *run = &self.v.runs[index]
        return (run.kind, run.guest, run.length, run.host, run.layer)

    def __iter__(self):
        cdef size_t index = 0
        while index < self.v.count:
            yield self[index]
            index += 1


cdef enum:
    LINE = 192             # no line of a map is longer
    ZERO_FLAG = 1
    DATA_FLAG = 2
    PRESENT_FLAG = 4


cdef class MapText:
    """The lines of ``map --output=json``, from the runs of a chain in order.

    *plain* has one byte for each layer: 1 where data has an offset that means
    something to others (not encrypted).
    """

    cdef Run last
    cdef int last_flags
    cdef bint any
    cdef bytes plain

    def __cinit__(self, bytes plain not None):
        self.plain = plain

    def feed(self, RunList runs not None):
        """Return the lines that *runs* completes, each with ``,`` and a line end behind it."""
        cdef size_t i, used = 0, room = (runs.v.count + 1) * LINE
        cdef Run *run
        cdef uint64_t host
        cdef int flags
        cdef char *out = <char *> malloc(room)
        if out == NULL:
            raise MemoryError()
        try:
            for i in range(runs.v.count):
                run = &runs.v.runs[i]
                host = run.host
                flags = self._flags(run, &host)
                if self.any and self._continues(run, flags, host):
                    self.last.length += run.length
                    continue
                if self.any:
                    used += self._line(out + used, b",\n")
                self.last = run[0]
                self.last.host = host
                self.last_flags = flags
                self.any = True
            return out[:used].decode("ascii")
        finally:
            free(out)

    def finish(self):
        """Return the last line, without a line end; empty when there was no run."""
        cdef char out[LINE]
        cdef size_t used
        if not self.any:
            return ""
        used = self._line(out, b"")
        self.any = False
        return out[:used].decode("ascii")

    cdef int _flags(self, Run *run, uint64_t *host) except -1:
        if run.kind == RUN_HOLE:
            return ZERO_FLAG
        if run.kind == RUN_ZERO:
            return ZERO_FLAG | PRESENT_FLAG
        if run.kind == RUN_COMPRESSED or not self.plain[run.layer]:
            host[0] = QC_NO_OFFSET
        return DATA_FLAG | PRESENT_FLAG | (ZERO_FLAG if run.kind == RUN_SPARSE else 0)

    cdef bint _continues(self, Run *run, int flags, uint64_t host) noexcept:
        if flags != self.last_flags or run.layer != self.last.layer:
            return False
        if self.last.host == QC_NO_OFFSET:
            return host == QC_NO_OFFSET
        return host == self.last.host + self.last.length

    cdef size_t _line(self, char *out, const char *end) noexcept:
        cdef char *at = _put_text(out, b'{ "start": ')
        at = _put_number(at, self.last.guest)
        at = _put_text(at, b', "length": ')
        at = _put_number(at, self.last.length)
        at = _put_text(at, b', "depth": ')
        at = _put_number(at, self.last.layer)
        at = _put_text(at, b', "present": true' if self.last_flags & PRESENT_FLAG else b', "present": false')
        at = _put_text(at, b', "zero": true' if self.last_flags & ZERO_FLAG else b', "zero": false')
        at = _put_text(at, b', "data": true' if self.last_flags & DATA_FLAG else b', "data": false')
        if self.last.host != QC_NO_OFFSET:
            at = _put_text(at, b', "offset": ')
            at = _put_number(at, self.last.host)
        at = _put_text(at, b"}")
        return _put_text(at, end) - out


cdef char *_put_text(char *out, const char *text) noexcept nogil:
    cdef size_t length = strlen(text)
    memcpy(out, text, length)
    return out + length


cdef char *_put_number(char *out, uint64_t number) noexcept nogil:
    """Write *number* in decimal; returns where the next character goes."""
    cdef char digits[20]
    cdef int count = 0
    while True:
        digits[count] = <char> (48 + number % 10)
        count += 1
        number //= 10
        if number == 0:
            break
    while count:
        count -= 1
        out[0] = digits[count]
        out += 1
    return out
