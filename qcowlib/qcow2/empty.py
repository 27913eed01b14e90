# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Emptying an overlay whose content is in its backing file too.

Invariant: the mappings go in the order of every commit, so that a cut leaves
each table as it was or gone (I4, I5); as both show the same bytes, neither is
a loss.  Snapshots keep what they refer to.
"""

from __future__ import annotations

from qcowlib.errors import UsageError
from qcowlib.native import RunList
from qcowlib.qcow2.resize import cut_tail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.qcow2.write import Writer

__all__ = ["empty"]


async def empty(writer: Writer) -> None:
    """Drop every mapping of the image and shorten its file.

    Raises: UsageError without a backing file: that would lose the content; StorageError.
    """
    image = writer.image
    if image.header.backing_file is None:
        raise UsageError("Image does not have a backing file", path=image.storage.name)
    await image.start_writing()
    await writer.quiesce()
    try:
        await image.changing.commit()
        gone = RunList()
        try:
            await writer.unmap_behind(0, gone)
        finally:
            image.changing.freed.extend(gone)
        # The second commit writes the counts of what the first one released.
        await image.changing.commit()
        await image.changing.commit()
        if not image.header.has_data_file:
            await cut_tail(writer)
            # Most went with the end of the file: no need to punch that as well.
            await image.changing.punch_free(gone)
    finally:
        writer.resume()
