# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters through whatever C libraries the machine has, without the GIL.

The libraries are looked up with ``dlopen``: nothing is linked, nothing is
required, and each one missing is a bit missing in :func:`load`.

Invariant: a call writes at most one cluster to its output, reads at most the
bytes it is given, and allocates nothing whose size an image chooses (zstd
frames are decoded straight into the output, so the window size that a frame
claims is never allocated).  Contexts are pooled, at most ``POOL`` of a kind.
"""
from libc.stdint cimport uint8_t, uint64_t
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <pthread.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>

    /* z_stream of zlib's stable binary interface. */
    typedef struct {
        const uint8_t *next_in; unsigned avail_in; unsigned long total_in;
        uint8_t *next_out; unsigned avail_out; unsigned long total_out;
        const char *msg; void *state;
        void *zalloc; void *zfree; void *opaque;
        int data_type; unsigned long adler; unsigned long reserved;
    } qc_zstream;

    static struct {
        void *(*alloc)(void);
        void (*release)(void *);
        int (*run)(void *, const void *, size_t, void *, size_t, size_t *, size_t *);
    } qc_ld;
    static struct {
        int (*init)(qc_zstream *, int, const char *, int);
        int (*reset)(qc_zstream *);
        int (*run)(qc_zstream *, int);
        int (*end)(qc_zstream *);
    } qc_z;
    static struct {
        void *(*new_d)(void);
        size_t (*free_d)(void *);
        size_t (*run_d)(void *, void *, size_t, const void *, size_t);
        size_t (*frame)(const void *, size_t);
        unsigned (*error)(size_t);
        void *(*new_c)(void);
        size_t (*free_c)(void *);
        size_t (*run_c)(void *, void *, size_t, const void *, size_t, int);
        unsigned (*version)(void);
    } qc_zs;

    static int qc_load_libdeflate(const char *name)
    {
        void *so = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (!so) return 0;
        qc_ld.release = (void (*)(void *)) dlsym(so, "libdeflate_free_decompressor");
        qc_ld.run = (int (*)(void *, const void *, size_t, void *, size_t, size_t *, size_t *))
            dlsym(so, "libdeflate_deflate_decompress_ex");
        qc_ld.alloc = (void *(*)(void)) dlsym(so, "libdeflate_alloc_decompressor");
        return qc_ld.alloc && qc_ld.release && qc_ld.run;
    }
    static int qc_load_libz(const char *name)
    {
        void *so = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (!so) return 0;
        qc_z.init = (int (*)(qc_zstream *, int, const char *, int)) dlsym(so, "inflateInit2_");
        qc_z.reset = (int (*)(qc_zstream *)) dlsym(so, "inflateReset");
        qc_z.run = (int (*)(qc_zstream *, int)) dlsym(so, "inflate");
        qc_z.end = (int (*)(qc_zstream *)) dlsym(so, "inflateEnd");
        return qc_z.init && qc_z.reset && qc_z.run && qc_z.end;
    }
    static int qc_load_libzstd(const char *name)
    {
        void *so = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (!so) return 0;
        qc_zs.new_d = (void *(*)(void)) dlsym(so, "ZSTD_createDCtx");
        qc_zs.free_d = (size_t (*)(void *)) dlsym(so, "ZSTD_freeDCtx");
        qc_zs.run_d = (size_t (*)(void *, void *, size_t, const void *, size_t)) dlsym(so, "ZSTD_decompressDCtx");
        qc_zs.frame = (size_t (*)(const void *, size_t)) dlsym(so, "ZSTD_findFrameCompressedSize");
        qc_zs.error = (unsigned (*)(size_t)) dlsym(so, "ZSTD_isError");
        qc_zs.new_c = (void *(*)(void)) dlsym(so, "ZSTD_createCCtx");
        qc_zs.free_c = (size_t (*)(void *)) dlsym(so, "ZSTD_freeCCtx");
        qc_zs.run_c = (size_t (*)(void *, void *, size_t, const void *, size_t, int)) dlsym(so, "ZSTD_compressCCtx");
        qc_zs.version = (unsigned (*)(void)) dlsym(so, "ZSTD_versionNumber");
        return qc_zs.new_d && qc_zs.free_d && qc_zs.run_d && qc_zs.frame && qc_zs.error && qc_zs.new_c
            && qc_zs.free_c && qc_zs.run_c && qc_zs.version && qc_zs.version() >= 10400;
    }

    /* Idle contexts; a context is used by one thread at a time. */
    #define QC_POOL 32
    typedef struct { pthread_mutex_t lock; int count; void *idle[QC_POOL]; } qc_pool;
    static qc_pool qc_pools[4] = {
        { PTHREAD_MUTEX_INITIALIZER, 0, { 0 } }, { PTHREAD_MUTEX_INITIALIZER, 0, { 0 } },
        { PTHREAD_MUTEX_INITIALIZER, 0, { 0 } }, { PTHREAD_MUTEX_INITIALIZER, 0, { 0 } },
    };
    static void *qc_take(int kind)
    {
        qc_pool *pool = &qc_pools[kind];
        void *context = NULL;
        pthread_mutex_lock(&pool->lock);
        if (pool->count)
            context = pool->idle[--pool->count];
        pthread_mutex_unlock(&pool->lock);
        return context;
    }
    static int qc_keep(int kind, void *context)
    {
        qc_pool *pool = &qc_pools[kind];
        int kept = 0;
        pthread_mutex_lock(&pool->lock);
        if (pool->count < QC_POOL) {
            pool->idle[pool->count++] = context;
            kept = 1;
        }
        pthread_mutex_unlock(&pool->lock);
        return kept;
    }

    static void *qc_new_zstream(void)
    {
        qc_zstream *z = (qc_zstream *) calloc(1, sizeof *z);
        if (z && qc_z.init(z, -15, "1.2.11", (int) sizeof *z)) {
            free(z);
            z = NULL;
        }
        return z;
    }
    static void qc_free_zstream(void *context)
    {
        qc_z.end((qc_zstream *) context);
        free(context);
    }
    /* Inflate until the output is full; the arbiter of what a stream means. */
    static int qc_run_zstream(void *context, const uint8_t *src, size_t n, uint8_t *dst, size_t room)
    {
        qc_zstream *z = (qc_zstream *) context;
        int code;
        if (qc_z.reset(z))
            return -1;
        z->next_in = src; z->avail_in = (unsigned) n;
        z->next_out = dst; z->avail_out = (unsigned) room;
        code = qc_z.run(z, 4 /* Z_FINISH */);
        z->next_in = NULL; z->next_out = NULL;
        return (code == 0 || code == 1 || code == -5) && z->avail_out == 0 ? 0 : -1;
    }
    static void *qc_ld_alloc(void) { return qc_ld.alloc(); }
    static void qc_ld_release(void *c) { qc_ld.release(c); }
    static int qc_ld_run(void *c, const void *s, size_t n, void *d, size_t r, size_t *i, size_t *o)
    { return qc_ld.run(c, s, n, d, r, i, o); }
    static void *qc_zs_new_d(void) { return qc_zs.new_d(); }
    static void qc_zs_free_d(void *c) { qc_zs.free_d(c); }
    static size_t qc_zs_run_d(void *c, void *d, size_t r, const void *s, size_t n)
    { return qc_zs.run_d(c, d, r, s, n); }
    static size_t qc_zs_frame(const void *s, size_t n) { return qc_zs.frame(s, n); }
    static unsigned qc_zs_error(size_t code) { return qc_zs.error(code); }
    static void *qc_zs_new_c(void) { return qc_zs.new_c(); }
    static void qc_zs_free_c(void *c) { qc_zs.free_c(c); }
    static size_t qc_zs_run_c(void *c, void *d, size_t r, const void *s, size_t n, int level)
    { return qc_zs.run_c(c, d, r, s, n, level); }
    static unsigned qc_zs_version(void) { return qc_zs.version(); }
    """
    int qc_load_libdeflate(const char *) nogil
    int qc_load_libz(const char *) nogil
    int qc_load_libzstd(const char *) nogil
    void *qc_take(int) noexcept nogil
    int qc_keep(int, void *) noexcept nogil
    void *qc_new_zstream() noexcept nogil
    void qc_free_zstream(void *) noexcept nogil
    int qc_run_zstream(void *, const uint8_t *, size_t, uint8_t *, size_t) noexcept nogil
    void *qc_ld_alloc() noexcept nogil
    void qc_ld_release(void *) noexcept nogil
    int qc_ld_run(void *, const void *, size_t, void *, size_t, size_t *, size_t *) noexcept nogil
    void *qc_zs_new_d() noexcept nogil
    void qc_zs_free_d(void *) noexcept nogil
    size_t qc_zs_run_d(void *, void *, size_t, const void *, size_t) noexcept nogil
    size_t qc_zs_frame(const void *, size_t) noexcept nogil
    unsigned qc_zs_error(size_t) noexcept nogil
    void *qc_zs_new_c() noexcept nogil
    void qc_zs_free_c(void *) noexcept nogil
    size_t qc_zs_run_c(void *, void *, size_t, const void *, size_t, int) noexcept nogil
    unsigned qc_zs_version() noexcept nogil

