# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The QCOW2 header: the fixed fields, the extensions, the backing file name.

Invariant: :meth:`Header.parse` accepts what QEMU accepts and refuses the rest
with QEMU's words, before anything is allocated from a number of the image
(I10: an unknown incompatible bit is a refusal); :meth:`Header.pack` keeps
unknown fields, unknown extensions and unknown compatible bits.

====== ==== =====================  ====== ==== ==========================
offset size field                  offset size field
====== ==== =====================  ====== ==== ==========================
0      4    magic                  60     4    nb_snapshots
4      4    version                64     8    snapshots_offset
8      8    backing_file_offset    72     8    incompatible_features (v3)
16     4    backing_file_size      80     8    compatible_features
20     4    cluster_bits           88     8    autoclear_features
24     8    size                   96     4    refcount_order
32     4    crypt_method           100    4    header_length
36     4    l1_size                104    1    compression_type
40     8    l1_table_offset        105    7    zero
48     8    refcount_table_offset  112    ..   fields we do not know
56     4    refcount_table_clusters
====== ==== =====================  ====== ==== ==========================
"""

from __future__ import annotations

from struct import Struct

from qcowlib.errors import FormatError, UnsupportedFeature, UsageError
from qcowlib.ondisk import constants as c
from qcowlib.ondisk import extensions as ext
from qcowlib.ondisk.extensions import BitmapsExtension, CryptoPointer, Extension, FeatureName
from qcowlib.ondisk.geometry import l1_entries
from qcowlib.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


__all__ = ["HEADER_READ", "Header", "header_read_size", "is_qcow2"]

HEADER_READ: Final = 4096
"""Bytes to read first: almost always all of the header area that is in use."""

_V2 = Struct(">4sIQIIQIIQQIIQ")
_V3 = Struct(">QQQIIB7x")
_V2_LENGTH: Final = 72
_V3_MINIMUM: Final = 104
_V3_LENGTH: Final = 112
_SNAPSHOT_HEAD: Final = 40


def is_qcow2(data: bytes) -> bool:
    """Return whether *data*, the start of a file, is recognised as QCOW2 by probing."""
    return data[:4] == c.MAGIC and data[4:8] >= b"\0\0\0\2"


def header_read_size(data: bytes) -> int:
    """Return how many bytes from the file's start :meth:`Header.parse` wants.

    *data* is what one read of :data:`HEADER_READ` bytes gave.  The answer is
    ``len(data)`` where that holds END and the backing file name, else one
    cluster (at most 2 MiB); a shorter file is passed whole.
    """
    fixed = data.ljust(_V3_LENGTH, b"\0")
    fields = _V2.unpack_from(fixed)
    cluster_bits, backing_end = fields[4], fields[2] + fields[3] if fields[2] else 0
    if fields[0] != c.MAGIC or not c.MIN_CLUSTER_BITS <= cluster_bits <= c.MAX_CLUSTER_BITS:
        return len(data)
    cluster_size: int = 1 << cluster_bits
    start = _V2_LENGTH if fields[1] == 2 else int.from_bytes(fixed[100:104], "big")
    end = min(fields[2] or cluster_size, cluster_size)
    try:
        for kind, offset, length in ext.walk_extensions(data, start, end, path=None):
            if offset + length > len(data):
                return cluster_size
            if kind == ext.EXT_END:
                break
    except FormatError:
        return cluster_size
    return len(data) if backing_end <= len(data) else cluster_size


def _check_table(
    offset: int, entries: int, cluster_size: int, limit: int, what: str, path: str | None, entry: int = 8
) -> None:
    """Refuse a table over *limit* bytes, unaligned, or past the end of the offset range."""
    if entries > limit // entry:
        raise FormatError(f"{what} too large", path=path)
    if offset > c.INT64_MAX - entries * entry or offset % cluster_size:
        raise FormatError(f"{what} offset invalid", path=path)


class Header:
    """All of the header area; attributes have the names of the format.

    ``backing_file``, ``backing_format`` and ``data_file_name`` are bytes as in
    the image, or ``None``.  ``unknown_fields`` are the header bytes from 112
    on, ``unknown_extensions`` what is carried along; ``extensions`` is the
    list as it was read, for inspection only.  ``feature_names`` likewise:
    :meth:`pack` writes :data:`~.extensions.FEATURE_NAMES`.
    """

    __slots__ = (
        "autoclear_features",
        "backing_file",
        "backing_file_offset",
        "backing_format",
        "bitmaps",
        "cluster_bits",
        "compatible_features",
        "compression_type",
        "crypt_method",
        "crypto",
        "data_file_name",
        "extensions",
        "feature_names",
        "header_length",
        "incompatible_features",
        "l1_size",
        "l1_table_offset",
        "nb_snapshots",
        "refcount_order",
        "refcount_table_clusters",
        "refcount_table_offset",
        "size",
        "snapshots_offset",
        "unknown_extensions",
        "unknown_fields",
        "version",
    )

    def __init__(self, *, version: int = 3, cluster_bits: int = 16, size: int = 0, refcount_order: int = 4) -> None:
        self.version = version
        self.cluster_bits = cluster_bits
        self.size = size
        self.refcount_order = refcount_order
        self.backing_file_offset = 0
        self.backing_file: bytes | None = None
        self.crypt_method = c.CRYPT_NONE
        self.l1_size = 0
        self.l1_table_offset = 0
        self.refcount_table_offset = 0
        self.refcount_table_clusters = 0
        self.nb_snapshots = 0
        self.snapshots_offset = 0
        self.incompatible_features = 0
        self.compatible_features = 0
        self.autoclear_features = 0
        self.header_length = _V2_LENGTH if version == 2 else _V3_LENGTH
        self.compression_type = c.COMPRESSION_ZLIB
        self.unknown_fields = b""
        self.extensions: tuple[Extension, ...] = ()
        self.backing_format: bytes | None = None
        self.data_file_name: bytes | None = None
        self.crypto: CryptoPointer | None = None
        self.feature_names: tuple[FeatureName, ...] = ()
        self.bitmaps: BitmapsExtension | None = None
        self.unknown_extensions: tuple[Extension, ...] = ()

    def copy(self) -> Header:
        """Return an independent copy: change it, pack it, then make it the current one."""
        other = Header.__new__(Header)
        for name in Header.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    # -- derived ---------------------------------------------------------------

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster, guest and host."""
        return 1 << self.cluster_bits

    @property
    def virtual_size(self) -> int:
        """Guest bytes: ``size`` without the part of a sector, as QEMU reads it."""
        return self.size // SECTOR * SECTOR

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have a subcluster bitmap."""
        return bool(self.incompatible_features & c.INCOMPAT_EXTENDED_L2)

    @property
    def l2_entry_size(self) -> int:
        """Bytes per L2 entry: 8 or 16."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries in an L2 table."""
        return self.cluster_size // self.l2_entry_size

    @property
    def subclusters(self) -> int:
        """Subclusters per cluster: 1 or 32."""
        return c.SUBCLUSTERS if self.extended_l2 else 1

    @property
    def subcluster_size(self) -> int:
        """Bytes per subcluster."""
        return self.cluster_size // self.subclusters

    @property
    def refcount_bits(self) -> int:
        """Bits per refcount."""
        return 1 << self.refcount_order

    @property
    def refcount_max(self) -> int:
        """Largest storable refcount."""
        return (1 << self.refcount_bits) - 1

    @property
    def l1_needed(self) -> int:
        """L1 entries the virtual size needs; VM state begins behind them."""
        return l1_entries(self.size, self.cluster_bits, self.extended_l2)

    @property
    def is_dirty(self) -> bool:
        """Refcounts may be stale."""
        return bool(self.incompatible_features & c.INCOMPAT_DIRTY)

    @property
    def is_corrupt(self) -> bool:
        """Marked corrupt: reading only."""
        return bool(self.incompatible_features & c.INCOMPAT_CORRUPT)

    @property
    def has_data_file(self) -> bool:
        """Guest data lies in another file."""
        return bool(self.incompatible_features & c.INCOMPAT_DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        """The data file alone must always show the guest's content."""
        return bool(self.autoclear_features & c.AUTOCLEAR_RAW_DATA)

    @property
    def lazy_refcounts(self) -> bool:
        """Refcount updates may be postponed under the dirty bit."""
        return bool(self.compatible_features & c.COMPAT_LAZY_REFCOUNTS)

    @property
    def bitmaps_valid(self) -> bool:
        """The bitmaps extension may be trusted."""
        return self.bitmaps is not None and bool(self.autoclear_features & c.AUTOCLEAR_BITMAPS)

    # -- parse -----------------------------------------------------------------

    @classmethod
    def parse(
        cls,
        data: bytes | memoryview,
        file_size: int,
        *,
        path: str | None = None,
        writable: bool = False,
        repair: bool = False,
        no_io: bool = False,
    ) -> Header:
        """Return the header of an image whose first bytes are *data*.

        *data* has :func:`header_read_size` bytes or the whole file of
        *file_size* bytes.  With *repair* what ``check -r`` can mend is let
        through: the corrupt bit, a missing refcount table, a bad snapshot
        table pointer.  With *no_io* nobody will touch guest data (``info``),
        so what only data access needs is not checked.
        Raises: FormatError, UnsupportedFeature, with QEMU's cause as message.
        """
        data = bytes(data)
        header = cls._parse_fields(data.ljust(_V3_LENGTH, b"\0"), path)
        header._check_version3(data, path)
        if header.is_corrupt and writable and not repair:
            raise FormatError("qcow2: Image is corrupt; cannot be opened read/write", path=path)
        header._check_geometry(path)
        header._check_tables(repair, path)
        header._parse_extensions(data, file_size, path)
        if header.data_file_raw and not header.has_data_file and not no_io:
            raise FormatError("data-file-raw requires a data file", path=path)
        if header.crypt_method == c.CRYPT_LUKS and header.crypto is None:
            raise FormatError(f"Missing CRYPTO header for crypt method {header.crypt_method}", path=path)
        header._parse_backing_file(data, file_size, path)
        return header

    @classmethod
    def _parse_fields(cls, data: bytes, path: str | None) -> Header:
        fields = _V2.unpack_from(data)
        magic, version, cluster_bits = fields[0], fields[1], fields[4]
        if magic != c.MAGIC:
            raise FormatError("Image is not in qcow2 format", path=path)
        if version not in (2, 3):
            raise UnsupportedFeature(f"Unsupported qcow2 version {version}", path=path)
        if not c.MIN_CLUSTER_BITS <= cluster_bits <= c.MAX_CLUSTER_BITS:
            raise FormatError(f"Unsupported cluster size: 2^{cluster_bits}", path=path)
        header = cls(version=version, cluster_bits=cluster_bits, size=fields[5])
        header.backing_file_offset = fields[2]
        # The length, until the name itself is read.
        header.backing_file = b"" if fields[2] else None
        header.crypt_method = fields[6]
        header.l1_size, header.l1_table_offset = fields[7], fields[8]
        header.refcount_table_offset, header.refcount_table_clusters = fields[9], fields[10]
        header.nb_snapshots, header.snapshots_offset = fields[11], fields[12]
        if version == 3:
            (
                header.incompatible_features,
                header.compatible_features,
                header.autoclear_features,
                header.refcount_order,
                header.header_length,
                compression,
            ) = _V3.unpack_from(data, _V2_LENGTH)
            if header.header_length < _V3_MINIMUM:
                raise FormatError("qcow2 header too short", path=path)
            if header.header_length > header.cluster_size:
                raise FormatError("qcow2 header exceeds cluster size", path=path)
            header.compression_type = compression if header.header_length > _V3_MINIMUM else c.COMPRESSION_ZLIB
        if header.backing_file_offset > header.cluster_size:
            raise FormatError("Invalid backing file offset", path=path)
        return header

    def _check_version3(self, data: bytes, path: str | None) -> None:
        if self.header_length > _V3_LENGTH:
            self.unknown_fields = data[_V3_LENGTH : self.header_length].ljust(self.header_length - _V3_LENGTH, b"\0")
        has_bit = bool(self.incompatible_features & c.INCOMPAT_COMPRESSION)
        if self.compression_type > c.COMPRESSION_ZSTD:
            raise UnsupportedFeature(f"qcow2: unknown compression type: {self.compression_type}", path=path)
        if has_bit != (self.compression_type != c.COMPRESSION_ZLIB):
            word = "must not be set" if has_bit else "must be set"
            raise FormatError(f"qcow2: Compression type incompatible feature bit {word}", path=path)
        unknown = self.incompatible_features & ~c.INCOMPAT_MASK
        if unknown:
            # The image itself may name the features we lack.
            names: tuple[FeatureName, ...] = ()
            try:
                area = ext.walk_extensions(data, self.header_length, self._extension_end, path=path)
                for kind, offset, length in area:
                    if kind == ext.EXT_FEATURE_NAMES:
                        names = ext.parse_feature_names(data[offset : offset + length])
            except FormatError:
                pass
            raise UnsupportedFeature(
                f"Unsupported qcow2 feature(s): {ext.describe_features(unknown, names)}", path=path
            )

    def _check_geometry(self, path: str | None) -> None:
        if self.subcluster_size < SECTOR:
            raise FormatError(f"Unsupported subcluster size: {self.subcluster_size}", path=path)
        if self.refcount_order > 6:
            raise FormatError("Reference count entry width too large; may not exceed 64 bits", path=path)
        if self.crypt_method > c.CRYPT_LUKS:
            raise UnsupportedFeature(f"Unsupported encryption method {self.crypt_method}", path=path)

    def _check_tables(self, repair: bool, path: str | None) -> None:
        cluster_size = self.cluster_size
        if self.refcount_table_clusters == 0 and not repair:
            raise FormatError("Image does not contain a reference count table", path=path)
        _check_table(
            self.refcount_table_offset,
            self.refcount_table_clusters * (cluster_size // 8),
            cluster_size,
            c.MAX_REFCOUNT_TABLE_BYTES,
            "Reference count table",
            path,
        )
        if not repair:
            _check_table(
                self.snapshots_offset,
                self.nb_snapshots,
                cluster_size,
                c.MAX_SNAPSHOTS * _SNAPSHOT_HEAD,
                "Snapshot table",
                path,
                _SNAPSHOT_HEAD,
            )
        _check_table(self.l1_table_offset, self.l1_size, cluster_size, c.MAX_L1_BYTES, "Active L1 table", path)
        if self.size > c.INT64_MAX or self.l1_needed > 0x7FFF_FFFF:
            raise FormatError("Image is too big", path=path)
        if self.l1_size < self.l1_needed:
            raise FormatError("L1 table is too small", path=path)

    @property
    def _extension_end(self) -> int:
        return self.backing_file_offset or self.cluster_size

    def _parse_extensions(self, data: bytes, file_size: int, path: str | None) -> None:
        found: list[Extension] = []
        unknown: list[Extension] = []
        for kind, offset, length in ext.walk_extensions(data, self.header_length, self._extension_end, path=path):
            self._check_given(data, offset + length, file_size, path)
            if kind == ext.EXT_END:
                break
            body = data[offset : offset + length].ljust(length, b"\0")
            found.append(Extension(kind, body))
            if kind == ext.EXT_BACKING_FORMAT:
                self.backing_format = ext.parse_backing_format(body, path=path)
            elif kind == ext.EXT_DATA_FILE:
                self.data_file_name = body.partition(b"\0")[0]
            elif kind == ext.EXT_CRYPTO:
                if self.crypt_method != c.CRYPT_LUKS:
                    raise FormatError("CRYPTO header extension only expected with LUKS encryption method", path=path)
                self.crypto = ext.parse_crypto(body, self.cluster_size, path=path)
            elif kind == ext.EXT_FEATURE_NAMES:
                self.feature_names = ext.parse_feature_names(body)
            elif kind == ext.EXT_BITMAPS:
                self._parse_bitmaps(body, path)
            else:
                unknown.append(found[-1])
        self.extensions = tuple(found)
        self.unknown_extensions = tuple(unknown)

    def _check_given(self, data: bytes, end: int, file_size: int, path: str | None) -> None:
        """Refuse to take bytes as zeros that the file has and the caller did not pass."""
        if end > len(data) < min(file_size, self.cluster_size):
            raise UsageError(f"the header needs {self.cluster_size} bytes to parse, {len(data)} given", path=path)

    def _parse_bitmaps(self, body: bytes, path: str | None) -> None:
        if len(body) != 24:
            raise FormatError("bitmaps_ext: Invalid extension length", path=path)
        # With the bit clear the extension is stale: it must not make the image unreadable.
        if self.autoclear_features & c.AUTOCLEAR_BITMAPS:
            self.bitmaps = ext.parse_bitmaps(body, self.cluster_size, path=path)
        else:
            try:
                self.bitmaps = ext.parse_bitmaps(body, self.cluster_size, path=path)
            except FormatError:
                self.bitmaps = None

    def _parse_backing_file(self, data: bytes, file_size: int, path: str | None) -> None:
        if self.backing_file is None:
            return
        length = int.from_bytes(data[16:20], "big")
        if length > min(c.MAX_BACKING_NAME, self.cluster_size - self.backing_file_offset):
            raise FormatError("Backing file name too long", path=path)
        start = self.backing_file_offset
        self._check_given(data, start + length, file_size, path)
        self.backing_file = data[start : start + length].ljust(length, b"\0").partition(b"\0")[0]

    # -- pack ------------------------------------------------------------------

    def pack(self) -> bytes:
        """Return the whole header cluster as QEMU writes it, zeros to its end.

        ``backing_file_offset`` and ``header_length`` are set to what was
        packed.  Raises: UsageError if it does not fit in one cluster.
        """
        self.header_length = _V2_LENGTH if self.version == 2 else _V3_LENGTH + len(self.unknown_fields)
        parts = [ext.pack_extension(kind, body) for kind, body in self._extensions_to_write()]
        parts.append(ext.pack_extension(ext.EXT_END, b""))
        area = b"".join(parts)
        name = self.backing_file or b""
        if len(name) > c.MAX_BACKING_NAME:
            raise UsageError("Backing file name too long")
        if self.header_length + len(area) + len(name) > self.cluster_size:
            raise UsageError("No space left in the file header")
        self.backing_file_offset = self.header_length + len(area) if self.backing_file is not None else 0
        return (self._pack_fields(len(name)) + area + name).ljust(self.cluster_size, b"\0")

    def pack_fields(self) -> bytes:
        """Return the fixed fields only, for writing a few of them in place."""
        return self._pack_fields(len(self.backing_file or b""))

    def _extensions_to_write(self) -> list[tuple[int, bytes]]:
        result: list[tuple[int, bytes]] = []
        if self.backing_format:
            result.append((ext.EXT_BACKING_FORMAT, self.backing_format))
        if self.has_data_file and self.data_file_name is not None:
            result.append((ext.EXT_DATA_FILE, self.data_file_name))
        if self.crypto is not None:
            result.append((ext.EXT_CRYPTO, self.crypto.pack()))
        # Smaller clusters are left to what must be stored.
        if self.version >= 3 and self.cluster_size > 4096:
            result.append((ext.EXT_FEATURE_NAMES, ext.pack_feature_names(ext.FEATURE_NAMES)))
        if self.bitmaps is not None:
            result.append((ext.EXT_BITMAPS, self.bitmaps.pack()))
        result.extend(self.unknown_extensions)
        return result

    def _pack_fields(self, backing_file_size: int) -> bytes:
        fields = _V2.pack(
            c.MAGIC,
            self.version,
            self.backing_file_offset,
            backing_file_size,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version == 2:
            return fields
        return (
            fields
            + _V3.pack(
                self.incompatible_features,
                self.compatible_features,
                self.autoclear_features,
                self.refcount_order,
                self.header_length,
                self.compression_type,
            )
            + self.unknown_fields
        )
