# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A deflate encoder (RFC 1951) for one cluster at a time, made for a 4096-byte window.

zlib spends most of its time on long hash chains and cuts blocks by count; here
the cluster is in memory as a whole, chains are keyed by four bytes, and a
block ends where the statistics change, so the output is not larger at a
fraction of the time.  Larger windows are useless: QEMU's reader has 2^12.

Invariant: no reference goes back more than WINDOW bytes or beyond the start of
the cluster, every Huffman code is complete, and nothing is written beyond the
caller's room: a cluster that does not fit is reported, not truncated.
"""
from libc.math cimport log2
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline uint32_t qd_load32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
    static inline uint64_t qd_load64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    static inline void qd_store64(uint8_t *p, uint64_t v) { memcpy(p, &v, 8); }
    static inline unsigned qd_same(uint64_t diff) { return (unsigned) __builtin_ctzll(diff) >> 3; }
    #define qd_low24(v) ((v) << 8)
    #else
    static inline void qd_store64(uint8_t *p, uint64_t v) { v = __builtin_bswap64(v); memcpy(p, &v, 8); }
    static inline unsigned qd_same(uint64_t diff) { return (unsigned) __builtin_clzll(diff) >> 3; }
    #define qd_low24(v) ((v) & 0xFFFFFF00u)
    #endif
    static inline int qd_log2(uint32_t v) { return 31 - __builtin_clz(v); }
    """
    uint32_t qd_load32(const uint8_t *) noexcept nogil
    uint64_t qd_load64(const uint8_t *) noexcept nogil
    void qd_store64(uint8_t *, uint64_t) noexcept nogil
    unsigned qd_same(uint64_t) noexcept nogil
    uint32_t qd_low24(uint32_t) noexcept nogil
    int qd_log2(uint32_t) noexcept nogil

cdef enum:
    WINDOW = 4096
    MIN_MATCH = 3
    MAX_MATCH = 258
    LITERALS = 286
    DISTANCES = 30
    LENGTHS = 19
    END = 256
    CODE_LIMIT = 15
    HASH4 = 15
    HASH3 = 13
    CHUNK = 1024          # tokens between two looks at whether the block should end
    BLOCK = 49152         # most tokens of a block
    SLACK = 16            # bytes that the bit writer may store past its position
    LOGS = 4096
    MAX_CLUSTER = 1 << 21
    # Measured: half the depth is 10 % faster and 1 % larger, six times the
    # depth 25 % slower and 0.5 % smaller.
    DEPTH = 8             # candidates looked at
    NICE = 32             # a match this long ends the search
    LAZY = 8              # a match this long is taken at once

cdef struct Histogram:
    uint32_t literal[LITERALS]
    uint32_t distance[DISTANCES]

cdef struct Tree:
    uint8_t length[LITERALS]
    uint16_t code[LITERALS]

cdef struct State:
    uint32_t base                     # added to positions, so that old table entries are out of reach
    uint32_t head4[1 << HASH4]
    uint32_t head3[1 << HASH3]
    uint32_t previous[WINDOW]
    uint32_t tokens[BLOCK + CHUNK]    # literal, or length << 16 | distance
    Histogram block
    Histogram chunk
    Tree literal
    Tree distance
    Tree lengths
    uint8_t *out
    uint8_t *limit
    uint64_t bits
    int held                          # number of valid bits

# RFC 1951 section 3.2.5; filled in at import.
cdef uint8_t length_symbol[MAX_MATCH + 1]
cdef uint8_t distance_symbol[WINDOW + 1]
cdef uint16_t length_base[29]
cdef uint8_t length_extra[29]
cdef uint16_t distance_base[24]
cdef uint8_t distance_extra[24]
cdef float log_table[LOGS]
cdef uint8_t length_order[LENGTHS]


