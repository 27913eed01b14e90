# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Scans of plain bytes: zeros, differences, bits of a bitmap.

Invariant: no function looks outside the buffers it is given or makes a Python
object per unit; long scans run without the GIL.
"""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memset

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    /* Whether n bytes are zero: blocks of 256, so that the compiler can use vectors. */
    static inline int qs_zero(const uint8_t *p, size_t n) {
        uint64_t w[32], any;
        while (n >= 256) {
            memcpy(w, p, 256);
            any = 0;
            for (int i = 0; i < 32; i++) any |= w[i];
            if (any) return 0;
            p += 256; n -= 256;
        }
        while (n >= 8) { memcpy(&any, p, 8); if (any) return 0; p += 8; n -= 8; }
        while (n) { if (*p) return 0; p++; n--; }
        return 1;
    }
    static inline uint64_t qs_popcount(const uint8_t *p, size_t n) {
        uint64_t total = 0, w;
        while (n >= 8) { memcpy(&w, p, 8); total += (uint64_t)__builtin_popcountll(w); p += 8; n -= 8; }
        while (n) { total += (uint64_t)__builtin_popcount(*p); p++; n--; }
        return total;
    }
    static inline void qs_or(uint8_t *to, const uint8_t *from, size_t n) {
        for (size_t i = 0; i < n; i++) to[i] |= from[i];
    }
    """
    int qs_zero(const uint8_t *p, size_t n) noexcept nogil
    uint64_t qs_popcount(const uint8_t *p, size_t n) noexcept nogil
    void qs_or(uint8_t *to, const uint8_t *from_, size_t n) noexcept nogil

cdef enum:
    SECTOR = 512
    NOGIL_FROM = 16384  # shorter scans cost less than giving the lock away


cdef inline const uint8_t *_start(const uint8_t[::1] view) noexcept:
    return &view[0] if view.shape[0] else NULL


def is_zero(const uint8_t[::1] buffer not None):
    """Return whether every byte of *buffer* is zero (an empty one is)."""
    cdef const uint8_t *data = _start(buffer)
    cdef size_t length = <size_t> buffer.shape[0]
    cdef int result
    if length < NOGIL_FROM:
        return qs_zero(data, length) != 0
    with nogil:
        result = qs_zero(data, length)
    return result != 0


cdef size_t _zero_run(const uint8_t *data, size_t at, size_t length, size_t unit, int *kind) noexcept nogil:
    """Return where the run of zero or of other units that starts at *at* ends."""
    cdef size_t step = unit if length - at > unit else length - at
    kind[0] = qs_zero(data + at, step)
    at += step
    while at < length:
        step = unit if length - at > unit else length - at
        if qs_zero(data + at, step) != kind[0]:
            break
        at += step
    return at


def zero_runs(const uint8_t[::1] buffer not None, size_t unit):
    """Split *buffer* into runs of *unit* bytes that are all zero or not.

    Returns ``(start, length, is_zero)`` tuples that cover the buffer in order
    and alternate; the last unit may be short.  Raises ValueError for unit 0.
    """
    cdef const uint8_t *data = _start(buffer)
    cdef size_t length = <size_t> buffer.shape[0]
    cdef size_t at = 0
    cdef size_t end
    cdef int kind = 0
    if unit == 0:
        raise ValueError("unit must not be 0")
    runs = []
    while at < length:
        with nogil:
            end = _zero_run(data, at, length, unit, &kind)
        runs.append((at, end - at, kind != 0))
        at = end
    return runs


def first_difference(const uint8_t[::1] a not None, const uint8_t[::1] b not None):
    """Return the offset of the first 512-byte sector that differs, or None.

    Only the bytes both have are compared; sectors count from the start.
    """
    cdef const uint8_t *left = _start(a)
    cdef const uint8_t *right = _start(b)
    cdef size_t length = <size_t> min(a.shape[0], b.shape[0])
    cdef size_t at = 0
    cdef size_t step
    with nogil:
        while at < length:
            step = 65536 if length - at > 65536 else length - at
            if memcmp(left + at, right + at, step) != 0:
                break
            at += step
        while at < length:
            step = SECTOR if length - at > SECTOR else length - at
            if memcmp(left + at, right + at, step) != 0:
                break
            at += step
    return at if at < length else None


