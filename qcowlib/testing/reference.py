# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A second reader and checker of qcow2, to judge the first.

Invariant: nothing of the engine is used; every number comes from the format
description, in the plainest way, so a mistake here is not the same mistake
there.  For images of a few MiB: the whole file is held in memory.

:func:`reference_read` gives the guest's bytes; :func:`reference_check` counts
references and compares, with the verdicts of ``qemu-img check``.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from backports.zstd import ZstdDecompressor

from qcowlib.storage.base import Storage

__all__ = [
    "CheckResult",
    "RefImage",
    "RefSnapshot",
    "ReferenceError",
    "reference_check",
    "reference_read",
    "reference_snapshots",
]

OFFSET_MASK = 0x00FFFFFFFFFFFE00
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
COPIED = 1 << 63
COMPRESSED = 1 << 62
MAX_FILE = 256 << 20
MAX_GUEST = 256 << 20
MAX_WORDS = 1 << 22

DIRTY, CORRUPT, DATA_FILE, ZSTD, EXTENDED = 1, 2, 4, 8, 16


class ReferenceError(Exception):
    """The image cannot be read; one sentence says why."""


class RefSnapshot(NamedTuple):
    """An entry of the snapshot table; ``size`` is the disk size it has."""

    ident: str
    name: str
    l1_offset: int
    l1_size: int
    size: int
    extra_size: int


class CheckResult(NamedTuple):
    """Counts and sentences.

    ``stale`` counts COPIED bits that are clear though the refcount is one;
    they are part of ``corruptions``, as qemu-img counts them.
    """

    corruptions: int
    stale: int
    leaks: int
    messages: tuple[str, ...]
    dirty: bool
    corrupt: bool


class _Sub(NamedTuple):
    """A stretch of a guest cluster: state ``data``, ``zero`` or ``hole``."""

    state: str
    start: int
    length: int
    host: int


def _content(source: Storage | bytes | bytearray) -> bytes:
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    if source.size > MAX_FILE:
        raise ReferenceError("the file is too large for the reference reader")
    buffer = bytearray(source.size)
    source.read_into(0, [buffer])
    return bytes(buffer)


