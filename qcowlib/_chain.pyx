# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One mapping over all layers of a chain, and the hit lane: what needs no engine.

A read whose runs are mapped and plain, an overwrite in place and a simple
allocating write run here from the look-up to the system call.

Invariants: a look-up is one moment of the chain, because it keeps the GIL; what
works on looked-up offsets without the GIL is pinned, and space freed meanwhile
is not reused before the pin is gone (I4).  No engine state changes here except
by a simple allocation, whose entry changes after its data was written (I2).
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from qcowlib._cluster cimport ClusterMap, WRITE_ALLOCATE, WRITE_IN_PLACE
from qcowlib._extent cimport Run, RunList, RunVec, rv_append, rv_free
from qcowlib._io cimport LayerFds
from qcowlib._ondisk cimport (
    QC_COPIED, QC_NO_OFFSET, QC_ZERO, RUN_COMPRESSED, RUN_DATA, RUN_HOLE, qc_swap64,
)
from qcowlib._refcount cimport Refcounts

cdef enum:
    STACK_RUNS = 24
    SMALL = 65536          # below this a transfer costs less than giving the GIL away
    OK = 0
    NEED = 1
    NO_MEMORY = 4


cdef class ChainMap:
    """The layers of a chain, top first, and who is using them.

    A *pin* marks an operation that works on host offsets it looked up, outside
    the engine lock; space freed while it is held is not reused before it is
    gone (Invariant: I4).
    """

    def __cinit__(self, maps, sizes, LayerFds fds not None):
        cdef int i
        self.count = len(maps)
        if self.count < 1 or self.count > 256 or len(sizes) != self.count or fds.count < self.count:
            raise ValueError("a chain needs one size and one storage for each layer")
        self.maps = list(maps)
        self.fds = fds
        self.cmaps = <void **> calloc(self.count, sizeof(void *))
        self.sizes = <uint64_t *> calloc(self.count, sizeof(uint64_t))
        if self.cmaps == NULL or self.sizes == NULL:
            raise MemoryError()
        for i in range(self.count):
            if self.maps[i] is not None:
                if not isinstance(self.maps[i], ClusterMap):
                    raise TypeError(self.maps[i])
                self.cmaps[i] = <void *> self.maps[i]
            self.sizes[i] = sizes[i]

    def __dealloc__(self):
        free(self.cmaps)
        free(self.sizes)

    def set_size(self, int layer, uint64_t size):
        """The guest-visible size of a layer changed."""
        if layer < 0 or layer >= self.count:
            raise IndexError(layer)
        self.sizes[layer] = size
        if self.cmaps[layer] != NULL:
            (<ClusterMap> self.cmaps[layer]).size = size

    def replace_map(self, int layer, ClusterMap new not None):
        """Use another mapping for *layer* (an internal snapshot was applied)."""
        if layer < 0 or layer >= self.count or self.cmaps[layer] == NULL:
            raise IndexError(layer)
        self.maps[layer] = new
        self.cmaps[layer] = <void *> new

    cdef int resolve_into(self, uint64_t pos, uint64_t length, size_t limit, RunVec *out) noexcept nogil:
        """Resolve through all layers; stops early at *limit* runs. OK, NEED, CORRUPT or NO_MEMORY."""
        cdef uint64_t hole_until[256]
        cdef uint64_t end = pos + length, part, found, host
        cdef int layer, kind, code
        memset(hole_until, 0, sizeof(uint64_t) * self.count)
        while pos < end:
            if out.count >= limit:
                return OK
            part = end - pos
            kind = RUN_HOLE
            host = QC_NO_OFFSET
            layer = 0
            while layer < self.count:
                if pos >= self.sizes[layer]:
                    # Past the end of a shorter layer nothing below it shows; space above it for subclusters does.
                    kind = RUN_HOLE
                    layer -= 1 if layer else 0
                    break
                if part > self.sizes[layer] - pos:
                    part = self.sizes[layer] - pos
                if self.cmaps[layer] == NULL:
                    kind = RUN_DATA
                    host = pos
                    break
                if hole_until[layer] > pos:
                    kind = RUN_HOLE
                    host = QC_NO_OFFSET
                    if part > hole_until[layer] - pos:
                        part = hole_until[layer] - pos
                else:
                    code = (<ClusterMap> self.cmaps[layer]).lookup(pos, part, &kind, &host, &found)
                    if code != OK:
                        self.need_layer = layer
                        self.need_l1 = pos
                        return code
                    part = found
                    if kind != RUN_HOLE:
                        break
                    if layer + 1 < self.count and host == QC_NO_OFFSET:
                        hole_until[layer] = pos + part
                layer += 1
            if layer == self.count:
                layer -= 1
            if rv_append(out, kind, pos, part, host, layer) < 0:
                return NO_MEMORY
            pos += part
        return OK

    def resolve(self, uint64_t offset, uint64_t length, size_t limit, RunList out not None):
        """Append runs from *offset* on to *out*, at most about *limit* of them.

        Returns ``(code, layer, guest)``: 0, or 1 when the table for guest
        offset *guest* of *layer* must be loaded before the rest can be
        resolved, or 2 when it is corrupt (the map knows how).
        """
        cdef int code
        code = self.resolve_into(offset, length, limit, &out.v)
        if code == NO_MEMORY:
            raise MemoryError()
        return code, self.need_layer, self.need_l1

    def set_refs(self, Refcounts refs):
        """Let the hit lane allocate from *refs*, while :attr:`fast_allocate` is set."""
        self.refs = refs

    # -- pins ----------------------------------------------------------------------------------------------------

    def pin(self):
        """Start using looked-up offsets; give the result to :meth:`unpin`."""
        self.pins[self.parity] += 1
        return self.parity

    def unpin(self, int parity):
        """End what :meth:`pin` started."""
        self.pins[parity & 1] -= 1

    def advance(self):
        """Try to start a new epoch; true when no operation older than the last epoch is left."""
        if self.pins[1 - self.parity]:
            return False
        self.parity = 1 - self.parity
        return True

    @property
    def pinned(self):
        """Operations that are using looked-up offsets."""
        return self.pins[0] + self.pins[1]

    # -- the hit lane --------------------------------------------------------------------------------------------

    def read_hit(self, buffer, uint64_t offset, bint nowait=False):
        """Read into *buffer* if all of it is mapped and plain; false when the engine must do it.

        With *nowait* only if the page cache has it.  The caller has checked the bounds.
        """
        cdef Py_buffer view
        if not self.fast_read:
            return False
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            return self._read_into(<char *> view.buf, view.len, offset, nowait)
        finally:
            PyBuffer_Release(&view)

    cdef bint _read_into(self, char *buf, uint64_t length, uint64_t offset, bint nowait):
        cdef Run runs[STACK_RUNS]
        cdef RunVec vec
        cdef uint64_t fail = 0
        cdef int code, parity
        vec.runs = runs
        vec.count = 0
        vec.room = STACK_RUNS
        vec.borrowed = True
        code = self.resolve_into(offset, length, 4096, &vec)
        if code == OK and vec.count:
            code = vec.runs[vec.count - 1].guest + vec.runs[vec.count - 1].length != offset + length
        if code == OK and self._plain(&vec):
            if length < SMALL:
                code = self.fds.read_vec(&vec, buf, offset, nowait, &fail)
            else:
                parity = self.parity
                self.pins[parity] += 1
                with nogil:
                    code = self.fds.read_vec(&vec, buf, offset, nowait, &fail)
                self.pins[parity] -= 1
        else:
            code = NEED
        rv_free(&vec)
        return code == OK

    def read_bytes(self, uint64_t length, uint64_t offset):
        """As :meth:`read_hit`, into a new bytes object; ``None`` when the engine must do it."""
        cdef object out
        if not self.fast_read or length == 0 or length > 0x7FFFFFFF:
            return None
        out = PyBytes_FromStringAndSize(NULL, length)
        return out if self._read_into(PyBytes_AS_STRING(out), length, offset, False) else None

    def read_many(self, buffer, offsets, uint64_t length):
        """Read *length* bytes from each of *offsets* (unsigned 64-bit numbers) into *buffer*, one behind the other.

        Returns how many of them, from the first on, are done; the engine must
        do the next one.  All look-ups are one moment; then everything is read
        without the GIL.  The caller has checked the bounds.
        """
        cdef Py_buffer view, places
        cdef RunVec all_runs, one
        cdef uint64_t fail = 0, index = 0, count
        cdef uint64_t *at
        cdef int code = OK, parity
        if not self.fast_read:
            return 0
        memset(&all_runs, 0, sizeof(RunVec))
        memset(&one, 0, sizeof(RunVec))
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            PyObject_GetBuffer(offsets, &places, PyBUF_SIMPLE)
        except BaseException:
            PyBuffer_Release(&view)
            raise
        try:
            at = <uint64_t *> places.buf
            count = places.len // 8
            if count * length > <uint64_t> view.len:
                raise ValueError("the buffer is too short")
            while index < count and code == OK:
                code = self._look_up(at[index], length, index * length, &one, &all_runs)
                if code == OK:
                    index += 1
            if code == NO_MEMORY:
                raise MemoryError()
            parity = self.parity
            self.pins[parity] += 1
            with nogil:
                code = self.fds.read_vec(&all_runs, <char *> view.buf, 0, False, &fail)
            self.pins[parity] -= 1
            return index if code == 0 else 0
        finally:
            rv_free(&all_runs)
            rv_free(&one)
            PyBuffer_Release(&places)
            PyBuffer_Release(&view)

    cdef int _look_up(self, uint64_t offset, uint64_t length, uint64_t place, RunVec *one, RunVec *out):
        """Append the runs of one range to *out*, at *place* of the buffer; anything but OK appends nothing."""
        cdef size_t i
        cdef Run *run
        one.count = 0
        if self.resolve_into(offset, length, 4096, one) != OK or not self._plain(one):
            return NEED
        if length and one.runs[one.count - 1].guest + one.runs[one.count - 1].length != offset + length:
            return NEED
        for i in range(one.count):
            run = &one.runs[i]
            if rv_append(out, run.kind, run.guest - offset + place, run.length, run.host, run.layer) < 0:
                return NO_MEMORY
        return OK

    cdef bint _plain(self, RunVec *vec) noexcept nogil:
        cdef size_t i
        for i in range(vec.count):
            if vec.runs[i].kind == RUN_COMPRESSED:
                return False
            if vec.runs[i].kind == RUN_DATA and not self.fds.layers[vec.runs[i].layer].direct:
                return False
        return True

    def write_hit(self, buffer, uint64_t offset):
        """Overwrite in place if every byte has its own cluster already; false when the engine must do it.

        Changes no metadata, and is short enough to keep the GIL, so that the
        lookup still holds when the bytes arrive.  The caller has checked the bounds.
        """
        cdef Py_buffer view
        cdef Run runs[STACK_RUNS]
        cdef RunVec vec
        cdef uint64_t host, part, done = 0, fail = 0
        cdef int code
        cdef ClusterMap m
        if not self.fast_write or not self.fds.layers[0].direct:
            return False
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        if view.len >= SMALL:
            PyBuffer_Release(&view)
            return False
        vec.runs = runs
        vec.count = 0
        vec.room = STACK_RUNS
        vec.borrowed = True
        try:
            if self.cmaps[0] == NULL:
                if rv_append(&vec, RUN_DATA, offset, view.len, offset, 0) < 0:
                    raise MemoryError()
            else:
                m = <ClusterMap> self.cmaps[0]
                if self.fast_allocate and self._write_new(m, <const char *> view.buf, view.len, offset):
                    return True
                while done < <uint64_t> view.len:
                    if m.plan(offset + done, view.len - done, &host, &part) != WRITE_IN_PLACE:
                        return False
                    if not m.has_data_file and m._is_guarded(host, part):
                        return False
                    if rv_append(&vec, RUN_DATA, offset + done, part, host, 0) < 0:
                        raise MemoryError()
                    done += part
            code = self._write_vec(&vec, <const char *> view.buf, offset, &fail)
            return code == 0
        finally:
            rv_free(&vec)
            PyBuffer_Release(&view)

    cdef int _write_new(self, ClusterMap m, const char *buf, uint64_t length, uint64_t offset):
        """Write into new clusters if that is simple; 1 when it was done.

        Simple: one table that is ours and may become dirty, no bits beside the
        entry, nothing of the old clusters to keep, space at hand that reads as
        zeros around the payload.  The entry changes after the write
        (Invariant: I2); a failed write leaves nothing.
        """
        cdef uint64_t host = QC_NO_OFFSET, part = 0, first = 0, got = 0, fail = 0, count, e, i
        cdef uint64_t inside = offset & (m.cluster_size - 1)
        cdef uint64_t *entry
        cdef bint whole
        if self.refs is None or m.extended or m.has_data_file:
            return 0
        if m.plan(offset, length, &host, &part) != WRITE_ALLOCATE or part != length:
            return 0
        if m.dirty_count + 2 >= m.slot_count:
            return 0
        count = (inside + length + m.cluster_size - 1) >> m.cluster_bits
        whole = inside == 0 and (length & (m.cluster_size - 1)) == 0
        if not whole and self.count > 1:
            return 0
        entry = m._entry(offset)
        for i in range(count):
            e = qc_swap64(entry[i])
            # Unallocated or zero without space: anything else has bytes to keep or references to drop.
            if e & ~QC_ZERO:
                return 0
        if self.refs.find(count, False, &first, &got) != 0 or got != count:
            return 0
        if first < self.refs.high_water and (not whole or m._is_guarded(
                first << m.cluster_bits, count << m.cluster_bits)):
            return 0
        self.refs.take_run(first, got, True)
        if self.fds.write_at(0, (first << m.cluster_bits) + inside, buf, length, &fail):
            self.refs.drop_run(first, got)
            return 0
        for i in range(count):
            entry[i] = qc_swap64(((first + i) << m.cluster_bits) | QC_COPIED)
        m._touch(offset, count)
        return 1

    cdef int _write_vec(self, RunVec *vec, const char *buf, uint64_t base, uint64_t *fail) noexcept nogil:
        cdef size_t i
        cdef int code
        for i in range(vec.count):
            code = self.fds.write_at(
                0, vec.runs[i].host, buf + (vec.runs[i].guest - base), vec.runs[i].length, fail)
            if code:
                return code
        return 0
