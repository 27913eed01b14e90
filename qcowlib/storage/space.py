# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Giving a range of a storage its space beforehand.

Invariant: the range reads as zeros afterwards.
"""

from __future__ import annotations

from qcowlib.units import MiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

__all__ = ["reserve_space"]

_PIECE = 4 * MiB


def reserve_space(storage: Storage, offset: int, length: int, *, full: bool) -> None:
    """Allocate the range, by the file system's own call or, if *full*, by writing every byte.

    Source: qemu's preallocation modes falloc and full; only bytes that were
    written cost nothing when they are written again.
    """
    if not full:
        storage.zero(offset, length, allocate=True)
        return
    zeros = memoryview(bytes(min(length, _PIECE)))
    end = offset + length
    while offset < end:
        count = min(end - offset, _PIECE)
        storage.write(offset, [zeros[:count]])
        offset += count
