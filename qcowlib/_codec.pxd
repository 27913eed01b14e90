# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
from libc.stdint cimport uint8_t

# Results of codec_decompress and codec_compress.
cdef enum:
    CODEC_OK = 0
    CODEC_BAD = -1          # the bytes are not one cluster of this codec
    CODEC_UNAVAILABLE = -2  # no library was found, or there was no memory: ask the Python codec

# Libraries that a call may use (bits of ``allow``).
cdef enum:
    USE_LIBDEFLATE = 1
    USE_LIBZ = 2
    USE_LIBZSTD = 4

cdef int codec_decompress(int kind, int allow, const uint8_t *src, size_t length,
                          uint8_t *dst, size_t cluster) noexcept nogil
cdef Py_ssize_t codec_compress_zstd(int level, const uint8_t *src, size_t length,
                                    uint8_t *dst, size_t room) noexcept nogil
