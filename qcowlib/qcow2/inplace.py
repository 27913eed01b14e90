# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Checking and repairing an image that is open.

Invariant: check and repair see storage only after everything changed so far is
on it, and nobody writes meanwhile; after a repair the engine forgets what it
had in memory and starts again from storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qcowlib.qcow2.check import Report, check
from qcowlib.qcow2.repair import repair

if TYPE_CHECKING:
    from qcowlib.qcow2.image import Qcow2Image
    from qcowlib.qcow2.write import Writer

__all__ = ["check_open"]


async def check_open(image: Qcow2Image, writer: Writer, level: Literal["leaks", "all"] | None) -> Report:
    """Check *image*, or repair it to *level*; *writer* is the one that writes to it."""
    if image.writeback is None and level is None:
        return await image.runtime.io(check, image.storage)
    await writer.quiesce()
    try:
        if image.writeback is not None:
            # The second commit writes the counts of what the first one released.
            await image.writeback.commit(final=True)
            await image.writeback.commit(final=True)
        if level is None:
            return await image.runtime.io(check, image.storage)
        try:
            return await image.runtime.io(repair, image.storage, level)
        finally:
            await image.runtime.io(image.reload)
    finally:
        writer.resume()