def _fill_tables():
    cdef int symbol, extra, value, i
    value = MIN_MATCH
    for symbol in range(28):
        extra = 0 if symbol < 8 else symbol // 4 - 1
        length_base[symbol] = value
        length_extra[symbol] = extra
        for _ in range(1 << extra):
            if value <= MAX_MATCH:
                length_symbol[value] = symbol
            value += 1
    length_base[28] = MAX_MATCH
    length_extra[28] = 0
    length_symbol[MAX_MATCH] = 28
    value = 1
    for symbol in range(24):
        extra = 0 if symbol < 4 else symbol // 2 - 1
        distance_base[symbol] = value
        distance_extra[symbol] = extra
        for _ in range(1 << extra):
            distance_symbol[value] = symbol
            value += 1
    for i in range(1, LOGS):
        log_table[i] = i * log2(i)
    for i, symbol in enumerate((16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)):
        length_order[i] = symbol


_fill_tables()


# --- Huffman codes -----------------------------------------------------------------------------------------

cdef void sort_keys(uint32_t *keys, int count) noexcept nogil:
    """Shell sort; there are at most 286."""
    cdef int gap = 132, i, j
    cdef uint32_t key
    while gap:
        for i in range(gap, count):
            key = keys[i]
            j = i
            while j >= gap and keys[j - gap] > key:
                keys[j] = keys[j - gap]
                j -= gap
            keys[j] = key
        gap = 57 if gap == 132 else 23 if gap == 57 else 10 if gap == 23 else 4 if gap == 10 else 1 if gap == 4 else 0


cdef void build_tree(Tree *tree, uint32_t *counts, int symbols, int limit) noexcept nogil:
    """Set lengths (at most *limit*) and bit-reversed canonical codes; the code is always complete.

    At least two symbols get a code: decoders differ in what they make of fewer.
    """
    cdef uint32_t keys[LITERALS]
    cdef uint32_t node[LITERALS]
    cdef int number[33]
    cdef int count = 0, i, length
    for i in range(symbols):
        tree.length[i] = 0
        if counts[i]:
            keys[count] = counts[i] << 9 | i
            count += 1
    i = 0
    while count < 2:
        if counts[i] == 0:
            keys[count] = 1 << 9 | i
            count += 1
        i += 1
    sort_keys(keys, count)
    for i in range(count):
        node[i] = keys[i] >> 9
    count_lengths(node, count, number)
    limit_lengths(number, limit)
    # Rarest symbols get the longest codes.
    i = 0
    for length in range(limit, 0, -1):
        for _ in range(number[length]):
            tree.length[keys[i] & 511] = length
            i += 1
    assign_codes(tree, number, symbols, limit)


cdef void count_lengths(uint32_t *node, int count, int *number) noexcept nogil:
    """Set ``number[n]`` to how many symbols get n bits; *node* holds their counts, ascending, and is used up.

    The in-place method of Moffat and Katajainen: parents, depths of the inner
    nodes, leaves of each depth.  Depths above 32 are counted as 32.
    """
    cdef int i, root, leaf, depth, available, used
    node[0] += node[1]
    root = 0
    leaf = 2
    for i in range(1, count - 1):
        if leaf >= count or node[root] < node[leaf]:
            node[i] = node[root]
            node[root] = i
            root += 1
        else:
            node[i] = node[leaf]
            leaf += 1
        if leaf >= count or (root < i and node[root] < node[leaf]):
            node[i] += node[root]
            node[root] = i
            root += 1
        else:
            node[i] += node[leaf]
            leaf += 1
    node[count - 2] = 0
    i = count - 3
    while i >= 0:
        node[i] = node[node[i]] + 1
        i -= 1
    memset(number, 0, 33 * sizeof(int))
    available = 1
    used = 0
    depth = 0
    root = count - 2
    while available > 0:
        while root >= 0 and <int> node[root] == depth:
            used += 1
            root -= 1
        while available > used:
            number[depth if depth < 32 else 32] += 1
            available -= 1
        available = 2 * used
        depth += 1
        used = 0


cdef void assign_codes(Tree *tree, const int *number, int symbols, int limit) noexcept nogil:
    """Canonical codes, first bit lowest, from the lengths and how many there are of each."""
    cdef uint32_t next_code[17]
    cdef uint32_t code = 0
    cdef int length, i
    for length in range(1, limit + 1):
        next_code[length] = code
        code = (code + number[length]) << 1
    for i in range(symbols):
        length = tree.length[i]
        if length:
            tree.code[i] = reverse(next_code[length], length)
            next_code[length] += 1


cdef uint32_t reverse(uint32_t code, int length) noexcept nogil:
    cdef uint32_t turned = 0
    while length:
        turned = turned << 1 | code & 1
        code >>= 1
        length -= 1
    return turned


