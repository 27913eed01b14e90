# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Header extensions: a list of (type, length, data padded to 8 bytes).

Invariant: data of a type we do not know survives a rewrite byte for byte, and
no length of the image is trusted beyond the end of the extension area.

=========== ======================= ==========================================
type        name                    data
=========== ======================= ==========================================
0x00000000  END                     none
0xE2792ACA  backing format          ASCII, at most 15 bytes
0x6803F857  feature name table      n x (u8 kind, u8 bit, 46 bytes of name)
0x23852875  bitmaps                 u32 count, u32 0, u64 size, u64 offset
0x0537BE77  encryption header       u64 offset, u64 length
0x44415441  external data file      name, no terminator
=========== ======================= ==========================================
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from qcowlib.errors import FormatError, printable
from qcowlib.ondisk.constants import MAX_BACKING_FORMAT, MAX_BITMAP_DIRECTORY, MAX_BITMAPS
from qcowlib.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NamedTuple
else:
    from qcowlib.records import NamedTuple


__all__ = [
    "EXT_BACKING_FORMAT",
    "EXT_BITMAPS",
    "EXT_CRYPTO",
    "EXT_DATA_FILE",
    "EXT_END",
    "EXT_FEATURE_NAMES",
    "FEATURE_NAMES",
    "BitmapsExtension",
    "CryptoPointer",
    "Extension",
    "FeatureName",
    "describe_features",
    "pack_extension",
    "pack_feature_names",
    "parse_backing_format",
    "parse_bitmaps",
    "parse_crypto",
    "parse_feature_names",
    "walk_extensions",
]

EXT_END: Final = 0x0000_0000
EXT_BACKING_FORMAT: Final = 0xE279_2ACA
EXT_FEATURE_NAMES: Final = 0x6803_F857
EXT_BITMAPS: Final = 0x2385_2875
EXT_CRYPTO: Final = 0x0537_BE77
EXT_DATA_FILE: Final = 0x4441_5441

_HEAD = Struct(">II")
_BITMAPS = Struct(">IIQQ")
_CRYPTO = Struct(">QQ")
_FEATURE = Struct(">BB46s")


class Extension(NamedTuple):
    """One extension as it stands in the header."""

    type: int
    data: bytes


class FeatureName(NamedTuple):
    """Name of a feature bit; ``kind`` 0 incompatible, 1 compatible, 2 autoclear."""

    kind: int
    bit: int
    name: bytes


class BitmapsExtension(NamedTuple):
    """Where the bitmap directory lies; sizes and offset in bytes."""

    nb_bitmaps: int
    directory_size: int
    directory_offset: int

    def pack(self) -> bytes:
        """Return the 24 bytes of extension data."""
        return _BITMAPS.pack(self.nb_bitmaps, 0, self.directory_size, self.directory_offset)


class CryptoPointer(NamedTuple):
    """Where the encryption header lies; bytes."""

    offset: int
    length: int

    def pack(self) -> bytes:
        """Return the 16 bytes of extension data."""
        return _CRYPTO.pack(self.offset, self.length)


# What QEMU 7.2 writes, in its order: names are part of the byte-identical header.
FEATURE_NAMES: Final = (
    FeatureName(0, 0, b"dirty bit"),
    FeatureName(0, 1, b"corrupt bit"),
    FeatureName(0, 2, b"external data file"),
    FeatureName(0, 3, b"compression type"),
    FeatureName(0, 4, b"extended L2 entries"),
    FeatureName(1, 0, b"lazy refcounts"),
    FeatureName(2, 0, b"bitmaps"),
    FeatureName(2, 1, b"raw external data"),
)


def pack_extension(kind: int, data: bytes) -> bytes:
    """Return head, *data* and padding."""
    return _HEAD.pack(kind, len(data)) + data.ljust(round_up(len(data), 8), b"\0")


def walk_extensions(data: bytes, start: int, end: int, *, path: str | None) -> Iterator[tuple[int, int, int]]:
    """Yield ``(type, data offset, data length)`` up to and including END.

    Bytes of the area that *data* does not hold read as zeros, as a file's end does.
    Raises: FormatError where an extension leaves the area.
    """
    while start < end:
        kind, length = _HEAD.unpack(data[start : start + 8].ljust(8, b"\0"))
        start += 8
        if start > end or length > end - start:
            raise FormatError("Header extension too large", path=path)
        yield kind, start, length
        if kind == EXT_END:
            return
        start += round_up(length, 8)


def parse_backing_format(data: bytes, *, path: str | None) -> bytes:
    """Return the name; Raises: FormatError over 15 bytes."""
    if len(data) > MAX_BACKING_FORMAT:
        limit = MAX_BACKING_FORMAT + 1
        raise FormatError(f"ERROR: ext_backing_format: len={len(data)} too large (>={limit})", path=path)
    return data.partition(b"\0")[0]


def parse_feature_names(data: bytes) -> tuple[FeatureName, ...]:
    """Return the entries; the last may be cut short (source: qemu reads zeros behind the table)."""
    whole = data + bytes(-len(data) % _FEATURE.size)
    return tuple(FeatureName(kind, bit, name.partition(b"\0")[0]) for kind, bit, name in _FEATURE.iter_unpack(whole))


def pack_feature_names(names: tuple[FeatureName, ...]) -> bytes:
    """Return 48 bytes for each name."""
    return b"".join(_FEATURE.pack(*name) for name in names)


def parse_bitmaps(data: bytes, cluster_size: int, *, path: str | None) -> BitmapsExtension:
    """Return the pointer; Raises: FormatError outside the limits."""
    count, reserved, size, offset = _BITMAPS.unpack(data)
    if reserved:
        message = "bitmaps_ext: Reserved field is not zero"
    elif count > MAX_BITMAPS:
        message = f"bitmaps_ext: image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
    elif count == 0:
        message = "found bitmaps extension with zero bitmaps"
    elif offset % cluster_size:
        message = "bitmaps_ext: invalid bitmap directory offset"
    elif size > MAX_BITMAP_DIRECTORY:
        message = (
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({MAX_BITMAP_DIRECTORY})"
        )
    else:
        return BitmapsExtension(count, size, offset)
    raise FormatError(message, path=path)


def parse_crypto(data: bytes, cluster_size: int, *, path: str | None) -> CryptoPointer:
    """Return the pointer; Raises: FormatError for a wrong length or an unaligned offset."""
    if len(data) != _CRYPTO.size:
        raise FormatError(f"CRYPTO header extension size {len(data)}, but expected size {_CRYPTO.size}", path=path)
    pointer = CryptoPointer(*_CRYPTO.unpack(data))
    if pointer.offset % cluster_size:
        raise FormatError(
            f"Encryption header offset '{pointer.offset}' is not a multiple of cluster size '{cluster_size}'", path=path
        )
    return pointer


def describe_features(mask: int, names: tuple[FeatureName, ...]) -> str:
    """Return the unknown incompatible bits of *mask* by name, the nameless ones in hex."""
    found = []
    for entry in names:
        if not entry.name:
            break
        if entry.kind == 0 and entry.bit < 64 and mask >> entry.bit & 1:
            found.append(printable(entry.name))
            mask &= ~(1 << entry.bit)
    if mask:
        found.append(f"Unknown incompatible feature: {mask:x}")
    return ", ".join(found)
