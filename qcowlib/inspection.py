# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Judges an image that nobody trusts, from its metadata alone.

Invariant: nothing that the image names is opened, no guest data is read, and
work and memory are bounded by the format's limits (32 MiB of L1, 8 MiB of
refcount table, 64 MiB of snapshot table and of bitmap directory).  The verdict
concerns the descriptor that was read: keep it open and use that one
(pass an open file), since a name may be given to another file meanwhile.

Of a stream that cannot seek the first 2 MiB are read; tables behind that are
reported as not looked at.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise
from sys import byteorder
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

from qcowlib.errors import FormatError, UnsupportedFeature, UsageError, printable
from qcowlib.ondisk import (
    AUTOCLEAR_MASK,
    COMPAT_LAZY_REFCOUNTS,
    CRYPT_NONE,
    HEADER_READ,
    L1_RESERVED,
    MAX_L1_BYTES,
    OFFSET_MASK,
    REFCOUNT_TABLE_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    Header,
    ShortTable,
    SnapshotEntry,
    header_read_size,
    is_qcow2,
    parse_bitmap_directory,
    parse_snapshots,
    snapshot_table_size,
)
from qcowlib.storage.file import FileStorage
from qcowlib.storage.memory import MemoryStorage
from qcowlib.storage.reader import ReaderStorage
from qcowlib.units import MiB, TiB

if TYPE_CHECKING:
    from os import PathLike

    from qcowlib.storage.base import Storage
    from qcowlib.storage.reader import PositionedReader, SeekableReader

__all__ = ["Finding", "Inspection", "Severity", "StreamReader", "inspect"]

Severity = Literal["info", "warning", "danger"]

_STREAM_PREFIX: Final = 2 * MiB
_LARGE_SNAPSHOT_L1: Final = 256 * MiB
_MANY_EXTENSIONS: Final = 64
_MOST_FINDINGS: Final = 100
_SAFE_FORMATS: Final = frozenset((b"qcow2", b"raw"))

# Formats that refer to other files, or that a guest may use to pass as what they are not.
_FOREIGN: Final = (
    (0, b"QFI\xfb\0\0\0\1", "qcow"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"Bochs Virtual HD Image", "bochs"),
)


class StreamReader(Protocol):
    """A stream that can only be read on; ``read`` may return less than asked, nothing at the end."""

    def read(self, length: int, /) -> bytes: ...


class Finding(NamedTuple):
    """One fact about an image.

    ``kind`` is a stable identifier, ``message`` one printable line, ``offset``
    the byte of the file it was read from (``None`` where there is none).
    """

    kind: str
    severity: Severity
    message: str
    offset: int | None = None


class Inspection(NamedTuple):
    """The verdict: ``format`` is ``qcow2``, ``raw`` or a foreign format's name.

    ``header`` is there if the image is qcow2 and could be parsed.
    ``complete`` is false where a stream ended our view before a table.
    """

    format: str
    file_size: int | None
    header: Header | None
    findings: tuple[Finding, ...]
    complete: bool

    @property
    def safe(self) -> bool:
        """Nothing worse than ``info`` was found, and everything was looked at."""
        return self.complete and all(finding.severity == "info" for finding in self.findings)


def inspect(source: str | bytes | PathLike[str] | int | PositionedReader | SeekableReader | StreamReader) -> Inspection:
    """Return the findings about *source*: a path, a descriptor, or any readable object.

    A path must lead to a regular file or block device; opening never blocks.
    A descriptor or object stays open, its position undefined.
    Raises: StorageError where *source* cannot be opened or read; never
    anything for what the image holds.
    """
    storage, whole = _open(source)
    try:
        return _Inspector(storage, whole).run()
    finally:
        storage.close()