cdef void limit_lengths(int *number, int limit) noexcept nogil:
    """Make the counts of code lengths a complete code without lengths above *limit*."""
    cdef int length, over = 0
    cdef int64_t kraft = 0
    for length in range(limit + 1, 33):
        over += number[length]
        number[length] = 0
    if not over:
        return
    number[limit] += over
    for length in range(1, limit + 1):
        kraft += <int64_t> number[length] << (limit - length)
    while kraft > <int64_t> 1 << limit:
        # Replace a leaf above the limit's level by an inner node that takes a leaf from the last level.
        length = limit - 1
        while number[length] == 0:
            length -= 1
        number[length] -= 1
        number[length + 1] += 2
        number[limit] -= 1
        kraft -= 1


# --- bit writer --------------------------------------------------------------------------------------------

cdef inline void put(State *s, uint64_t value, int count) noexcept nogil:
    """Append *count* (at most 48) bits; :func:`drain` must follow before 56 are held."""
    s.bits |= value << s.held
    s.held += count


cdef inline bint drain(State *s) noexcept nogil:
    """Store whole bytes; False when the room is used up."""
    if s.out > s.limit:
        return False
    qd_store64(s.out, s.bits)
    s.out += s.held >> 3
    s.bits >>= s.held & 56
    s.held &= 7
    return True


# --- blocks ------------------------------------------------------------------------------------------------

cdef inline float weight(uint32_t count) noexcept nogil:
    return log_table[count] if count < LOGS else <float> (count * log2(count))


cdef float entropy(const uint32_t *a, const uint32_t *b, int symbols) noexcept nogil:
    """Bits that the symbols counted in *a* (and *b*) take with an ideal code."""
    cdef float total = 0
    cdef uint32_t count, every = 0
    cdef int i
    for i in range(symbols):
        count = a[i] if b == NULL else a[i] + b[i]
        if count:
            every += count
            total -= weight(count)
    return total + weight(every) if every else 0


cdef bint should_split(State *s) noexcept nogil:
    """Whether the last chunk is cheaper with codes of its own than in the block before it."""
    cdef float apart, together
    apart = (entropy(s.block.literal, NULL, LITERALS) + entropy(s.block.distance, NULL, DISTANCES)
             + entropy(s.chunk.literal, NULL, LITERALS) + entropy(s.chunk.distance, NULL, DISTANCES))
    together = (entropy(s.block.literal, s.chunk.literal, LITERALS)
                + entropy(s.block.distance, s.chunk.distance, DISTANCES))
    return together - apart > 640     # about what a header and coarser codes cost


cdef int pack_lengths(State *s, int literals, int distances, uint8_t *symbols, uint8_t *extras,
                      uint32_t *counts) noexcept nogil:
    """Run-length code of both sets of code lengths (RFC 1951 section 3.2.7); returns the number of symbols."""
    cdef uint8_t lengths[LITERALS + DISTANCES]
    cdef int total = literals + distances, i = 0, run, made = 0, length, take
    memcpy(lengths, s.literal.length, literals)
    memcpy(lengths + literals, s.distance.length, distances)
    memset(counts, 0, LENGTHS * sizeof(uint32_t))
    while i < total:
        length = lengths[i]
        run = 1
        while i + run < total and lengths[i + run] == length:
            run += 1
        i += run
        if length:
            symbols[made] = length
            made += 1
            counts[length] += 1
            run -= 1
        while run >= 3:
            if length == 0:
                take = min(run, 138)
                symbols[made] = 18 if take >= 11 else 17
                extras[made] = take - 11 if take >= 11 else take - 3
            else:
                take = min(run, 6)
                symbols[made] = 16
                extras[made] = take - 3
            counts[symbols[made]] += 1
            made += 1
            run -= take
        while run > 0:
            symbols[made] = length
            counts[length] += 1
            made += 1
            run -= 1
    return made


cdef uint64_t extra_bits(const Histogram *h) noexcept nogil:
    cdef uint64_t total = 0
    cdef int i
    for i in range(29):
        total += <uint64_t> h.literal[257 + i] * length_extra[i]
    for i in range(24):
        total += <uint64_t> h.distance[i] * distance_extra[i]
    return total


