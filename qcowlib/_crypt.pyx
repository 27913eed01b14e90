# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Disk encryption over runs of 512-byte sectors, without the GIL.

XTS and CBC are built here from one primitive, AES-ECB over many blocks, which
libcrypto (found with ``dlopen``, not linked) runs at the speed of the
processor's AES unit; a context set up again for each sector, as the XTS
interface of libcrypto wants it, is several times slower.

Invariant: the length is a whole number of sectors, source and target are the
same bytes or do not overlap, and a context is used by one thread at a time.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <stdint.h>
    #include <string.h>

    static struct {
        void *(*create)(void);
        void (*release)(void *);
        int (*init)(void *, const void *, void *, const uint8_t *, const uint8_t *, int);
        int (*padding)(void *, int);
        int (*update)(void *, uint8_t *, int *, const uint8_t *, int);
        const void *(*aes[3])(void);
    } qy;

    static int qy_load(const char *name)
    {
        void *so = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (!so) return 0;
        qy.create = (void *(*)(void)) dlsym(so, "EVP_CIPHER_CTX_new");
        qy.release = (void (*)(void *)) dlsym(so, "EVP_CIPHER_CTX_free");
        qy.init = (int (*)(void *, const void *, void *, const uint8_t *, const uint8_t *, int))
            dlsym(so, "EVP_CipherInit_ex");
        qy.padding = (int (*)(void *, int)) dlsym(so, "EVP_CIPHER_CTX_set_padding");
        qy.update = (int (*)(void *, uint8_t *, int *, const uint8_t *, int)) dlsym(so, "EVP_CipherUpdate");
        qy.aes[0] = (const void *(*)(void)) dlsym(so, "EVP_aes_128_ecb");
        qy.aes[1] = (const void *(*)(void)) dlsym(so, "EVP_aes_192_ecb");
        qy.aes[2] = (const void *(*)(void)) dlsym(so, "EVP_aes_256_ecb");
        return qy.create && qy.release && qy.init && qy.padding && qy.update && qy.aes[0] && qy.aes[1] && qy.aes[2];
    }
    /* A context for AES-ECB, or NULL; the key has 16, 24 or 32 bytes. */
    static void *qy_new(const uint8_t *key, size_t bytes, int encrypt)
    {
        void *context = qy.create();
        if (context && !(qy.init(context, qy.aes[bytes / 8 - 2](), NULL, key, NULL, encrypt)
                         && qy.padding(context, 0))) {
            qy.release(context);
            context = NULL;
        }
        return context;
    }
    static void qy_free(void *context) { if (context) qy.release(context); }
    static int qy_ecb(void *context, uint8_t *out, const uint8_t *in, int bytes)
    {
        int made = 0;
        return qy.update(context, out, &made, in, bytes) && made == bytes;
    }

    typedef struct { uint64_t low, high; } qy_block;
    static inline qy_block qy_get(const uint8_t *p) { qy_block b; memcpy(&b, p, 16); return b; }
    static inline void qy_set(uint8_t *p, qy_block b) { memcpy(p, &b, 16); }
    static inline void qy_xor(uint8_t *out, const uint8_t *a, const uint8_t *b, size_t bytes)
    {
        for (size_t i = 0; i < bytes; i += 16) {
            qy_block x = qy_get(a + i), y = qy_get(b + i);
            x.low ^= y.low;
            x.high ^= y.high;
            qy_set(out + i, x);
        }
    }
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    #define QY_LE(v) (v)
    #else
    #define QY_LE(v) __builtin_bswap64(v)
    #endif
    /* IEEE 1619: tweaks of the 32 blocks of a sector, each the one before times x. */
    static void qy_expand(const uint8_t *first, uint8_t *out)
    {
        qy_block t = qy_get(first);
        uint64_t low = QY_LE(t.low), high = QY_LE(t.high);
        for (int i = 0; i < 32; i++) {
            qy_block le = { QY_LE(low), QY_LE(high) };
            uint64_t over = high >> 63;
            qy_set(out + 16 * i, le);
            high = high << 1 | low >> 63;
            low = low << 1 ^ (over ? 0x87 : 0);
        }
    }
    static inline void qy_le64(uint8_t *out, uint64_t v) { v = QY_LE(v); memcpy(out, &v, 8); }
    """
    int qy_load(const char *) nogil
    void *qy_new(const uint8_t *, size_t, int) noexcept nogil
    void qy_free(void *) noexcept nogil
    int qy_ecb(void *, uint8_t *, const uint8_t *, int) noexcept nogil
    void qy_xor(uint8_t *, const uint8_t *, const uint8_t *, size_t) noexcept nogil
    void qy_expand(const uint8_t *, uint8_t *) noexcept nogil
    void qy_le64(uint8_t *, uint64_t) noexcept nogil

cdef enum:
    SECTOR = 512
    BATCH = 16            # sectors between two calls of the library: 8 KiB stay in the first cache
    IDLE = 8

cdef struct Contexts:
    void *encrypt
    void *decrypt
    void *tweak           # XTS: the second half of the key
    void *essiv

cdef bint loaded = False


def load():
    """Look for libcrypto; True when :class:`SectorCipher` can be used."""
    global loaded
    if not loaded:
        loaded = qy_load(b"libcrypto.so.3") or qy_load(b"libcrypto.so.1.1")
    return bool(loaded)


cdef void fill_sectors(uint64_t first, int count, bint short_numbers, uint8_t *out) noexcept nogil:
    """The sector numbers, little-endian, in 16-byte blocks."""
    cdef int i
    memset(out, 0, 16 * count)
    for i in range(count):
        qy_le64(out + 16 * i, <uint32_t> (first + i) if short_numbers else first + i)


def sector_numbers(uint64_t first, int count, bint short_numbers):
    """Return *count* blocks of 16 bytes: plain64 initial vectors, or plain ones with *short_numbers*."""
    if count < 0 or count > 1 << 20:
        raise ValueError("too many sectors")
    out = bytearray(16 * count)
    fill_sectors(first, count, short_numbers, out)
    return out


def expand_tweaks(const uint8_t[::1] tweaks not None):
    """Return the XTS tweaks of all blocks, 512 bytes for each 16-byte first tweak."""
    cdef Py_ssize_t count = tweaks.shape[0] // 16, i
    out = bytearray(SECTOR * count)
    cdef uint8_t *target = out
    for i in range(count):
        qy_expand(&tweaks[16 * i], target + SECTOR * i)
    return out


def xor_into(target, const uint8_t[::1] other not None):
    """Add *other* to *target*, bit by bit; equal lengths, a multiple of 16."""
    cdef uint8_t[::1] view = target
    if view.shape[0] != other.shape[0] or view.shape[0] % 16:
        raise ValueError("lengths differ")
    if view.shape[0]:
        qy_xor(&view[0], &view[0], &other[0], view.shape[0])


cdef class SectorCipher:
    """AES over sectors: *xts* or CBC, with initial vectors from sector numbers.

    *key* has 16, 24 or 32 bytes, twice that for XTS; *essiv* is the key that
    encrypts the sector numbers, or None; *short_numbers* cuts them to 32 bits.
    """
    cdef Contexts *idle[IDLE]
    cdef int count
    cdef bint xts
    cdef bint short_numbers
    cdef bytes key
    cdef bytes essiv

    def __cinit__(self, bytes key not None, *, bint xts, bint short_numbers, bytes essiv):
        cdef Py_ssize_t size = len(key) // 2 if xts else len(key)
        if size not in (16, 24, 32) or (xts and len(key) != 2 * size):
            raise ValueError("not the length of an AES key")
        if essiv is not None and len(essiv) not in (16, 24, 32):
            raise ValueError("not the length of an AES key")
        if not loaded:
            raise RuntimeError("libcrypto is not loaded")
        self.key = key
        self.essiv = essiv
        self.xts = xts
        self.short_numbers = short_numbers

    def __dealloc__(self):
        while self.count:
            self.count -= 1
            release(self.idle[self.count])

    def __reduce__(self):
        raise TypeError("a cipher cannot be pickled")

    cdef Contexts *take(self) except NULL:
        cdef Contexts *c
        cdef const uint8_t *key = self.key
        cdef size_t size
        if self.count:
            self.count -= 1
            return self.idle[self.count]
        c = <Contexts *> calloc(1, sizeof(Contexts))
        if c == NULL:
            raise MemoryError()
        size = len(self.key) // 2 if self.xts else len(self.key)
        c.encrypt = qy_new(key, size, 1)
        c.decrypt = qy_new(key, size, 0)
        if self.xts:
            c.tweak = qy_new(key + size, size, 1)
        if self.essiv is not None:
            c.essiv = qy_new(self.essiv, len(self.essiv), 1)
        if (c.encrypt == NULL or c.decrypt == NULL or (self.xts and c.tweak == NULL)
                or (self.essiv is not None and c.essiv == NULL)):
            release(c)
            raise RuntimeError("libcrypto refuses AES")
        return c

    cdef void give(self, Contexts *c) noexcept:
        if self.count < IDLE:
            self.idle[self.count] = c
            self.count += 1
        else:
            release(c)

    def crypt(self, source, target, uint64_t first_sector, bint encrypt):
        """Transform *source* into *target*: whole sectors, equal lengths, the same buffer or disjoint ones."""
        cdef Py_buffer src, dst
        cdef Contexts *c
        cdef bint good
        PyObject_GetBuffer(source, &src, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(target, &dst, PyBUF_WRITABLE)
            try:
                if src.len != dst.len or src.len % SECTOR:
                    raise ValueError("not whole sectors of equal length")
                if (<size_t> src.buf < <size_t> dst.buf + <size_t> dst.len and src.buf != dst.buf
                        and <size_t> dst.buf < <size_t> src.buf + <size_t> src.len):
                    raise ValueError("source and target overlap")
                c = self.take()
                with nogil:
                    good = self.run(c, <const uint8_t *> src.buf, <uint8_t *> dst.buf,
                                    <uint64_t> src.len // SECTOR, first_sector, encrypt)
                self.give(c)
            finally:
                PyBuffer_Release(&dst)
        finally:
            PyBuffer_Release(&src)
        if not good:
            raise RuntimeError("libcrypto failed")

    cdef bint run(self, Contexts *c, const uint8_t *src, uint8_t *dst, uint64_t sectors, uint64_t first,
                  bint encrypt) noexcept nogil:
        cdef uint8_t ivs[16 * BATCH]
        cdef int count
        while sectors:
            count = <int> (sectors if sectors < BATCH else BATCH)
            fill_sectors(first, count, self.short_numbers, ivs)
            if c.essiv != NULL and not qy_ecb(c.essiv, ivs, ivs, 16 * count):
                return False
            if self.xts:
                if not xts_batch(c, src, dst, count, ivs, encrypt):
                    return False
            elif encrypt:
                if not cbc_encrypt_batch(c, src, dst, count, ivs):
                    return False
            elif not cbc_decrypt_batch(c, src, dst, count, ivs):
                return False
            sectors -= count
            first += count
            src += SECTOR * count
            dst += SECTOR * count
        return True


cdef void release(Contexts *c) noexcept nogil:
    qy_free(c.encrypt)
    qy_free(c.decrypt)
    qy_free(c.tweak)
    qy_free(c.essiv)
    free(c)


cdef bint xts_batch(Contexts *c, const uint8_t *src, uint8_t *dst, int count, uint8_t *ivs,
                    bint encrypt) noexcept nogil:
    cdef uint8_t tweaks[SECTOR * BATCH]
    cdef int i
    if not qy_ecb(c.tweak, ivs, ivs, 16 * count):
        return False
    for i in range(count):
        qy_expand(ivs + 16 * i, tweaks + SECTOR * i)
    qy_xor(dst, src, tweaks, SECTOR * count)
    if not qy_ecb(c.encrypt if encrypt else c.decrypt, dst, dst, SECTOR * count):
        return False
    qy_xor(dst, dst, tweaks, SECTOR * count)
    return True


cdef bint cbc_decrypt_batch(Contexts *c, const uint8_t *src, uint8_t *dst, int count,
                            const uint8_t *ivs) noexcept nogil:
    cdef uint8_t chain[SECTOR * BATCH]
    cdef int i
    for i in range(count):
        memcpy(chain + SECTOR * i, ivs + 16 * i, 16)
        memcpy(chain + SECTOR * i + 16, src + SECTOR * i, SECTOR - 16)
    if not qy_ecb(c.decrypt, dst, src, SECTOR * count):
        return False
    qy_xor(dst, dst, chain, SECTOR * count)
    return True


cdef bint cbc_encrypt_batch(Contexts *c, const uint8_t *src, uint8_t *dst, int count, uint8_t *chain) noexcept nogil:
    """A chain runs inside of one sector, so the same block of all sectors is one call."""
    cdef int i, block
    for block in range(0, SECTOR, 16):
        for i in range(count):
            qy_xor(chain + 16 * i, chain + 16 * i, src + SECTOR * i + block, 16)
        if not qy_ecb(c.encrypt, chain, chain, 16 * count):
            return False
        for i in range(count):
            memcpy(dst + SECTOR * i + block, chain + 16 * i, 16)
    return True