cdef enum:
    POOL_LIBDEFLATE = 0
    POOL_LIBZ = 1
    POOL_ZSTD_READ = 2
    POOL_ZSTD_WRITE = 3

# No cluster is larger, and compressed data spans at most two of them.
cdef enum:
    MAX_CLUSTER = 1 << 21

cdef int loaded = 0


def load(*, str libdeflate="libdeflate.so.0", str libz="libz.so.1", str libzstd="libzstd.so.1"):
    """Look for the libraries not found so far; returns the mask of those that can be used.

    Bits: 1 libdeflate, 2 libz, 4 libzstd.  A name is a soname or a path.
    """
    global loaded
    if not loaded & USE_LIBDEFLATE and qc_load_libdeflate(libdeflate.encode()):
        loaded |= USE_LIBDEFLATE
    if not loaded & USE_LIBZ and qc_load_libz(libz.encode()):
        loaded |= USE_LIBZ
    if not loaded & USE_LIBZSTD and qc_load_libzstd(libzstd.encode()):
        loaded |= USE_LIBZSTD
    return loaded


def zstd_version():
    """Return the loaded libzstd's version as major * 10000 + minor * 100 + patch, 0 without one."""
    return qc_zs_version() if loaded & USE_LIBZSTD else 0


cdef int inflate_cluster(int allow, const uint8_t *src, size_t length, uint8_t *dst, size_t cluster) noexcept nogil:
    cdef void *context
    cdef size_t used = 0, made = 0
    cdef int code
    if allow & USE_LIBDEFLATE:
        context = qc_take(POOL_LIBDEFLATE)
        if context == NULL:
            context = qc_ld_alloc()
        if context != NULL:
            code = qc_ld_run(context, src, length, dst, cluster, &used, &made)
            if not qc_keep(POOL_LIBDEFLATE, context):
                qc_ld_release(context)
            if code == 0:
                return CODEC_OK if made == cluster else CODEC_BAD
            # Longer than a cluster, cut off, or broken: libdeflate may have
            # stopped short of filling the output, so let zlib judge.
    if allow & USE_LIBZ:
        context = qc_take(POOL_LIBZ)
        if context == NULL:
            context = qc_new_zstream()
        if context == NULL:
            return CODEC_UNAVAILABLE
        code = qc_run_zstream(context, src, length, dst, cluster)
        if not qc_keep(POOL_LIBZ, context):
            qc_free_zstream(context)
        return CODEC_OK if code == 0 else CODEC_BAD
    return CODEC_UNAVAILABLE