cdef void fixed_trees(State *s) noexcept nogil:
    cdef int i
    cdef uint32_t code
    for i in range(LITERALS):
        s.literal.length[i] = 8 if i < 144 else 9 if i < 256 else 7 if i < 280 else 8
        code = 0x30 + i if i < 144 else 0x190 + i - 144 if i < 256 else i - 256 if i < 280 else 0xC0 + i - 280
        s.literal.code[i] = reverse(code, s.literal.length[i])
    for i in range(DISTANCES):
        s.distance.length[i] = 5
        s.distance.code[i] = reverse(i, 5)


cdef uint64_t coded_bits(State *s) noexcept nogil:
    cdef uint64_t total = 0
    cdef int i
    for i in range(LITERALS):
        total += <uint64_t> s.block.literal[i] * s.literal.length[i]
    for i in range(DISTANCES):
        total += <uint64_t> s.block.distance[i] * s.distance.length[i]
    return total


cdef bint write_stored(State *s, const uint8_t *data, size_t length, bint last) noexcept nogil:
    cdef size_t piece
    while True:
        piece = length if length < 65535 else 65535
        put(s, 1 if last and piece == length else 0, 3)
        s.held = (s.held + 7) & ~7
        if not drain(s) or s.out + piece + 4 > s.limit:
            return False
        put(s, piece | (~piece & 0xFFFF) << 16, 32)
        drain(s)
        memcpy(s.out, data, piece)
        s.out += piece
        data += piece
        length -= piece
        if length == 0:
            return True


cdef bint write_tokens(State *s, int count) noexcept nogil:
    cdef int i, symbol, length, distance
    cdef uint32_t token
    for i in range(count):
        token = s.tokens[i]
        if token < 256:
            put(s, s.literal.code[token], s.literal.length[token])
        else:
            length = token >> 16
            distance = token & 0xFFFF
            symbol = length_symbol[length]
            put(s, s.literal.code[257 + symbol], s.literal.length[257 + symbol])
            put(s, length - length_base[symbol], length_extra[symbol])
            symbol = distance_symbol[distance]
            put(s, s.distance.code[symbol], s.distance.length[symbol])
            put(s, distance - distance_base[symbol], distance_extra[symbol])
        if not drain(s):
            return False
    put(s, s.literal.code[END], s.literal.length[END])
    return drain(s)


