# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The only door to the compiled modules.

Invariant: no other module of ours imports ``qcowlib._*``; so the import
contract sees one edge, and what the engine needs of the core is this list.
"""

from __future__ import annotations

from qcowlib._build import add_refcount, convert_refcounts, count_refcounts, fill_entries
from qcowlib._chain import ChainMap
from qcowlib._cluster import (
    BAD_COMPRESSED_DATA_FILE,
    BAD_DATA_FILE_OFFSET,
    BAD_DATA_OFFSET,
    BAD_L2_OFFSET,
    BAD_SUBCLUSTERS,
    BAD_ZERO_V2,
    ClusterMap,
    l2_clear_copied,
    l2_references,
)
from qcowlib._codec import compress_zstd as codec_compress_zstd
from qcowlib._codec import decompress as codec_decompress
from qcowlib._codec import decompress_many as codec_decompress_many
from qcowlib._codec import load as codec_load
from qcowlib._codec import zstd_version as codec_zstd_version
from qcowlib._crypt import SectorCipher, expand_tweaks, sector_numbers, xor_into
from qcowlib._crypt import load as crypt_load
from qcowlib._deflate import Deflater
from qcowlib._extent import MapText, RunList
from qcowlib._io import LayerFds
from qcowlib._refcount import Refcounts
from qcowlib._references import (
    EVENT_BITMAP,
    EVENT_COPIED,
    EVENT_PAST_END,
    EVENT_PREALLOCATED_UNALIGNED,
    EVENT_RESERVED,
    EVENT_TABLE,
    EVENT_TABLE_UNALIGNED,
    ReferenceCounts,
    TableSet,
)
from qcowlib._relocate import (
    BLOCK_CLUSTER,
    DATA_CLUSTER,
    FIXED,
    FREE,
    LINKED,
    PACKED,
    TABLE_CLUSTER,
    add_count,
    add_counts,
    assign,
    clear_counts,
    copy_counts,
    mark_table,
    moves,
    repoint,
    repoint_packed,
    spanning,
    spread,
)
from qcowlib._runs import data_clusters
from qcowlib._scan import (
    bitmap_count,
    bitmap_merge,
    bitmap_runs,
    bitmap_set,
    first_difference,
    is_zero,
    zero_runs,
)
from qcowlib._survey import (
    MARK_ACTIVE,
    MARK_OTHER,
    MARK_REFCOUNT,
    MARK_SNAPSHOT,
    MARK_TABLE,
    Owners,
    Tally,
)

__all__ = [
    "BAD_COMPRESSED_DATA_FILE",
    "BAD_DATA_FILE_OFFSET",
    "BAD_DATA_OFFSET",
    "BAD_L2_OFFSET",
    "BAD_SUBCLUSTERS",
    "BAD_ZERO_V2",
    "BLOCK_CLUSTER",
    "DATA_CLUSTER",
    "EVENT_BITMAP",
    "EVENT_COPIED",
    "EVENT_PAST_END",
    "EVENT_PREALLOCATED_UNALIGNED",
    "EVENT_RESERVED",
    "EVENT_TABLE",
    "EVENT_TABLE_UNALIGNED",
    "FIXED",
    "FREE",
    "LINKED",
    "MARK_ACTIVE",
    "MARK_OTHER",
    "MARK_REFCOUNT",
    "MARK_SNAPSHOT",
    "MARK_TABLE",
    "PACKED",
    "TABLE_CLUSTER",
    "ChainMap",
    "ClusterMap",
    "Deflater",
    "LayerFds",
    "MapText",
    "Owners",
    "Refcounts",
    "ReferenceCounts",
    "RunList",
    "SectorCipher",
    "TableSet",
    "Tally",
    "add_count",
    "add_counts",
    "add_refcount",
    "assign",
    "bitmap_count",
    "bitmap_merge",
    "bitmap_runs",
    "bitmap_set",
    "clear_counts",
    "codec_compress_zstd",
    "codec_decompress",
    "codec_decompress_many",
    "codec_load",
    "codec_zstd_version",
    "convert_refcounts",
    "copy_counts",
    "count_refcounts",
    "crypt_load",
    "data_clusters",
    "expand_tweaks",
    "fill_entries",
    "first_difference",
    "is_zero",
    "l2_clear_copied",
    "l2_references",
    "mark_table",
    "moves",
    "repoint",
    "repoint_packed",
    "sector_numbers",
    "spanning",
    "spread",
    "xor_into",
    "zero_runs",
]
