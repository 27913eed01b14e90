# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers of the format, and the limits within which images are accepted.

Invariant: masks equal those of ``_ondisk.pxd``; limits equal QEMU's, so that
no image QEMU writes is refused and none it refuses makes us allocate.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


MAGIC: Final = b"QFI\xfb"

# Incompatible features: an unknown bit means do not open.
INCOMPAT_DIRTY: Final = 1 << 0
INCOMPAT_CORRUPT: Final = 1 << 1
INCOMPAT_DATA_FILE: Final = 1 << 2
INCOMPAT_COMPRESSION: Final = 1 << 3
INCOMPAT_EXTENDED_L2: Final = 1 << 4
INCOMPAT_MASK: Final = 0x1F

# Compatible features: unknown bits are kept.
COMPAT_LAZY_REFCOUNTS: Final = 1 << 0

# Autoclear features: unknown bits are cleared before the first write.
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_RAW_DATA: Final = 1 << 1
AUTOCLEAR_MASK: Final = 0x3

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2

COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1

# Table entries.
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
REFCOUNT_TABLE_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
REFCOUNT_TABLE_RESERVED: Final = 0x1FF
COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1

SUBCLUSTERS: Final = 32

# Limits.
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_SNAPSHOTS: Final = 65_536
MAX_SNAPSHOT_TABLE: Final = 64 << 20
MAX_SNAPSHOT_EXTRA: Final = 1024
MAX_BITMAPS: Final = 65_535
MAX_BITMAP_DIRECTORY: Final = MAX_BITMAPS * 1024
MAX_BITMAP_TABLE: Final = 1 << 27
MAX_BITMAP_BYTES: Final = 512 << 20
MAX_BITMAP_NAME: Final = 1023
MIN_GRANULARITY_BITS: Final = 9
MAX_GRANULARITY_BITS: Final = 31
MAX_BACKING_NAME: Final = 1023
MAX_BACKING_FORMAT: Final = 15
INT64_MAX: Final = (1 << 63) - 1