cdef bint write_block(State *s, const uint8_t *data, size_t length, int count, bint last) noexcept nogil:
    """Write *count* tokens, which stand for *length* bytes at *data*, in the cheapest of the three forms."""
    cdef uint8_t symbols[LITERALS + DISTANCES]
    cdef uint8_t extras[LITERALS + DISTANCES]
    cdef uint32_t counts[LENGTHS]
    cdef uint64_t dynamic, fixed, extra
    cdef int literals = LITERALS, distances = DISTANCES, lengths = LENGTHS, made, i
    s.block.literal[END] = 1
    extra = extra_bits(&s.block)
    build_tree(&s.literal, s.block.literal, LITERALS, CODE_LIMIT)
    build_tree(&s.distance, s.block.distance, DISTANCES, CODE_LIMIT)
    dynamic = coded_bits(s) + extra
    while s.literal.length[literals - 1] == 0:
        literals -= 1
    while s.distance.length[distances - 1] == 0:
        distances -= 1
    made = pack_lengths(s, literals, distances, symbols, extras, counts)
    build_tree(&s.lengths, counts, LENGTHS, 7)
    while lengths > 4 and s.lengths.length[length_order[lengths - 1]] == 0:
        lengths -= 1
    dynamic += 17 + 3 * lengths
    for i in range(LENGTHS):
        dynamic += counts[i] * (s.lengths.length[i] + (2 if i == 16 else 3 if i == 17 else 7 if i == 18 else 0))
    fixed = 3 + extra + fixed_bits(&s.block)
    if 8 * <uint64_t> length + 40 * (length // 65535 + 1) < min(dynamic, fixed):
        return write_stored(s, data, length, last)
    put(s, last, 1)
    if fixed <= dynamic:
        put(s, 1, 2)
        fixed_trees(s)
        return drain(s) and write_tokens(s, count)
    put(s, 2, 2)
    put(s, literals - 257, 5)
    put(s, distances - 1, 5)
    put(s, lengths - 4, 4)
    if not drain(s):
        return False
    for i in range(lengths):
        put(s, s.lengths.length[length_order[i]], 3)
        if not drain(s):
            return False
    for i in range(made):
        put(s, s.lengths.code[symbols[i]], s.lengths.length[symbols[i]])
        if symbols[i] >= 16:
            put(s, extras[i], 2 if symbols[i] == 16 else 3 if symbols[i] == 17 else 7)
        if not drain(s):
            return False
    return write_tokens(s, count)


cdef uint64_t fixed_bits(const Histogram *h) noexcept nogil:
    cdef uint64_t total = 0
    cdef int i
    for i in range(LITERALS):
        total += h.literal[i] * (8 if i < 144 else 9 if i < 256 else 7 if i < 280 else 8)
    for i in range(DISTANCES):
        total += h.distance[i] * 5
    return total


# --- matches -----------------------------------------------------------------------------------------------

cdef inline int extend(const uint8_t *a, const uint8_t *b, int known, int room) noexcept nogil:
    """Length of the common prefix, at most *room*; the first *known* bytes are equal."""
    cdef uint64_t diff
    while known + 8 <= room:
        diff = qd_load64(a + known) ^ qd_load64(b + known)
        if diff:
            return known + <int> qd_same(diff)
        known += 8
    while known < room and a[known] == b[known]:
        known += 1
    return known


cdef inline uint32_t insert(State *s, const uint8_t *data, uint32_t at, uint32_t word) noexcept nogil:
    """Enter position *at*, whose four bytes are *word*; returns the position entered before it."""
    cdef uint32_t slot = word * <uint32_t> 0x9E3779B1 >> (32 - HASH4)
    cdef uint32_t here = s.base + at, older = s.head4[slot]
    s.head4[slot] = here
    s.head3[qd_low24(word) * <uint32_t> 0x9E3779B1 >> (32 - HASH3)] = here
    s.previous[here & (WINDOW - 1)] = older
    return older


cdef inline uint32_t find(State *s, const uint8_t *data, uint32_t at, uint32_t end, int best) noexcept nogil:
    """Enter position *at* and return a match longer than *best* as ``length << 16 | distance``, or 0.

    Needs four bytes at *at*.  Positions in the tables have ``s.base`` added;
    what lies below it belongs to a cluster seen before.
    """
    cdef uint32_t word = qd_load32(data + at), base = s.base, here = base + at, found = 0
    cdef int depth = DEPTH
    cdef uint32_t lowest = base if at < WINDOW else here - WINDOW
    cdef uint32_t near = s.head3[qd_low24(word) * <uint32_t> 0x9E3779B1 >> (32 - HASH3)]
    cdef uint32_t candidate = insert(s, data, at, word)
    cdef int room = MAX_MATCH if end - at > MAX_MATCH else <int> (end - at), length
    if best < MIN_MATCH:
        best = MIN_MATCH
        if near >= lowest and qd_low24(qd_load32(data + (near - base))) == qd_low24(word):
            found = <uint32_t> MIN_MATCH << 16 | (here - near)
    while candidate >= lowest and depth > 0 and best < room:
        if (qd_load32(data + (candidate - base) + best - 3) == qd_load32(data + at + best - 3)
                and qd_load32(data + (candidate - base)) == word):
            length = extend(data + (candidate - base), data + at, 4, room)
            if length > best:
                best = length
                found = <uint32_t> length << 16 | (here - candidate)
                if length >= NICE:
                    break
        depth -= 1
        near = s.previous[candidate & (WINDOW - 1)]
        if near >= candidate:
            break
        candidate = near
    return found


cdef inline bint better(uint32_t following, uint32_t match) noexcept nogil:
    """Whether a literal and the match after it are worth more than the match here."""
    return (4 * (<int> (following >> 16) - <int> (match >> 16))
            + qd_log2(match & 0xFFFF) - qd_log2(following & 0xFFFF)) > 2


cdef class Deflater:
    """Tables for one thread at a time."""
    cdef State *state

    def __cinit__(self):
        self.state = <State *> calloc(1, sizeof(State))
        if self.state == NULL:
            raise MemoryError()
        self.state.base = WINDOW

    def __dealloc__(self):
        free(self.state)

    def compress(self, source, target):
        """Write *source* as one deflate stream into *target*; returns its length, or -1 if there is no room.

        The last SLACK bytes of *target* are scratch space.
        """
        cdef Py_buffer src, dst
        cdef Py_ssize_t made
        PyObject_GetBuffer(source, &src, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(target, &dst, PyBUF_WRITABLE)
            try:
                if src.len > MAX_CLUSTER or dst.len < SLACK:
                    raise ValueError("not a cluster")
                with nogil:
                    made = encode(self.state, <const uint8_t *> src.buf, <uint32_t> src.len,
                                  <uint8_t *> dst.buf, <size_t> dst.len)
            finally:
                PyBuffer_Release(&dst)
        finally:
            PyBuffer_Release(&src)
        return made


cdef struct Parse:
    int tokens            # in the block, without the chunk
    int chunk             # tokens of the chunk
    uint32_t start        # first byte of the block
    uint32_t middle       # first byte of the chunk


cdef bint close_chunk(State *s, Parse *p, const uint8_t *data, uint32_t at) noexcept nogil:
    """Add the chunk to the block, or end the block before it."""
    cdef int i
    if p.tokens and (p.tokens + p.chunk > BLOCK - CHUNK or should_split(s)):
        if not write_block(s, data + p.start, p.middle - p.start, p.tokens, False):
            return False
        for i in range(p.chunk):
            s.tokens[i] = s.tokens[p.tokens + i]
        p.start = p.middle
        p.tokens = 0
        memset(&s.block, 0, sizeof(Histogram))
    for i in range(LITERALS):
        s.block.literal[i] += s.chunk.literal[i]
    for i in range(DISTANCES):
        s.block.distance[i] += s.chunk.distance[i]
    memset(&s.chunk, 0, sizeof(Histogram))
    p.tokens += p.chunk
    p.chunk = 0
    p.middle = at
    return True


cdef Py_ssize_t encode(State *s, const uint8_t *data, uint32_t length, uint8_t *out, size_t room) noexcept nogil:
    cdef Parse p
    cdef uint32_t at = 0, match, following, done, stop
    memset(&p, 0, sizeof(Parse))
    memset(&s.block, 0, sizeof(Histogram))
    memset(&s.chunk, 0, sizeof(Histogram))
    s.out = out
    s.limit = out + room - SLACK
    s.bits = 0
    s.held = 0
    if s.base > <uint32_t> 1 << 31:
        s.base = WINDOW
        memset(s.head4, 0, sizeof(s.head4))
        memset(s.head3, 0, sizeof(s.head3))
    while at < length:
        match = find(s, data, at, length, 0) if at + 4 <= length else 0
        done = at + 1
        while match and <int> (match >> 16) < LAZY and at + 5 <= length:
            following = find(s, data, at + 1, length, <int> (match >> 16) - 1)
            done = at + 2
            if following == 0 or not better(following, match):
                break
            s.tokens[p.tokens + p.chunk] = data[at]
            s.chunk.literal[data[at]] += 1
            p.chunk += 1
            at += 1
            match = following
        if match:
            s.tokens[p.tokens + p.chunk] = match
            s.chunk.literal[257 + length_symbol[match >> 16]] += 1
            s.chunk.distance[distance_symbol[match & 0xFFFF]] += 1
            at += match >> 16
            stop = at if at + 4 <= length else (length - 3 if length > 3 else 0)
            while done < stop:
                insert(s, data, done, qd_load32(data + done))
                done += 1
        else:
            s.tokens[p.tokens + p.chunk] = data[at]
            s.chunk.literal[data[at]] += 1
            at += 1
        p.chunk += 1
        if p.chunk >= CHUNK and not close_chunk(s, &p, data, at):
            s.base += length
            return -1
    s.base += length
    if p.chunk and not close_chunk(s, &p, data, at):
        return -1
    if not write_block(s, data + p.start, length - p.start, p.tokens, True):
        return -1
    if s.out > s.limit:
        return -1
    qd_store64(s.out, s.bits)
    return s.out - out + ((s.held + 7) >> 3)
