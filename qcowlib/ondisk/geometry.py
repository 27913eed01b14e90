# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic of L1, L2 and refcount structures, and compressed descriptors.

Invariant: total functions on valid geometries; exact integers, no floats.
"""

from __future__ import annotations

from qcowlib.ondisk.constants import COMPRESSED, MAX_L1_BYTES
from qcowlib.units import SECTOR, ceil_div

__all__ = [
    "l1_entries",
    "l1_index",
    "l2_index",
    "max_virtual_size",
    "pack_compressed",
    "refcount_structures",
    "refcounts_per_block",
    "unpack_compressed",
]


def _l1_shift(cluster_bits: int, extended_l2: bool) -> int:
    """Return log2 of the guest bytes behind one L1 entry."""
    return 2 * cluster_bits - (4 if extended_l2 else 3)


def l1_index(guest_offset: int, cluster_bits: int, extended_l2: bool = False) -> int:
    """Return the L1 entry that covers *guest_offset*."""
    return guest_offset >> _l1_shift(cluster_bits, extended_l2)


def l2_index(guest_offset: int, cluster_bits: int, extended_l2: bool = False) -> int:
    """Return the entry for *guest_offset* in its L2 table."""
    entry_bits = 4 if extended_l2 else 3
    return (guest_offset >> cluster_bits) & ((1 << (cluster_bits - entry_bits)) - 1)


def l1_entries(size: int, cluster_bits: int, extended_l2: bool = False) -> int:
    """Return how many L1 entries a virtual size of *size* bytes needs."""
    return ceil_div(size, 1 << _l1_shift(cluster_bits, extended_l2))


def max_virtual_size(cluster_bits: int, extended_l2: bool = False) -> int:
    """Return the largest virtual size an L1 table within the limits can map."""
    return (MAX_L1_BYTES // 8) << _l1_shift(cluster_bits, extended_l2)


def refcounts_per_block(cluster_bits: int, refcount_order: int) -> int:
    """Return how many clusters one refcount block describes."""
    return 1 << (cluster_bits + 3 - refcount_order)


def refcount_structures(clusters: int, cluster_bits: int, refcount_order: int) -> tuple[int, int]:
    """Return ``(blocks, table_clusters)`` that describe *clusters* and themselves.

    Both only grow from round to round and each round's growth is at most a
    fraction of the last one's, so the fixed point is reached in a few rounds;
    512-byte clusters with 64-bit entries are the slowest (64 per block).
    """
    per_block = refcounts_per_block(cluster_bits, refcount_order)
    per_table = 1 << (cluster_bits - 3)
    blocks = tables = 0
    while True:
        new_blocks = ceil_div(clusters + tables + blocks, per_block)
        new_tables = ceil_div(new_blocks, per_table)
        if (new_blocks, new_tables) == (blocks, tables):
            return blocks, tables
        blocks, tables = new_blocks, new_tables


def pack_compressed(host_offset: int, length: int, cluster_bits: int) -> int:
    """Return the L2 entry for *length* (at least 1) compressed bytes at *host_offset*."""
    shift = 70 - cluster_bits
    extra = ((host_offset + length - 1) // SECTOR) - host_offset // SECTOR
    return COMPRESSED | (extra << shift) | host_offset


def unpack_compressed(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return ``(host_offset, length)``; *length* ends at the last sector, not at the data's end."""
    shift = 70 - cluster_bits
    host_offset = entry & ((1 << min(shift, 56)) - 1)
    extra = (entry & (COMPRESSED - 1)) >> shift
    return host_offset, (extra + 1) * SECTOR - host_offset % SECTOR
