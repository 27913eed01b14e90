# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Execute runs on file descriptors: positioned, whole, without the GIL.

Invariant: a transfer is complete or reported with errno and offset.  Bytes
missing at the end of a file read as zero only up to the end of the cluster
that the file ends in; a run that lies wholly past the end is an error, never
zeros.

The segment array of a layer is replaced, never changed, so that a reader
without the GIL sees the old one or the new one.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport ENXIO, EINTR, EIO, EINVAL, errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from posix.types cimport off_t

from qcowlib._extent cimport Run, RunList, RunVec, rv_append
from qcowlib._ondisk cimport RUN_COMPRESSED, RUN_DATA

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buf, size_t count, off_t offset)
    ssize_t pwrite(int fd, const void *buf, size_t count, off_t offset)
    off_t lseek(int fd, off_t offset, int whence)
    int SEEK_DATA, SEEK_HOLE

cdef extern from *:
    """
    #include <sys/stat.h>
    #include <sys/uio.h>
    #ifndef RWF_NOWAIT
    #define RWF_NOWAIT 8
    #endif
    /* Only what the page cache has: EAGAIN where the disk would be needed. */
    static ssize_t qc_pread_nowait(int fd, void *buf, size_t count, off_t offset) {
        struct iovec v = { buf, count };
        return preadv2(fd, &v, 1, offset, RWF_NOWAIT);
    }
    static int64_t qc_regular_size(int fd) {
        struct stat st;
        if (fstat(fd, &st) < 0) return -1;
        return S_ISREG(st.st_mode) ? (int64_t)st.st_size : -1;
    }
    """
    int64_t qc_regular_size(int fd) noexcept nogil
    ssize_t qc_pread_nowait(int fd, void *buf, size_t count, off_t offset) noexcept nogil

cdef enum:
    SMALL = 65536   # below this a transfer costs less than giving the GIL away


cdef int _read_fd(int fd, uint64_t position, char *buf, uint64_t length, uint64_t pad, bint nowait,
                  uint64_t *fail) noexcept nogil:
    cdef ssize_t got
    cdef int64_t size
    while length:
        if nowait:
            got = qc_pread_nowait(fd, buf, length, <off_t> position)
        else:
            got = pread(fd, buf, length if length < 0x40000000 else 0x40000000, <off_t> position)
        if got < 0:
            if errno == EINTR:
                continue
            fail[0] = position
            return errno
        if got == 0:
            size = qc_regular_size(fd)
            # A file may end inside its last cluster; everything behind that cluster is missing, not zero.
            if size >= 0 and position + length <= (<uint64_t> size + pad - 1) // pad * pad:
                memset(buf, 0, length)
                return 0
            fail[0] = position
            return IO_MISSING
        buf += got
        position += got
        length -= got
    return 0


cdef int _write_fd(int fd, uint64_t position, const char *buf, uint64_t length, uint64_t *fail) noexcept nogil:
    cdef ssize_t done
    while length:
        done = pwrite(fd, buf, length if length < 0x40000000 else 0x40000000, <off_t> position)
        if done < 0:
            if errno == EINTR:
                continue
            fail[0] = position
            return errno
        if done == 0:
            fail[0] = position
            return EIO
        buf += done
        position += done
        length -= done
    return 0


cdef int _transfer(
    LayerIo *layer, uint64_t offset, char *buf, uint64_t length, bint write, bint nowait, uint64_t *fail
) noexcept nogil:
    cdef FdSeg *seg
    cdef int i, code
    cdef uint64_t inside, part
    for i in range(layer.count):
        seg = &layer.segs[i]
        if length == 0:
            return 0
        if offset < seg.start or offset - seg.start >= seg.length:
            continue
        inside = offset - seg.start
        part = seg.length - inside
        if part > length:
            part = length
        if write:
            code = _write_fd(seg.fd, seg.position + inside, buf, part, fail)
        else:
            code = _read_fd(seg.fd, seg.position + inside, buf, part, layer.pad, nowait, fail)
        if code:
            fail[0] = fail[0] - seg.position + seg.start
            return code
        buf += part
        offset += part
        length -= part
    if length:
        fail[0] = offset
        return IO_MISSING
    return 0