def bitmap_merge(uint8_t[::1] target not None, const uint8_t[::1] source not None):
    """Set in *target* every bit that is set in *source*; both have the same length."""
    cdef size_t length = <size_t> target.shape[0]
    if source.shape[0] != target.shape[0]:
        raise ValueError("bitmaps of different lengths")
    if length:
        with nogil:
            qs_or(&target[0], &source[0], length)


cdef void _fill(uint8_t *data, uint64_t first, uint64_t count, bint value) noexcept nogil:
    """Set *count* bits from *first*, least significant bit of a byte first."""
    cdef uint64_t end = first + count
    cdef uint8_t mask
    while first < end and first & 7:
        mask = <uint8_t> (1 << (first & 7))
        data[first >> 3] = (data[first >> 3] | mask) if value else (data[first >> 3] & ~mask)
        first += 1
    if first < end:
        memset(data + (first >> 3), 0xFF if value else 0, <size_t> ((end - first) >> 3))
        first += (end - first) & ~<uint64_t> 7
    while first < end:
        mask = <uint8_t> (1 << (first & 7))
        data[first >> 3] = (data[first >> 3] | mask) if value else (data[first >> 3] & ~mask)
        first += 1


def bitmap_set(uint8_t[::1] bitmap not None, uint64_t first, uint64_t count, bint value=True):
    """Set (or clear) *count* bits from bit *first*; bit n is byte n/8, bit n%8.

    Raises ValueError if the range is not inside the bitmap.
    """
    cdef uint64_t bits = <uint64_t> bitmap.shape[0] * 8
    if first > bits or count > bits - first:
        raise ValueError("bits outside the bitmap")
    if count:
        with nogil:
            _fill(&bitmap[0], first, count, value)


def bitmap_count(const uint8_t[::1] bitmap not None):
    """Return how many bits are set."""
    cdef const uint8_t *data = _start(bitmap)
    cdef size_t length = <size_t> bitmap.shape[0]
    cdef uint64_t total
    with nogil:
        total = qs_popcount(data, length)
    return total


cdef inline bint _bit(const uint8_t *data, uint64_t at) noexcept nogil:
    return (data[at >> 3] >> (at & 7)) & 1


cdef uint64_t _next(const uint8_t *data, uint64_t at, uint64_t end, bint value) noexcept nogil:
    """Return the first bit from *at* that equals *value*, or *end*."""
    cdef uint8_t skip = 0 if value else 0xFF
    while at < end:
        if at & 7 == 0:
            while at + 8 <= end and data[at >> 3] == skip:
                at += 8
            if at >= end:
                break
        if _bit(data, at) == value:
            return at
        at += 1
    return end


def bitmap_runs(const uint8_t[::1] bitmap not None, uint64_t first=0, count=None):
    """Return the runs of set bits among *count* bits from *first* as ``(start, length)``.

    Raises ValueError if the range is not inside the bitmap.
    """
    cdef const uint8_t *data = _start(bitmap)
    cdef uint64_t bits = <uint64_t> bitmap.shape[0] * 8
    cdef uint64_t at
    cdef uint64_t end
    cdef uint64_t stop
    if first > bits or (count is not None and count > bits - first):
        raise ValueError("bits outside the bitmap")
    stop = bits if count is None else first + <uint64_t> count
    runs = []
    at = first
    while at < stop:
        with nogil:
            at = _next(data, at, stop, True)
            end = _next(data, at, stop, False)
        if at < stop:
            runs.append((at, end - at))
        at = end
    return runs
