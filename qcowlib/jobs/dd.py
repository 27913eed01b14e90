# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Copying a range of an image into a new one, as ``qemu-img dd``.

Invariant: as for :mod:`.convert`, whose machinery this is.  *count* is counted
from the start of the input, not from the skip point (so does qemu-img 7.2).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from qcowlib.errors import UsageError
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.convert import DEFAULT_SPARSE, Job, into_new
from qcowlib.jobs.creation import Format
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control
from qcowlib.jobs.plan import Source

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.opening import Secrets
    from qcowlib.opening import Source as OpenSource
    from qcowlib.storage.base import Storage

__all__ = ["dd"]


def dd(
    source: OpenSource | Image,
    target: str | bytes | os.PathLike[str] | Storage,
    *,
    format: Format = "raw",
    source_format: str | None = None,
    block_size: int = 512,
    count: int | None = None,
    skip: int = 0,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: Secrets | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    **options: object,
) -> int:
    """Copy blocks *skip* to *count* (both from the start of the input) of *source* into a new image.

    *options* are :class:`~qcowlib.jobs.creation.NewOptions`.  Returns the size
    of the new image, 0 where *skip* lies behind what is to be copied.
    Raises: UsageError; any error of opening; StorageError; Cancelled.
    """
    if block_size < 1 or skip < 0 or (count is not None and count < 0):
        raise UsageError("block size must be positive, count and skip not negative")
    control = Control(progress=progress, cancel=cancel, workers=workers, memory=memory)
    with ExitStack() as stack:
        image = source if isinstance(source, Image) else open_image(
            source, format=source_format, references=references, force_share=force_share, secret=secret
        )  # fmt: skip
        if image is not source:
            stack.callback(image.close)
        end = image.size if count is None else min(image.size, count * block_size)
        start = min(skip * block_size, end)
        job = Job([Source(image, 0, start, end - start)], DEFAULT_SPARSE, False, "fast", False, 0, False, None, control)
        into_new(job, target, format, None, None, cache, references, options)
        return end - start
