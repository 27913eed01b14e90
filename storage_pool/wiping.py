# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Overwriting and giving back the bytes of a volume, in steps that can be ended.

Invariant: the right to write is asked for before each step; what was
overwritten is durable on return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qcowlib.errors import StorageError
from qcowlib.units import GiB

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

    from .token import SpmToken

__all__ = ["give_back", "wipe"]

STEP: Final = GiB


def _ranges(start: int, end: int, step: int) -> list[tuple[int, int]]:
    return [(offset, min(step, end - offset)) for offset in range(start, end, step)]


def wipe(
    token: SpmToken,
    storage: Storage,
    start: int = 0,
    *,
    allocate: bool = False,
    step: int = STEP,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Make the bytes from *start* on read as zeros; an exception of *progress* or the token ends it between steps."""
    total = storage.size
    for offset, length in _ranges(start, total, step):
        token.check()
        storage.zero(offset, length, allocate=allocate)
        if progress is not None:
            progress(offset + length, total)
    storage.flush()


def give_back(token: SpmToken, storage: Storage, *, step: int = STEP) -> bool:
    """Discard all bytes; returns whether the device below took them.  What they hold then is undefined."""
    for offset, length in _ranges(0, storage.size, step):
        token.check()
        try:
            storage.discard(offset, length)
        except StorageError:
            # A device that cannot is no reason not to remove the volume.
            return False
    return True