cdef class LayerFds:
    """The file descriptors behind each layer of a chain."""

    def __cinit__(self, int count):
        if count < 1:
            raise ValueError(count)
        self.graveyard = []
        self.layers = <LayerIo *> calloc(count, sizeof(LayerIo))
        if self.layers == NULL:
            raise MemoryError()
        self.count = count

    def __dealloc__(self):
        cdef int i
        if self.layers != NULL:
            for i in range(self.count):
                free(self.layers[i].segs)
            free(self.layers)
        for address in self.graveyard or ():
            free(<void *> <size_t> address)

    def set(self, int layer, segments, uint64_t pad):
        """Give *layer* its segments (sorted, start, length, fd, position); ``None`` forbids direct use."""
        cdef FdSeg *segs = NULL
        cdef int n = 0
        if layer < 0 or layer >= self.count or pad == 0:
            raise ValueError(layer)
        if self.layers[layer].segs != NULL:
            self.graveyard.append(<size_t> self.layers[layer].segs)
        if segments is not None:
            segs = <FdSeg *> malloc(len(segments) * sizeof(FdSeg) + 1)
            if segs == NULL:
                raise MemoryError()
            for start, length, fd, position in segments:
                segs[n].start = start
                segs[n].length = length
                segs[n].fd = fd
                segs[n].position = position
                n += 1
        self.layers[layer].count = 0
        self.layers[layer].segs = segs
        self.layers[layer].count = n
        self.layers[layer].pad = pad
        self.layers[layer].direct = segments is not None

    def direct(self, int layer):
        """Whether *layer* may be used through its descriptors."""
        return 0 <= layer < self.count and self.layers[layer].direct != 0

    cdef int read_vec(self, RunVec *v, char *buf, uint64_t base, bint nowait, uint64_t *fail) noexcept nogil:
        cdef size_t i
        cdef int code
        cdef Run *run
        for i in range(v.count):
            run = &v.runs[i]
            if run.kind == RUN_DATA:
                if run.layer < 0 or run.layer >= self.count:
                    fail[0] = run.guest
                    return EINVAL
                code = _transfer(&self.layers[run.layer], run.host, buf + (run.guest - base), run.length, False,
                                 nowait, fail)
                if code:
                    return code
            else:
                memset(buf + (run.guest - base), 0, run.length)
        return 0

    cdef int write_at(
        self, int layer, uint64_t offset, const char *buf, uint64_t length, uint64_t *fail
    ) noexcept nogil:
        return _transfer(&self.layers[layer], offset, <char *> buf, length, True, False, fail)

    def read_runs(self, RunList runs, buffer, uint64_t base):
        """Fill *buffer* (guest offset *base* at its start) from *runs*.

        Returns ``(left, code, layer, offset)``: the indices of runs that need
        more than a descriptor (compressed, layers without descriptors), and
        for the first failure its errno (0 none, ``IO_MISSING`` past the end)
        with the layer and file offset.
        """
        cdef Py_buffer view
        cdef size_t i
        cdef int code = 0, layer = 0
        cdef uint64_t fail = 0, total = 0
        cdef Run *run
        cdef char *buf
        cdef list left = []
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            buf = <char *> view.buf
            for i in range(runs.v.count):
                run = &runs.v.runs[i]
                if (
                    run.guest < base or run.guest - base > <uint64_t> view.len
                    or run.length > view.len - (run.guest - base)
                ):
                    raise ValueError("a run lies outside the buffer")
                if run.kind == RUN_COMPRESSED or (
                    run.kind == RUN_DATA
                    and (run.layer < 0 or run.layer >= self.count or not self.layers[run.layer].direct)
                ):
                    left.append(i)
                else:
                    total += run.length
            if len(left) != <Py_ssize_t> runs.v.count:
                if total < SMALL:
                    code = self._read_direct(runs, buf, base, &fail, &layer)
                else:
                    with nogil:
                        code = self._read_direct(runs, buf, base, &fail, &layer)
        finally:
            PyBuffer_Release(&view)
        return left, code, layer, fail

    cdef int _read_direct(self, RunList runs, char *buf, uint64_t base, uint64_t *fail, int *layer) noexcept nogil:
        cdef size_t i
        cdef int code
        cdef Run *run
        for i in range(runs.v.count):
            run = &runs.v.runs[i]
            if run.kind == RUN_COMPRESSED:
                continue
            if run.kind != RUN_DATA:
                memset(buf + (run.guest - base), 0, run.length)
            elif run.layer >= 0 and run.layer < self.count and self.layers[run.layer].direct:
                code = _transfer(&self.layers[run.layer], run.host, buf + (run.guest - base), run.length, False,
                                 False, fail)
                if code:
                    layer[0] = run.layer
                    return code
        return 0

    def refine(self, RunList runs not None, bytes holes not None, RunList out not None):
        """Append *runs* to *out* with the holes of the file system as runs of their own.

        *holes* has one byte for each layer: the kind that a hole in its data
        is, 0 where that is not asked.  Such a layer must be one whole file.
        Returns errno, 0 when all went well.
        """
        cdef size_t i
        cdef int code = 0
        cdef Run *run
        cdef char *kinds = holes
        if len(holes) < self.count:
            raise ValueError("one kind for each layer")
        for i in range(runs.v.count):
            run = &runs.v.runs[i]
            if run.kind != RUN_DATA or not kinds[run.layer]:
                code = rv_append(&out.v, run.kind, run.guest, run.length, run.host, run.layer)
            else:
                code = _refine_run(self.layers[run.layer].segs[0].fd, run, kinds[run.layer], &out.v)
            if code < 0:
                raise MemoryError()
            if code:
                break
        return code

    def whole_file(self, int layer):
        """Whether *layer* is one descriptor from its start on."""
        return (
            0 <= layer < self.count and self.layers[layer].direct and self.layers[layer].count == 1
            and self.layers[layer].segs[0].start == 0 and self.layers[layer].segs[0].position == 0
        )


cdef int _refine_run(int fd, Run *run, int hole, RunVec *out) noexcept nogil:
    """Split one data run by the extents of its file; errno, or -1 without memory."""
    cdef uint64_t at = run.host, end = run.host + run.length, stop
    cdef off_t found
    while at < end:
        found = lseek(fd, <off_t> at, SEEK_DATA)
        if found < 0 and errno != ENXIO:
            return errno
        stop = end if found < 0 or <uint64_t> found > end else <uint64_t> found
        if rv_append(out, hole, run.guest + (at - run.host), stop - at, at, run.layer) < 0:
            return -1
        at = stop
        if at >= end:
            return 0
        found = lseek(fd, <off_t> at, SEEK_HOLE)
        if found < 0 and errno != ENXIO:
            return errno
        # A file that changes meanwhile still ends the loop: each turn moves on.
        stop = end if found < 0 or <uint64_t> found > end or <uint64_t> found <= at else <uint64_t> found
        if rv_append(out, RUN_DATA, run.guest + (at - run.host), stop - at, at, run.layer) < 0:
            return -1
        at = stop
    return 0
