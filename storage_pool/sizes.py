# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""How big things are: volumes, their limits, alignments of leases.

Invariant: pure integer arithmetic, the same answers as VDSM's for every
input; sizes in bytes.  The rules are those of chunk 2560 MiB, overhead 1.1
and extents of 128 MiB.
"""

from __future__ import annotations

from typing import Final

from qcowlib.units import MiB, ceil_div, round_up

from .errors import IllegalSpec, IllegalSpecKind, InvalidName
from .metadata_volume import COW, PREALLOCATED, RAW

__all__ = [
    "ALIGNMENT_1M",
    "CHUNK",
    "EXTENT",
    "PAGE",
    "capacity_for",
    "copy_size",
    "file_initial_size",
    "lv_size",
    "max_size",
    "new_lv_size",
    "optimal_cow_size",
    "sanlock_alignment",
    "with_overhead",
]

EXTENT: Final = 128 * MiB
CHUNK: Final = 2560 * MiB
#: Capacities and initial sizes are multiples of this.
PAGE: Final = 4096
ALIGNMENT_1M: Final = MiB
MAX_CAPACITY: Final = 2**63 - EXTENT


def with_overhead(size: int) -> int:
    """Return 1.1 times *size*, cut to bytes as a binary floating point product is.

    The product must be the one that other hosts compute, which rounds to 53
    bits; integer arithmetic would differ by a byte here and there.
    """
    return int(size * 1.1)


def capacity_for(size: int) -> int:
    """Return the capacity of a volume asked to hold *size* bytes.

    Raises: IllegalSpec when it is not positive or beyond what fits a record.
    """
    if not 0 < size <= MAX_CAPACITY:
        raise IllegalSpec(f"a volume holds 1 to {MAX_CAPACITY} bytes, not {size}", kind=IllegalSpecKind.SIZE)
    return round_up(size, PAGE)


def max_size(capacity: int, fmt: str, *, block: bool) -> int:
    """Return the most bytes that a volume of *capacity* can need.

    A COW volume's limit is rounded up to an extent on block storage, to a
    MiB in files.
    """
    if fmt == RAW:
        return capacity
    return round_up(with_overhead(capacity), EXTENT if block else MiB)


def new_lv_size(capacity: int, fmt: str, kind: str, initial_size: int | None = None) -> int:
    """Return the bytes to allocate for a new logical volume, before rounding to extents.

    Raises: IllegalSpec for an initial size of a RAW volume or beyond the maximum.
    """
    if initial_size:
        if fmt == RAW:
            raise IllegalSpec("a RAW volume has no initial size", kind=IllegalSpecKind.SIZE)
        limit = max_size(capacity, fmt, block=True)
        if initial_size > limit:
            raise IllegalSpec(f"initial size {initial_size} exceeds the maximum {limit}", kind=IllegalSpecKind.SIZE)
    if kind == PREALLOCATED:
        return initial_size or capacity
    if initial_size:
        return with_overhead(initial_size)
    return min(CHUNK, capacity)


def lv_size(size: int) -> int:
    """Return the size of the logical volume that LVM makes when asked for *size*."""
    return round_up(max(size, 1), EXTENT)


def optimal_cow_size(used: int, capacity: int, *, leaf: bool) -> int:
    """Return the size to which a COW logical volume should be reduced.

    *used* is the end of the image in the volume.  A leaf keeps one chunk of
    free space.
    """
    wanted = round_up(used + (CHUNK if leaf else 0), EXTENT)
    return min(wanted, max_size(capacity, COW, block=True))


def copy_size(required: int, capacity: int, fmt: str, *, block: bool, leaf: bool, bitmaps: int = 0) -> int:
    """Return the initial size of the target of a copy that measures *required* bytes."""
    size = required + bitmaps
    if fmt == COW and block and leaf:
        size += CHUNK
    return min(size, max_size(capacity, fmt, block=block))


def file_initial_size(capacity: int, fmt: str, kind: str, initial_size: int | None) -> int | None:
    """Check the initial size of a volume in a file; return what remains of it.

    Raises: IllegalSpec.
    """
    if not initial_size:
        return None
    if fmt == RAW and kind == PREALLOCATED:
        if initial_size > capacity:
            raise IllegalSpec(f"initial size {initial_size} exceeds the capacity {capacity}", kind=IllegalSpecKind.SIZE)
        return None
    raise IllegalSpec(f"a {kind} {fmt} volume in a file has no initial size", kind=IllegalSpecKind.SIZE)


def sanlock_alignment(block_size: int, max_hosts: int) -> int:
    """Return bytes between lease areas.

    Raises: InvalidName for a block size or number of hosts that do not exist.
    """
    if block_size not in (512, 4096):
        raise InvalidName(f"the block size of a domain is 512 or 4096, not {block_size}")
    if not 1 <= max_hosts <= 2000:
        raise InvalidName(f"a domain is for 1 to 2000 hosts, not {max_hosts}")
    if block_size == 512:
        return ALIGNMENT_1M
    megabytes = 1
    while megabytes * 250 < max_hosts:
        megabytes *= 2
    return megabytes * MiB


def lvcreate_mib(size: int) -> int:
    """Return the whole MiB to ask lvcreate for."""
    return ceil_div(size, MiB)
