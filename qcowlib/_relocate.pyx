# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Who may move: host clusters by kind, places for those of the tail, and pointers to them.

Invariant: an index is compared with the length of what it indexes before use;
a word that points anywhere else keeps its value.
"""
from libc.stdint cimport uint8_t, uint64_t

FREE = 0
DATA_CLUSTER = 1
TABLE_CLUSTER = 2
BLOCK_CLUSTER = 3
FIXED = 4
PACKED = 7
LINKED = 8

cdef enum:
    C_FREE = 0
    C_DATA = 1
    C_FIXED = 4
    C_PACKED = 7
    C_LINKED = 8

cdef inline uint64_t _get(const uint8_t *p) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(8):
        value = value << 8 | p[i]
    return value

cdef inline void _put(uint8_t *p, uint64_t value) noexcept nogil:
    cdef int i
    for i in range(7, -1, -1):
        p[i] = value & 0xFF
        value >>= 8

cdef enum:
    FLAG_SHIFT = 62

cdef extern from *:
    """
    #define RELOCATE_MASK 0x00FFFFFFFFFFFE00ULL
    """
    const uint64_t MASK "RELOCATE_MASK"


cdef bint _extent(uint64_t word, int cluster_bits, uint64_t *first, uint64_t *last) noexcept nogil:
    """Whether *word* is of a compressed cluster; if so, the host clusters that it touches."""
    cdef int shift = FLAG_SHIFT - (cluster_bits - 8)
    cdef uint64_t offset, sectors
    if not word >> FLAG_SHIFT & 1:
        return False
    offset = word & ((<uint64_t> 1 << shift) - 1)
    sectors = (word >> shift) & ((<uint64_t> 1 << (cluster_bits - 8)) - 1)
    first[0] = offset >> cluster_bits
    last[0] = ((offset & ~<uint64_t> 511) + 512 * (sectors + 1) - 1) >> cluster_bits
    return True


cdef void _mark_packed(uint8_t[::1] kinds, uint64_t first, uint64_t last) noexcept nogil:
    cdef uint64_t at
    cdef bint usual = last - first < 2
    for at in range(first, last + 1):
        usual = usual and kinds[at] in (C_FREE, C_PACKED, C_LINKED)
    for at in range(first, last + 1):
        if not usual:
            kinds[at] = C_FIXED
        elif at < last:
            kinds[at] = C_LINKED
        elif kinds[at] == C_FREE:
            kinds[at] = C_PACKED


def mark_table(uint8_t[::1] kinds not None, const uint8_t[::1] table not None, int cluster_bits, int stride):
    """Mark what an L2 *table* points to: clusters of data, and those that hold compressed ones.

    LINKED shares a compressed cluster with the next one, PACKED with none
    behind it; what is used in two ways is FIXED.  Returns false for an offset
    outside.
    """
    cdef Py_ssize_t at = -stride
    cdef uint64_t word, first, last, count = kinds.shape[0]
    cdef bint sound = True
    with nogil:
        while at + stride + 8 <= table.shape[0]:
            at += stride
            word = _get(&table[at])
            if _extent(word, cluster_bits, &first, &last):
                if first >= count:
                    sound = False
                    break
                _mark_packed(kinds, first, min(last, count - 1))
                continue
            if word & MASK == 0:
                continue
            first = (word & MASK) >> cluster_bits
            if first >= count:
                sound = False
                break
            if kinds[first] == C_FREE:
                kinds[first] = C_DATA
            elif kinds[first] != C_DATA:
                kinds[first] = C_FIXED
    return sound


def add_counts(uint8_t[::1] kinds not None, const uint8_t[::1] block not None, int order, Py_ssize_t first):
    """Mark what *block* counts from cluster *first* on and nobody marked as fixed; false where a mark has no count."""
    cdef Py_ssize_t index, per_block = block.shape[0] * 8 >> order
    for index in range(min(per_block, kinds.shape[0] - first)):
        if _count(block, order, index):
            if kinds[first + index] == C_FREE:
                kinds[first + index] = 4
        elif kinds[first + index] != C_FREE:
            return False
    return True


def assign(
    const uint8_t[::1] kinds not None, Py_ssize_t end, int kind, uint64_t[::1] places not None, Py_ssize_t free,
    Py_ssize_t source, Py_ssize_t limit
):
    """Give clusters of *kind* from *source* on (at or behind *end*) the free ones from *free* on, before *end*.

    ``places[cluster - end]`` is the new one, or 0.  Returns where to go on:
    the next free cluster, the next source, and how many got a place (at most *limit*).
    """
    cdef Py_ssize_t done = 0
    if kinds.shape[0] - end > places.shape[0]:
        raise ValueError("the places are too few")
    with nogil:
        while source < kinds.shape[0] and done < limit:
            if kinds[source] == kind:
                while free < end and kinds[free] != C_FREE:
                    free += 1
                if free >= end:
                    break
                places[source - end] = free
                free += 1
                done += 1
            source += 1
    return free, source, done


def moves(const uint64_t[::1] places not None, Py_ssize_t end, Py_ssize_t first, Py_ssize_t limit):
    """Return the runs ``(old, new, count)`` of clusters with a place, from index *first* to *limit*."""
    found = []
    cdef Py_ssize_t at = first, start
    while at < limit:
        if places[at] == 0:
            at += 1
            continue
        start = at
        at += 1
        while at < limit and places[at] == places[at - 1] + 1:
            at += 1
        found.append((start + end, places[start], at - start))
    return found


def repoint(
    uint8_t[::1] words not None, int stride, bint compressed, int cluster_bits, Py_ssize_t end,
    const uint64_t[::1] places not None
):
    """Let each word that points to a cluster with a new place point there, flags kept; returns how many did.

    With *compressed*, words with bit 62 set are left alone.
    """
    cdef Py_ssize_t at = -stride, changed = 0
    cdef uint64_t word, index
    with nogil:
        while at + stride + 8 <= words.shape[0]:
            at += stride
            word = _get(&words[at])
            if compressed and word >> FLAG_SHIFT & 1:
                continue
            index = (word & MASK) >> cluster_bits
            if index < <uint64_t> end or index - end >= <uint64_t> places.shape[0] or places[index - end] == 0:
                continue
            _put(&words[at], (word & ~MASK) | places[index - end] << cluster_bits)
            changed += 1
    return changed


def repoint_packed(
    uint8_t[::1] table not None, int stride, int cluster_bits, Py_ssize_t base, const uint64_t[::1] places not None
):
    """Let each compressed cluster of an L2 *table* follow the last host cluster that it touches; returns how many did.

    ``places[cluster - base]`` is the new place, or 0.
    """
    cdef Py_ssize_t at = -stride, changed = 0
    cdef uint64_t word, first, last, index
    with nogil:
        while at + stride + 8 <= table.shape[0]:
            at += stride
            word = _get(&table[at])
            if not _extent(word, cluster_bits, &first, &last) or last < <uint64_t> base:
                continue
            index = last - base
            if index >= <uint64_t> places.shape[0] or places[index] == 0 or places[index] + first < last:
                continue
            # Whole clusters: what is below the offset field's top and above it stays.
            _put(&table[at], word - (last << cluster_bits) + (places[index] << cluster_bits))
            changed += 1
    return changed


def spanning(const uint8_t[::1] table not None, int stride, int cluster_bits, uint64_t cluster):
    """Return how many entries of an L2 *table* are compressed clusters that begin in *cluster* and end behind it."""
    cdef Py_ssize_t at = -stride, found = 0
    cdef uint64_t first, last
    with nogil:
        while at + stride + 8 <= table.shape[0]:
            at += stride
            if _extent(_get(&table[at]), cluster_bits, &first, &last) and first == cluster and last > cluster:
                found += 1
    return found


def spread(uint64_t[::1] places not None, Py_ssize_t base, runs):
    """Note runs ``(old, new, count)`` in *places*, by old cluster from *base* on."""
    cdef Py_ssize_t old, new, count, index
    for old, new, count in runs:
        if old < base or old - base + count > places.shape[0] or count < 0:
            raise ValueError("a run outside the places")
        for index in range(count):
            places[old - base + index] = new + index


cdef uint64_t _count(const uint8_t[::1] block, int order, Py_ssize_t index) except? 0xFFFFFFFFFFFFFFFF:
    cdef int bits = 1 << order, i
    cdef uint64_t value = 0
    if index < 0 or (index + 1) * bits > block.shape[0] * 8:
        raise IndexError(index)
    if order < 3:
        return block[index * bits >> 3] >> (index * bits & 7) & ((1 << bits) - 1)
    for i in range(bits >> 3):
        value = value << 8 | block[index * (bits >> 3) + i]
    return value


cdef int _set(uint8_t[::1] block, int order, Py_ssize_t index, uint64_t value) except -1:
    cdef int bits = 1 << order, i, shift
    cdef uint8_t mask
    _count(block, order, index)
    if order < 3:
        shift = index * bits & 7
        mask = ((1 << bits) - 1) << shift
        block[index * bits >> 3] = (block[index * bits >> 3] & ~mask) | (value << shift & mask)
        return 0
    for i in range((bits >> 3) - 1, -1, -1):
        block[index * (bits >> 3) + i] = value & 0xFF
        value >>= 8
    return 0


def copy_counts(
    const uint8_t[::1] source not None, Py_ssize_t at, uint8_t[::1] target not None, Py_ssize_t to,
    Py_ssize_t count, int order
):
    """Give *count* counts of refcount block *target* from *to* on the values that *source* has from *at* on."""
    cdef Py_ssize_t index
    for index in range(count):
        _set(target, order, to + index, _count(source, order, at + index))


def clear_counts(uint8_t[::1] block not None, Py_ssize_t at, Py_ssize_t count, int order):
    """Make *count* counts of a refcount block of width ``2**order`` zero."""
    cdef Py_ssize_t index
    for index in range(count):
        _set(block, order, at + index, 0)


def add_count(uint8_t[::1] block not None, Py_ssize_t index, Py_ssize_t amount, int order):
    """Add *amount*, which may be negative, to one count of a refcount block; ValueError where it does not fit."""
    cdef uint64_t value = _count(block, order, index)
    if amount < 0 and <uint64_t> -amount > value:
        raise ValueError("a count below zero")
    value += amount
    if order < 6 and value >> (1 << order):
        raise ValueError("a count is too large")
    _set(block, order, index, value)
