# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""New images: the options, their rules, and the bytes.

Invariant: I11, a new image has no magic until it is complete.  All tables are
on storage and flushed before the header cluster is written.  The bytes and
the length of the file are those that ``qemu-img create`` gives.

Not here: opening backing or data files, and making the encryption header
(:mod:`qcowlib.crypto`); the caller hands in its bytes.
"""

from __future__ import annotations

import errno

from qcowlib.errors import StorageError, UsageError, printable
from qcowlib.ondisk import (
    AUTOCLEAR_RAW_DATA,
    COMPAT_LAZY_REFCOUNTS,
    COMPRESSION_ZLIB,
    CRYPT_LUKS,
    CRYPT_NONE,
    INCOMPAT_COMPRESSION,
    INCOMPAT_DATA_FILE,
    INCOMPAT_EXTENDED_L2,
    MAX_BACKING_NAME,
    CryptoPointer,
    Header,
    max_virtual_size,
)
from qcowlib.ondisk.constants import INT64_MAX
from qcowlib.qcow2.layout import NewImage
from qcowlib.storage.base import Storage
from qcowlib.storage.space import reserve_space
from qcowlib.units import SECTOR, MiB, ceil_div, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Literal, NamedTuple

    Preallocation = Literal["off", "metadata", "falloc", "full"]
else:
    from qcowlib.records import NamedTuple


__all__ = [
    "QCOW2_OPTIONS",
    "RAW_OPTIONS",
    "CreateOptions",
    "Encryption",
    "Option",
    "create",
    "create_raw",
    "new_header",
]


_RAW_PROBE: Final = 4096
# QEMU looks at L2 tables in slices of this many bytes; it shows in what is allocated together.
_L2_SLICE: Final = 65536


class Option(NamedTuple):
    """One creation option as the command line knows it.

    ``type`` is ``str``, ``size``, ``num`` or ``bool``; ``default`` is what the
    ``Formatting`` line shows for an option not given, ``None`` if it shows nothing.
    """

    name: str
    type: str
    default: str | None
    help: str


_PROTOCOL_OPTIONS = (
    Option("extent_size_hint", "size", None, "Extent size hint for the image file, 0 to disable"),
    Option("nocow", "bool", None, "Turn off copy-on-write (valid only on btrfs)"),
)
_SIZE = Option("size", "size", None, "Virtual disk size")

# Sorted by name, as the help lists them.
QCOW2_OPTIONS: Final = (
    Option("backing_file", "str", None, "File name of a base image"),
    Option("backing_fmt", "str", None, "Image format of the base image"),
    Option("cluster_size", "size", "65536", "qcow2 cluster size"),
    Option("compat", "str", None, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Option("compression_type", "str", "zlib", "Compression method used for image cluster compression"),
    Option("data_file", "str", None, "File name of an external data file"),
    Option("data_file_raw", "bool", None, "The external data file must stay valid as a raw image"),
    Option("encrypt.cipher-alg", "str", None, "Name of encryption cipher algorithm"),
    Option("encrypt.cipher-mode", "str", None, "Name of encryption cipher mode"),
    Option("encrypt.format", "str", None, "Encrypt the image, format choices: 'aes', 'luks'"),
    Option("encrypt.hash-alg", "str", None, "Name of encryption hash algorithm"),
    Option("encrypt.iter-time", "num", None, "Time to spend in PBKDF in milliseconds"),
    Option("encrypt.ivgen-alg", "str", None, "Name of IV generator algorithm"),
    Option("encrypt.ivgen-hash-alg", "str", None, "Name of IV generator hash algorithm"),
    Option("encrypt.key-secret", "str", None, "ID of secret providing qcow AES key or LUKS passphrase"),
    Option(
        "encryption", "bool", None, "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"
    ),
    Option("extended_l2", "bool", "off", "Extended L2 tables"),
    _PROTOCOL_OPTIONS[0],
    Option("lazy_refcounts", "bool", "off", "Postpone refcount updates"),
    _PROTOCOL_OPTIONS[1],
    Option("preallocation", "str", None, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    Option("refcount_bits", "num", "16", "Width of a reference count entry in bits"),
    _SIZE,
)
RAW_OPTIONS: Final = (
    _PROTOCOL_OPTIONS[0],
    _PROTOCOL_OPTIONS[1],
    Option("preallocation", "str", None, "Preallocation mode (allowed values: off, falloc, full)"),
    _SIZE,
)


class Encryption(NamedTuple):
    """What an encrypted image stores about its keys.

    ``method`` is the header's crypt_method; ``header`` the encryption header,
    written in clusters of its own (empty for a method that has none).
    """

    method: int
    header: bytes = b""


class CreateOptions(NamedTuple):
    """What a new image is to be; sizes in bytes, names as bytes of the header.

    ``size`` is rounded up to 512.  ``data_file`` is the name to store; the
    storage behind it is handed to :func:`create`.
    """

    size: int
    version: int = 3
    cluster_size: int = 65536
    refcount_bits: int = 16
    extended_l2: bool = False
    lazy_refcounts: bool = False
    compression_type: int = COMPRESSION_ZLIB
    preallocation: Preallocation = "off"
    backing_file: bytes | None = None
    backing_format: bytes | None = None
    data_file: bytes | None = None
    data_file_raw: bool = False
    encrypt: Encryption | None = None

    def check(self) -> None:
        """Raises: UsageError for a combination QEMU refuses, in its words."""
        for message in self._refusals():
            raise UsageError(message)

    def _refusals(self) -> list[str]:
        old = self.version < 3
        need = "(use version=v3 or greater)"
        level = f"compatibility level 1.1 or above {need}"
        cluster, width = self.cluster_size, self.refcount_bits
        rules = (
            (self.extended_l2 and old, f"Extended L2 entries are only supported with {_and(level)}"),
            (
                cluster & (cluster - 1) or not SECTOR <= cluster <= 2 * MiB,
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                self.extended_l2 and cluster < 16384,
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ),
            (
                self.backing_file is not None and self.preallocation != "off" and not self.extended_l2,
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ),
            (
                self.backing_format is not None and self.backing_file is None,
                "Backing format cannot be used without backing file",
            ),
            (self.lazy_refcounts and old, f"Lazy refcounts only supported with {_and(level)}"),
            (
                width <= 0 or width > 64 or width & (width - 1),
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (old and width != 16, f"Different refcount widths than 16 bits require {level}"),
            (self.data_file_raw and self.data_file is None, "data-file-raw requires data-file"),
            (
                self.data_file_raw and self.backing_file is not None,
                "Backing file and data-file-raw cannot be used at the same time",
            ),
            (
                self.data_file is not None and old,
                f"External data files are only supported with {_and(level)}",
            ),
            (
                self.compression_type != COMPRESSION_ZLIB and old,
                f"Non-zlib compression type is only supported with {_and(level)}",
            ),
        )
        found = [message for broken, message in rules if broken]
        return found or self._size_refusals()

    def _size_refusals(self) -> list[str]:
        size = round_up(self.size, SECTOR)
        if size < 0 or size > INT64_MAX:
            return ["Could not resize image: Image size cannot be negative"]
        if size > max_virtual_size(self.cluster_size.bit_length() - 1, self.extended_l2):
            return ["The image size is too large for file format 'qcow2' (try using a larger cluster size)"]
        return []


def _and(level: str) -> str:
    return level.replace("1.1 or above", "1.1 and above")


def new_header(options: CreateOptions) -> Header:
    """Return the header for *options* without any place in it.

    Raises: UsageError for options QEMU refuses.
    """
    options.check()
    header = Header(
        version=options.version,
        cluster_bits=options.cluster_size.bit_length() - 1,
        size=round_up(options.size, SECTOR),
        refcount_order=options.refcount_bits.bit_length() - 1,
    )
    header.backing_file = options.backing_file
    header.backing_format = options.backing_format
    header.compression_type = options.compression_type
    if options.compression_type != COMPRESSION_ZLIB:
        header.incompatible_features |= INCOMPAT_COMPRESSION
    if options.extended_l2:
        header.incompatible_features |= INCOMPAT_EXTENDED_L2
    if options.data_file is not None:
        header.incompatible_features |= INCOMPAT_DATA_FILE
        header.data_file_name = options.data_file
    if options.data_file_raw:
        header.autoclear_features |= AUTOCLEAR_RAW_DATA
    if options.lazy_refcounts:
        header.compatible_features |= COMPAT_LAZY_REFCOUNTS
    header.crypt_method = options.encrypt.method if options.encrypt is not None else CRYPT_NONE
    _check_fits(header)
    return header


def _check_fits(header: Header) -> None:
    name = header.backing_file
    if name is None:
        header.pack()
        return
    what = f"Could not assign backing file '{printable(name)}'"
    if header.backing_format is not None:
        what += f" with format '{printable(header.backing_format)}'"
    if len(name) > MAX_BACKING_NAME:
        raise UsageError(f"{what}: Invalid argument")
    trial = header.copy()
    if header.crypt_method == CRYPT_LUKS:
        trial.crypto = CryptoPointer(0, 0)
    try:
        trial.pack()
    except UsageError:
        raise UsageError(f"{what}: No space left on device") from None


class _Creator(NewImage):
    """One run of :func:`create`."""

    def __init__(self, storage: Storage, options: CreateOptions, data: Storage | None) -> None:
        super().__init__(storage, new_header(options))
        self.options = options
        self.data = data

    def run(self) -> Header:
        header = self.header
        self.begin()
        mode = self.options.preallocation
        if header.data_file_raw and mode == "off":
            mode = "metadata"
        if self.data is not None:
            self._size_data_file(self.data, mode)
        if mode in ("falloc", "full") and self.data is None:
            self._preallocate_space()
        elif mode != "off":
            self._preallocate_metadata()
        if self.options.encrypt is not None and self.options.encrypt.header:
            self.write_encryption_header(self.options.encrypt.header)
        if self.data is not None:
            self.data.flush()
        return self.finish()

    def _size_data_file(self, data: Storage, mode: str) -> None:
        size = self.header.size
        if data.size < size:
            data.resize(size)
        if mode in ("falloc", "full") and size:
            reserve_space(data, 0, size, full=mode == "full")

    # -- preallocation -----------------------------------------------------------

    def _preallocate_metadata(self) -> None:
        """Allocate every L2 table and cluster, as a guest writing in order would."""
        header = self.header
        entries = header.l2_entries
        slice_entries = min(_L2_SLICE, header.cluster_size) // header.l2_entry_size
        left = ceil_div(header.size, header.cluster_size)
        host = 0
        for l1_index in range(header.l1_size):
            table = bytearray(header.cluster_size)
            l2_offset = self.new_l2(l1_index)
            count = min(left, entries)
            if self.data is not None:
                self.link(table, 0, count, l1_index * entries * header.cluster_size)
                host = 0
            else:
                host = self._fill_table(table, count, slice_entries)
            left -= count
            self.storage.write(l2_offset, [table])
        # The part of the last cluster that the disk does not reach is zeroed, in whole subclusters.
        reach = round_up(header.size, header.subcluster_size)
        if host:
            self.tail = (host << header.cluster_bits) - round_up(reach, header.cluster_size) + reach
        elif self.data is not None and self.data.size < reach:
            self.data.resize(reach)

    def _fill_table(self, table: bytearray, count: int, slice_entries: int) -> int:
        """Allocate *count* clusters for one L2 table; return one past the last of them."""
        placement = self.placement
        done, expected = 0, -1
        while done < count:
            # Slices that no new refcount block can interrupt are one step.
            want = min(count - done, slice_entries - done % slice_entries)
            if expected >= 0:
                room = placement.described_until(expected) - expected - want
                if room >= slice_entries:
                    want = min(count - done, want + room // slice_entries * slice_entries)
                got = placement.allocate_at(expected, want)
                start = expected
                expected = expected + got if got else -1
            else:
                start = placement.allocate(want)
                got = want
                expected = start + got
            self.link(table, done, got, start << self.header.cluster_bits)
            done += got
        return start + got

    def _preallocate_space(self) -> None:
        """Place all data in one run behind refcount structures that suffice for it, tables after."""
        header, placement, storage = self.header, self.placement, self.storage
        clusters = ceil_div(header.size, header.cluster_size)
        tables = ceil_div(clusters, header.l2_entries) + 1
        start = placement.grow_table(placement.end, clusters + tables, exact=True)
        placement.allocate_at(start, clusters)
        end = (start + clusters) << header.cluster_bits
        full = self.options.preallocation == "full"
        reserve_space(storage, start << header.cluster_bits, clusters << header.cluster_bits, full=full)
        self.tail = max(self.tail, end)
        for l1_index in range(header.l1_size):
            first = l1_index * header.l2_entries
            table = bytearray(header.cluster_size)
            count = min(clusters - first, header.l2_entries)
            self.link(table, 0, count, (start + first) << header.cluster_bits)
            storage.write(self.new_l2(l1_index), [table])


def create(storage: Storage, options: CreateOptions, *, data: Storage | None = None) -> Header:
    """Write a new image to *storage* and return its header; blocking.

    *data* is the storage of the external data file; it is needed exactly if
    ``options.data_file`` is given, and is made as long as the disk.
    Raises: UsageError, before anything is written; StorageError.
    Invariant: I11
    """
    if (data is not None) != (options.data_file is not None):
        raise UsageError("an external data file needs both a name and a storage")
    return _Creator(storage, options, data).run()


def create_raw(storage: Storage, size: int, *, preallocation: Preallocation = "off") -> None:
    """Make *storage* a raw image of *size* bytes, rounded up to 512.

    The first 4 KiB are written, so that the alignment of the storage can be probed.
    Raises: UsageError, StorageError.
    """
    if preallocation == "metadata":
        raise UsageError("Parameter 'preallocation' does not accept value 'metadata'")
    size = round_up(size, SECTOR)
    if size < 0 or size > INT64_MAX:
        raise UsageError("Image size cannot be negative")
    if storage.size > size:
        storage.resize(0)
    if storage.size != size:
        storage.resize(size)
    if storage.size < size:
        raise StorageError(errno.ENOSPC, path=storage.name, operation="resize")
    if preallocation != "off" and size:
        reserve_space(storage, 0, size, full=preallocation == "full")
    if size:
        storage.write(0, [bytes(min(size, _RAW_PROBE))])
    storage.flush()