cdef bint is_frame(const uint8_t *src, size_t length) noexcept nogil:
    """Standard or skippable frame: formats from before zstd 0.8 are not part of qcow2."""
    if length < 5:
        return False
    if src[1] == 0xB5 and src[2] == 0x2F and src[3] == 0xFD:
        return src[0] == 0x28
    return src[0] & 0xF0 == 0x50 and src[1] == 0x2A and src[2] == 0x4D and src[3] == 0x18


cdef int unzstd_cluster(const uint8_t *src, size_t length, uint8_t *dst, size_t cluster) noexcept nogil:
    cdef void *context = qc_take(POOL_ZSTD_READ)
    cdef size_t frame, made
    cdef int result = CODEC_OK
    if context == NULL:
        context = qc_zs_new_d()
    if context == NULL:
        return CODEC_UNAVAILABLE
    while cluster:
        if not is_frame(src, length):
            result = CODEC_BAD
            break
        frame = qc_zs_frame(src, length)
        if qc_zs_error(frame) or frame == 0 or frame > length:
            result = CODEC_BAD
            break
        made = qc_zs_run_d(context, dst, cluster, src, frame)
        if qc_zs_error(made) or made > cluster:
            result = CODEC_BAD
            break
        src += frame
        length -= frame
        dst += made
        cluster -= made
    if not qc_keep(POOL_ZSTD_READ, context):
        qc_zs_free_d(context)
    return result