def _open(source: object) -> tuple[Storage, bool]:
    """Return a storage to read from, and whether it shows the whole file."""
    if isinstance(source, (str, bytes, int)) or hasattr(source, "__fspath__"):
        return FileStorage.open(source), True
    seekable = getattr(source, "seekable", None)
    cannot_seek = callable(seekable) and not seekable()
    if not cannot_seek and (hasattr(source, "pread") or (hasattr(source, "seek") and hasattr(source, "readinto"))):
        return ReaderStorage(source), True  # type: ignore[arg-type]
    read = getattr(source, "read", None)
    if not callable(read):
        raise UsageError("the object cannot be read")
    prefix = bytearray()
    while len(prefix) < _STREAM_PREFIX:
        piece = read(_STREAM_PREFIX - len(prefix))
        if not piece:
            return MemoryStorage(prefix, name="stream", writable=False), True
        prefix += piece
    del prefix[_STREAM_PREFIX:]
    return MemoryStorage(prefix, name="stream", writable=False), False


class _Inspector:
    def __init__(self, storage: Storage, whole: bool) -> None:
        self._storage = storage
        self._whole = whole
        self._size = storage.size
        self._complete = True
        self._findings: list[Finding] = []

    def run(self) -> Inspection:
        start = self._read(0, min(HEADER_READ, self._size))
        format_name, header = "raw", None
        if is_qcow2(start):
            format_name = "qcow2"
            header = self._header(start)
            if header is not None:
                self._names(header)
                self._features(header)
                self._tables(header)
        else:
            for offset, magic, name in _FOREIGN:
                if start[offset : offset + len(magic)] == magic:
                    format_name = name
                    self._add("foreign-format", "danger", f"the file is of format {name}", offset)
                    break
        size = self._size if self._whole else None
        return Inspection(format_name, size, header, tuple(self._findings), self._complete)

    def _add(self, kind: str, severity: Severity, message: str, offset: int | None = None) -> None:
        if len(self._findings) < _MOST_FINDINGS:
            self._findings.append(Finding(kind, severity, printable(message), offset))
        elif len(self._findings) == _MOST_FINDINGS:
            self._findings.append(Finding("more-findings", "danger", "there is more than is listed here"))

    def _read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._storage.read_into(offset, [buffer])
        return bytes(buffer)

    # -- header --------------------------------------------------------------------

    def _header(self, start: bytes) -> Header | None:
        need = min(header_read_size(start), self._size)
        if need > len(start):
            start = self._read(0, need)
        try:
            return Header.parse(start, self._size, no_io=True)
        except UnsupportedFeature as error:
            self._add("unknown-feature", "danger", error.message, 0)
        except FormatError as error:
            self._add("bad-header", "danger", error.message, 0)
        # What keeps an image from being opened must not hide what it refers to.
        try:
            header = Header.parse(start, self._size, no_io=True, repair=True)
        except FormatError:
            return None
        self._names(header)
        return None

    def _names(self, header: Header) -> None:
        if header.backing_file is not None:
            self._backing(header.backing_file, header)
        if header.has_data_file or header.data_file_name is not None:
            name = header.data_file_name
            if name is None:
                text = "guest data lies in a file that must be given by the user"
            else:
                text = f"guest data lies in the file '{printable(name)}'"
            self._add("data-file", "danger", text, 72)
            self._control("data file", name or b"", header.header_length)
        for entry in header.feature_names:
            self._control("feature", entry.name, header.header_length)

    def _backing(self, name: bytes, header: Header) -> None:
        shown = printable(name)
        offset = header.backing_file_offset
        head, colon, _ = name.partition(b":")
        if name.startswith(b"json:"):
            self._add("backing-json", "danger", f"the backing file is given by driver options: '{shown}'", offset)
        elif colon and b"/" not in head and head != b"file":
            self._add("backing-protocol", "danger", f"the backing file is reached by a protocol: '{shown}'", offset)
        else:
            path = name[5:] if head == b"file" and colon else name
            if path.startswith(b"/"):
                self._add("backing-absolute", "danger", f"the backing file has an absolute name: '{shown}'", offset)
            elif b".." in path.split(b"/"):
                self._add("backing-outside", "danger", f"the backing file lies outside the folder: '{shown}'", offset)
            else:
                self._add("backing-file", "warning", f"the image needs the backing file '{shown}'", offset)
        self._control("backing file", name, offset)
        if header.backing_format is None:
            self._add("backing-format-missing", "warning", "the format of the backing file is not told", offset)
        elif header.backing_format not in _SAFE_FORMATS:
            text = f"the backing file has the format '{printable(header.backing_format)}'"
            self._add("backing-format", "danger", text, header.header_length)

    def _control(self, what: str, name: bytes, offset: int) -> None:
        text = name.decode("utf-8", "replace")
        if not text.isprintable() or "�" in text:
            self._add(
                "unprintable-name", "danger", f"the name of a {what} is not printable: '{printable(name)}'", offset
            )

    def _features(self, header: Header) -> None:
        if header.is_corrupt:
            self._add("corrupt", "danger", "the image is marked corrupt", 72)
        if header.is_dirty:
            self._add("dirty", "info", "refcounts may be stale: the image was not closed", 72)
        if header.compatible_features & ~COMPAT_LAZY_REFCOUNTS:
            text = f"unknown compatible features: {header.compatible_features & ~COMPAT_LAZY_REFCOUNTS:#x}"
            self._add("unknown-compatible-feature", "info", text, 80)
        if header.autoclear_features & ~AUTOCLEAR_MASK:
            text = f"unknown autoclear features: {header.autoclear_features & ~AUTOCLEAR_MASK:#x}"
            self._add("unknown-autoclear-feature", "info", text, 88)
        if header.crypt_method != CRYPT_NONE:
            self._add("encrypted", "info", f"guest data is encrypted with method {header.crypt_method}", 32)
        for kind, body in header.unknown_extensions[:_MANY_EXTENSIONS]:
            text = f"unknown header extension {kind:#010x} of {len(body)} bytes"
            self._add("unknown-extension", "info", text, header.header_length)
        if len(header.extensions) > _MANY_EXTENSIONS:
            text = f"{len(header.extensions)} header extensions"
            self._add("many-extensions", "warning", text, header.header_length)
        if self._whole and header.size >= TiB and header.size > 1000 * max(self._size, 1):
            text = f"{header.size} bytes for the guest in a file of {self._size} bytes"
            self._add("sparse", "info", text, 24)

    # -- tables --------------------------------------------------------------------

    def _tables(self, header: Header) -> None:
        tables: list[tuple[int, int, str]] = [(0, header.cluster_size, "header")]
        if header.l1_size * 8 > max(2 * header.l1_needed * 8, MiB):
            self._add("large-l1", "warning", f"{header.l1_size} L1 entries for {header.l1_needed} needed", 36)
        tables.append((header.l1_table_offset, header.l1_size * 8, "L1 table"))
        refcount_bytes = header.refcount_table_clusters << header.cluster_bits
        tables.append((header.refcount_table_offset, refcount_bytes, "refcount table"))
        if header.crypto is not None:
            tables.append((header.crypto.offset, header.crypto.length, "encryption header"))
        if header.nb_snapshots:
            tables.extend(self._snapshots(header))
        if header.bitmaps is not None:
            bitmaps = header.bitmaps
            tables.append((bitmaps.directory_offset, bitmaps.directory_size, "bitmap directory"))
            if header.bitmaps_valid:
                self._bitmaps(header)
        tables = [table for table in tables if table[1] and self._inside(*table)]
        self._overlaps(tables)
        for offset, length, what in tables:
            if what == "L1 table":
                self._entries(offset, length, OFFSET_MASK, L1_RESERVED, "L1", header)
            elif what == "refcount table":
                mask, reserved = REFCOUNT_TABLE_OFFSET_MASK, REFCOUNT_TABLE_RESERVED
                self._entries(offset, length, mask, reserved, "refcount table", header)

    def _inside(self, offset: int, length: int, what: str) -> bool:
        """Return whether the table can be read; report it if it cannot."""
        if offset + length <= self._size:
            return True
        if not self._whole:
            self._complete = False
            self._add("not-read", "info", f"the {what} lies behind what was read of the stream", offset)
        elif what != "L1 table" or offset >= self._size:
            self._add("outside-file", "danger", f"the {what} reaches past the end of the file", offset)
        else:
            self._add("truncated", "warning", f"the {what} is cut off by the end of the file", offset)
        return False

    def _overlaps(self, tables: list[tuple[int, int, str]]) -> None:
        ordered = sorted(tables)
        for (start, length, what), (other, _, second) in pairwise(ordered):
            if start + length > other:
                self._add("overlap", "danger", f"the {second} overlaps the {what}", other)

    def _snapshots(self, header: Header) -> Iterator[tuple[int, int, str]]:
        offset = header.snapshots_offset
        entries = self._snapshot_entries(header)
        if entries is None:
            return
        yield offset, snapshot_table_size(entries), "snapshot table"
        total = 0
        for entry in entries:
            self._control("snapshot", entry.id + entry.name, offset)
            length = entry.l1_size * 8
            total += length
            if length > MAX_L1_BYTES or entry.l1_table_offset % header.cluster_size:
                text = f"the L1 table of snapshot '{printable(entry.id)}' is out of bounds"
                self._add("snapshot-l1", "danger", text, offset)
            else:
                # Snapshots of one moment may share nothing: each has its own L1.
                yield entry.l1_table_offset, length, f"L1 table of snapshot '{printable(entry.id)}'"
        if total > _LARGE_SNAPSHOT_L1:
            self._add("large-snapshots", "warning", f"{total} bytes of L1 tables in snapshots", offset)

    def _snapshot_entries(self, header: Header) -> list[SnapshotEntry] | None:
        offset = header.snapshots_offset
        length = min(max(self._size - offset, 0), 64 * header.nb_snapshots)
        while True:
            try:
                return parse_snapshots(self._read(offset, length), header.nb_snapshots)
            except ShortTable as short:
                if offset + short.needed > self._size:
                    self._inside(offset, short.needed, "snapshot table")
                    return None
                length = min(self._size - offset, max(short.needed, 2 * length))
            except FormatError as error:
                self._add("bad-snapshot-table", "danger", error.message, offset)
                return None

    def _bitmaps(self, header: Header) -> None:
        bitmaps = header.bitmaps
        if bitmaps is None or bitmaps.directory_offset + bitmaps.directory_size > self._size:
            return
        offset = bitmaps.directory_offset
        data = self._read(offset, bitmaps.directory_size)
        try:
            entries = parse_bitmap_directory(data, bitmaps.nb_bitmaps, header.virtual_size, header.cluster_bits)
        except FormatError as error:
            self._add("bad-bitmap-directory", "danger", error.message, offset)
            return
        for entry in entries:
            self._control("bitmap", entry.name, offset)
            if entry.table_offset + entry.table_size * 8 > self._size:
                text = f"the table of bitmap '{printable(entry.name)}' reaches past the end of the file"
                self._add("outside-file", "danger", text, offset)

    def _entries(self, offset: int, length: int, mask: int, reserved: int, what: str, header: Header) -> None:
        """Judge the pointers of one table: reserved bits, alignment, range, and double use."""
        table = array("Q", self._read(offset, length))
        if byteorder == "little":
            table.byteswap()
        entries = [entry for entry in table if entry]
        if any(entry & reserved for entry in entries):
            self._add("reserved-bits", "danger", f"reserved bits are set in the {what} entries", offset)
        pointers = [entry & mask for entry in entries if entry & mask]
        unit = header.cluster_size
        if any(pointer % unit for pointer in pointers):
            self._add("unaligned", "danger", f"{what} entries point inside a cluster", offset)
        if pointers and self._whole and max(pointers) >= self._size:
            self._add("outside-file", "danger", f"{what} entries point past the end of the file", offset)
        if pointers and min(pointers) < unit:
            self._add("overlap", "danger", f"{what} entries point at the header", offset)
        if len(set(pointers)) != len(pointers):
            self._add("shared-tables", "danger", f"several {what} entries point at one place", offset)
