# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Masks and inline decoding of table entries; equality with ondisk.py is a test.

Constants end in ULL: a wider literal without it is a Python object.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int64_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #define QC_OFFSET_MASK      0x00FFFFFFFFFFFE00ULL
    #define QC_L1_RESERVED      0x7F000000000001FFULL
    #define QC_L2_RESERVED      0x3F000000000001FEULL
    #define QC_RT_OFFSET_MASK   0xFFFFFFFFFFFFFE00ULL
    #define QC_RT_RESERVED      0x00000000000001FFULL
    #define QC_COPIED           0x8000000000000000ULL
    #define QC_COMPRESSED       0x4000000000000000ULL
    #define QC_ZERO             0x0000000000000001ULL
    #define QC_NO_OFFSET        0xFFFFFFFFFFFFFFFFULL
    static inline uint64_t qc_be64(const void *p) { uint64_t v; memcpy(&v, p, 8); return __builtin_bswap64(v); }
    static inline void qc_put64(void *p, uint64_t v) { v = __builtin_bswap64(v); memcpy(p, &v, 8); }
    static inline uint64_t qc_swap64(uint64_t v) { return __builtin_bswap64(v); }
    /* Compressed descriptor: host byte offset, and bytes to read (to the end of the last sector). */
    static inline uint64_t qc_comp_offset(uint64_t e, unsigned cb) {
        unsigned x = 70 - cb; uint64_t m = (1ULL << x) - 1; if (x > 56) m = (1ULL << 56) - 1; return e & m; }
    static inline uint64_t qc_comp_length(uint64_t e, unsigned cb) {
        unsigned x = 70 - cb; uint64_t n = (e & 0x3FFFFFFFFFFFFFFFULL) >> x;
        return (n + 1) * 512 - (qc_comp_offset(e, cb) & 511); }
    static inline uint64_t qc_get_refcount(const uint8_t *b, uint64_t i, unsigned order) {
        switch (order) {
        case 0: return (b[i >> 3] >> (i & 7)) & 1;
        case 1: return (b[i >> 2] >> ((i & 3) * 2)) & 3;
        case 2: return (b[i >> 1] >> ((i & 1) * 4)) & 15;
        case 3: return b[i];
        case 4: { uint16_t v; memcpy(&v, b + i * 2, 2); return __builtin_bswap16(v); }
        case 5: { uint32_t v; memcpy(&v, b + i * 4, 4); return __builtin_bswap32(v); }
        default: return qc_be64(b + i * 8); } }
    static inline void qc_set_refcount(uint8_t *b, uint64_t i, unsigned order, uint64_t v) {
        switch (order) {
        case 0: b[i >> 3] = (b[i >> 3] & ~(1 << (i & 7))) | (v << (i & 7)); break;
        case 1: b[i >> 2] = (b[i >> 2] & ~(3 << ((i & 3) * 2))) | (v << ((i & 3) * 2)); break;
        case 2: b[i >> 1] = (b[i >> 1] & ~(15 << ((i & 1) * 4))) | (v << ((i & 1) * 4)); break;
        case 3: b[i] = v; break;
        case 4: { uint16_t w = __builtin_bswap16((uint16_t)v); memcpy(b + i * 2, &w, 2); break; }
        case 5: { uint32_t w = __builtin_bswap32((uint32_t)v); memcpy(b + i * 4, &w, 4); break; }
        default: qc_put64(b + i * 8, v); } }
    """
    uint64_t QC_OFFSET_MASK, QC_L1_RESERVED, QC_L2_RESERVED, QC_RT_OFFSET_MASK, QC_RT_RESERVED
    uint64_t QC_COPIED, QC_COMPRESSED, QC_ZERO, QC_NO_OFFSET
    uint64_t qc_be64(const void *p) noexcept nogil
    void qc_put64(void *p, uint64_t v) noexcept nogil
    uint64_t qc_swap64(uint64_t v) noexcept nogil
    uint64_t qc_comp_offset(uint64_t e, unsigned cb) noexcept nogil
    uint64_t qc_comp_length(uint64_t e, unsigned cb) noexcept nogil
    uint64_t qc_get_refcount(const uint8_t *b, uint64_t i, unsigned order) noexcept nogil
    void qc_set_refcount(uint8_t *b, uint64_t i, unsigned order, uint64_t v) noexcept nogil

cdef enum RunKind:
    RUN_HOLE = 0
    RUN_ZERO = 1
    RUN_DATA = 2
    RUN_COMPRESSED = 3
    RUN_END = 4
    RUN_SPARSE = 5