cdef int codec_decompress(int kind, int allow, const uint8_t *src, size_t length,
                          uint8_t *dst, size_t cluster) noexcept nogil:
    """Decode exactly one cluster; *kind* is the header's compression_type."""
    if cluster > MAX_CLUSTER or length > 2 * MAX_CLUSTER:
        return CODEC_BAD
    if kind == 0:
        return inflate_cluster(allow & loaded, src, length, dst, cluster)
    if kind == 1 and allow & loaded & USE_LIBZSTD:
        return unzstd_cluster(src, length, dst, cluster)
    return CODEC_UNAVAILABLE


cdef Py_ssize_t codec_compress_zstd(int level, const uint8_t *src, size_t length,
                                    uint8_t *dst, size_t room) noexcept nogil:
    """Write one frame; returns its length, ``CODEC_BAD`` if it does not fit in *room*."""
    cdef void *context
    cdef size_t made
    if not loaded & USE_LIBZSTD:
        return CODEC_UNAVAILABLE
    context = qc_take(POOL_ZSTD_WRITE)
    if context == NULL:
        context = qc_zs_new_c()
    if context == NULL:
        return CODEC_UNAVAILABLE
    made = qc_zs_run_c(context, dst, room, src, length, level)
    if not qc_keep(POOL_ZSTD_WRITE, context):
        qc_zs_free_c(context)
    return CODEC_BAD if qc_zs_error(made) else <Py_ssize_t> made


def decompress(int kind, int allow, source, target):
    """Decode *source* into the whole of *target*; returns 0, -1 (bad data) or -2 (no library)."""
    cdef Py_buffer src, dst
    cdef int result
    PyObject_GetBuffer(source, &src, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(target, &dst, PyBUF_WRITABLE)
        try:
            with nogil:
                result = codec_decompress(kind, allow, <const uint8_t *> src.buf, <size_t> src.len,
                                          <uint8_t *> dst.buf, <size_t> dst.len)
        finally:
            PyBuffer_Release(&dst)
    finally:
        PyBuffer_Release(&src)
    return result


def decompress_many(int kind, int allow, size_t cluster, pieces, source, target, Py_ssize_t start):
    """Decode the pieces from number *start* on, without the GIL, until one fails.

    *pieces* is a buffer of native 64-bit triples (offset in *source*, length,
    offset in *target*); all of them are checked against the buffers before
    anything is decoded.  Returns (number of the piece it stopped at, result),
    the result 0 when all are done.
    """
    cdef Py_buffer src, dst, plan
    cdef const uint64_t *piece
    cdef Py_ssize_t count, index = start
    cdef int result = CODEC_OK
    PyObject_GetBuffer(pieces, &plan, PyBUF_SIMPLE)
    try:
        if plan.len % 24 or <size_t> plan.buf % 8 or start < 0 or cluster == 0 or cluster > MAX_CLUSTER:
            raise ValueError("pieces are triples of 64-bit numbers")
        count = plan.len // 24
        piece = <const uint64_t *> plan.buf
        PyObject_GetBuffer(source, &src, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(target, &dst, PyBUF_WRITABLE)
            try:
                with nogil:
                    for index in range(count):
                        if (piece[3 * index] > <uint64_t> src.len
                                or piece[3 * index + 1] > <uint64_t> src.len - piece[3 * index]
                                or cluster > <uint64_t> dst.len
                                or piece[3 * index + 2] > <uint64_t> dst.len - cluster):
                            with gil:
                                raise ValueError("a piece lies outside its buffer")
                    index = start
                    while index < count:
                        result = codec_decompress(kind, allow, <const uint8_t *> src.buf + piece[3 * index],
                                                  <size_t> piece[3 * index + 1],
                                                  <uint8_t *> dst.buf + piece[3 * index + 2], cluster)
                        if result != CODEC_OK:
                            break
                        index += 1
            finally:
                PyBuffer_Release(&dst)
        finally:
            PyBuffer_Release(&src)
    finally:
        PyBuffer_Release(&plan)
    return index, result


def compress_zstd(int level, source, target):
    """Write *source* as one frame into *target*; returns its length, -1 (does not fit) or -2 (no library)."""
    cdef Py_buffer src, dst
    cdef Py_ssize_t made
    PyObject_GetBuffer(source, &src, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(target, &dst, PyBUF_WRITABLE)
        try:
            with nogil:
                made = codec_compress_zstd(level, <const uint8_t *> src.buf, <size_t> src.len,
                                           <uint8_t *> dst.buf, <size_t> dst.len)
        finally:
            PyBuffer_Release(&dst)
    finally:
        PyBuffer_Release(&src)
    return made