class RefImage:
    """The header of an image and its bytes.  Raises ReferenceError when it cannot be opened."""

    def __init__(self, source: Storage | bytes | bytearray, data: Storage | bytes | bytearray | None = None) -> None:
        raw = self.raw = _content(source)
        if len(raw) < 72 or raw[:4] != b"QFI\xfb":
            raise ReferenceError("no qcow2 magic")
        (self.version, self.backing_offset, self.backing_size, self.bits, self.size, self.crypt, self.l1_size) = (
            struct.unpack_from(">IQIIQII", raw, 4)
        )
        (self.l1_offset, self.table_offset, self.table_clusters, self.snapshot_count, self.snapshot_offset) = (
            struct.unpack_from(">QQIIQ", raw, 40)
        )
        self.incompatible = self.compatible = self.autoclear = 0
        self.order, self.header_length, self.compression = 4, 72, 0
        if self.version not in (2, 3):
            raise ReferenceError(f"version {self.version}")
        if self.version == 3:
            if len(raw) < 104:
                raise ReferenceError("header cut off")
            (self.incompatible, self.compatible, self.autoclear, self.order, self.header_length) = struct.unpack_from(
                ">QQQII", raw, 72
            )
            self.compression = raw[104] if self.header_length > 104 and len(raw) > 104 else 0
        self._validate()
        self.cluster = 1 << self.bits
        self.extended = bool(self.incompatible & EXTENDED)
        self.entry = 16 if self.extended else 8
        self.l2_entries = self.cluster // self.entry
        self.has_data_file = bool(self.incompatible & DATA_FILE)
        self.data = _content(data) if data is not None else (None if self.has_data_file else raw)
        self.extensions = self._extensions()
        needed = -(-self.size // (self.cluster * self.l2_entries))
        if self.l1_size < needed:
            raise ReferenceError("L1 table is too small")
        self.snapshots = self._snapshots()

    def _validate(self) -> None:
        if not 9 <= self.bits <= 21:
            raise ReferenceError(f"cluster_bits {self.bits}")
        if self.incompatible & ~0x1F:
            raise ReferenceError("unknown incompatible feature")
        if self.incompatible & EXTENDED and self.bits < 14:
            raise ReferenceError("subclusters too small")
        if self.order > 6 or self.header_length > 1 << self.bits or self.header_length < 72 or self.header_length % 8:
            raise ReferenceError("refcount_order or header_length")
        if bool(self.incompatible & ZSTD) != bool(self.compression) or self.compression > 1:
            raise ReferenceError("compression type")
        if self.l1_size > 1 << 22 or self.table_clusters << self.bits > 8 << 20 or self.table_clusters == 0:
            raise ReferenceError("a table is too large or missing")
        for offset in (self.l1_offset, self.table_offset, self.snapshot_offset):
            if offset % (1 << self.bits):
                raise ReferenceError(f"table offset {offset:#x} is not aligned")
        if self.snapshot_count > 65536:
            raise ReferenceError("too many snapshots")
        if self.size > MAX_GUEST << 20:
            raise ReferenceError("too large for the reference reader")

    def _extensions(self) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        end = self.backing_offset or 1 << self.bits
        at = self.header_length
        while at + 8 <= min(end, len(self.raw)):
            kind, length = struct.unpack_from(">II", self.raw, at)
            if kind == 0:
                break
            if at + 8 + length > end:
                raise ReferenceError("header extension too large")
            found[kind] = self.raw[at + 8 : at + 8 + length]
            at += 8 + -(-length // 8) * 8
        return found

    def _snapshots(self) -> list[RefSnapshot]:
        entries = []
        at = self.snapshot_offset
        for _ in range(self.snapshot_count):
            if at + 40 > len(self.raw):
                raise ReferenceError("snapshot table past the end of the file")
            l1_offset, l1_size, id_size, name_size = struct.unpack_from(">QIHH", self.raw, at)
            (extra_size,) = struct.unpack_from(">I", self.raw, at + 36)
            extra = self.raw[at + 40 : at + 40 + min(extra_size, 1024)]
            size = struct.unpack_from(">Q", extra, 8)[0] if len(extra) >= 16 else self.size
            at += 40 + extra_size
            text = self.raw[at : at + id_size + name_size]
            if len(text) < id_size + name_size:
                raise ReferenceError("snapshot table past the end of the file")
            ident, name = (part.decode(errors="replace") for part in (text[:id_size], text[id_size:]))
            entries.append(RefSnapshot(ident, name, l1_offset, l1_size, size, extra_size))
            at = self.snapshot_offset + -(-(at + len(text) - self.snapshot_offset) // 8) * 8
        self.snapshot_bytes = at - self.snapshot_offset
        return entries

    def words(self, offset: int, count: int, what: str) -> tuple[int, ...]:
        """Return *count* big-endian 64-bit words; what the file lacks at its last cluster is zero."""
        if count > MAX_WORDS:
            raise ReferenceError(f"{what} is too large")
        if count and offset >= len(self.raw):
            raise ReferenceError(f"{what} at {offset:#x} lies past the end of the file")
        data = self.raw[offset : offset + count * 8]
        return struct.unpack(f">{count}Q", data + bytes(count * 8 - len(data)))

    def l2_table(self, offset: int) -> tuple[int, ...]:
        """Return the words of an L2 table (two for each cluster with subclusters)."""
        if offset % self.cluster:
            raise ReferenceError(f"L2 table offset {offset:#x} is not aligned")
        return self.words(offset, self.cluster // 8, "L2 table")

    def compressed_span(self, entry: int) -> tuple[int, int]:
        """Return (host offset, length) of the sectors of a compressed cluster."""
        x = 70 - self.bits
        offset = entry & ((1 << x) - 1) & ((1 << 56) - 1)
        sectors = (entry >> x & ((1 << (62 - x)) - 1)) + 1
        return offset, sectors * 512 - offset % 512

    def decompress(self, entry: int) -> bytes:
        """Return the cluster that a compressed descriptor names."""
        offset, length = self.compressed_span(entry)
        data = self.raw[offset : offset + length]
        try:
            if self.compression == 0:
                out = zlib.decompressobj(-15).decompress(data, self.cluster)
            else:
                out = b""
                while len(out) < self.cluster:
                    decoder = ZstdDecompressor()
                    part = decoder.decompress(data, self.cluster - len(out))
                    if not part:
                        break
                    out, data = out + part, decoder.unused_data
        except Exception as error:
            raise ReferenceError(f"compressed cluster at {offset:#x}: {error}") from error
        if len(out) != self.cluster:
            raise ReferenceError(f"compressed cluster at {offset:#x} gives {len(out)} bytes")
        return out

    def subclusters(self, entry: int, bitmap: int) -> Iterator[_Sub]:
        """Yield the stretches of a cluster that is not compressed."""
        host = entry & OFFSET_MASK
        present = host != 0 or (self.has_data_file and entry & COPIED != 0)
        if host % self.cluster:
            raise ReferenceError(f"cluster offset {host:#x} is not aligned")
        if not self.extended:
            if entry & 1 and self.version == 2:
                raise ReferenceError("zero cluster in version 2")
            state = "zero" if entry & 1 else "data" if present else "hole"
            yield _Sub(state, 0, self.cluster, host)
            return
        step = self.cluster // 32
        for index in range(32):
            allocated, zero = bitmap >> index & 1, bitmap >> (32 + index) & 1
            if allocated and (zero or not present):
                raise ReferenceError("invalid subcluster bitmap")
            state = "zero" if zero else "data" if allocated else "hole"
            yield _Sub(state, index * step, step, host + index * step)

    def host_bytes(self, offset: int, length: int) -> bytes:
        """Return guest data at *offset* of the file that holds it."""
        if self.data is None:
            raise ReferenceError("the data file is not given")
        if offset >= len(self.data) and not self.has_data_file:
            raise ReferenceError(f"data at {offset:#x} lies past the end of the file")
        part = self.data[offset : offset + length]
        return part + bytes(length - len(part))


def reference_read(
    source: Storage | bytes | bytearray | RefImage,
    *,
    data: Storage | bytes | bytearray | None = None,
    backing: bytes = b"",
    snapshot: str | None = None,
) -> bytes:
    """Return all guest bytes; *backing* are those of the layer below, *snapshot* an id or a name.

    Raises: ReferenceError for whatever cannot be read, also data past the end of the file.
    """
    image = source if isinstance(source, RefImage) else RefImage(source, data)
    l1_offset, l1_size, size = image.l1_offset, image.l1_size, image.size
    if snapshot is not None:
        found = [entry for entry in image.snapshots if snapshot in (entry.ident, entry.name)]
        if not found:
            raise ReferenceError(f"no snapshot {snapshot}")
        l1_offset, l1_size, size = found[0].l1_offset, found[0].l1_size, found[0].size
    if size > MAX_GUEST:
        raise ReferenceError("too large for the reference reader")
    span = image.cluster * image.l2_entries
    needed = -(-size // span)
    l1 = image.words(l1_offset, min(l1_size, needed), "L1 table")
    out = bytearray(backing[:size] + bytes(max(0, size - len(backing))))
    for index, word in enumerate(l1):
        table = word & OFFSET_MASK
        if table:
            _read_table(image, image.l2_table(table), index * span, out)
    return bytes(out)


def _read_table(image: RefImage, words: tuple[int, ...], guest: int, out: bytearray) -> None:
    step = image.entry // 8
    size = len(out)
    for slot in range(0, len(words), step):
        entry = words[slot]
        if guest >= size:
            return
        if entry & COMPRESSED:
            part = image.decompress(entry)
            out[guest : min(guest + len(part), size)] = part[: size - guest]
        elif entry or step == 2:
            for sub in image.subclusters(entry, words[slot + 1] if step == 2 else 0):
                start = guest + sub.start
                if sub.state == "hole" or start >= size:
                    continue
                count = min(sub.length, size - start)
                out[start : start + count] = image.host_bytes(sub.host, count) if sub.state == "data" else bytes(count)
        guest += image.cluster


def reference_snapshots(source: Storage | bytes | bytearray) -> list[RefSnapshot]:
    """Return the snapshot table."""
    return RefImage(source).snapshots


class _Checker:
    def __init__(self, image: RefImage) -> None:
        self.image = image
        self.counted: Counter[int] = Counter()
        self.messages: list[str] = []
        self.corruptions = self.stale = self.leaks = 0

    def wrong(self, text: str) -> None:
        self.corruptions += 1
        self.messages.append(text)

    def count(self, offset: int, length: int, what: str) -> None:
        """Count one reference to each cluster of a range."""
        if length <= 0:
            return
        if offset + length - len(self.image.raw) >= self.image.cluster:
            self.wrong(f"{what} at {offset:#x} lies past the end of the file")
            return
        for cluster in range(offset >> self.image.bits, (offset + length - 1 >> self.image.bits) + 1):
            self.counted[cluster] += 1

    def tables(self) -> None:
        image = self.image
        self.count(0, image.cluster, "header")
        self.table(image.l1_offset, image.l1_size, True, "L1 table")
        for snapshot in image.snapshots:
            if snapshot.l1_offset % image.cluster:
                self.wrong(f"L1 table of snapshot {snapshot.ident} is not aligned")
            else:
                self.table(snapshot.l1_offset, snapshot.l1_size, False, f"L1 table of snapshot {snapshot.ident}")
        if image.snapshots:
            self.count(image.snapshot_offset, image.snapshot_bytes, "snapshot table")
        crypto = image.extensions.get(0x0537BE77)
        if crypto is not None and len(crypto) == 16:
            offset, length = struct.unpack(">QQ", crypto)
            self.count(offset, length, "encryption header")
        self.bitmaps()

    def table(self, offset: int, size: int, active: bool, what: str) -> None:
        image = self.image
        self.count(offset, size * 8, what)
        try:
            words = image.words(offset, size, what)
        except ReferenceError:
            return
        for word in words:
            table = word & OFFSET_MASK
            if word & L1_RESERVED and active:
                self.wrong(f"reserved bits in L1 entry {word:#x}")
            if not table:
                continue
            if table % image.cluster:
                self.wrong(f"L2 table offset {table:#x} is not aligned")
                continue
            self.count(table, image.cluster, "L2 table")
            try:
                entries = image.l2_table(table)
            except ReferenceError:
                continue
            self.entries(entries, active)

    def entries(self, words: tuple[int, ...], active: bool) -> None:
        image = self.image
        step = image.entry // 8
        for slot in range(0, len(words), step):
            entry = words[slot]
            bitmap = words[slot + 1] if step == 2 else 0
            if entry & COMPRESSED:
                self.compressed(entry, bitmap)
                continue
            if entry & (L2_RESERVED | (1 if image.extended else 0)) and active:
                self.wrong(f"reserved bits in L2 entry {entry:#x}")
            host = entry & OFFSET_MASK
            present = host != 0 or (image.has_data_file and entry & COPIED != 0)
            allocated, zero = bitmap & 0xFFFFFFFF, bitmap >> 32
            if image.extended and (allocated & zero or (allocated and not present)):
                self.wrong(f"invalid subcluster bitmap {bitmap:#x}")
            if not host or image.has_data_file:
                continue
            if host % image.cluster:
                self.wrong(f"cluster offset {host:#x} is not aligned")
            else:
                self.count(host, image.cluster, "cluster")

    def compressed(self, entry: int, bitmap: int) -> None:
        if entry & COPIED:
            self.wrong(f"COPIED in compressed entry {entry:#x}")
        if self.image.has_data_file:
            self.wrong("compressed cluster with a data file")
        elif bitmap:
            self.wrong("compressed cluster with a subcluster bitmap")
        else:
            self.count(*self.image.compressed_span(entry), "compressed cluster")

    def bitmaps(self) -> None:
        image = self.image
        extension = image.extensions.get(0x23852875)
        if extension is None or not image.autoclear & 1 or len(extension) != 24:
            return
        number, _, size, offset = struct.unpack(">IIQQ", extension)
        self.count(offset, size, "bitmap directory")
        at, end = offset, min(offset + size, len(image.raw))
        for _ in range(number):
            if at + 24 > end:
                self.wrong("bitmap directory is cut off")
                return
            table, entries, _, _, _, name_size, extra = struct.unpack_from(">QIIBBHI", image.raw, at)
            at += -(-(24 + name_size + extra) // 8) * 8
            self.count(table, entries * 8, "bitmap table")
            try:
                words = image.words(table, min(entries, 1 << 20), "bitmap table")
            except ReferenceError:
                continue
            for word in words:
                if word & OFFSET_MASK:
                    self.count(word & OFFSET_MASK, image.cluster, "bitmap data")

    def stored(self) -> dict[int, int]:
        """Count the refcount structures themselves and return the refcounts that are not zero."""
        image = self.image
        self.count(image.table_offset, image.table_clusters << image.bits, "refcount table")
        try:
            table = image.words(image.table_offset, (image.table_clusters << image.bits) // 8, "refcount table")
        except ReferenceError:
            return {}
        stored: dict[int, int] = {}
        blocks: Counter[int] = Counter()
        per_block = image.cluster * 8 >> image.order
        for index, block in enumerate(table):
            if block & 0x1FF:
                self.wrong(f"reserved bits in refcount table entry {index}")
            block &= ~0x1FF
            if not block:
                continue
            if block % image.cluster or block >= len(image.raw):
                self.wrong(f"refcount block {index} at {block:#x} is not aligned or past the end of the file")
                continue
            self.count(block, image.cluster, "refcount block")
            blocks[block] += 1
            data = image.raw[block : block + image.cluster]
            for slot, value in _refcounts(data + bytes(image.cluster - len(data)), image.order):
                stored[index * per_block + slot] = value
        for block in blocks:
            if self.counted[block >> image.bits] != 1:
                self.wrong(f"refcount block at {block:#x} is referenced more than once")
        return stored

    def compare(self, stored: dict[int, int]) -> None:
        for cluster in sorted(stored.keys() | self.counted.keys()):
            have, want = stored.get(cluster, 0), self.counted.get(cluster, 0)
            if have < want:
                self.wrong(f"cluster {cluster} refcount={have} reference={want}")
            elif have > want:
                self.leaks += 1
                self.messages.append(f"leaked cluster {cluster} refcount={have} reference={want}")

    def flags(self, stored: dict[int, int]) -> None:
        image = self.image
        try:
            l1 = image.words(image.l1_offset, image.l1_size, "L1 table")
        except ReferenceError:
            return
        step = image.entry // 8
        for word in l1:
            table = word & OFFSET_MASK
            if not table or table % image.cluster:
                continue
            self.flag(word, stored, "L2 table")
            try:
                entries = image.l2_table(table)
            except ReferenceError:
                continue
            if image.has_data_file:
                continue
            for entry in entries[::step]:
                host = entry & OFFSET_MASK
                if host and not entry & COMPRESSED and not host % image.cluster:
                    self.flag(entry, stored, "cluster")

    def flag(self, entry: int, stored: dict[int, int], what: str) -> None:
        host = entry & OFFSET_MASK
        refcount = stored.get(host >> self.image.bits, 0)
        if bool(entry & COPIED) != (refcount == 1):
            self.stale += refcount == 1
            self.wrong(f"{what} at {host:#x}: COPIED {entry >> 63} with refcount {refcount}")


def _refcounts(block: bytes, order: int) -> Iterator[tuple[int, int]]:
    """Yield (slot, value) of the entries that are not zero."""
    if order >= 3:
        code = "BHIQ"[order - 3]
        values = struct.unpack(f">{len(block) >> (order - 3)}{code}", block)
        yield from ((slot, value) for slot, value in enumerate(values) if value)
        return
    width = 1 << order
    per_byte = 8 // width
    for index, byte in enumerate(block):
        if byte:
            for part in range(per_byte):
                value = byte >> part * width & ((1 << width) - 1)
                if value:
                    yield index * per_byte + part, value


def reference_check(
    source: Storage | bytes | bytearray | RefImage, *, data: Storage | bytes | bytearray | None = None
) -> CheckResult:
    """Count all references and compare them with the refcounts and COPIED flags.

    Raises: ReferenceError when the header or the snapshot table cannot be read.
    """
    image = source if isinstance(source, RefImage) else RefImage(source, data)
    checker = _Checker(image)
    checker.tables()
    stored = checker.stored()
    checker.compare(stored)
    checker.flags(stored)
    for snapshot in image.snapshots:
        if image.version == 3 and snapshot.extra_size < 16:
            checker.wrong(f"snapshot {snapshot.ident} has too little extra data")
    return CheckResult(
        checker.corruptions,
        checker.stale,
        checker.leaks,
        tuple(checker.messages),
        bool(image.incompatible & DIRTY),
        bool(image.incompatible & CORRUPT),
    )
