# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Fills tables of a new image: arithmetic series of L2 entries, runs of refcounts.

Invariant: every index is checked against the buffer before the first store;
no I/O, no policy.
"""
from libc.stdint cimport uint8_t, uint64_t, UINT64_MAX

from qcowlib._ondisk cimport qc_get_refcount, qc_put64, qc_set_refcount


def fill_entries(uint8_t[::1] table not None, uint64_t first, uint64_t count, uint64_t value, uint64_t step,
                 unsigned int words, uint64_t bitmap):
    """Store ``value + i * step`` as entry ``first + i`` for *count* entries.

    *words* is the width of an entry in 8-byte words: 1, or 2 where *bitmap*
    is the second word.  Raises: IndexError past the end of *table*.
    """
    cdef uint64_t i
    cdef uint64_t size = <uint64_t>table.shape[0] // (8 * words)
    cdef uint8_t *p
    if first > size or count > size - first:
        raise IndexError("entries past the end of the table")
    if count == 0:
        return
    p = &table[0] + first * 8 * words
    with nogil:
        if words == 1:
            for i in range(count):
                qc_put64(p + i * 8, value + i * step)
        else:
            for i in range(count):
                qc_put64(p + i * 16, value + i * step)
                qc_put64(p + i * 16 + 8, bitmap)


def count_refcounts(uint8_t[::1] block not None, uint64_t first, uint64_t count, unsigned int order):
    """Set the refcounts of *count* clusters from *first* that are still 0 to 1.

    Raises: IndexError past the end of *block*.
    """
    cdef uint64_t i
    cdef uint64_t size = (<uint64_t>table_bits(block)) >> order
    cdef uint8_t *p
    if first > size or count > size - first:
        raise IndexError("refcounts past the end of the block")
    if count == 0:
        return
    p = &block[0]
    with nogil:
        for i in range(first, first + count):
            if qc_get_refcount(p, i, order) == 0:
                qc_set_refcount(p, i, order, 1)


def add_refcount(uint8_t[::1] block not None, uint64_t index, unsigned int order):
    """Add 1 to refcount *index* and return the new value.

    Raises: IndexError past the end of *block*, OverflowError at the width's maximum.
    """
    cdef uint64_t value
    cdef uint64_t most = UINT64_MAX if order == 6 else ((<uint64_t>1) << ((<uint64_t>1) << order)) - 1
    if index >= (<uint64_t>table_bits(block)) >> order:
        raise IndexError("refcount past the end of the block")
    value = qc_get_refcount(&block[0], index, order)
    if value >= most:
        raise OverflowError("refcount at its maximum")
    qc_set_refcount(&block[0], index, order, value + 1)
    return value + 1


def convert_refcounts(const uint8_t[::1] source not None, unsigned int order, uint8_t[::1] target not None,
                      uint64_t first, unsigned int new_order):
    """Store all refcounts of *source*, 2**order bits each, from refcount *first* of *target* on.

    Returns the number of the first one that its new width cannot hold and its
    value, or None.  Raises: IndexError past the end of *target*.
    """
    cdef uint64_t i = 0
    cdef uint64_t value = 0
    cdef uint64_t count = (<uint64_t>source.shape[0] * 8) >> order
    cdef uint64_t size = (<uint64_t>table_bits(target)) >> new_order
    cdef uint64_t most = UINT64_MAX if new_order >= 6 else ((<uint64_t>1) << ((<uint64_t>1) << new_order)) - 1
    cdef const uint8_t *p
    cdef uint8_t *q
    if first > size or count > size - first:
        raise IndexError("refcounts past the end of the block")
    if count == 0:
        return None
    p = &source[0]
    q = &target[0]
    with nogil:
        while i < count:
            value = qc_get_refcount(p, i, order)
            if value > most:
                break
            if value:
                qc_set_refcount(q, first + i, new_order, value)
            i += 1
    return None if i == count else (i, value)


cdef inline uint64_t table_bits(uint8_t[::1] block) noexcept:
    return <uint64_t>block.shape[0] * 8
